"""A whole deployment on this machine: three servers, keys and state in a temporary directory.

For trying things out and for tests. Whoever controls all three servers can see everything.
"""

from __future__ import annotations

import os
import tempfile
import time
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpcserve.config import SERVER_ROLES, Config, load_config
from mpcserve.plan.plan import Output
from mpcserve.serving.client import Client
from mpcserve.serving.inputs import Array, OnRange
from mpcserve.serving.keys import ROLES, init_keys, issue
from mpcserve.serving.processes import Listen, ServerProcess, reserved_ports, stop_all

if TYPE_CHECKING:
    from mpcserve.compiler import CompiledModel

HOST = "127.0.0.1"
CONNECT_S = 30.0

_CONFIG = """\
servers: {{alice: "{host}:{alice}", bob: "{host}:{bob}", carol: localhost}}
pool: {{depth: {pool_depth}, max_bytes: {pool_bytes}}}
deadlines: {{connect: {connect}, round: {seconds}, request: {seconds}, drain: 10}}
limits: {{threads: {threads}}}
log_level: {log_level}
"""


class LocalCluster:
    """alice, bob and carol as three processes, and a client of theirs. A context manager.

    No process outlives this one, however it ends.
    """

    def __init__(
        self,
        *,
        pool_depth: int = 2,
        pool_bytes: str = "2 GB",
        network: str = "loopback",
        seconds: float = 600.0,
        log_level: str = "warning",
        ready_within: float = 180.0,
        listen: Listen = lambda role, line: None,
    ) -> None:
        """Start, and wait until all are ready. `seconds`: the deadline of whatever waits."""
        self._stack = ExitStack()
        self._arguments, self._listen = ("--network", network), listen
        self._ready_within = ready_within
        self._servers: dict[str, ServerProcess] = {}
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpcserve-")))
            _write_keys(directory / "keys")
            alice, bob = stack.enter_context(reserved_ports(2, HOST))
            path = directory / "mpcserve.yaml"
            path.write_text(
                _CONFIG.format(
                    host=HOST,
                    alice=alice,
                    bob=bob,
                    pool_depth=pool_depth,
                    pool_bytes=pool_bytes,
                    seconds=seconds,
                    connect=min(seconds, CONNECT_S),
                    threads=len(_cores_of("alice")),
                    log_level=log_level,
                )
            )
            self.config: Config = load_config(path)
            stack.callback(_stop, self._servers)
            self.start(*SERVER_ROLES)
            self.client = stack.enter_context(Client(self.config, network=network))
            self._stack = stack.pop_all()
        self._finalizer = weakref.finalize(self, self._stack.close)

    def deploy(
        self,
        model: CompiledModel | Path | str,
        *,
        name: str | None = None,
        replace: bool = False,
    ) -> str:
        """Share a model's weights; see `Client.deploy`."""
        return self.client.deploy(model, name=name, replace=replace)

    def infer(
        self,
        x: Array | Mapping[str, Array],
        *,
        model: str | None = None,
        on_range: OnRange = "error",
    ) -> Output | dict[str, Output]:
        """The model's output for `x`; see `Client.infer`."""
        return self.client.infer(x, model=model, on_range=on_range)

    def models(self) -> list[dict[str, Any]]:
        """What is deployed; see `Client.models`."""
        return self.client.models()

    def start(self, *roles: str) -> None:
        """Start these servers, and wait until they are ready."""
        deadline = time.monotonic() + self._ready_within
        assert self.config.path is not None
        for role in roles:
            self._servers[role] = ServerProcess(
                role, self.config.path, self._arguments, self._listen, _cores_of(role)
            )
        for role in roles:
            self._servers[role].await_ready(deadline)

    def stop(self, role: str) -> int:
        """Ask one server to drain and end; its exit status."""
        return stop_all([self._servers.pop(role)], self.config.deadlines.drain + 5)[0]

    def kill(self, role: str) -> None:
        """End one server as a crash would."""
        server = self._servers.pop(role)
        server.process.kill()
        server.stop(time.monotonic() + 5)

    def close(self) -> None:
        """Stop the servers, delete keys and state."""
        self._finalizer()

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def local_cluster(
    *, pool_depth: int = 2, network: str = "loopback", seconds: float = 600.0
) -> LocalCluster:
    """Three servers on this machine, ready for `deploy` and `infer`; close it, or use `with`.

    `network`: loopback, lan, wan or RTT_MS,MBIT. `seconds`: the deadline of whatever waits.
    """
    return LocalCluster(pool_depth=pool_depth, network=network, seconds=seconds)


def _write_keys(directory: Path) -> None:
    init_keys(directory)
    for role in ROLES:
        issue(directory, role, ("localhost", HOST))


def _cores_of(role: str) -> list[int]:
    """Half of the cores for alice and half for bob, as if each had a machine of its own.

    Left to itself the system now and then wakes one on the core where the other computes. None if
    there is but one, or where a process cannot be kept to some (macOS).
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    half = len(cores) // 2
    return {"alice": cores[:half], "bob": cores[half : 2 * half]}.get(role, [])


def _stop(servers: dict[str, ServerProcess]) -> None:
    stop_all(list(servers.values()), 15.0)
    servers.clear()
