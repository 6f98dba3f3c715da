"""The wire: frames, the handshake and their limits. Bytes in → events out, commands in → bytes out.

A frame is a header of 24 bytes (big-endian), then its payload:

    version 1 · kind 1 · reserved 2 (zero) · length 4 · stream 16 · payload

    kind     payload (bytes)                        stream    meaning
    HELLO    JSON, ≤ 4 KiB                          zero      protocol, role, receive window; first
    CONTROL  JSON object, ≤ 1 MiB                   not zero  a message, ordered with DATA
    DATA     1 … 256 KiB                            not zero  payload bytes of the stream
    ERROR    JSON: kind, message, hint; ≤ 16 KiB    any       this stream (zero: this link) failed
    PING     8                                      zero      answer with a PONG of the same 8 bytes
    PONG     8                                      zero
    CREDIT   8: DATA bytes consumed so far          not zero  up to `window` more may be in flight
    GOODBYE  0                                      any       this stream (zero: the link) ends

    state       may receive
    GREETING    HELLO → OPEN, ERROR or GOODBYE on stream zero → CLOSED
    OPEN        all but HELLO; GOODBYE or ERROR on stream zero → CLOSED
    CLOSED      nothing

Rules: whatever bytes come in, `Session.receive` yields events or raises `WireError` saying what
was expected and what came, and holds at most one control payload (1 MiB). DATA is never collected
here: its bytes leave as they arrive, as views of the caller's buffer. No socket, thread or clock.

Source: the shape of h11, <https://h11.readthedocs.io>; credit as in HTTP/2, RFC 9113 section 5.2.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from mpcserve import errors
from mpcserve.errors import MpcError, PeerError, WireError
from mpcserve.messages import json_of, parse_message

Buffer: TypeAlias = bytes | bytearray | memoryview

PROTOCOL = 1
ROLES = ("alice", "bob", "carol", "model-owner", "data-owner")

STREAM_BYTES = 16
LINK_STREAM = bytes(STREAM_BYTES)  # stream zero: the link itself
MAX_DATA = 256 << 10  # streams take turns frame by frame: 2 ms of a gigabit line
MAX_CONTROL = 1 << 20
MAX_HELLO = 4 << 10
MAX_ERROR = 16 << 10
MAX_ERROR_TEXT = 2000  # characters of a message or a hint; at four bytes each both fit MAX_ERROR
MIN_WINDOW = 1 << 10
MAX_WINDOW = 1 << 62

_FRAME_VERSION = 1
_TLS_RECORD = b"\x16\x03"  # how a TLS handshake record begins
_HEADER = struct.Struct(">BBHI16s")
HEADER_BYTES = _HEADER.size
_DATA_HEADER = struct.Struct(">II16s")  # the same, its first four bytes as one number


class Kind(enum.IntEnum):
    """What a frame is; the byte after the version."""

    HELLO = 1
    CONTROL = 2
    DATA = 3
    ERROR = 4
    PING = 5
    PONG = 6
    CREDIT = 7
    GOODBYE = 8


class State(enum.Enum):
    """How far the peer's half of the session has come."""

    GREETING = "GREETING"
    OPEN = "OPEN"
    CLOSED = "CLOSED"


class _On(enum.Enum):
    """Which streams a kind of frame may name."""

    LINK = "stream zero"
    STREAM = "a stream other than zero"
    ANY = "any stream"


@dataclass(frozen=True, slots=True)
class _Law:
    """The limits of one kind: least and greatest payload, and its streams."""

    least: int
    most: int
    on: _On


_LAWS = MappingProxyType(
    {
        Kind.HELLO: _Law(2, MAX_HELLO, _On.LINK),
        Kind.CONTROL: _Law(2, MAX_CONTROL, _On.STREAM),
        Kind.DATA: _Law(1, MAX_DATA, _On.STREAM),
        Kind.ERROR: _Law(2, MAX_ERROR, _On.ANY),
        Kind.PING: _Law(8, 8, _On.LINK),
        Kind.PONG: _Law(8, 8, _On.LINK),
        Kind.CREDIT: _Law(8, 8, _On.STREAM),
        Kind.GOODBYE: _Law(0, 0, _On.ANY),
    }
)
_DATA_START = _FRAME_VERSION << 24 | Kind.DATA << 16
_MAY_RECEIVE = MappingProxyType(
    {
        State.GREETING: frozenset({Kind.HELLO, Kind.ERROR, Kind.GOODBYE}),
        State.OPEN: frozenset(Kind) - {Kind.HELLO},
        State.CLOSED: frozenset[Kind](),
    }
)
_ERRORS = MappingProxyType(
    {
        name: error
        for name, error in vars(errors).items()
        if isinstance(error, type) and issubclass(error, MpcError)
    }
)


@dataclass(frozen=True, slots=True)
class Hello:
    """The peer introduced itself; a stream may have `window` unconsumed DATA bytes in flight."""

    role: str
    window: int


@dataclass(frozen=True, slots=True)
class Message:
    """A CONTROL message; `size` is its payload's length."""

    stream: bytes
    message: dict[str, object]
    size: int


class Data(NamedTuple):
    """Some DATA bytes: a view of the buffer given to `receive`, valid until that is reused."""

    stream: bytes
    chunk: memoryview


@dataclass(frozen=True, slots=True)
class Failure:
    """The peer ended a stream (zero: the link) with an error."""

    stream: bytes
    kind: str
    message: str
    hint: str

    def error(self, peer: str) -> MpcError:
        """The same class of error, its message prefixed with the peer's role."""
        return _ERRORS.get(self.kind, PeerError)(f"{peer}: {self.message}", self.hint)


@dataclass(frozen=True, slots=True)
class Ping:
    """Answer with `Session.pong(token)`."""

    token: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to a PING."""

    token: bytes


@dataclass(frozen=True, slots=True)
class Credit:
    """The peer has consumed `total` DATA bytes of a stream."""

    stream: bytes
    total: int


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The peer will send no more on this stream (zero: on this link)."""

    stream: bytes


Event: TypeAlias = Hello | Message | Data | Failure | Ping | Pong | Credit | Goodbye


@dataclass(slots=True)
class Session:
    """One end of one link: encodes what this side says, decodes and checks what the peer says.

    `peer` names the other end in errors. The encoders may be called from any thread (they touch no
    state of the decoder); `receive` from one thread at a time.
    """

    role: str
    window: int
    peer: str
    state: State = State.GREETING
    _pending: bytearray = field(default_factory=bytearray)
    _kind: Kind | None = None  # of the frame whose payload is being received
    _stream: bytes = LINK_STREAM
    _left: int = 0  # payload bytes of that frame still to come
    _broken: WireError | None = None

    def __post_init__(self) -> None:
        assert MIN_WINDOW <= self.window <= MAX_WINDOW

    # ── commands in, bytes out ──

    def hello(self) -> bytes:
        """Introduce this side: must be the first frame it sends."""
        greeting = {"protocol": PROTOCOL, "role": self.role, "window": self.window}
        return frame(Kind.HELLO, LINK_STREAM, json_of(greeting))

    def ping(self, token: bytes) -> bytes:
        """Ask for a sign of life."""
        return frame(Kind.PING, LINK_STREAM, token)

    def pong(self, token: bytes) -> bytes:
        """Answer a PING."""
        return frame(Kind.PONG, LINK_STREAM, token)

    def message(self, stream: bytes, message: Mapping[str, object]) -> bytes:
        """A CONTROL message. Raises: WireError if it exceeds 1 MiB of JSON."""
        payload = json_of(message)
        if len(payload) > MAX_CONTROL:
            raise WireError(
                f"a message to {self.peer} has {len(payload)} bytes of JSON, expected at most "
                f"{MAX_CONTROL}",
                "send bulk as DATA",
            )
        return frame(Kind.CONTROL, stream, payload)

    def data_header(self, stream: bytes, length: int) -> bytes:
        """The header of a DATA frame; its `length` payload bytes follow, uncopied."""
        assert 0 < length <= MAX_DATA and stream != LINK_STREAM
        return _DATA_HEADER.pack(_DATA_START, length, stream)

    def error(self, stream: bytes, error: MpcError) -> bytes:
        """Tell the peer that a stream (zero: the link) failed, and how."""
        kind = next((k.__name__ for k in type(error).__mro__ if k.__name__ in _ERRORS), "PeerError")
        message, hint = _one_line(error.message), _one_line(error.hint)
        told = json_of({"kind": kind, "message": message, "hint": hint})
        return frame(Kind.ERROR, stream, told)

    def credit(self, stream: bytes, total: int) -> bytes:
        """Tell the peer how many DATA bytes of a stream this side has consumed so far."""
        return frame(Kind.CREDIT, stream, total.to_bytes(8, "big"))

    def goodbye(self, stream: bytes = LINK_STREAM) -> bytes:
        """The last frame of a stream, or of the link."""
        return frame(Kind.GOODBYE, stream, b"")

    # ── bytes in, events out ──

    @property
    def under_way(self) -> tuple[bytes, int]:
        """Stream of the DATA that may come next, and how many bytes of its frame do.

        The last one's, if its frame has ended; stream zero if it is no DATA that comes next.
        """
        if self._pending or self._kind not in (None, Kind.DATA):
            return LINK_STREAM, 0
        return self._stream, self._left

    def went_by(self, left: int) -> None:
        """DATA of that stream was taken elsewhere; of its last frame so many bytes are to come."""
        self._kind, self._left = Kind.DATA if left else None, left

    def receive(self, data: Buffer) -> Iterator[Event]:
        """The events in `data`, in order; exhaust it before the next call.

        Raises: WireError, now and at every later call, at the first byte that is not the protocol.
        """
        if self._broken is not None:
            raise self._broken
        view = memoryview(data)
        at, end = 0, len(view)
        while at < end:
            if self._kind is Kind.DATA:
                chunk = view[at : at + self._left]
                at += len(chunk)
                self._left -= len(chunk)
                self._kind = Kind.DATA if self._left else None
                yield Data(self._stream, chunk)
                continue
            if self._kind is None and not self._pending and end - at >= HEADER_BYTES:
                start, length, stream = _DATA_HEADER.unpack_from(view, at)
                fits = 0 < length <= MAX_DATA and stream != LINK_STREAM
                if start == _DATA_START and fits and self.state is State.OPEN:
                    at += HEADER_BYTES
                    self._kind, self._left, self._stream = Kind.DATA, length, stream
                    continue
            piece = view[at : at + self._left] if self._kind else self._rest_of_header(view, at)
            at += len(piece)
            self._pending += piece
            event = self._advance(len(piece))
            if event is not None:
                yield event

    def _rest_of_header(self, view: memoryview, at: int) -> memoryview:
        return view[at : at + HEADER_BYTES - len(self._pending)]

    def _advance(self, came: int) -> Event | None:
        """Act on a complete header or payload in `_pending`; None while it is incomplete."""
        try:
            if self._kind is None:
                self._check_start()
                if len(self._pending) < HEADER_BYTES:
                    return None
                self._open_frame()
                return self._close_frame(b"") if self._left == 0 else None
            self._left -= came
            if self._left:
                return None
            payload = bytes(self._pending)
            self._pending.clear()
            return self._close_frame(payload)
        except WireError as error:
            self._broken = error
            self.state = State.CLOSED
            self._pending.clear()
            raise

    def _check_start(self) -> None:
        """Refuse a wrong version or kind before the rest of the header has come."""
        version, *kind = self._pending[:2]
        if version != _FRAME_VERSION:
            tls = bytes(self._pending[:2]) == _TLS_RECORD[: len(self._pending)]
            raise self._unlike(
                f"frame version {_FRAME_VERSION}",
                "a TLS record" if tls else f"0x{version:02x}",
                f"{self.peer} uses TLS, this side plain TCP: start both alike" if tls else "",
            )
        if kind and kind[0] not in _KINDS:
            raise self._unlike(f"a frame kind of {Kind.HELLO:d} … {Kind.GOODBYE:d}", str(kind[0]))

    def _open_frame(self) -> None:
        _, number, reserved, length, stream = _HEADER.unpack(self._pending)
        self._pending.clear()
        kind = Kind(number)
        law = _LAWS[kind]
        if kind not in _MAY_RECEIVE[self.state]:
            raise self._out_of_turn(kind)
        if reserved:
            raise self._unlike("reserved bits of zero", f"0x{reserved:04x}")
        if not law.least <= length <= law.most:
            expected = f"{law.least} … {law.most}" if law.least < law.most else f"{law.least}"
            raise self._unlike(f"{expected} bytes in a {kind.name} frame", str(length))
        on_link = stream == LINK_STREAM
        if law.on is not _On.ANY and on_link != (law.on is _On.LINK):
            raise self._unlike(f"{law.on.value} in a {kind.name} frame", stream.hex())
        if self.state is State.GREETING and not on_link:
            raise self._out_of_turn(kind)
        self._kind, self._left, self._stream = kind, length, stream

    def _close_frame(self, payload: bytes) -> Event:
        kind, stream, self._kind = self._kind, self._stream, None
        if kind is Kind.HELLO:
            return self._greeted(self._object(kind, payload))
        if kind is Kind.CONTROL:
            return Message(stream, self._object(kind, payload), len(payload))
        if kind is Kind.ERROR:
            if stream == LINK_STREAM:
                self.state = State.CLOSED
            return self._failure(stream, self._object(kind, payload))
        if kind is Kind.PING:
            return Ping(payload)
        if kind is Kind.PONG:
            return Pong(payload)
        if kind is Kind.CREDIT:
            return Credit(stream, int.from_bytes(payload, "big"))
        if stream == LINK_STREAM:
            self.state = State.CLOSED
        return Goodbye(stream)

    def _greeted(self, greeting: dict[str, object]) -> Hello:
        protocol, role, window = (greeting.get(k) for k in ("protocol", "role", "window"))
        if type(protocol) is not int or protocol != PROTOCOL:
            raise self._unlike(
                f"protocol {PROTOCOL} in HELLO",
                _shown(protocol),
                "run the same version of mpcserve on every machine",
            )
        if not isinstance(role, str) or role not in ROLES:
            raise self._unlike(f"a role of {', '.join(ROLES)} in HELLO", _shown(role))
        if type(window) is not int or not MIN_WINDOW <= window <= MAX_WINDOW:
            raise self._unlike(f"a window of {MIN_WINDOW} … 2^62 in HELLO", _shown(window))
        self.state = State.OPEN
        return Hello(role, window)

    def _failure(self, stream: bytes, told: dict[str, object]) -> Failure:
        kind, message, hint = (told.get(k) for k in ("kind", "message", "hint"))
        if not (isinstance(kind, str) and isinstance(message, str) and isinstance(hint, str)):
            raise self._unlike("texts `kind`, `message`, `hint` in ERROR", _shown(sorted(told)))
        return Failure(stream, _one_line(kind), _one_line(message), _one_line(hint))

    def _object(self, kind: Kind, payload: bytes) -> dict[str, object]:
        try:
            return parse_message(payload)
        except (ValueError, RecursionError) as error:
            what = "too deep" if isinstance(error, RecursionError) else str(error)
            raise self._unlike(f"a JSON object in {kind.name}", _one_line(what[:100])) from None

    def _out_of_turn(self, kind: Kind) -> WireError:
        expected = {
            State.GREETING: "HELLO first",
            State.OPEN: "one HELLO only",
            State.CLOSED: "nothing after the end of the link",
        }[self.state]
        return self._unlike(expected, f"{kind.name}")

    def _unlike(self, expected: str, got: str, hint: str = "") -> WireError:
        return WireError(
            f"{self.peer} sent bytes that are not the protocol: expected {expected}, got {got}",
            hint or "check that the address is an mpcserve server of the same version",
        )


def frame(kind: Kind, stream: bytes, payload: bytes) -> bytes:
    """One whole frame."""
    assert len(stream) == STREAM_BYTES and len(payload) <= _LAWS[kind].most
    return _HEADER.pack(_FRAME_VERSION, kind, 0, len(payload), stream) + payload


_KINDS = frozenset(int(kind) for kind in Kind)


def _one_line(text: str) -> str:
    """Printable, one line, bounded: a peer's text may end up in a log."""
    clean = "".join(c if c.isprintable() else " " for c in text[: MAX_ERROR_TEXT + 1])
    return clean if len(clean) <= MAX_ERROR_TEXT else clean[: MAX_ERROR_TEXT - 1] + "…"


def _shown(value: object) -> str:
    return _one_line(repr(value))[:60]
