"""Plaintext to wire bytes and back: TLS records, or nothing.

TLS is OpenSSL's, the one that `cryptography` brings: newer than many a system's, its AES-GCM twice
as fast or more. pyOpenSSL makes contexts, verifies and shakes hands over a pair of memory buffers.
Its `send`, `bio_read`, `bio_write` and `recv_into` copy once more than OpenSSL does, so the four
functions behind them are called where the data lie; those of a round from compiled code.

OpenSSL's connection must not be used by two threads at once, and one thread reads while others
write: each call holds a lock.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cryptography.hazmat.bindings._rust import _openssl
from cryptography.hazmat.primitives import serialization
from OpenSSL import SSL

from mpcserve.errors import ConfigError
from mpcserve.kernels.records import HEADER_BYTES, read_data, write_records
from mpcserve.transport.options import Counters
from mpcserve.transport.tls import ISSUE, TlsError, TlsFiles, left, role_of
from mpcserve.wire import MAX_DATA, Buffer

READ_BYTES = 256 << 10  # taken from the socket, and decrypted, at once
_RECORD = 16 << 10  # the most plaintext of a TLS record

# By speed; keys of 128 bits are as long as those of our own streams.
_CIPHERS = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"

_lib: Any = SSL._lib  # type: ignore[attr-defined]
_ffi: Any = SSL._ffi  # type: ignore[attr-defined]
_INTPTR = _ffi.typeof("intptr_t")
_NO_MORE = (_lib.SSL_ERROR_WANT_READ, _lib.SSL_ERROR_ZERO_RETURN)


def _number(pointer: Any) -> int:
    return int(_ffi.cast(_INTPTR, pointer))


def _address(buffer: Buffer) -> int:
    """Where its bytes lie."""
    return int(_ffi.cast(_INTPTR, _ffi.from_buffer(buffer)))


def _function(name: str) -> int:
    return _number(_ffi.addressof(_openssl.lib, name))


_SSL_READ, _SSL_WRITE = _function("SSL_read"), _function("SSL_write")
_BIO_READ, _BIO_WRITE = _function("BIO_read"), _function("BIO_write")
_SSL_ERROR = _function("SSL_get_error")


class Received(NamedTuple):
    """What `Codec.receive` has done.

    come: wire bytes; 0 at the end, −1 for nothing or an error. filled: bytes of payload. left: of
    the frame under way, to come. headers: of frames. more: what else came is to be decrypted.
    """

    come: int
    filled: int
    left: int
    headers: int
    more: bool


class Codec(Protocol):
    """Plaintext to wire bytes and back. `answers`: what was read made it say something itself."""

    answers: bool

    def encrypt(self, pieces: Sequence[Buffer]) -> Buffer:
        """The wire bytes of these pieces, after all before; valid until the next call.

        With none: what the codec itself has to say.
        """
        ...

    def send(self, file: int, header: bytes, payload: Buffer) -> tuple[int, bytes]:
        """Encrypt a frame and hand it to a socket: how many wire bytes, and which of them it did
        not take at once."""
        ...

    def decrypt(self, received: memoryview) -> Iterator[memoryview]:
        """The plaintext in what was received; each view is valid until the next."""
        ...

    def receive(self, file: int, place: memoryview, left: int, start: bytes) -> Received | None:
        """Take what a socket has: payload of the frame under way, of which `left` bytes are to
        come, and of frames with such a header, goes to `place`. None: decrypt what you take."""
        ...


class PlainCodec:
    """No encryption: loopback and memory links."""

    answers = False

    def encrypt(self, pieces: Sequence[Buffer]) -> bytes:
        """The pieces, joined."""
        return b"".join(pieces)

    def send(self, file: int, header: bytes, payload: Buffer) -> tuple[int, bytes]:
        """Raises: OSError."""
        wire = header + payload
        try:
            done = os.write(file, wire)
        except BlockingIOError:
            done = 0
        return len(wire), wire[done:]

    def decrypt(self, received: memoryview) -> Iterator[memoryview]:
        """The bytes themselves."""
        yield received

    def receive(self, file: int, place: memoryview, left: int, start: bytes) -> None:
        """Nothing is decrypted here."""


class TlsCodec:
    """One TLS connection without a socket."""

    def __init__(self, context: SSL.Context, server_side: bool) -> None:
        self._lock = threading.Lock()
        self._connection: Any = SSL.Connection(context)
        if server_side:
            self._connection.set_accept_state()
        else:
            self._connection.set_connect_state()
        self._ssl = self._connection._ssl
        self._incoming, self._outgoing = self._connection._into_ssl, self._connection._from_ssl
        _lib.SSL_clear_mode(self._ssl, _lib.SSL_MODE_ENABLE_PARTIAL_WRITE)  # all, or an error
        self.answers = False  # an alert, a key update
        plain = bytearray(READ_BYTES)
        # Not from the view: the garbage collector may clear that one first, and cffi crashes then.
        self._plain, self._plain_at = memoryview(plain), _ffi.from_buffer(plain)
        self._wire = memoryview(bytearray(2 * MAX_DATA))
        self._wire_at = _address(self._wire)
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._have = 0  # of a header that `receive` left to `decrypt`
        self._like, self._like_at = b"", 0  # the header that frames were like, and where it lies
        self._come = bytearray(READ_BYTES)
        self._start = _ffi.new("char **")
        ssl, out, into = map(_number, (self._ssl, self._outgoing, self._incoming))
        self._writes = _SSL_WRITE, ssl, _BIO_READ, out
        self._reads = _SSL_READ, ssl, _BIO_WRITE, into, _SSL_ERROR, _lib.SSL_ERROR_WANT_READ
        self._into = _address(self._come), READ_BYTES, _address(self._header)

    def encrypt(self, pieces: Sequence[Buffer]) -> memoryview:
        """TLS records. Raises: TlsError."""
        with self._lock:
            for piece in pieces:
                if piece:
                    done = _lib.SSL_write(self._ssl, _ffi.from_buffer(piece), len(piece))
                    if done <= 0:
                        self._fail(done)
            size = self._pending()
            if size > len(self._wire):
                self._wire = memoryview(bytearray(size))
                self._wire_at = _address(self._wire)
            if size:
                _lib.BIO_read(self._outgoing, _ffi.from_buffer(self._wire), size)
            self.answers = False
            return self._wire[:size]

    def send(self, file: int, header: bytes, payload: Buffer) -> tuple[int, bytes]:
        """Raises: TlsError; an error of the socket is for its next user."""
        size = len(payload)
        head, body = _address(header), _address(payload) if size else 0
        room = len(self._wire)
        with self._lock:
            made, sent, last = write_records(
                *self._writes, file, head, len(header), body, size, self._wire_at, room
            )
            if last <= 0:
                self._fail(last)
            rest = b"" if sent == made else bytes(self._wire[sent:made])
            self.answers = made == room  # what it had to say itself left no room
            return made, rest

    def decrypt(self, received: memoryview) -> Iterator[memoryview]:
        """Raises: TlsError, also for an alert of the peer."""
        if received:
            with self._lock:
                _lib.BIO_write(self._incoming, _ffi.from_buffer(received), len(received))
        if self._have:
            have, self._have = self._have, 0
            yield self._header[:have]
        more = True
        while more:
            with self._lock:
                filled, more = self._fill()
            if filled:
                yield self._plain[:filled]

    def receive(self, file: int, place: memoryview, left: int, start: bytes) -> Received:
        """Raises: as `decrypt`."""
        to = _address(place)
        with self._lock:
            if start is not self._like:
                self._like, self._like_at = start, _address(start)
            come, filled, left, have, headers, last = read_data(
                *self._reads,
                file,
                *self._into,
                self._like_at,
                MAX_DATA,
                to,
                len(place),
                left,
                self._have,
            )
            self._have = have
            if come > 0 and last <= 0:
                self._nothing(last)
        return Received(come, filled, left, headers, last > 0 or have > 0)

    def handshake(self, sock: socket.socket, deadline: float, counters: Counters) -> str:
        """Shake hands on a connected socket; the role of the peer's certificate.

        Raises: TlsError, after the peer was sent the reason; OSError; TimeoutError; PeerError if
        the certificate has no role.
        """
        while True:
            try:
                self._connection.do_handshake()
                done = True
            except SSL.WantReadError:
                done = False
            except SSL.Error as error:
                self._send_answers(sock, deadline, counters)
                code = _lib.SSL_get_verify_result(self._ssl)
                raise TlsError(_words(error), code) from None
            self._send_answers(sock, deadline, counters)
            if done:
                return role_of(self._connection.get_peer_certificate(as_cryptography=True))
            sock.settimeout(left(deadline))
            received = sock.recv(READ_BYTES)
            counters.wire_received += len(received)
            if not received:
                raise ConnectionResetError("closed")
            _lib.BIO_write(self._incoming, _ffi.from_buffer(received), len(received))

    # ── helpers, `_lock` held ──

    def _pending(self) -> int:
        """Wire bytes to be sent."""
        return int(_lib.BIO_get_mem_data(self._outgoing, self._start))

    def _fill(self) -> tuple[int, bool]:
        """Decrypt until the buffer is full (then True) or nothing is left.

        A read returns one record. There is always room for a whole one, so OpenSSL never keeps a
        part.
        """
        read, tls, most = _lib.SSL_read, self._ssl, READ_BYTES - _RECORD
        at, filled = self._plain_at, 0
        while filled <= most:
            got = read(tls, at + filled, _RECORD)
            if got <= 0:
                self._nothing(got)
                return filled, False
            filled += got
        return filled, True

    def _nothing(self, result: int) -> None:
        """A read gave no bytes: raise, unless there were none."""
        # close_notify is no end: the one that counts is GOODBYE
        if _lib.SSL_get_error(self._ssl, result) not in _NO_MORE:
            self._fail(result)
        self.answers = self._pending() > 0

    def _fail(self, result: int) -> None:
        """Raise what a call of OpenSSL that gave this result has met."""
        try:
            self._connection._raise_ssl_error(self._ssl, result)
        except SSL.Error as error:
            raise TlsError(_words(error)) from None

    def _send_answers(self, sock: socket.socket, deadline: float, counters: Counters) -> None:
        answers = self.encrypt(())
        if answers:
            counters.wire_sent += len(answers)
            sock.settimeout(left(deadline))
            sock.sendall(answers)


def codecs(files: TlsFiles) -> Callable[[bool], TlsCodec]:
    """Load the files once; makes a codec for each connection (True: the listening side).

    Raises: ConfigError naming the file.
    """
    context = _context(files)
    return lambda server_side: TlsCodec(context, server_side)


def _context(files: TlsFiles) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(_CIPHERS)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    # Links live long: nothing to resume.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET)
    _readable(files.ca, files.cert, files.key)
    try:
        context.load_verify_locations(str(files.ca))
    except SSL.Error as error:
        raise ConfigError(
            f"{files.ca}: not a CA certificate in PEM: {_words(error)}", ISSUE
        ) from None
    try:
        context.use_certificate_chain_file(str(files.cert))
        context.use_privatekey(_private_key(files.key))
        context.check_privatekey()
    except (SSL.Error, ValueError) as error:
        reason = _words(error) if isinstance(error, SSL.Error) else str(error)
        raise ConfigError(
            f"{files.cert}, {files.key}: not a certificate and its private key in PEM: {reason}",
            ISSUE,
        ) from None
    return context


def _words(error: SSL.Error) -> str:
    """OpenSSL's reason."""
    reasons = [entry[-1] for entry in error.args[0]] if error.args else []
    return str(reasons[0]) if reasons and isinstance(error.args[0], list) else str(error)


def _private_key(path: Path | str) -> Any:
    """Raises: ValueError."""
    try:
        return serialization.load_pem_private_key(Path(path).read_bytes(), password=None)
    except TypeError:
        raise ValueError("the key has a password") from None


def _readable(*paths: Path | str) -> None:
    for path in paths:
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot read: {error.strerror}", "create keys with `mpcserve keys init`"
            ) from None
