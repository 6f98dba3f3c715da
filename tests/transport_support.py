"""Certificates, pairs of links, a relay that counts, and a peer made of a bare socket."""

from __future__ import annotations

import contextlib
import json
import math
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mpcserve.transport import (
    Channel,
    Hooks,
    Link,
    LinkOptions,
    Listener,
    MemoryNetwork,
    TlsFiles,
    connect,
)

WAIT = 10.0  # seconds that nothing in these tests should take
HELLO, CONTROL, DATA, ERROR, PING, PONG, CREDIT, GOODBYE = range(1, 9)
_UNSET = "?"


class Authority:
    """A CA that issues certificates, lawful or not."""

    def __init__(self, directory: Path, name: str = "test CA") -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self._now = datetime.now(timezone.utc)
        self._count = 0
        certificate = (
            self._builder(self._name, self._key.public_key(), timedelta(days=-1), timedelta(days=9))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.ca = directory / "ca.pem"
        self.ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        common: str,
        *,
        uri: str | None = _UNSET,
        starts: timedelta = timedelta(days=-1),
        ends: timedelta = timedelta(days=9),
        password: bytes | None = None,
    ) -> TlsFiles:
        """Files for a party; `uri` is the role in the URI, the common name if not given."""
        key = ec.generate_private_key(ec.SECP256R1())
        uri = common if uri == _UNSET else uri
        names: list[x509.GeneralName] = [x509.DNSName("localhost")]
        if uri is not None:
            names.append(x509.UniformResourceIdentifier(f"mpcserve:role:{uri}"))
        certificate = (
            self._builder(_name(common), key.public_key(), starts, ends)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self._count += 1
        stem = f"{common or 'nameless'}-{self._count}"
        cert_path, key_path = (self.directory / f"{stem}.{end}" for end in ("pem", "key"))
        cert_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        protection: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if password is not None:
            protection = serialization.BestAvailableEncryption(password)
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection
            )
        )
        return TlsFiles(self.ca, cert_path, key_path)

    def _builder(
        self, name: x509.Name, key: ec.EllipticCurvePublicKey, starts: timedelta, ends: timedelta
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now + starts)
            .not_valid_after(self._now + ends)
        )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)] if common else [])


@dataclass
class Log:
    """What callbacks were told, to wait for."""

    errors: queue.Queue[Exception] = field(default_factory=queue.Queue)
    links: queue.Queue[Link] = field(default_factory=queue.Queue)
    closed: queue.Queue[Exception] = field(default_factory=queue.Queue)
    channels: queue.Queue[Channel] = field(default_factory=queue.Queue)

    def error(self) -> Exception:
        return self.errors.get(timeout=WAIT)

    def link(self) -> Link:
        return self.links.get(timeout=WAIT)


Serve = Callable[[Channel], None]


def quickest(seconds: Callable[[], float], enough: float) -> float:
    """The least of several measurements, of as many as it takes: the machine may be busy."""
    best = math.inf
    for _ in range(10):
        best = min(best, seconds())
        if best < enough:
            break
    return best


class Network:
    """Makes pairs of links, (alice's end, bob's end), of one kind, and closes them."""

    def __init__(self, kind: str, files: dict[str, TlsFiles]) -> None:
        self.kind = kind
        self.files = files
        self.log = Log()
        self._stack = contextlib.ExitStack()

    def pair(
        self,
        *,
        alice: Serve | None = None,
        bob: Serve | None = None,
        options: LinkOptions | None = None,
        bob_options: LinkOptions | None = None,
        through: Callable[[str], str] = str,
        attends: Callable[[Mapping[str, object]], float] = lambda message: 0.0,
    ) -> tuple[Link, Link]:
        """alice listens, bob connects; `alice` and `bob` serve the streams the other opens.

        `attends`: of alice's link.
        """
        options = options or LinkOptions()
        if self.kind == "memory":
            network = self._stack.enter_context(MemoryNetwork(options=options))
            at_bob, at_alice = network.pair(
                "bob",
                "alice",
                hooks_one=Hooks(bob, self.log.errors.put, self._closed),
                hooks_other=Hooks(alice, self.log.errors.put, self._closed, attends),
            )
            return at_alice, at_bob
        plain = self.kind == "plain"
        listener = self._stack.enter_context(
            Listener(
                "127.0.0.1:0",
                None if plain else self.files["alice"],
                self.log.links.put,
                role="alice",
                on_stream=alice,
                on_error=self.log.errors.put,
                on_closed=self._closed,
                attends=attends,
                insecure_plaintext=plain,
                options=options,
            )
        )
        at_bob = self._stack.enter_context(
            connect(
                through(listener.address),
                None if plain else self.files["bob"],
                "alice",
                WAIT,
                role="bob",
                on_stream=bob,
                on_error=self.log.errors.put,
                on_closed=self._closed,
                insecure_plaintext=plain,
                options=bob_options or options,
            )
        )
        return self.log.link(), at_bob

    def _closed(self, link: Link, reason: Exception) -> None:
        self.log.closed.put(reason)

    def close(self) -> None:
        self._stack.close()


class Relay:
    """Forwards one TCP connection and counts: what the wire really carried."""

    def __init__(self) -> None:
        self.to_server = 0
        self.to_client = 0
        self._socks: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __call__(self, address: str) -> str:
        """Listen in front of `address`."""
        host, port = address.rsplit(":", 1)
        listener = socket.create_server(("127.0.0.1", 0))
        self._socks.append(listener)
        self._start(self._accept, listener, (host, int(port)))
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def _accept(self, listener: socket.socket, target: tuple[str, int]) -> None:
        client, _ = listener.accept()
        server = socket.create_connection(target)
        self._socks += [client, server]
        self._start(self._pump, client, server, "to_server")
        self._start(self._pump, server, client, "to_client")

    def _pump(self, source: socket.socket, sink: socket.socket, counter: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                setattr(self, counter, getattr(self, counter) + len(data))
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        self._threads.append(thread)

    def finish(self) -> None:
        """Wait until both directions have ended."""
        for thread in self._threads:
            thread.join(WAIT)
        for sock in self._socks:
            sock.close()


class BarePeer:
    """bob, as a socket that speaks plain frames and no more than it is told to."""

    def __init__(self, address: str, window: int = 1 << 30) -> None:
        host, port = address.rsplit(":", 1)
        self.sock = socket.create_connection((host, int(port)), timeout=WAIT)
        self.window = window

    def hello(self, **changes: object) -> BarePeer:
        """Introduce ourselves and take alice's HELLO."""
        greeting = {"protocol": 1, "role": "bob", "window": self.window} | changes
        self.send(HELLO, json.dumps(greeting).encode(), bytes(16))
        assert self.frame()[0] == HELLO
        return self

    def __enter__(self) -> BarePeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, kind: int, payload: bytes, stream: bytes) -> None:
        self.sock.sendall(struct.pack(">BBHI", 1, kind, 0, len(payload)) + stream + payload)

    def frame(self) -> tuple[int, bytes, bytes]:
        """The next frame: kind, stream, payload. Raises: EOFError."""
        header = self._exactly(24)
        _, kind, _, length = struct.unpack(">BBHI", header[:8])
        return kind, header[8:], self._exactly(length)

    def frame_of(self, kind: int) -> tuple[bytes, bytes]:
        """The next frame of a kind: stream, payload."""
        while True:
            got, stream, payload = self.frame()
            if got == kind:
                return stream, payload

    def _exactly(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            piece = self.sock.recv(n - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data


@contextlib.contextmanager
def plain_listener(
    log: Log, serve: Serve | None = None, options: LinkOptions | None = None
) -> Iterator[Listener]:
    """alice, listening without TLS."""
    with Listener(
        "127.0.0.1:0",
        None,
        log.links.put,
        role="alice",
        on_stream=serve,
        on_error=log.errors.put,
        on_closed=lambda _, reason: log.closed.put(reason),
        insecure_plaintext=True,
        options=options or LinkOptions(),
    ) as listener:
        yield listener


def new_id() -> bytes:
    return secrets.token_bytes(16)
