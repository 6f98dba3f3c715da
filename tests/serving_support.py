"""Small plans and fakes for the tests of the servers."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.artifact import CompiledModel
from mpcserve.config import Address, Config, Deadlines, Limits, Pool, Servers
from mpcserve.plan import InputSpec, Instruction, OutputSpec, Plan, Value, verify_plan
from mpcserve.serving.client import Client
from mpcserve.serving.links import Wiring
from mpcserve.serving.party import SERVERS
from mpcserve.serving.server import Server

FRAC = 8


def dense_relu_plan(name: str = "dense", batch: int = 2, features: int = 6, units: int = 4) -> Plan:
    """relu(x @ w): one product, one sign, one select that is not opened. 3 rounds."""
    wide = 40

    def step(
        id: int, op: str, inputs: tuple[int, ...], value: Value, **attrs: object
    ) -> Instruction:
        return Instruction(id, op, inputs, value, MappingProxyType(attrs), "dense")

    x = Value((batch, features), wide, FRAC, FRAC + 4)
    w = Value((features, units), wide, FRAC, FRAC + 2)
    z = Value((batch, units), 20, FRAC, FRAC + 8)
    plan = Plan(
        name=name,
        instructions=(
            step(0, "input", (), x, name="x"),
            step(1, "weight", (), w, name="w"),
            step(2, "matmul", (0, 1), z, ring=wide, truncate=FRAC),
            step(3, "sign", (2,), Value((batch, units), 1, 0, 0), chunks=[5, 5, 5, 4], groups=[4]),
            step(
                4,
                "select",
                (3, 2),
                Value((batch, units), 24, FRAC, FRAC + 8),
                when=0,
                nonnegative=True,
                widths=[20],
            ),
        ),
        inputs=(InputSpec("x", 0, "float32", (batch, features), -8.0, 8.0, "proved"),),
        outputs=(OutputSpec("y", 4, "float32", (batch, units)),),
        batch=batch,
    )
    verify_plan(plan)
    return plan


def dense_weights(plan: Plan, seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """Encoded weights within the plan's bound."""
    shape = plan.value(plan.weights["w"]).shape
    return {"w": np.random.default_rng(seed).integers(-256, 256, shape, dtype=np.int64)}


def dense_relu(
    x: NDArray[np.floating], weights: dict[str, NDArray[np.int64]]
) -> NDArray[np.floating]:
    """What the plan computes, in float."""
    return np.maximum(x.astype(np.float64) @ (weights["w"] / 2.0**FRAC), 0)


class Trio:
    """alice, bob and carol in this process, over plain TCP on free loopback ports."""

    def __init__(
        self,
        state: Path,
        *,
        depth: int = 1,
        max_bytes: int = 1 << 30,
        queue: int = 2,
        **deadlines: float,
    ) -> None:
        seconds = {"connect": 20.0, "handshake": 10.0, "round": 20.0, "request": 40.0}
        self.config = Config(
            Servers(Address("127.0.0.1", 0), Address("127.0.0.1", 0)),
            state=state,
            keys=state / "no-keys",
            pool=Pool(depth, max_bytes),
            deadlines=Deadlines(**{**seconds, **deadlines}),
            limits=Limits(requests=2, queue=queue),
        )
        self.servers: dict[str, Server] = {}
        self._clients: list[Client] = []
        for role in SERVERS:
            self.start(role)
        self.wait_up()

    def start(self, role: str) -> None:
        """Start one server; its port is the one it had before."""
        server = SERVERS[role](Wiring(self.config, role, insecure_plaintext=True))
        server.start()
        self.servers[role] = server
        if server.listener is not None:
            address = Address("127.0.0.1", int(server.listener.address.rpartition(":")[2]))
            servers = replace(self.config.servers, **{role: address})
            self.config = replace(self.config, servers=servers)

    def wait_up(self) -> None:
        """Wait until everyone is connected to everyone."""
        for server in self.servers.values():
            assert server.links.wait_up(threading.Event())

    def client(self) -> Client:
        """A new client, closed with the trio."""
        self._clients.append(Client(self.config, plaintext=True))
        return self._clients[-1]

    def sever(self, role: str) -> None:
        """Break every connection of a server without a goodbye; it makes no new ones.

        What it has said before, it has said: its writers may still be at it.
        """
        server = self.servers[role]
        server._stopping = True
        server.links._closed.set()
        links = [*server.links._links.values(), *(server.listener.links if server.listener else ())]
        for link in links:
            end = time.monotonic() + 1
            while link.sender._more or link.sender._rest or link.sender._turn.locked():
                if time.monotonic() > end:
                    break
                time.sleep(0.001)
            with contextlib.suppress(OSError):
                link._made_of.sock.shutdown(socket.SHUT_RDWR)

    def crash(self, role: str) -> None:
        """Sever a server and end it."""
        self.sever(role)
        self.servers.pop(role).close()

    def restart(self, role: str) -> None:
        """End a severed server and start it again on its address."""
        self.crash(role)
        self.start(role)
        self.wait_up()

    def close(self) -> None:
        """End all."""
        for client in self._clients:
            client.close()
        for server in self.servers.values():
            server.close()


def as_model(plan: Plan, weights: dict[str, NDArray[np.int64]]) -> CompiledModel:
    """What the compiler would have returned."""
    return CompiledModel(plan, weights)


def some_rows(plan: Plan, rows: int, seed: int = 0) -> NDArray[np.float32]:
    """Inputs within the plan's range, which its fixed point holds exactly."""
    shape = (rows, *plan.inputs[0].shape[1:])
    ulps = np.random.default_rng(seed).integers(-8 << FRAC, 8 << FRAC, shape, endpoint=True)
    return (ulps / 2.0**FRAC).astype(np.float32)


def until(happens: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.002)
