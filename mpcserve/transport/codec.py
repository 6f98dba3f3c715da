"""Plaintext to wire bytes and back: TLS records, or nothing.

TLS is OpenSSL's, the one that `cryptography` brings: newer than many a system's, its AES-GCM twice
as fast or more. pyOpenSSL makes contexts, verifies and shakes hands over a pair of memory buffers.
Its `send`, `bio_read`, `bio_write` and `recv_into` copy once more than OpenSSL does, so the four
functions behind them are called where the data lie.

OpenSSL's connection must not be used by two threads at once, and one thread reads while others
write: each call holds a lock.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.bindings._rust import _openssl
from cryptography.hazmat.primitives import serialization
from OpenSSL import SSL

from mpcserve.errors import ConfigError
from mpcserve.kernels.records import read_records
from mpcserve.transport.options import Counters
from mpcserve.transport.tls import ISSUE, TlsError, TlsFiles, left, role_of
from mpcserve.wire import Buffer

READ_BYTES = 256 << 10  # taken from the socket, and decrypted, at once
_RECORD = 16 << 10  # the most plaintext of a TLS record

# By speed; keys of 128 bits are as long as those of our own streams.
_CIPHERS = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"

_lib: Any = SSL._lib  # type: ignore[attr-defined]
_ffi: Any = SSL._ffi  # type: ignore[attr-defined]
_NO_MORE = (_lib.SSL_ERROR_WANT_READ, _lib.SSL_ERROR_ZERO_RETURN)




def _address(place: Any) -> int:
    return int(_ffi.cast("intptr_t", place))


def _function(name: str) -> int:
    return _address(_ffi.addressof(_openssl.lib, name))


_SSL_READ, _BIO_WRITE = _function("SSL_read"), _function("BIO_write")


class Codec(Protocol):
    """Plaintext to wire bytes and back."""

    def encrypt(self, pieces: Sequence[Buffer]) -> Buffer:
        """The wire bytes of these pieces, after all before; valid until the next call."""
        ...

    def put(self, received: memoryview) -> None:
        """Wire bytes have come; they are read before more are put, and before they change."""
        ...

    def read(self, most: int = 0) -> memoryview:
        """Some of the plaintext in them, valid until the next read; empty: no more.

        At least a record is read if there is one, and no more than one or `most` bytes.
        """
        ...

    def read_into(self, place: memoryview) -> int:
        """Fill this place with plaintext: how much of it. If that is not all, there is no more."""
        ...

    @property
    def answers(self) -> bool:
        """True if what was read made the codec itself say something: encrypt() it."""
        ...


class PlainCodec:
    """No encryption: loopback and memory links."""

    answers = False

    def __init__(self) -> None:
        self._left = memoryview(b"")

    def encrypt(self, pieces: Sequence[Buffer]) -> bytes:
        """The pieces, joined."""
        return b"".join(pieces)

    def put(self, received: memoryview) -> None:
        """These are the bytes."""
        self._left = received

    def read(self, most: int = 0) -> memoryview:
        """As many."""
        size = max(most, _RECORD)
        some, self._left = self._left[:size], self._left[size:]
        return some

    def read_into(self, place: memoryview) -> int:
        """Copies."""
        some, self._left = self._left[: len(place)], self._left[len(place) :]
        place[: len(some)] = some
        return len(some)


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
        self._view = memoryview(bytearray(READ_BYTES))
        self._plain = _ffi.from_buffer(self._view)
        self._wire = memoryview(bytearray(READ_BYTES))
        self._come = memoryview(b"")  # of what has come, what OpenSSL was not given yet
        self._start = _ffi.new("char **")
        self.answers = False  # OpenSSL has something of its own to say: an alert, a key update
        self._reads = _SSL_READ, _address(self._ssl), _BIO_WRITE, _address(self._incoming)

    def encrypt(self, pieces: Sequence[Buffer]) -> memoryview:
        """TLS records of the pieces; with none, what OpenSSL itself has to say.

        Raises: TlsError.
        """
        with self._lock:
            for piece in pieces:
                if piece:
                    done = _lib.SSL_write(self._ssl, _ffi.from_buffer(piece), len(piece))
                    if done <= 0:
                        self._fail(done)
            size = _lib.BIO_get_mem_data(self._outgoing, self._start)
            self.answers = False
            if size > len(self._wire):
                self._wire = memoryview(bytearray(size))
            if size:
                _lib.BIO_read(self._outgoing, _ffi.from_buffer(self._wire), size)
            return self._wire[:size]

    def put(self, received: memoryview) -> None:
        """Wire bytes for OpenSSL: at once if they are few."""
        if len(received) > _RECORD:
            self._come = received
        elif received:
            self._put(received)

    def read(self, most: int = 0) -> memoryview:
        """Raises: TlsError, also for an alert of the peer."""
        with self._lock:
            if self._come:
                size = min(max(most, _RECORD), READ_BYTES)
                return self._view[: self._fill(self._plain, size, most or 1)]
            got = _lib.SSL_read(self._ssl, self._plain, READ_BYTES)
            if got <= 0:
                self._nothing(got)
                got = 0
            return self._view[:got]

    def read_into(self, place: memoryview) -> int:
        """Raises: as `read`."""
        with self._lock:
            return self._fill(_ffi.from_buffer(place), len(place), len(place))

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
            self._put(received)

    # ── helpers, `_lock` held ──

    def _put(self, received: Buffer) -> None:
        with self._lock:
            _lib.BIO_write(self._incoming, _ffi.from_buffer(received), len(received))

    def _fill(self, place: Any, size: int, least: int) -> int:
        """Decrypt to this place, until there are `least` bytes or no more: how many."""
        come = self._come
        wire = _address(_ffi.from_buffer(come)) if come else 0
        filled, taken, last = read_records(
            *self._reads, wire, len(come), _address(place), size, least
        )
        self._come = come[taken:]
        if last <= 0:
            self._nothing(last)
        return filled

    def _nothing(self, result: int) -> None:
        """A read gave no bytes: raise, unless there were none."""
        # close_notify is no end: the one that counts is GOODBYE
        if _lib.SSL_get_error(self._ssl, result) not in _NO_MORE:
            self._fail(result)
        self.answers = _lib.BIO_get_mem_data(self._outgoing, self._start) > 0

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
