"""TLS 1.3, mutual: who the peer is, and what to say when it is not who it should be.

A certificate carries its role twice: the subject's common name, and one URI in the subject
alternative names, `mpcserve:role:<role>`. Both must agree. The role is the identity: host names are
not compared, for a deployment has a CA of its own that signs nothing but roles.

TLS runs over a pair of memory buffers (`SSLContext.wrap_bio`) under one lock, because OpenSSL's
connection must not be used by two threads at once, and one thread reads while others write.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

from cryptography import x509

from mpcserve.errors import ConfigError, PeerError, PeerLost, PeerTimeout
from mpcserve.transport.options import Counters
from mpcserve.wire import ROLES, Buffer

ROLE_URI = "mpcserve:role:"
READ_BYTES = 256 << 10  # taken from the socket, and decrypted, at once
_RECORD = 16 << 10  # the most plaintext of a TLS record
_CLOSE_S = 1.0  # how long a refused peer has to read why

_ISSUE = "issue a new one with `mpcserve keys issue`"
_SAME_CA = "give all parties certificates of one CA (`mpcserve keys show` prints it)"
_VERIFY = MappingProxyType(
    {
        9: ("is not valid yet", "compare the clocks of the two machines"),
        10: ("has expired", _ISSUE),
        18: ("is signed by itself, not by our CA", _SAME_CA),
        19: ("is signed by a CA that is not ours", _SAME_CA),
        20: ("is signed by a CA that is not ours", _SAME_CA),
        21: ("is signed by a CA that is not ours", _SAME_CA),
        7: ("is signed by a CA that is not ours", _SAME_CA),
    }
)
_ALERTS = MappingProxyType(
    {
        "CERTIFICATE_EXPIRED": ("says that our certificate has expired", _ISSUE),
        "UNKNOWN_CA": ("does not know the CA that signed our certificate", _SAME_CA),
        "DECRYPT_ERROR": ("does not know the CA that signed our certificate", _SAME_CA),
        "CERTIFICATE_REQUIRED": ("wants a certificate and got none", _SAME_CA),
        "BAD_CERTIFICATE": ("does not accept our certificate", _ISSUE),
        "CERTIFICATE_UNKNOWN": ("does not accept our certificate", _ISSUE),
        "UNSUPPORTED_CERTIFICATE": ("does not accept our certificate for this purpose", _ISSUE),
        "PROTOCOL_VERSION": ("does not speak TLS 1.3", "upgrade its OpenSSL"),
        "UNSUPPORTED_PROTOCOL": ("does not speak TLS 1.3", "upgrade its OpenSSL"),
        "WRONG_VERSION_NUMBER": ("does not speak TLS", "check the address; start both alike"),
        "HTTP_REQUEST": ("speaks HTTP, not TLS", "check the address"),
        "RECORD_LAYER_FAILURE": ("does not speak TLS", "check the address; start both alike"),
    }
)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of three PEM files: the CA's certificate, this party's certificate, its private key."""

    ca: Path | str
    cert: Path | str
    key: Path | str


class Codec(Protocol):
    """Plaintext to wire bytes and back."""

    def encrypt(self, pieces: Sequence[Buffer]) -> bytes:
        """The wire bytes of these pieces, after all that was encrypted before."""
        ...

    def decrypt(self, received: memoryview) -> Iterator[memoryview]:
        """The plaintext in what was received; each view is valid until the next."""
        ...

    @property
    def answers(self) -> bool:
        """True if the peer's bytes made the codec itself say something: encrypt() it."""
        ...


class PlainCodec:
    """No encryption: loopback and memory links."""

    answers = False

    def encrypt(self, pieces: Sequence[Buffer]) -> bytes:
        """The pieces, joined."""
        return b"".join(pieces)

    def decrypt(self, received: memoryview) -> Iterator[memoryview]:
        """The bytes themselves."""
        yield received


class TlsCodec:
    """One TLS connection without a socket."""

    def __init__(self, context: ssl.SSLContext, server_side: bool) -> None:
        self._lock = threading.Lock()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._plain = bytearray(READ_BYTES)

    @property
    def answers(self) -> bool:
        """True if OpenSSL has something of its own to say (an alert, a key update)."""
        return self._outgoing.pending > 0

    def encrypt(self, pieces: Sequence[Buffer]) -> bytes:
        """TLS records of the pieces; with none, what OpenSSL itself has to say."""
        with self._lock:
            for piece in pieces:
                self._write(piece)
            return self._outgoing.read()

    def _write(self, piece: Buffer) -> None:
        done = self._tls.write(piece)
        while done < len(piece):
            done += self._tls.write(memoryview(piece)[done:])

    def decrypt(self, received: memoryview) -> Iterator[memoryview]:
        """Raises: ssl.SSLError, also for an alert of the peer."""
        with self._lock:
            self._incoming.write(received)
        view = memoryview(self._plain)
        more = True
        while more:
            with self._lock:
                filled, more = self._fill(view)
            if filled:
                yield view[:filled]

    def _fill(self, view: memoryview) -> tuple[int, bool]:
        """Decrypt until the buffer is full (then True) or nothing is left.

        A read returns one record. There is always room for a whole one, so OpenSSL never keeps a
        part, and an empty incoming buffer means that there is no more.
        """
        read, incoming, most = self._tls.read, self._incoming, len(view) - _RECORD
        filled = 0
        try:
            while filled <= most and incoming.pending:
                got = read(_RECORD, view[filled:])
                if not got:  # close_notify; the end that counts is GOODBYE
                    return filled, False
                filled += cast(int, got)
        except ssl.SSLWantReadError:
            return filled, False
        return filled, filled > most

    def handshake(self, sock: socket.socket, deadline: float, counters: Counters) -> str:
        """Shake hands on a connected socket; the role of the peer's certificate.

        Raises: ssl.SSLError, after the peer was sent the reason; OSError; TimeoutError; PeerError
        if the certificate has no role.
        """
        while True:
            try:
                self._tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                done = False
            except ssl.SSLError:
                self._send_answers(sock, deadline, counters)
                raise
            self._send_answers(sock, deadline, counters)
            if done:
                return role_of(self._tls.getpeercert())
            sock.settimeout(_left(deadline))
            received = sock.recv(READ_BYTES)
            counters.wire_received += len(received)
            if not received:
                raise ConnectionResetError("closed")
            self._incoming.write(received)

    def _send_answers(self, sock: socket.socket, deadline: float, counters: Counters) -> None:
        answers = self._outgoing.read()
        if answers:
            counters.wire_sent += len(answers)
            sock.settimeout(_left(deadline))
            sock.sendall(answers)


def codecs(files: TlsFiles) -> Callable[[bool], TlsCodec]:
    """Load the files once; makes a codec for each connection (True: the listening side).

    Raises: ConfigError naming the file.
    """
    made = {side: _context(files, side) for side in (False, True)}
    return lambda server_side: TlsCodec(made[server_side], server_side)


def _context(files: TlsFiles, server_side: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the role is the identity
    context.verify_mode = ssl.CERT_REQUIRED
    if server_side:
        context.num_tickets = 0  # links live long: nothing to resume
    _readable(files.ca, files.cert, files.key)
    try:
        context.load_verify_locations(files.ca)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{files.ca}: not a CA certificate in PEM: {error.reason}", _ISSUE
        ) from None
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise ConfigError(
            f"{files.cert}, {files.key}: not a certificate and its private key in PEM: {reason}",
            _ISSUE,
        ) from None
    return context


def _no_password() -> str:
    raise ValueError("the key has a password")


def _readable(*paths: Path | str) -> None:
    for path in paths:
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot read: {error.strerror}", "create keys with `mpcserve keys init`"
            ) from None


def role_of(certificate: Mapping[str, Any] | None) -> str:
    """The role in a verified certificate, as `getpeercert` gives it. Raises: PeerError."""
    certificate = certificate or {}
    names: list[str] = []
    for kind, value in certificate.get("subjectAltName", ()):
        if kind == "URI" and value.startswith(ROLE_URI):
            names.append(value.removeprefix(ROLE_URI))
    common = [
        value
        for part in certificate.get("subject", ())
        for key, value in part
        if key == "commonName"
    ]
    return _one_role(names, common)


def own_role(files: TlsFiles) -> str:
    """The role in this party's own certificate. Raises: ConfigError."""
    try:
        certificate = x509.load_pem_x509_certificate(Path(files.cert).read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        roles = [uri.removeprefix(ROLE_URI) for uri in uris if uri.startswith(ROLE_URI)]
        return _one_role(roles, [str(name.value) for name in common])
    except (OSError, ValueError, x509.ExtensionNotFound, PeerError) as error:
        raise ConfigError(f"{files.cert}: no role in this certificate: {error}", _ISSUE) from None


def _one_role(uris: list[str], common: list[str]) -> str:
    if len(uris) != 1 or uris != common or uris[0] not in ROLES:
        raise PeerError(
            f"expected a certificate with one role of {', '.join(ROLES)} as its common name and "
            f"as URI {ROLE_URI}…, got common name {common} and URI {uris}",
            _ISSUE,
        )
    return uris[0]


def explain(error: Exception, peer: str, doing: str) -> PeerError:
    """What a failure of TLS or of the socket means, in words; `peer` is a role and an address."""
    if isinstance(error, PeerError):
        return type(error)(f"{peer}: {error.message}", error.hint)
    if isinstance(error, ssl.SSLCertVerificationError):
        what, hint = _VERIFY.get(error.verify_code, (f"is bad: {error.verify_message}", _ISSUE))
        return PeerError(f"the certificate of {peer} {what} ({doing})", hint)
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).upper()
        for word, (what, hint) in _ALERTS.items():
            if word in reason:
                return PeerError(f"{peer} {what} ({doing})", hint)
        return PeerError(f"TLS with {peer} failed: {reason.lower()} ({doing})", _SAME_CA)
    if isinstance(error, TimeoutError):
        return PeerTimeout(f"{peer} did not answer in time ({doing})", "check that it is alive")
    if isinstance(error, ConnectionRefusedError):
        return PeerLost(f"{peer} refused the connection ({doing})", "check that it is running")
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return PeerLost(f"lost the connection to {peer}: {why} ({doing})", "see the log of that party")


def part(sock: socket.socket) -> None:
    """Close a socket so that the peer can still read what was sent last.

    Closing while bytes of the peer are unread resets the connection, and the reset may overtake the
    reason: so say that no more comes, and read until the peer closes, for a second at most.
    """
    deadline = time.monotonic() + _CLOSE_S
    try:
        sock.shutdown(socket.SHUT_WR)
        while time.monotonic() < deadline:
            sock.settimeout(_left(deadline))
            if not sock.recv(READ_BYTES):
                break
    except OSError:
        return  # the peer is gone already
    finally:
        sock.close()


def _left(deadline: float) -> float:
    """Seconds to the deadline. Raises: TimeoutError."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
