"""The wire engine: frames, handshake, limits. Frames are built here by hand, from the table."""

from __future__ import annotations

import itertools
import json
import random
import struct

import pytest

from mpcserve import errors, wire
from mpcserve.errors import WireError
from mpcserve.wire import (
    Credit,
    Data,
    Event,
    Failure,
    Goodbye,
    Hello,
    Message,
    Ping,
    Pong,
    Session,
    State,
)

ZERO = bytes(16)
STREAM = bytes(range(1, 17))
HELLO, CONTROL, DATA, ERROR, PING, PONG, CREDIT, GOODBYE = range(1, 9)
WINDOW = 1 << 20


def raw(
    kind: int,
    payload: bytes = b"",
    stream: bytes = ZERO,
    *,
    version: int = 1,
    length: int | None = None,
    reserved: int = 0,
) -> bytes:
    """A frame by the table in wire.py's docstring, whether lawful or not."""
    length = len(payload) if length is None else length
    return struct.pack(">BBHI", version, kind, reserved, length) + stream + payload


def hello(**changes: object) -> bytes:
    return raw(
        HELLO, json.dumps({"protocol": 1, "role": "bob", "window": WINDOW} | changes).encode()
    )


def session() -> Session:
    return Session("alice", WINDOW, "bob at 10.0.0.2:9000")


def opened() -> Session:
    s = session()
    assert list(s.receive(hello())) == [Hello("bob", WINDOW)]
    return s


def events(s: Session, data: bytes, cuts: list[int] | None = None) -> list[Event]:
    """Feed in pieces; DATA chunks are copied and joined, for they are views."""
    got: list[Event] = []
    bounds = [0, *(cuts or []), len(data)]
    for start, stop in itertools.pairwise(bounds):
        for event in s.receive(data[start:stop]):
            if isinstance(event, Data):
                last = got.pop() if got and isinstance(got[-1], Data) else None
                before = b""
                if isinstance(last, Data) and last.stream == event.stream:
                    before = bytes(last.chunk)
                elif last is not None:
                    got.append(last)
                event = Data(event.stream, memoryview(before + bytes(event.chunk)))
            got.append(event)
    return got


def refused(s: Session, data: bytes) -> str:
    with pytest.raises(WireError) as caught:
        events(s, data)
    assert caught.value.exit_code == 4 and caught.value.hint
    assert "bob at 10.0.0.2:9000" in caught.value.message
    return caught.value.message


def test_the_encoders_write_the_table() -> None:
    s = session()
    greeting = {"protocol": 1, "role": "alice", "window": WINDOW}
    assert s.hello() == raw(HELLO, json.dumps(greeting, separators=(",", ":")).encode())
    assert s.message(STREAM, {"a": [1]}) == raw(CONTROL, b'{"a":[1]}', STREAM)
    assert s.data_header(STREAM, 3) + b"xyz" == raw(DATA, b"xyz", STREAM)
    assert s.ping(b"12345678") == raw(PING, b"12345678")
    assert s.pong(b"12345678") == raw(PONG, b"12345678")
    assert s.credit(STREAM, 258) == raw(CREDIT, bytes(6) + b"\x01\x02", STREAM)
    assert s.goodbye() == raw(GOODBYE) and s.goodbye(STREAM) == raw(GOODBYE, b"", STREAM)
    told = {"kind": "Refused", "message": "no", "hint": "ask"}
    assert s.error(STREAM, errors.Refused("no", "ask")) == raw(
        ERROR, json.dumps(told, separators=(",", ":")).encode(), STREAM
    )


def test_every_kind_arrives_however_the_bytes_are_cut() -> None:
    seed = 20
    print("seed", seed)
    rng = random.Random(seed)
    payload = rng.randbytes(70_000)
    stream = b"".join(
        [
            hello(),
            raw(CONTROL, b'{"x":{"y":[1,2.5,null,true,"\\u03bb"]}}', STREAM),
            raw(DATA, payload[:50_000], STREAM),
            raw(DATA, payload[50_000:], STREAM),
            raw(PING, b"abcdefgh"),
            raw(PONG, b"hgfedcba"),
            raw(CREDIT, (1 << 40).to_bytes(8, "big"), STREAM),
            raw(ERROR, b'{"kind":"PeerLost","message":"m","hint":"h"}', STREAM),
            raw(GOODBYE, b"", STREAM),
            raw(GOODBYE),
        ]
    )
    expected = [
        Hello("bob", WINDOW),
        Message(STREAM, {"x": {"y": [1, 2.5, None, True, "λ"]}}, 38),
        Data(STREAM, memoryview(payload)),
        Ping(b"abcdefgh"),
        Pong(b"hgfedcba"),
        Credit(STREAM, 1 << 40),
        Failure(STREAM, "PeerLost", "m", "h"),
        Goodbye(STREAM),
        Goodbye(ZERO),
    ]
    for cuts in (0, 1, 2, 5, 50, 5000):
        s = session()
        where = sorted(rng.randrange(len(stream)) for _ in range(cuts))
        assert events(s, stream, where) == expected
        assert s.state is State.CLOSED
    small = stream[: len(hello()) + 62] + raw(GOODBYE)
    assert len(events(session(), small, list(range(1, len(small))))) == 3


def test_data_is_a_view_of_the_callers_buffer() -> None:
    buffer = bytearray(raw(DATA, b"payload", STREAM))
    (event,) = opened().receive(buffer)
    assert isinstance(event, Data)
    buffer[-7:] = b"PAYLOAD"
    assert bytes(event.chunk) == b"PAYLOAD"


@pytest.mark.parametrize("kind", [CONTROL, DATA, PING, PONG, CREDIT])
def test_nothing_may_come_before_hello(kind: int) -> None:
    message = refused(session(), raw(kind, b"12345678", ZERO if kind in (PING, PONG) else STREAM))
    assert "expected HELLO first" in message and f"got {wire.Kind(kind).name}" in message


def test_a_peer_may_refuse_or_leave_before_hello() -> None:
    s = session()
    refusal = raw(ERROR, b'{"kind":"Refused","message":"full","hint":""}')
    assert events(s, refusal) == [Failure(ZERO, "Refused", "full", "")]
    assert s.state is State.CLOSED
    s = session()
    assert events(s, raw(GOODBYE)) == [Goodbye(ZERO)]
    assert "HELLO first" in refused(session(), raw(GOODBYE, b"", STREAM))


def test_hello_comes_once() -> None:
    assert "one HELLO only" in refused(opened(), hello())


def test_nothing_may_come_after_the_end() -> None:
    s = opened()
    assert events(s, raw(GOODBYE)) == [Goodbye(ZERO)]
    assert "nothing after the end" in refused(s, raw(PING, bytes(8)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": 2}, "expected protocol 1 in HELLO, got 2"),
        ({"protocol": True}, "got True"),
        ({"protocol": 1.0}, "got 1.0"),
        ({"protocol": None}, "got None"),
        ({"role": "mallory"}, "got 'mallory'"),
        ({"role": ["alice"]}, "got ['alice']"),
        ({"window": 0}, "window"),
        ({"window": 1 << 63}, "window"),
        ({"window": "1"}, "window"),
    ],
)
def test_hello_says_protocol_role_and_window(changes: dict[str, object], words: str) -> None:
    assert words in refused(session(), hello(**changes))


def test_hello_may_say_more_than_this_version_knows() -> None:
    assert events(session(), hello(features=["x"])) == [Hello("bob", WINDOW)]


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        (CONTROL, 2, 1 << 20),
        (DATA, 1, 256 << 10),
        (ERROR, 2, 16 << 10),
        (PING, 8, 8),
        (PONG, 8, 8),
        (CREDIT, 8, 8),
        (GOODBYE, 0, 0),
    ],
)
def test_lengths_are_checked_before_the_payload_comes(kind: int, least: int, most: int) -> None:
    stream = ZERO if kind in (PING, PONG) else STREAM
    for length in (least, most):
        assert opened().receive(raw(kind, b"", stream, length=length)) is not None
        s = opened()
        events(s, raw(kind, b"", stream, length=length))
        assert s.state is State.OPEN
    for length in {least - 1, most + 1, 2**32 - 1} - {-1}:
        message = refused(opened(), raw(kind, b"", stream, length=length))
        assert f"got {length}" in message and wire.Kind(kind).name in message
    assert "HELLO" in refused(session(), raw(HELLO, b"", length=4097))


@pytest.mark.parametrize("kind", [PING, PONG])
def test_frames_of_the_link_name_no_stream(kind: int) -> None:
    assert "stream zero" in refused(opened(), raw(kind, bytes(8), STREAM))


@pytest.mark.parametrize("kind", [CONTROL, DATA, CREDIT])
def test_frames_of_a_stream_name_one(kind: int) -> None:
    assert "a stream other than zero" in refused(opened(), raw(kind, bytes(8)))


@pytest.mark.parametrize("kind", [0, 9, 77, 255])
def test_unknown_kinds_are_refused_at_the_second_byte(kind: int) -> None:
    assert f"got {kind}" in refused(opened(), raw(kind)[:2])


def test_a_wrong_version_is_refused_at_the_first_byte() -> None:
    assert "expected frame version 1, got 0x47" in refused(session(), b"G")
    assert "reserved" in refused(opened(), raw(PING, bytes(8), reserved=1))


def test_tls_bytes_on_a_plain_link_are_recognised() -> None:
    with pytest.raises(WireError, match="TLS record") as caught:
        list(session().receive(b"\x16\x03\x01\x02\x00"))
    assert "start both alike" in caught.value.hint


@pytest.mark.parametrize(
    "payload",
    [
        b"[]",
        b"12",
        b'"x"',
        b"null",
        b"{]",
        b"{}{}",
        b'{"a":1',
        b"\xff\xfe",
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":' + b"9" * 21 + b"}",
        b'{"a":' + b"9" * 1_000_000 + b"}",
        b'{"a":"\\ud800"}',
        b'{"\\udfff":1}',
        b'{"a":' + b"[" * 16 + b"]" * 16 + b"}",
        b'{"a":' + b"[" * 300_000 + b"]" * 300_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"a":[' + b"0," * 200_000 + b"0]}",
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda p: repr(p[:16]) + str(len(p)),
)
def test_a_message_that_is_not_a_bounded_json_object_is_refused(payload: bytes) -> None:
    message = refused(opened(), raw(CONTROL, payload, STREAM))
    assert "a JSON object in CONTROL" in message and len(message) < 400


def test_messages_round_trip_up_to_their_limits() -> None:
    nested: object = "deep"
    for _ in range(14):
        nested = [nested]
    sent = {"big": 2**64 - 1, "neg": -(2**63), "nested": nested, "text": "λ\n\U0001f600", "f": 0.1}
    (got,) = events(opened(), session().message(STREAM, sent))
    assert isinstance(got, Message) and got.message == sent
    fits = {"a": "x" * ((1 << 20) - 8)}
    (got,) = events(opened(), session().message(STREAM, fits))
    assert isinstance(got, Message) and got.message == fits and got.size == 1 << 20
    with pytest.raises(WireError, match="1048577 bytes of JSON"):
        session().message(STREAM, {"a": "x" * ((1 << 20) - 7)})


NAMES = "MpcError ConfigError InputError ModelError PlanError PeerError PeerLost PeerTimeout"


@pytest.mark.parametrize("kind", [*NAMES.split(" "), "WireError", "Refused"])
def test_an_error_arrives_as_the_same_class_with_the_peer_named(kind: str) -> None:
    error = getattr(errors, kind)("what happened", "what to do")
    (got,) = events(opened(), session().error(STREAM, error))
    assert isinstance(got, Failure)
    again = got.error("alice")
    assert type(again) is type(error)
    assert (again.message, again.hint) == ("alice: what happened", "what to do")


def test_an_error_class_of_elsewhere_arrives_as_its_nearest_kin() -> None:
    class Spent(errors.Refused):
        pass

    (got,) = events(opened(), session().error(STREAM, Spent("spent")))
    assert isinstance(got, Failure) and type(got.error("bob")) is errors.Refused
    assert type(Failure(STREAM, "SystemExit", "m", "").error("bob")) is errors.PeerError


def test_error_texts_are_one_bounded_line() -> None:
    nasty = 'line\nnext\x1b[31m"\\\ud800' + "\U0001f600" * 5000
    (got,) = events(opened(), session().error(STREAM, errors.PeerError(nasty, nasty)))
    assert isinstance(got, Failure)
    assert got.message.startswith('line next [31m"\\ ') and len(got.message) == 2000
    told = json.dumps({"kind": "PeerLost", "message": "a\nb\x00c", "hint": "h\r\n"}).encode()
    (got,) = events(opened(), raw(ERROR, told, STREAM))
    assert got == Failure(STREAM, "PeerLost", "a b c", "h  ")


@pytest.mark.parametrize("told", [b"{}", b'{"kind":1,"message":"","hint":""}', b'{"kind":"x"}'])
def test_an_error_frame_says_kind_message_and_hint(told: bytes) -> None:
    assert "in ERROR" in refused(opened(), raw(ERROR, told, STREAM))


def test_what_came_before_a_bad_frame_is_delivered() -> None:
    s = opened()
    incoming = s.receive(raw(PING, b"87654321") + b"\x07")
    assert next(incoming) == Ping(b"87654321")
    with pytest.raises(WireError):
        next(incoming)


def test_a_broken_session_stays_broken() -> None:
    s = opened()
    first = refused(s, b"\x00")
    assert s.state is State.CLOSED
    assert refused(s, raw(PING, bytes(8))) == first


def test_at_most_one_control_payload_is_held() -> None:
    s = opened()
    frame = raw(CONTROL, b'{"a":"' + b"x" * ((1 << 20) - 8) + b'"}', STREAM)
    for at in range(0, len(frame) - 1, 65_536):
        assert list(s.receive(frame[at : min(at + 65_536, len(frame) - 1)])) == []
        assert len(s._pending) <= 1 << 20
    assert len(list(s.receive(frame[-1:]))) == 1
    assert len(s._pending) == 0
    for _ in range(64):
        (data,) = events(s, raw(DATA, bytes(1 << 18), STREAM))
        assert isinstance(data, Data) and len(data.chunk) == 1 << 18
        assert len(s._pending) == 0
