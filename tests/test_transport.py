"""Links and channels: what holds on TLS links holds on plain and on memory links."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator

import pytest

from mpcserve import errors
from mpcserve.errors import MpcError, PeerLost, PeerTimeout, Refused, WireError
from mpcserve.transport import (
    Channel,
    Hooks,
    Link,
    LinkOptions,
    MemoryNetwork,
    NetworkProfile,
    TlsFiles,
)
from tests.transport_support import WAIT, Authority, Network, new_id, quickest


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TlsFiles]:
    authority = Authority(tmp_path_factory.mktemp("pki"))
    return {role: authority.issue(role) for role in ("alice", "bob")}


@pytest.fixture(params=["tls", "plain", "memory"])
def network(request: pytest.FixtureRequest, files: dict[str, TlsFiles]) -> Iterator[Network]:
    network = Network(request.param, files)
    yield network
    network.close()


def echo(channel: Channel) -> None:
    """Answer a request {"n": …} with the n bytes that follow it."""
    n = channel.receive_message("request", WAIT)["n"]
    assert isinstance(n, int)
    channel.send(channel.receive(n, "bytes to echo", WAIT))
    channel.send_message({"echoed": n})


# ── streams ──


def test_messages_and_data_arrive_in_the_order_they_were_sent(network: Network) -> None:
    alice, bob = network.pair()
    assert (alice.peer, bob.peer) == ("bob", "alice")
    stream = new_id()
    out, into = bob.channel(stream), alice.channel(stream)
    for i in range(20):
        out.send_message({"i": i, "text": "λ"})
        out.send(bytes([i]) * (i * 1000 + 1))
    for i in range(20):
        assert into.receive_message("message", WAIT) == {"i": i, "text": "λ"}
        assert into.receive(i * 1000 + 1, "data", WAIT) == bytes([i]) * (i * 1000 + 1)


def test_data_may_be_taken_in_other_pieces_than_it_was_sent(network: Network) -> None:
    alice, bob = network.pair()
    seed = 7
    print("seed", seed)
    rng = random.Random(seed)
    data = rng.randbytes(3_000_000)
    stream = new_id()
    out, into = alice.channel(stream), bob.channel(stream)

    def send() -> None:
        for piece in pieces(rng, data):
            out.send(piece)

    sender = threading.Thread(target=send)
    sender.start()
    assert b"".join(into.receive(len(p), "p", WAIT) for p in pieces(random.Random(1), data)) == data
    sender.join()
    assert out.payload_sent == into.payload_received == len(data)


def pieces(rng: random.Random, data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        size = rng.choice([1, 100, 16_384, 65_536, 65_537, 262_144, 262_145, 1_000_000])
        yield data[at : at + size]
        at += size


def test_any_contiguous_buffer_can_be_sent_and_reused_at_once(network: Network) -> None:
    import numpy as np

    alice, bob = network.pair()
    stream = new_id()
    out, into = alice.channel(stream), bob.channel(stream)
    words = np.arange(100_000, dtype=np.uint64).reshape(100, 1000)
    out.send(memoryview(words))
    words[:] = 0
    out.send(bytearray(b"abc"))
    out.send(b"")
    assert np.array_equal(
        np.frombuffer(into.receive(800_000, "words", WAIT), np.uint64), np.arange(100_000)
    )
    assert into.receive(3, "text", WAIT) == b"abc"
    assert into.receive(0, "nothing", WAIT) == b""


def test_both_sides_can_send_a_lot_before_they_receive(network: Network) -> None:
    alice, bob = network.pair(options=LinkOptions(send_queue=1 << 20))
    size = 24 << 20
    stream = new_id()
    ends = alice.channel(stream), bob.channel(stream)
    got: list[int] = []

    def swap(channel: Channel, fill: bytes) -> None:
        channel.send(fill * size)
        got.append(sum(map(len, bytes(channel.receive(size, "swap", WAIT)).split(fill))))

    threads = [
        threading.Thread(target=swap, args=(end, fill))
        for end, fill in zip(ends, (b"\1", b"\2"), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert got == [size, size]


def test_a_stream_opened_with_a_message_goes_to_on_stream(network: Network) -> None:
    alice, bob = network.pair(alice=echo, bob=echo)
    for link in (alice, bob):
        with link.channel(new_id()) as channel:
            channel.send_message({"n": 5})
            channel.send(b"hello")
            assert channel.receive(5, "echo", WAIT) == b"hello"
            assert channel.receive_message("end", WAIT) == {"echoed": 5}
            with pytest.raises(PeerLost, match="closed the stream"):
                channel.receive(1, "more", WAIT)


def test_a_stream_opened_with_data_waits_for_its_channel(network: Network) -> None:
    served: list[Channel] = []
    alice, bob = network.pair(alice=served.append)
    stream = new_id()
    bob.channel(stream).send(b"early")
    fence(bob, alice)
    assert alice.channel(stream).receive(5, "early bytes", WAIT) == b"early"
    assert served == []


def fence(sender: Link, receiver: Link) -> None:
    """Returns when `receiver` has seen all that `sender` sent so far."""
    stream = new_id()
    sender.channel(stream).send(b"x")
    receiver.channel(stream).receive(1, "fence", WAIT)


def test_many_streams_at_once_keep_apart(network: Network) -> None:
    _, bob = network.pair(alice=echo)
    seed = 11
    print("seed", seed)
    rng = random.Random(seed)
    work = [rng.randbytes(rng.choice([1, 1000, 70_000, 600_000])) for _ in range(40)]
    wrong: list[int] = []

    def request(i: int) -> None:
        with bob.channel(new_id()) as channel:
            channel.send_message({"n": len(work[i])})
            channel.send(work[i])
            if channel.receive(len(work[i]), "echo", WAIT) != work[i]:
                wrong.append(i)
            channel.receive_message("end", WAIT)

    threads = [threading.Thread(target=request, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert wrong == [] and network.log.errors.empty()


def test_a_small_message_does_not_wait_for_a_large_one(network: Network) -> None:
    slow = LinkOptions(network=NetworkProfile(0.0, 100e6))  # 8 MB take 0.6 s
    alice, bob = network.pair(options=slow)

    def share_of_the_large_one() -> float:
        large, small = new_id(), new_id()
        bob.channel(large).send(bytes(8_000_000))
        started = time.monotonic()
        bob.channel(small).send(b"now")
        assert alice.channel(small).receive(3, "small", WAIT) == b"now"
        took = time.monotonic() - started
        alice.channel(large).receive(8_000_000, "large", WAIT)
        return took / (time.monotonic() - started)

    assert quickest(share_of_the_large_one, 0.5) < 0.5


def test_message_and_data_are_not_confused(network: Network) -> None:
    alice, bob = network.pair()
    stream = new_id()
    out, into = bob.channel(stream), alice.channel(stream)
    out.send(b"ab")
    with pytest.raises(WireError, match=r"bob at .*: expected a message \(reply\), got 2 bytes"):
        into.receive_message("reply", WAIT)
    out.send_message({})
    with pytest.raises(WireError, match=r"bob at .*: expected 3 bytes \(result\), got a message"):
        into.receive(3, "result", WAIT)


@pytest.mark.parametrize("size", [0, 1, 1000, 1 << 20])
def test_data_may_follow_a_message_in_its_packet(network: Network, size: int) -> None:
    alice, bob = network.pair()
    stream, data = new_id(), bytes(range(256)) * (size // 256) + bytes(size % 256)
    out, into = bob.channel(stream), alice.channel(stream)
    for i in range(3):
        out.send_message({"i": i}, bytearray(data))
        assert into.receive_message("message", WAIT) == {"i": i}
        assert into.receive(size, "data", WAIT) == data
    assert out.payload_sent == into.payload_received == 3 * size


@pytest.mark.parametrize("size", [0, 1, 1000, (16 << 10) - 1, 16 << 10, 100_000, 5 << 20])
def test_the_last_words_on_a_stream_come_with_its_end(network: Network, size: int) -> None:
    alice, bob = network.pair()
    out = bob.channel(new_id())
    into = alice.channel(out.stream)
    data = bytes(range(256)) * (size // 256 + 1)
    before = bob.counters.payload_sent
    out.finish({"size": size}, bytearray(data[:size]))
    assert bytes(into.receive(size, "data", WAIT)) == data[:size]
    assert into.receive_message("a message", WAIT) == {"size": size}
    assert out.payload_sent == size == bob.counters.payload_sent - before
    with pytest.raises(PeerLost, match="closed the stream"):
        into.receive(1, "more", WAIT)
    with pytest.raises(PeerLost):
        out.send(b"more")


def test_what_the_peer_has_ended_is_ended_without_a_word(network: Network) -> None:
    alice, bob = network.pair()
    for finish in (True, False):
        out = bob.channel(new_id())
        into = alice.channel(out.stream)
        into.send_message({"here": 1})
        assert out.receive_message("a message", WAIT) == {"here": 1}
        if finish:
            out.finish({"last": 1})
            assert into.receive_message("a message", WAIT) == {"last": 1}
        else:
            out.close()
        with pytest.raises(PeerLost):
            into.receive(1, "more", WAIT)
        said = alice.counters.overhead_sent, bob.counters.overhead_sent
        into.close()
        out.close()
        assert said == (alice.counters.overhead_sent, bob.counters.overhead_sent)


def test_last_words_wait_for_room_as_all_others_do(network: Network) -> None:
    """Behind what is queued, and behind the peer's window."""
    alice, bob = network.pair(options=LinkOptions(window=4096))
    out = bob.channel(new_id())
    into = alice.channel(out.stream)
    out.send(bytes(4000))
    thread = threading.Thread(target=out.finish, args=({"last": 1}, bytearray(b"x" * 1000)))
    thread.start()
    assert bytes(into.receive(5000, "data", WAIT)) == bytes(4000) + b"x" * 1000
    assert into.receive_message("a message", WAIT) == {"last": 1}
    thread.join(WAIT)
    assert not thread.is_alive()


def test_what_is_next_is_known_before_it_is_taken(network: Network) -> None:
    alice, bob = network.pair()
    stream = new_id()
    out, into = bob.channel(stream), alice.channel(stream)
    with pytest.raises(PeerTimeout, match=r"waited 0\.05 s for her turn from bob at"):
        into.message_is_next("her turn", 0.05)
    out.send_message({"i": 1}, b"abc")
    for _ in range(2):
        assert into.message_is_next("her turn", WAIT)
    assert into.receive_message("message", WAIT) == {"i": 1}
    for _ in range(2):
        assert not into.message_is_next("data", WAIT)
    assert into.receive(3, "data", WAIT) == b"abc"
    out.fail(Refused("no more"))
    with pytest.raises(Refused, match="no more"):
        into.message_is_next("her turn", WAIT)


def test_a_peer_that_lives_answers_and_one_that_does_not_is_silent(network: Network) -> None:
    alice, bob = network.pair()
    assert alice.answers(WAIT) and bob.answers(WAIT)
    stuck = threading.Event()
    heard = bob.receiver.hand_on
    bob.receiver.hand_on = lambda *received: stuck.wait(WAIT) and heard(*received)  # type: ignore[method-assign]
    began = time.monotonic()
    assert not alice.answers(0.2) and 0.2 <= time.monotonic() - began < WAIT / 2
    stuck.set()
    assert alice.answers(WAIT)


def test_a_message_over_its_limit_is_refused_here(network: Network) -> None:
    _, bob = network.pair()
    channel = bob.channel(new_id())
    with pytest.raises(WireError, match=r"alice at .* bytes of JSON, expected at most 1048576"):
        channel.send_message({"a": "x" * (1 << 20)})


# ── ends ──


def test_a_late_answer_is_named_and_what_came_stays(network: Network) -> None:
    alice, bob = network.pair()
    stream = new_id()
    out, into = bob.channel(stream), alice.channel(stream)
    out.send(b"abc")
    fence(bob, alice)
    with pytest.raises(
        PeerTimeout, match=r"waited 0\.05 s for round 3 from bob at .*: 3 of 5 bytes came"
    ) as caught:
        into.receive(5, "round 3", 0.05)
    assert caught.value.hint and alice.address in caught.value.message
    with pytest.raises(PeerTimeout, match=r"waited 0\.05 s for the reply from bob at"):
        alice.channel(new_id()).receive_message("the reply", 0.05)
    out.send(b"de")
    assert into.receive(5, "round 3", WAIT) == b"abcde"


def test_what_is_expected_comes_in_order_whenever_it_comes(network: Network) -> None:
    """Before it is expected, between, and behind; what is late stays; an end is told."""
    alice, bob = network.pair()
    stream = new_id()
    out, into = bob.channel(stream), alice.channel(stream)
    out.send(b"ab")
    fence(bob, alice)
    into.expect(5)
    out.send(b"cd")
    fence(bob, alice)
    with pytest.raises(PeerTimeout, match=r"round 3 from bob at .*: 4 of 5 bytes came"):
        into.receive(5, "round 3", 0.05)
    out.send(b"efgh")
    assert into.receive(5, "round 3", WAIT) == b"abcde"
    fence(bob, alice)
    into.expect(3)
    out.send_message({"then": 1})
    assert into.receive(3, "round 4", WAIT) == b"fgh"
    into.expect(2)
    with pytest.raises(WireError, match="expected 2 bytes"):
        into.receive(2, "round 5", WAIT)
    assert into.receive_message("the reply", WAIT) == {"then": 1}
    into.expect(2)
    out.send(b"x")
    out.fail(Refused("no more", "stop"))
    with pytest.raises(Refused, match="no more"):
        into.receive(2, "round 6", WAIT)


@pytest.mark.parametrize("kind", [Refused, errors.ConfigError, PeerLost, PeerTimeout, MpcError])
def test_a_failed_stream_raises_the_same_error_at_the_peer(
    network: Network, kind: type[MpcError]
) -> None:
    alice, bob = network.pair()
    stream = new_id()
    into, out = alice.channel(stream), bob.channel(stream)
    into.send(b"unread")
    fence(alice, bob)
    waiting = threading.Thread(target=lambda: out.fail(kind("bundle 7 is spent", "take another")))
    waiting.start()
    for _ in range(2):  # pending and later
        with pytest.raises(MpcError) as caught:
            into.receive(1, "result", WAIT)
        assert type(caught.value) is kind
        assert caught.value.message.startswith("bob at ")
        assert caught.value.message.endswith(": bundle 7 is spent")
        assert caught.value.hint == "take another"
    with pytest.raises(kind):
        into.send(b"more")
    waiting.join()
    with pytest.raises(kind, match="bundle 7"):
        out.receive(6, "unread", WAIT)


def test_a_stream_that_failed_before_the_other_side_came_is_not_lost(network: Network) -> None:
    alice, bob = network.pair()
    stream = new_id()
    bob.channel(stream).fail(Refused("no such deployment"))
    fence(bob, alice)
    with pytest.raises(Refused, match=r"bob at .*: no such deployment"):
        alice.channel(stream).receive(1, "input", WAIT)


def test_what_was_sent_before_a_stream_was_closed_is_delivered(network: Network) -> None:
    alice, bob = network.pair()
    stream = new_id()
    with bob.channel(stream) as out:
        out.send(b"last words")
        out.send_message({"end": True})
    into = alice.channel(stream)
    assert into.receive(10, "words", WAIT) == b"last words"
    assert into.receive_message("end", WAIT) == {"end": True}
    with pytest.raises(PeerLost, match=r"bob at .* closed the stream, after .* waiting for more"):
        into.receive_message("more", WAIT)
    with pytest.raises(PeerLost, match="closed the stream"):
        into.send(b"x")


def test_what_was_sent_before_a_link_was_closed_is_delivered(network: Network) -> None:
    alice, bob = network.pair()
    stream = new_id()
    bob.channel(stream).send(bytes(5_000_000))
    bob.close()
    # The id was opened by bob's frames, and the link has ended, maybe before we ask for it.
    assert "closed" in str(network.log.closed.get(timeout=WAIT))
    assert "closed" in str(network.log.closed.get(timeout=WAIT))
    assert network.log.errors.empty()
    assert alice.reason is not None and "bob" in alice.reason.message
    with pytest.raises(PeerLost, match="closed the link"):
        alice.channel(new_id())


def test_data_is_complete_although_the_link_was_closed_behind_it(network: Network) -> None:
    alice, bob = network.pair()
    stream = new_id()
    into = alice.channel(stream)
    bob.channel(stream).send(bytes(5_000_000))
    bob.close()
    assert len(into.receive(5_000_000, "all of it", WAIT)) == 5_000_000
    with pytest.raises(PeerLost, match="closed the link, after"):
        into.receive(1, "more", WAIT)


def test_a_closed_stream_takes_nothing_more_and_its_id_is_spent(network: Network) -> None:
    alice, bob = network.pair()
    stream = new_id()
    out, into = bob.channel(stream), alice.channel(stream)
    into.close()
    with pytest.raises(PeerLost, match="this side closed"):
        into.send(b"x")
    with pytest.raises(PeerLost, match="this side closed"):
        into.receive(1, "x", WAIT)
    out.send(b"dropped")
    fence(bob, alice)
    with pytest.raises(Refused, match="used before"):
        alice.channel(stream)
    for bad in (bytes(16), b"short", bytes(17)):
        with pytest.raises(Refused, match="16 bytes"):
            alice.channel(bad)


def test_a_lost_connection_fails_all_streams_and_names_the_peer(network: Network) -> None:
    alice, bob = network.pair()
    channels = [alice.channel(new_id()) for _ in range(3)]
    caught: list[str] = []

    def wait(channel: Channel) -> None:
        with pytest.raises(PeerLost) as lost:
            channel.receive(10, "round 2", WAIT)
        caught.append(lost.value.message)

    threads = [threading.Thread(target=wait, args=(c,)) for c in channels]
    for thread in threads:
        thread.start()
    bob._made_of.sock.shutdown(2)  # as if its process was killed
    for thread in threads:
        thread.join(WAIT)
    assert len(caught) == 3
    for message in caught:
        assert message.startswith(f"lost the connection to bob at {alice.address}")
        assert "waiting for round 2" in message
    assert isinstance(network.log.error(), PeerLost)
    for channel in channels:
        with pytest.raises(PeerLost):
            channel.send(b"x")


def test_a_stream_with_queued_data_can_be_failed_after_its_link_is_lost(network: Network) -> None:
    slow = LinkOptions(network=NetworkProfile(0.0, 1e6))
    alice, bob = network.pair(options=slow)
    channel = alice.channel(new_id())
    channel.send(bytes(1_000_000))
    bob.refuse(Refused("go away"))
    with pytest.raises(Refused, match=r"bob at .*: go away"):
        channel.receive(1, "answer", WAIT)
    channel.fail(Refused("so be it"))
    channel.close()


def test_closing_joins_all_threads_and_frees_all_descriptors(files: dict[str, TlsFiles]) -> None:
    for kind in ("memory", "tls"):
        threads, descriptors = set(threading.enumerate()), open_descriptors()
        network = Network(kind, files)
        stuck = threading.Event()

        def serve(channel: Channel, stuck: threading.Event = stuck) -> None:
            stuck.set()
            channel.receive(1, "what never comes", 60)

        _, bob = network.pair(alice=serve)
        bob.channel(new_id()).send_message({})
        assert stuck.wait(WAIT)
        network.close()
        assert set(threading.enumerate()) == threads
        assert open_descriptors() <= descriptors  # an earlier test may free its own late


def test_a_link_whose_writer_failed_first_winds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader may be done before the thread that ends the link has told the sender so."""
    closed, gate = threading.Event(), threading.Event()
    with MemoryNetwork() as network:
        one, other = network.pair(
            "bob", "alice", hooks_one=Hooks(on_closed=lambda *_: closed.set())
        )
        finish = one.sender.finish

        def late(parting: bytes, flush: float) -> None:
            if threading.current_thread() is not one._reader:
                assert gate.wait(WAIT)
            finish(parting, flush)

        monkeypatch.setattr(one.sender, "finish", late)
        ending = threading.Thread(target=one.refuse, args=(Refused("go away"),))
        ending.start()
        while one.reason is None:
            time.sleep(0.001)
        other.close()
        assert closed.wait(WAIT)
        gate.set()
        ending.join(WAIT)


def open_descriptors() -> int:
    """How many files this process has open, where the system tells."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


# ── callbacks ──


def test_an_error_in_on_stream_reaches_the_peer_and_the_log(network: Network) -> None:
    def serve(channel: Channel) -> None:
        what = channel.receive_message("request", WAIT)["what"]
        if what == "defect":
            raise ZeroDivisionError("with a secret in its text")
        if what == "refuse":
            raise Refused("model x is not deployed", "deploy it")
        channel.send(b"served")

    _, bob = network.pair(alice=serve)

    def ask(what: str) -> bytes:
        with bob.channel(new_id()) as channel:
            channel.send_message({"what": what})
            return bytes(channel.receive(6, "answer", WAIT))

    with pytest.raises(Refused, match=r"alice at .*: model x is not deployed"):
        ask("refuse")
    assert isinstance(network.log.error(), Refused)
    with pytest.raises(MpcError, match=r"alice at .*: alice failed inside: ZeroDivisionError$"):
        ask("defect")
    assert isinstance(network.log.error(), ZeroDivisionError)
    assert ask("serve") == b"served"
