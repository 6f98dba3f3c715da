"""A thread that waits for a round reads the socket itself, and nothing else suffers from it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mpcserve.errors import PeerLost, PeerTimeout, Refused
from mpcserve.serving.client import Both
from mpcserve.transport import Channel, Link, LinkOptions, TlsFiles
from tests.transport_support import WAIT, Authority, Network, new_id


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TlsFiles]:
    authority = Authority(tmp_path_factory.mktemp("pki"))
    return {role: authority.issue(role) for role in ("alice", "bob")}


def echo(channel: Channel) -> None:
    """Answer requests until the stream ends."""
    with contextlib.suppress(PeerLost):
        while True:
            channel.send_message(channel.receive_message("request", WAIT))


@pytest.fixture
def network(files: dict[str, TlsFiles]) -> Iterator[Network]:
    network = Network("tls", files)
    yield network
    network.close()


def rounds(channel: Channel, count: int, size: int = 1000) -> None:
    """Both sides send, then receive."""
    for k in range(count):
        channel.send(bytes([k % 256]) * size)
        assert bytes(channel.receive(size, "a round", WAIT)) == bytes([k % 256]) * size


def readers_of(*links: Link) -> set[str]:
    """Names of the threads that have read one of these links, from now on."""
    names = set()

    def watched(read: Callable[..., int | None]) -> Callable[..., int | None]:
        def noted(seconds: float, brisk: bool = False) -> int | None:
            got = read(seconds, brisk)
            if got:
                names.add(threading.current_thread().name)
            return got

        return noted

    for link in links:
        link.receiver.read = watched(link.receiver.read)  # type: ignore[method-assign]
    return names


def test_rounds_are_exchanged_by_the_threads_that_wait(network: Network) -> None:
    alice, bob = network.pair()
    stream = new_id()
    readers = readers_of(alice, bob)
    ends = [alice.channel(stream), bob.channel(stream)]

    def run(end: Channel) -> None:
        with end.attended():
            rounds(end, 200)

    threads = [threading.Thread(target=run, args=(e,), name=f"evaluation-{k}")
               for k, e in enumerate(ends)]  # fmt: skip
    for t in threads:
        t.start()
    for t in threads:
        t.join(WAIT)
    assert {"evaluation-0", "evaluation-1"} <= readers


def test_a_reader_that_waits_already_gives_way(network: Network) -> None:
    alice, bob = network.pair()
    stream = new_id()
    channel, other = bob.channel(stream), alice.channel(stream)
    time.sleep(0.05)  # the reader waits for bytes, as it does between requests
    readers = readers_of(bob)

    def answer() -> None:
        other.send_message({"ready": 1})
        other.send(bytes(10))

    later = threading.Timer(0.1, answer)
    later.start()
    with channel.attended():
        assert channel.receive_message("a message", WAIT) == {"ready": 1}
        assert channel.receive(10, "data", WAIT) == bytes(10)
    later.join()
    assert readers == {threading.current_thread().name}


def test_a_thread_that_waits_again_takes_over_from_the_reader(network: Network) -> None:
    """It has been busy for so long that the reader reads: it does not wait for it."""
    alice, bob = network.pair()
    stream = new_id()
    channel, other = bob.channel(stream), alice.channel(stream)
    me = threading.current_thread().name
    readers: set[str] = set()
    with channel.attended():
        for _ in range(20):  # the machine may be busy with something else
            time.sleep(0.1)
            readers = readers_of(bob)
            later = threading.Timer(0.1, other.send, (bytes(10),))
            later.start()
            assert channel.receive(10, "data", WAIT) == bytes(10)
            later.join()
            if readers == {me}:
                break
    assert readers == {me}


def test_a_glance_reads_what_has_come_and_waits_for_nothing(network: Network) -> None:
    _, bob = network.pair(alice=echo)
    attended, other = bob.channel(new_id()), bob.channel(new_id())
    with attended.attended(standby=3600.0):
        readers = readers_of(bob)
        other.send_message({"ask": 1})
        end = time.monotonic() + WAIT
        while not readers and time.monotonic() < end:
            attended.glance()
        assert readers == {threading.current_thread().name}
        assert other.receive_message("the echo", WAIT) == {"ask": 1}
        attended.glance()


def test_rounds_are_not_held_up_where_somebody_else_relies_on_the_reader(network: Network) -> None:
    """Whoever stood behind the reader would wait until it has waited for long enough."""
    alice, bob = network.pair()
    stream, slow = new_id(), []

    def play(end: Channel) -> None:
        with end.attended():
            for _ in range(100):
                time.sleep(0.001)  # it computes
                began = time.monotonic()
                rounds(end, 1)
                slow.append(time.monotonic() - began > 0.8 * end.link.reading._tick)

    def rely(link: Link) -> None:
        with link.channel(new_id()) as channel, pytest.raises(PeerTimeout):
            channel.receive_message("what never comes", 2.0)

    links = (alice, bob)
    playing = [threading.Thread(target=play, args=(link.channel(stream),)) for link in links]
    relying = [threading.Thread(target=rely, args=(link,)) for link in links]
    for thread in (*relying, *playing):
        thread.start()
    for thread in (*playing, *relying):
        thread.join(WAIT)
    assert len(slow) == 200
    assert sum(slow) < 3  # the machine may be busy with something else


def test_of_two_asked_at_once_the_first_to_fail_is_heard(network: Network) -> None:
    """Whichever of them is waited for."""
    for failing in (0, 1):
        links = [network.pair() for _ in range(2)]
        stream = new_id()
        both = Both([ours.channel(stream) for _, ours in links])
        theirs = [link.channel(stream) for link, _ in links]
        both.send(b"?")
        later = threading.Timer(0.1, theirs[failing].fail, (Refused("no", "ask another"),))
        later.start()
        began = time.monotonic()
        with pytest.raises(Refused, match="no"):
            both.ask(lambda channel, seconds: channel.receive(1, "an answer", seconds), WAIT)
        assert time.monotonic() - began < WAIT / 2
        later.join()
        with pytest.raises(Refused, match="no"):  # and the other server is told
            theirs[1 - failing].receive(2, "more", WAIT)


def test_other_streams_are_served_while_the_attending_thread_computes(network: Network) -> None:
    _, bob = network.pair(alice=echo)
    attended, other = bob.channel(new_id()), bob.channel(new_id())
    slow = 0
    with attended.attended():
        for _ in range(20):
            other.send_message({"ask": 1})
            began = time.monotonic()
            assert other.receive_message("the echo", WAIT) == {"ask": 1}
            slow += time.monotonic() - began > 0.8 * bob.reading._tick
    assert slow < 5  # the machine may be busy with something else


def test_several_attended_streams_all_get_their_rounds(network: Network) -> None:
    alice, bob = network.pair()
    streams = [new_id() for _ in range(4)]
    failed: list[BaseException] = []

    def run(end: Channel) -> None:
        try:
            with end.attended():
                rounds(end, 100)
        except BaseException as e:
            failed.append(e)

    threads = [
        threading.Thread(target=run, args=(link.channel(s),))
        for s in streams
        for link in (alice, bob)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(WAIT)
    assert not failed and not any(t.is_alive() for t in threads)


def test_a_deadline_holds_in_the_thread_that_reads(network: Network) -> None:
    _, bob = network.pair()
    channel = bob.channel(new_id())
    with channel.attended(), pytest.raises(PeerTimeout, match="round 7"):
        for _ in range(3):  # the first wait may find the reader thread still at it
            channel.receive(10, "round 7", 0.3)


def test_a_lost_peer_is_told_to_the_thread_that_reads(network: Network) -> None:
    alice, bob = network.pair()
    channel = bob.channel(new_id())
    with channel.attended():
        closing = threading.Timer(0.2, alice.close)
        closing.start()
        with pytest.raises(PeerLost):
            channel.receive(10, "a round", WAIT)
        closing.join()


def test_a_round_larger_than_all_queues_is_exchanged_though_both_attend(network: Network) -> None:
    """A sender that waits for room relies on the reader: the peer may wait for room as well."""
    alice, bob = network.pair(options=LinkOptions(send_queue=1 << 20, send_timeout=WAIT / 2))
    stream, size, done = new_id(), 48 << 20, []

    def run(end: Channel) -> None:
        with end.attended(standby=3600.0):
            end.send(bytes(size))
            done.append(len(end.receive(size, "a round", WAIT)))

    threads = [threading.Thread(target=run, args=(link.channel(stream),)) for link in (alice, bob)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(WAIT)
    assert done == [size, size]


def test_a_stream_ended_here_ends_the_wait_of_the_thread_that_reads(network: Network) -> None:
    """At once: not when it has waited for bytes for long enough."""
    _, bob = network.pair()
    waits = []
    for _ in range(5):
        channel = bob.channel(new_id())
        ended: list[float] = []

        def end(channel: Channel = channel, ended: list[float] = ended) -> None:
            ended.append(time.monotonic())
            channel.fail(Refused("no", "ask another"))

        later = threading.Timer(0.1, end)
        later.start()
        with channel.attended(), pytest.raises(Refused):
            channel.receive(10, "a round", WAIT)
        later.join()
        waits.append(time.monotonic() - ended[0])
    assert min(waits) < 0.1  # the machine may be busy with something else


def test_a_link_whose_reading_thread_is_interrupted_ends(network: Network) -> None:
    """What that thread had read is lost: later bytes would be taken for others."""
    alice, bob = network.pair()
    stream = new_id()
    channel, other = bob.channel(stream), alice.channel(stream)

    def interrupted(seconds: float, brisk: bool = False) -> None:
        if bob.receiver._intake.wait(seconds):
            raise KeyboardInterrupt

    with channel.attended(standby=3600.0):
        bob.receiver.read = interrupted  # type: ignore[method-assign]
        later = threading.Timer(0.1, other.send, (bytes(10),))
        later.start()
        with pytest.raises(KeyboardInterrupt):
            channel.receive(10, "a round", WAIT)
        later.join()
        with pytest.raises(PeerLost, match="interrupted"):
            channel.receive(10, "a round", WAIT)
    assert bob.reason is not None
    with pytest.raises(PeerLost):
        other.receive(1, "an answer", WAIT)


def test_an_ended_link_touches_no_file_that_was_opened_since(network: Network) -> None:
    """Its socket's number may be that of another connection."""
    alice, bob = network.pair()
    stream = new_id()
    channel, other = bob.channel(stream), alice.channel(stream)
    with channel.attended(brisk=True):
        other.send(bytes(10))
        channel.receive(10, "a round", WAIT)
        number = bob._made_of.sock.fileno()
        alice.close()
        bob.join()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(b"for nobody else")
            copied = number not in (ours.fileno(), theirs.fileno())
            if copied:
                os.dup2(ours.fileno(), number)
            channel.expect(10)
            channel.glance()
            with pytest.raises(PeerLost):
                channel.send(bytes(10))
            with pytest.raises(PeerLost):
                channel.receive(10, "a round", WAIT)
            if copied:
                os.close(number)
            theirs.settimeout(0)
            with pytest.raises(BlockingIOError):
                theirs.recv(1)
            assert ours.recv(100) == b"for nobody else"


def rung(link: Link) -> list[str]:
    """Names of the threads that ring for the one that reads this link, from now on."""
    names, interrupt = [], link.receiver.interrupt

    def ringing() -> None:
        names.append(threading.current_thread().name)
        interrupt()

    link.receiver.interrupt = ringing  # type: ignore[method-assign]
    return names


def test_who_expects_to_attend_rings_no_bell_then(network: Network) -> None:
    """The reader thread has given way; if nobody comes it reads again, soon."""
    alice, bob = network.pair(alice=echo)
    out = bob.channel(new_id())
    into, reading, bells = alice.channel(out.stream), alice.reading, rung(alice)
    into.expect_to_attend()
    assert len(bells) == 1 and not reading._needed.is_set()
    with into.attended():
        out.send(b"abc")
        assert into.receive(3, "data", WAIT) == b"abc"
    assert reading._needed.is_set()
    into.expect_to_attend()
    assert reading._needed.wait(WAIT)
    out.send(b"def")
    assert into.receive(3, "data", WAIT) == b"def"


def test_a_reader_gives_way_to_a_stream_that_will_be_attended(network: Network) -> None:
    """It does not read on after the first message of such a stream, so no bell need be rung; if
    nobody attends in time, it reads what has come."""
    bells: list[str] = []
    answered = threading.Event()

    def serve(channel: Channel) -> None:
        message = channel.receive_message("a request", WAIT)
        if message["attended"]:
            time.sleep(0.02)  # the reader is done with the message
            with channel.attended():
                channel.send(channel.receive(3, "data", WAIT))
            return
        assert not channel.link.reading._needed.is_set()
        channel.send_message({"here": 1})
        time.sleep(0.3)  # it computes, and reads nothing
        assert channel.link.reading._needed.is_set() and channel.inbox.queued == 3
        answered.set()

    alice, bob = network.pair(alice=serve, attends=lambda message: 0.1)
    bells = rung(alice)
    asked = bob.channel(new_id())
    asked.send_message({"attended": True})
    time.sleep(0.05)
    asked.send(b"abc")
    assert asked.receive(3, "data", WAIT) == b"abc"
    assert bells == []
    late = bob.channel(new_id())
    late.send_message({"attended": False})
    assert late.receive_message("a word", WAIT) == {"here": 1}
    late.send(b"def")
    assert answered.wait(WAIT)


@pytest.mark.parametrize("relied_on", [False, True])
def test_a_reader_whose_turn_was_taken_over_stands_by_again(
    network: Network, relied_on: bool
) -> None:
    """It came to read because the attending thread was busy for long, or another relied on it; that
    is paid for once."""
    alice, bob = network.pair(alice=echo, bob=echo)
    out = bob.channel(new_id())
    into, bells = alice.channel(out.stream), rung(alice)
    with into.attended(standby=0.2):
        time.sleep(0.3)  # the reader has come to read
        assert bells.count(threading.current_thread().name) == 1, "when it began to attend"
        if relied_on:
            with alice.reading.relied_on():
                pass
            time.sleep(0.001)
        for _ in range(50):
            later = threading.Timer(0.001, out.send, (b"abc",))
            later.start()
            assert into.receive(3, "data", WAIT) == b"abc"
            time.sleep(0.001)
    assert len(bells) <= 4 + relied_on, "one a standby at most"


def test_the_reader_of_a_link_on_which_this_side_asks_comes_back_when_relied_on(
    network: Network,
) -> None:
    """Between requests it is not woken; but for whoever waits without attending, and at the end."""
    _, bob = network.pair(alice=echo)
    reading = bob.reading
    for _ in range(3):
        channel = bob.channel(new_id())
        channel.send_message({"k": 1})
        with channel.attended(standby=10.0):
            assert channel.receive_message("an answer", WAIT) == {"k": 1}
        assert not reading._needed.is_set()
    channel = bob.channel(new_id())
    channel.send_message({"k": 2})
    began = time.monotonic()
    assert channel.receive_message("an answer", WAIT) == {"k": 2}
    with channel.attended(standby=10.0):
        pass
    bob.close()
    assert time.monotonic() - began < 5.0, "neither waits until the reader comes back by itself"


def test_the_thread_that_ends_a_stream_says_so_itself(network: Network) -> None:
    _, bob = network.pair(alice=echo)
    channel = bob.channel(new_id())
    channel.send_message({"k": 1})
    assert channel.receive_message("an answer", WAIT) == {"k": 1}
    woken, notify = [], bob.sender._work.notify
    bob.sender._work.notify = lambda n=1: woken.append(notify(n))  # type: ignore[method-assign]
    channel.close()
    assert not woken
    with pytest.raises(PeerLost):
        channel.send(b"more")
