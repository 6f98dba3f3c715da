"""How links come about: connecting, listening, and pairs in memory.

The side that connects says HELLO first, and the listening side answers with its own when it has
accepted the peer; so a link that `connect` returns is one that both sides want. In TLS 1.3 the
connecting side has finished its handshake before its certificate was looked at: a refusal reaches
it as an alert instead of the HELLO, and `connect` says what the alert means.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

from mpcserve.config import Address
from mpcserve.errors import ConfigError, MpcError, PeerError, PeerLost, PeerTimeout, Refused
from mpcserve.transport.channel import Channel
from mpcserve.transport.codec import PlainCodec, TlsCodec, codecs
from mpcserve.transport.link import Connected, Link
from mpcserve.transport.network import LOOPBACK, NetworkProfile
from mpcserve.transport.options import (
    Counters,
    Hooks,
    LinkOptions,
    address_of,
    check_plaintext,
)
from mpcserve.transport.tls import TlsFiles, explain, own_role, part
from mpcserve.wire import LINK_STREAM, MIN_WINDOW, ROLES, Session

_SOCKET_BUFFER = 4 << 20  # two milliseconds of ten gigabits, 300 of a hundred megabits
_BACKLOG = 128
_MAX_GREETING = 64  # connections that are shaking hands at once
_ACCEPT_TICK_S = 0.2  # how often a listener looks whether it was closed
_DEFAULT = LinkOptions()
_NO_HOOKS = Hooks()

_Target: TypeAlias = tuple[
    socket.AddressFamily,
    socket.SocketKind,
    int,
    str,
    tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes],
]

OnStream = Callable[[Channel], None]
OnLink = Callable[[Link], None]


def connect(
    address: str,
    tls: TlsFiles | None,
    role_expected: str,
    timeout: float = 10.0,
    *,
    role: str = "",
    on_stream: OnStream | None = None,
    on_error: Callable[[Exception], None] | None = None,
    on_closed: Callable[[Link, MpcError], None] | None = None,
    attends: Callable[[Mapping[str, object]], float] = _NO_HOOKS.attends,
    insecure_plaintext: bool = False,
    options: LinkOptions = _DEFAULT,
) -> Link:
    """Connect once to a listener that must be `role_expected`, within `timeout` seconds in all.

    `role` is this side's own; with TLS it is in the certificate, and is checked if given. With
    `insecure_plaintext` (loopback only) it must be given.

    Raises: ConfigError (files, role, address), PeerLost (refused, reset), PeerTimeout, PeerError
    (wrong role; a certificate that one side does not accept), Refused (said the peer).
    """
    where = address_of(address)
    make, role = _security(where, tls, role, insecure_plaintext)
    deadline = time.monotonic() + timeout
    name = f"{role_expected} at {where}"
    sock = _dial(where, name, timeout)
    counters = Counters()
    try:
        codec = make(False)
        peer = _shake(codec, sock, deadline, counters)
        if isinstance(codec, TlsCodec):
            _expect(peer, role_expected, where)
    except OSError as error:
        sock.close()
        raise _in_words(error, name, timeout) from None
    except PeerError as error:
        _tell(codec, sock, role, error)
        raise

    def admit(link: Link) -> None:
        _expect(link.peer, role_expected, where)

    made_of = Connected(sock, codec, role, peer, str(where), True, admit, counters)
    link = Link(made_of, Hooks(on_stream, on_error, on_closed, attends), options)
    link.start()
    try:
        link.wait_open(deadline - time.monotonic())
    except PeerTimeout:
        raise _in_words(TimeoutError(), name, timeout) from None
    return link


class Listener:
    """Accepts links on an address until closed; a context manager.

    `on_link(link)` runs in the link's reader thread when a peer is known and has an accepted role:
    it may raise Refused (the peer's `connect` raises it) and may send, but must not wait for what
    the peer sends. Other callbacks as in `Hooks`. Nothing that a peer does stops the listener.

    address: where it listens, host:port, with the real port if 0 was asked for.
    Raises: ConfigError (address in use, not of this machine, files, plain TCP off loopback).
    """

    def __init__(
        self,
        address: str,
        tls: TlsFiles | None,
        on_link: OnLink | None = None,
        *,
        role: str = "",
        accept_roles: Collection[str] = ROLES,
        on_stream: OnStream | None = None,
        on_error: Callable[[Exception], None] | None = None,
        on_closed: Callable[[Link, MpcError], None] | None = None,
        attends: Callable[[Mapping[str, object]], float] = _NO_HOOKS.attends,
        insecure_plaintext: bool = False,
        options: LinkOptions = _DEFAULT,
    ) -> None:
        where = address_of(address)
        self._make, self._role = _security(where, tls, role, insecure_plaintext)
        self._on_link = on_link
        self._accept_roles = frozenset(accept_roles)
        self._hooks = Hooks(on_stream, on_error, self._forget, attends)
        self._on_closed = on_closed
        self._options = options
        self._lock = threading.Lock()
        self._links: set[Link] = set()
        self._ended: set[Link] = set()  # their threads may still be there
        self._greeting: dict[threading.Thread, socket.socket] = {}
        self._closing = False
        self._sock = _bind(where)
        self.address = str(Address(where.host, self._sock.getsockname()[1]))
        self._thread = threading.Thread(
            target=self._run, name=f"mpcserve-listener-{self.address}", daemon=True
        )
        self._thread.start()

    @property
    def links(self) -> list[Link]:
        """The links that are open."""
        with self._lock:
            return list(self._links)

    def close(self) -> None:
        """Accept no more, close all links, join all threads."""
        self._closing = True
        with contextlib.suppress(OSError):  # wakes accept() where the system allows it
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._sock.close()
        with self._lock:
            greeting, open_ = dict(self._greeting), list(self._links)
        for sock in greeting.values():
            if not any(link.uses(sock) for link in open_):  # one is told why it ends
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in greeting:
            thread.join(self._options.handshake_timeout)
        with self._lock:
            links = self._links | self._ended
        closers = [threading.Thread(target=link.close, daemon=True) for link in links]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Listener of {self._role} on {self.address}>"

    def _run(self) -> None:
        while not self._closing:
            try:
                sock, peer = self._sock.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if self._closing:
                    return
                self._hooks.report(
                    PeerLost(f"{self.address}: cannot accept a connection: {error.strerror}")
                )
                time.sleep(_ACCEPT_TICK_S)  # out of descriptors, most likely: some will be closed
                continue
            self._greet_in_thread(sock, str(Address(peer[0], peer[1])))

    def _greet_in_thread(self, sock: socket.socket, address: str) -> None:
        thread = threading.Thread(
            target=self._greet,
            args=(sock, address),
            name=f"mpcserve-greeting-{address}",
            daemon=True,
        )
        try:
            with self._lock:
                if len(self._greeting) >= _MAX_GREETING:
                    raise Refused(f"{address}: {_MAX_GREETING} handshakes are under way already")
                thread.start()
                self._greeting[thread] = sock
        except (Refused, RuntimeError) as error:  # RuntimeError: out of threads
            sock.close()
            self._hooks.report(error)

    def _greet(self, sock: socket.socket, address: str) -> None:
        try:
            self._open(sock, address)
        except Exception as error:  # MpcError, or a defect: neither ends the listener
            self._hooks.report(error)
        finally:
            with self._lock:
                self._greeting.pop(threading.current_thread(), None)

    def _open(self, sock: socket.socket, address: str) -> None:
        timeout = self._options.handshake_timeout
        deadline = time.monotonic() + timeout
        counters = Counters()
        codec = self._make(True)
        try:
            _tune(sock)
            peer = _shake(codec, sock, deadline, counters)
        except OSError as error:
            part(sock)
            raise _in_words(error, f"the peer at {address}", timeout) from None
        except PeerError as error:
            _tell(codec, sock, self._role, error)
            raise explain(error, f"the peer at {address}", "in the handshake") from None
        made_of = Connected(sock, codec, self._role, peer, address, False, self._admit, counters)
        link = Link(made_of, self._hooks, self._options)
        link.start()
        link.wait_open(deadline - time.monotonic())

    def _admit(self, link: Link) -> None:
        if link.peer not in self._accept_roles:
            raise Refused(
                f"{self._role} accepts no link from {link.peer}, only from "
                f"{', '.join(sorted(self._accept_roles))}",
                "check the roles and addresses in the config",
            )
        if self._on_link is not None:
            self._on_link(link)
        with self._lock:
            if self._closing:
                raise PeerLost(f"{self._role} is shutting down", "try again later")
            self._links.add(link)

    def _forget(self, link: Link, reason: MpcError) -> None:
        with self._lock:
            self._links.discard(link)
            self._ended = {other for other in self._ended if other.has_threads} | {link}
        if self._on_closed is not None:
            self._on_closed(link, reason)


class MemoryNetwork:
    """Links between roles in one process: the same code over a socket pair, without TLS."""

    def __init__(
        self, network: NetworkProfile = LOOPBACK, options: LinkOptions | None = None
    ) -> None:
        self._options = options or LinkOptions(network=network)
        self._links: list[Link] = []

    def pair(
        self, one: str, other: str, *, hooks_one: Hooks = _NO_HOOKS, hooks_other: Hooks = _NO_HOOKS
    ) -> tuple[Link, Link]:
        """The two ends of a new link: held by `one` (its peer is `other`), and by `other`."""
        ends = socket.socketpair()
        links: list[Link] = []
        for sock, role, peer, greets, hooks in (
            (ends[0], one, other, True, hooks_one),
            (ends[1], other, one, False, hooks_other),
        ):
            made_of = Connected(sock, PlainCodec(), role, peer, "memory", greets, _admit_all)
            links.append(Link(made_of, hooks, self._options))
        for link in links:
            link.start()
        for link in links:
            link.wait_open(self._options.handshake_timeout)
        self._links += links
        return links[0], links[1]

    def close(self) -> None:
        """Close all links."""
        for link in self._links:
            link.close()

    def __enter__(self) -> MemoryNetwork:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _admit_all(link: Link) -> None:
    """Both ends of a pair are ours."""


def _security(
    where: Address, tls: TlsFiles | None, role: str, insecure_plaintext: bool
) -> tuple[Callable[[bool], PlainCodec | TlsCodec], str]:
    """What makes a codec for a connection, and this side's role. Raises: ConfigError."""
    if insecure_plaintext:
        check_plaintext(where)
        if role not in ROLES:
            raise ConfigError(f"own role: expected one of {', '.join(ROLES)}, got {role!r}")
        return lambda _: PlainCodec(), role
    if tls is None:
        raise ConfigError(
            f"{where}: no certificate, and plain TCP was not asked for",
            "create keys with `mpcserve keys init`, or pass --insecure-plaintext on loopback",
        )
    make = codecs(tls)
    certified = own_role(tls)
    if role not in ("", certified):
        raise ConfigError(
            f"{tls.cert}: expected a certificate of {role}, got one of {certified}",
            "give each party the certificate of its own role",
        )
    return make, certified


def _expect(peer: str, role: str, where: Address) -> None:
    if peer != role:
        raise PeerError(
            f"expected {role} at {where}, got {peer}",
            "check the addresses in the config, and which certificate that party uses",
        )


def _shake(
    codec: PlainCodec | TlsCodec, sock: socket.socket, deadline: float, counters: Counters
) -> str:
    """The TLS handshake; the peer's role, empty without TLS."""
    return codec.handshake(sock, deadline, counters) if isinstance(codec, TlsCodec) else ""


def _tell(codec: TlsCodec | PlainCodec, sock: socket.socket, role: str, error: MpcError) -> None:
    """Say why, before the link exists, and close."""
    last = Session(role, MIN_WINDOW, "").error(LINK_STREAM, error)
    with contextlib.suppress(OSError):
        sock.sendall(codec.encrypt([last]))
    part(sock)


def _in_words(error: Exception, name: str, timeout: float) -> PeerError:
    return explain(error, name, f"handshake, within {timeout:g} s")


def _dial(where: Address, name: str, timeout: float) -> socket.socket:
    """A connected TCP socket. Raises: PeerLost, PeerTimeout, ConfigError."""
    deadline = time.monotonic() + timeout
    found = _resolve(where, name, timeout)
    last: OSError = TimeoutError()
    for family, kind, protocol, _, target in found:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        sock = socket.socket(family, kind, protocol)
        try:
            _tune(sock)
            sock.settimeout(left)
            sock.connect(target)
            return sock
        except OSError as error:
            sock.close()
            last = error
    raise explain(last, name, f"connecting, within {timeout:g} s") from None


def _resolve(where: Address, name: str, timeout: float) -> Sequence[_Target]:
    """The addresses of a host. Raises: ConfigError, PeerTimeout.

    In a thread, for a name server that is silent would take longer than any deadline.
    """
    answers: queue.SimpleQueue[Sequence[_Target] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM))
        except OSError as error:
            answers.put(error)

    threading.Thread(target=ask, name=f"mpcserve-resolve-{where}", daemon=True).start()
    try:
        found = answers.get(timeout=max(0.0, timeout))
    except queue.Empty:
        raise PeerTimeout(
            f"{name}: the name of the host was not resolved within {timeout:g} s",
            "check the name server, or give an IP address",
        ) from None
    if isinstance(found, OSError):
        raise ConfigError(
            f"{name}: unknown host: {found.strerror}", "check the address in the config"
        )
    return found


def _bind(where: Address) -> socket.socket:
    """A listening TCP socket. Raises: ConfigError."""
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _tune(sock)
        sock.bind((where.host, where.port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        in_use = error.errno == errno.EADDRINUSE
        why = "the port is in use" if in_use else (error.strerror or str(error))
        hint = (
            "another party may still run here: stop it, or choose another port in the config"
            if in_use
            else "listen on an address of this machine, such as 127.0.0.1 or 0.0.0.0"
        )
        raise ConfigError(f"cannot listen on {where}: {why}", hint) from None
    sock.settimeout(_ACCEPT_TICK_S)
    return sock


def _tune(sock: socket.socket) -> None:
    """No Nagle; large buffers where the system grants them.

    Asking for more than it grants would leave a small fixed buffer in place of one that grows.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with socket.socket() as probe:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            probe.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
            if probe.getsockopt(socket.SOL_SOCKET, option) >= _SOCKET_BUFFER:
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
