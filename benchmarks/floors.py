"""The two floors of a row: ring multiply-adds at the kernel's speed, bytes at the wire's speed.

Both speeds are measured in the same run, on one core. A server cannot be faster than the slower of
the two, and without any overlap it needs their sum.
"""

from __future__ import annotations

import socket
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.kernels import median_seconds
from mpcserve.kernels import linear, linear_weights
from mpcserve.plan import Plan, bill_of
from mpcserve.plan.estimate import multiply_adds
from mpcserve.plan.ops import PRODUCTS
from mpcserve.serving.keys import init_keys, issue

SIZE = 1024
WIRE_BYTES = 256 << 20
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of one core: multiply-adds per second by word size, and TLS bytes per second one way."""

    products: dict[int, float]
    wire: float


@dataclass(frozen=True, slots=True)
class Work:
    """What one server does online: multiply-adds by word size, comparisons, bytes it sends."""

    products: dict[int, int]
    comparisons: int
    sent: int

    def seconds(self, speeds: Speeds) -> dict[str, float]:
        """The floors of a server on one core."""
        products = sum(count / speeds.products[word] for word, count in self.products.items())
        return {"products": products, "wire": self.sent / speeds.wire}


def work_of(plan: Plan) -> Work:
    """One ring product per linear layer; a comparison per element of every sign."""
    products = {32: 0, 64: 0}
    comparisons = 0
    for i in plan.instructions:
        if i.id in plan.static:
            continue
        if i.op in PRODUCTS:
            products[32 if i.attrs["ring"] <= 32 else 64] += multiply_adds(plan, i)
        comparisons += i.value.size if i.op in ("sign", "rectify") else 0
    return Work(products, comparisons, bill_of(plan).bytes["alice->bob"])


def measure_speeds(runs: int) -> Speeds:
    """Medians of this machine, now."""
    return Speeds({bits: _product_speed(bits, runs) for bits in (32, 64)}, _wire_speed(runs))


def _product_speed(bits: int, runs: int) -> float:
    """A square product of a packed weight."""
    word = np.uint32 if bits == 32 else np.uint64
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 2**bits, (SIZE, SIZE), word) for _ in range(2))
    packed = linear_weights.pack_matmul_b(b)
    return SIZE**3 / median_seconds(lambda: linear.matmul(a, packed), runs)


def _wire_speed(runs: int) -> float:
    """TLS 1.3 over loopback TCP, one way, with the project's own certificates."""
    with TemporaryDirectory(prefix="mpcserve-floor-") as name:
        keys = Path(name)
        init_keys(keys)
        for role in ("alice", "bob"):
            issue(keys, role, ("localhost", "127.0.0.1"))
        return WIRE_BYTES / median_seconds(lambda: _send_once(keys), runs)


def _send_once(keys: Path) -> None:
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(keys / "ca.crt"))
    server.load_cert_chain(keys / "alice.crt", keys / "alice.key")
    client = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = threading.Thread(target=_send, args=(listener.getsockname(), client))
        sender.start()
        raw, _ = listener.accept()
        with server.wrap_socket(raw, server_side=True) as stream:
            buffer, left = bytearray(CHUNK), WIRE_BYTES
            while left:
                came = stream.recv_into(buffer, min(left, CHUNK))
                assert came, "the sender ended early"
                left -= came
            stream.sendall(b"!")
        sender.join()


def _send(address: tuple[str, int], context: ssl.SSLContext) -> None:
    with (
        socket.create_connection(address) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as stream,
    ):
        block = bytes(CHUNK)
        for _ in range(WIRE_BYTES // CHUNK):
            stream.sendall(block)
        stream.recv(1)
