"""Bytes from a hostile peer: the engine yields events or raises WireError, a listener goes on."""

from __future__ import annotations

import json
import queue
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable

import pytest

from mpcserve.errors import MpcError, WireError
from mpcserve.transport import Channel, LinkOptions, Listener, connect
from mpcserve.wire import MAX_CONTROL, Data, Session, State
from tests.transport_support import WAIT, Authority

ZERO = bytes(16)
STREAMS = [bytes([i]) * 16 for i in (1, 2, 255)]
HELLO = json.dumps({"protocol": 1, "role": "bob", "window": 1 << 20}).encode()
CASES = 120_000
LIVE_CASES = 400


def raw(kind: int, payload: bytes, stream: bytes) -> bytes:
    return struct.pack(">BBHI", 1, kind, 0, len(payload)) + stream + payload


def valid(rng: random.Random) -> bytes:
    """A lawful frame of an open session."""
    stream = rng.choice(STREAMS)
    kind = rng.randrange(2, 9)
    if kind == 2:
        return raw(2, json.dumps(_value(rng, 3, {"k": 1})).encode(), stream)
    if kind == 3:
        return raw(3, rng.randbytes(rng.choice([1, 7, 300])), stream)
    if kind == 4:
        told = {"kind": rng.choice(["Refused", "?"]), "message": "m", "hint": "h"}
        return raw(4, json.dumps(told).encode(), stream)
    if kind in (5, 6):
        return raw(kind, rng.randbytes(8), ZERO)
    return raw(kind, rng.randbytes(8) if kind == 7 else b"", stream)


def _value(rng: random.Random, depth: int, value: object) -> object:
    for _ in range(rng.randrange(depth + 1)):
        value = rng.choice([{"a": value, "λ": 1.5}, {"b": [value, None, "x"]}])
    return value


def flip(rng: random.Random, frame: bytes) -> bytes:
    """A few bytes changed anywhere."""
    bad = bytearray(frame)
    for _ in range(rng.choice([1, 1, 2, 5])):
        bad[rng.randrange(len(bad))] = rng.choice(
            [0, 1, 0x22, 0x5B, 0x7B, 0xFF, rng.randrange(256)]
        )
    return bytes(bad)


def header(rng: random.Random, frame: bytes) -> bytes:
    """Another version, kind, reserved word or length before the same payload."""
    version, kind, reserved, length = struct.unpack(">BBHI", frame[:8])
    field = rng.randrange(4)
    kind = rng.randrange(256) if field == 0 else kind
    reserved = rng.randrange(1 << 16) if field == 1 else reserved
    version = rng.randrange(256) if field == 2 else version
    if field == 3:
        length = rng.choice([0, 1, length + 1, 1 << 14, 1 << 18, (1 << 18) + 1, 1 << 20, 2**32 - 1])
    return struct.pack(">BBHI", version, kind, reserved, length) + frame[8:]


def cut(rng: random.Random, frame: bytes) -> bytes:
    """The end is missing; what follows is taken for it."""
    return frame[: rng.randrange(len(frame))]


def noise(rng: random.Random, frame: bytes) -> bytes:
    """Random bytes, half of them behind a plausible start."""
    return rng.choice([b"", frame[:2], frame[:24]]) + rng.randbytes(rng.randrange(1, 200))


def nested(rng: random.Random, frame: bytes) -> bytes:
    """JSON that is deep, long or unclosed."""
    opening = rng.choice([b"[", b'{"a":', b'{"a":['])
    text = b'{"x":' + opening * rng.randrange(1, 3000) + rng.choice([b"", b"1", b"9" * 5000])
    return raw(rng.choice([2, 4]), text, STREAMS[0])


def intact(rng: random.Random, frame: bytes) -> bytes:
    return frame


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...]
MUTATIONS = (flip, flip, header, header, cut, noise, intact, intact)


def fed(rng: random.Random, session: Session, data: bytes) -> tuple[int, bool]:
    """Events of `data`, fed in one piece or several; and whether it was refused."""
    step = rng.choice([len(data), len(data), 1 + len(data) // 2, 13]) or 1
    events = 0
    try:
        for at in range(0, len(data), step):
            for event in session.receive(data[at : at + step]):
                events += 1
                assert not isinstance(event, Data) or len(event.chunk) <= step
    except WireError as error:
        assert error.message.isprintable() and len(error.message) < 500
        return events, True
    return events, False


@pytest.mark.slow
def test_the_engine_survives_a_hundred_thousand_frames() -> None:
    seed = time.time_ns() % 1_000_000
    print("seed", seed)
    rng = random.Random(seed)
    outcome: Counter[str] = Counter()
    session = Session("alice", 1 << 20, "bob at test")
    fresh = True
    started = time.thread_time()  # of this thread: other work on the machine does not count
    for case in range(CASES):
        if session.state is State.CLOSED or rng.random() < 0.05:
            session = Session("alice", 1 << 20, "bob at test")
            fresh = True
        if fresh and rng.random() < 0.95:
            fed(rng, session, raw(1, HELLO, ZERO))
        fresh = False
        mutate = nested if case % 100 == 0 else rng.choice(MUTATIONS)
        events, refused = fed(rng, session, mutate(rng, valid(rng)))
        assert len(session._pending) <= MAX_CONTROL
        assert (session.state is State.CLOSED) or not refused
        outcome["refused" if refused else "events" if events else "waiting"] += 1
    seconds = time.thread_time() - started
    print(f"{CASES} frames in {seconds:.1f} s: {dict(outcome)}")
    # Each way a frame can go is well covered, so the test tests something.
    assert min(outcome[way] for way in ("refused", "events", "waiting")) > CASES // 50
    assert seconds < 20


@pytest.mark.parametrize("secure", [False, True])
def test_a_listener_survives_hundreds_of_hostile_connections(
    tmp_path_factory: pytest.TempPathFactory, secure: bool
) -> None:
    seed = time.time_ns() % 1_000_000
    print("seed", seed)
    rng = random.Random(seed)
    authority = Authority(tmp_path_factory.mktemp("pki"))
    alice, bob = (authority.issue(role) for role in ("alice", "bob"))
    errors: queue.Queue[Exception] = queue.Queue()
    with Listener(
        "127.0.0.1:0",
        alice if secure else None,
        role="alice",
        on_stream=live,
        on_error=errors.put,
        insecure_plaintext=not secure,
        options=LinkOptions(handshake_timeout=2.0),
    ) as listener:
        host, port = listener.address.split(":")
        for _ in range(LIVE_CASES if not secure else LIVE_CASES // 4):
            attack(rng, (host, int(port)), greet=not secure)
        with connect(
            listener.address,
            bob if secure else None,
            "alice",
            WAIT,
            role="bob",
            insecure_plaintext=not secure,
        ) as link:
            channel = link.channel(STREAMS[0])
            channel.send_message({})
            assert bytes(channel.receive(5, "sign of life", WAIT)) == b"alive"
    told = list(errors.queue)
    assert told and all(isinstance(error, MpcError) for error in told)


def live(channel: Channel) -> None:
    channel.receive_message("request", WAIT)
    channel.send(b"alive")


def attack(rng: random.Random, address: tuple[str, int], greet: bool) -> None:
    """Connect, send a few mutated frames, and leave, politely or not."""
    with socket.create_connection(address, WAIT) as sock:
        data = raw(1, HELLO, ZERO) if greet and rng.random() < 0.9 else b""
        for _ in range(rng.randrange(1, 6)):
            data += rng.choice(MUTATIONS)(rng, valid(rng))
        try:
            sock.sendall(data)
            if rng.random() < 0.5:
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass
            elif rng.random() < 0.5:  # reset instead of an orderly end
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            return  # the listener was faster to hang up
