"""What a link carries and costs, and what it does with peers that are slow, silent or hostile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mpcserve.errors import ConfigError, PeerError, PeerLost, PeerTimeout, Refused, WireError
from mpcserve.transport import (
    LAN,
    LOOPBACK,
    WAN,
    Channel,
    LinkOptions,
    NetworkProfile,
    TlsFiles,
)
from mpcserve.transport.network import Line
from tests.transport_support import (
    CONTROL,
    CREDIT,
    DATA,
    ERROR,
    GOODBYE,
    PING,
    PONG,
    WAIT,
    Authority,
    BarePeer,
    Log,
    Network,
    Relay,
    new_id,
    plain_listener,
    quickest,
)

pytestmark = pytest.mark.slow

HEADER = 24
MAX_DATA = 256 << 10


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TlsFiles]:
    authority = Authority(tmp_path_factory.mktemp("pki"))
    return {role: authority.issue(role) for role in ("alice", "bob")}


@pytest.fixture(params=["tls", "memory"])
def network(request: pytest.FixtureRequest, files: dict[str, TlsFiles]) -> Iterator[Network]:
    network = Network(request.param, files)
    yield network
    network.close()


@pytest.fixture
def tls(files: dict[str, TlsFiles]) -> Iterator[Network]:
    network = Network("tls", files)
    yield network
    network.close()


@pytest.fixture
def log() -> Log:
    return Log()


# ── counters ──


@pytest.mark.parametrize("sizes", [[1], [65_536], [65_537, 3], [MAX_DATA], [MAX_DATA + 1, 700_000]])
def test_counters_are_exact(network: Network, sizes: list[int]) -> None:
    alice, bob = network.pair()
    before = bob.counters.overhead_sent, alice.counters.overhead_received
    stream = new_id()
    out, into = bob.channel(stream), alice.channel(stream)
    out.send_message({"x": 1})  # {"x":1} is 7 bytes
    for size in sizes:
        out.send(bytes(size))
        into.receive_message("x", WAIT) if size == sizes[0] else None
        into.receive(size, "data", WAIT)
    frames = sum(-(-size // MAX_DATA) for size in sizes)
    overhead = HEADER + 7 + HEADER * frames
    assert bob.counters.payload_sent == alice.counters.payload_received == sum(sizes)
    assert bob.counters.overhead_sent - before[0] == overhead
    assert alice.counters.overhead_received - before[1] == overhead
    assert out.payload_sent == into.payload_received == sum(sizes)
    assert alice.counters.payload_sent == bob.counters.payload_received == 0


def test_wire_bytes_are_those_that_tcp_carried(tls: Network) -> None:
    relay = Relay()
    alice, bob = tls.pair(through=relay)
    stream = new_id()
    bob.channel(stream).send(bytes(1_000_000))
    alice.channel(stream).receive(1_000_000, "data", WAIT)
    alice.channel(stream).send(bytes(70_000))
    bob.channel(stream).receive(70_000, "data", WAIT)
    tls.close()
    relay.finish()
    assert bob.counters.wire_sent == alice.counters.wire_received == relay.to_server
    assert alice.counters.wire_sent == bob.counters.wire_received == relay.to_client
    assert relay.to_server > 1_000_000


@pytest.mark.parametrize("size", [65_536, 100_000, 5_000_000])
def test_overhead_is_under_two_percent(tls: Network, size: int) -> None:
    alice, bob = tls.pair()
    stream = new_id()
    out, into = bob.channel(stream), alice.channel(stream)
    before = bob.counters.wire_sent
    for _ in range(10):
        out.send(bytes(size))
        into.receive(size, "data", WAIT)
    sent = bob.counters.wire_sent - before
    assert 10 * size < sent < 10.03 * size


# ── flow ──


@pytest.mark.parametrize("own", [False, True])
def test_a_sender_waits_for_a_slow_receiver_and_loses_nothing(network: Network, own: bool) -> None:
    window = 256 << 10
    windows = {"bob": window} if own else {}
    options = LinkOptions(window=1 << 30 if own else window, windows=windows, send_queue=64 << 10)
    alice, bob = network.pair(options=options)
    stream = new_id()
    out, into = bob.channel(stream), alice.channel(stream)
    data = bytes(range(256)) * (4 << 12)  # 4 MiB
    sender = threading.Thread(target=out.send, args=(data,))
    sender.start()
    step = 30_000
    for at in range(0, len(data), step):
        n = min(step, len(data) - at)
        assert into.receive(n, "step", WAIT) == data[at : at + n]
        assert into.inbox.queued <= window
    sender.join(WAIT)
    assert not sender.is_alive()


def test_one_receive_may_be_larger_than_the_window(network: Network) -> None:
    alice, bob = network.pair(options=LinkOptions(window=64 << 10))
    stream = new_id()
    sender = threading.Thread(target=bob.channel(stream).send, args=(bytes(1 << 20),))
    sender.start()
    assert len(alice.channel(stream).receive(1 << 20, "all", WAIT)) == 1 << 20
    sender.join(WAIT)


def test_a_send_that_makes_no_progress_is_given_up(network: Network) -> None:
    options = LinkOptions(window=64 << 10, send_queue=64 << 10, send_timeout=0.1)
    alice, bob = network.pair(options=options)
    started = time.monotonic()
    with pytest.raises(
        PeerTimeout, match=r"alice at .* took nothing for 0\.1 s while we were"
    ) as e:
        bob.channel(new_id()).send(bytes(1 << 20))
    assert e.value.hint and time.monotonic() - started < 5
    assert alice.reason is None and bob.reason is None  # the stream was stuck, the link is not


def test_a_peer_that_does_not_read_is_given_up(log: Log) -> None:
    options = LinkOptions(send_queue=1 << 20, send_timeout=0.2)
    with plain_listener(log, options=options) as listener, BarePeer(listener.address) as peer:
        peer.hello()
        channel = log.link().channel(new_id())
        with pytest.raises(PeerTimeout, match=r"bob at .* took nothing"):
            channel.send(bytes(64 << 20))


def test_credit_is_given_for_what_was_consumed(log: Log) -> None:
    window = 4096
    with (
        plain_listener(log, options=LinkOptions(window=window)) as listener,
        BarePeer(listener.address) as peer,
    ):
        peer.hello()
        stream = new_id()
        channel = log.link().channel(stream)
        peer.send(DATA, bytes(window), stream)
        channel.receive(1023, "less than a quarter", WAIT)
        channel.receive(1, "a quarter", WAIT)
        assert peer.frame() == (CREDIT, stream, (1024).to_bytes(8, "big"))
        channel.receive(3072, "the rest", WAIT)
        assert peer.frame() == (CREDIT, stream, (4096).to_bytes(8, "big"))


# ── hostile peers: the stream or the link ends, the listener does not ──


def error_of(log: Log, kind: type[Exception]) -> str:
    error = log.error()
    assert type(error) is kind
    return str(error)


def test_a_stream_that_exceeds_its_window_is_failed_alone(log: Log) -> None:
    with (
        plain_listener(log, options=LinkOptions(window=4096)) as listener,
        BarePeer(listener.address) as peer,
    ):
        peer.hello()
        good, bad = new_id(), new_id()
        link = log.link()
        waiting = link.channel(bad)
        peer.send(DATA, bytes(5000), bad)
        assert b"exceeded its window of 4096 bytes" in peer.frame_of(ERROR)[1]
        assert "bob at 127.0.0.1" in error_of(log, WireError)
        with pytest.raises(WireError, match="exceeded its window"):
            waiting.receive(5000, "data", WAIT)
        peer.send(DATA, bytes(5000), bad)  # dropped: the stream is over
        peer.send(DATA, b"good", good)
        assert link.channel(good).receive(4, "good", WAIT) == b"good"


def test_a_link_that_fills_its_receive_queue_loses_the_stream_that_did(log: Log) -> None:
    with (
        plain_listener(log, options=LinkOptions(receive_queue=10_000)) as listener,
        BarePeer(listener.address) as peer,
    ):
        peer.hello()
        first, second = new_id(), new_id()
        link = log.link()
        peer.send(DATA, bytes(8000), first)
        peer.send(DATA, bytes(2000), second)
        peer.send(DATA, bytes(1000), second)
        assert peer.frame_of(ERROR)[0] == second
        assert "receive queue of 10000 bytes" in error_of(log, WireError)
        assert len(link.channel(first).receive(8000, "first", WAIT)) == 8000


def test_messages_that_nobody_reads_fail_their_stream(log: Log) -> None:
    with plain_listener(log) as listener, BarePeer(listener.address) as peer:
        peer.hello()
        stream = new_id()
        for _ in range(6):
            peer.send(CONTROL, b'{"a":"' + b"x" * 1_000_000 + b'"}', stream)
        assert peer.frame_of(ERROR)[0] == stream
        assert "sent messages that nobody read" in error_of(log, WireError)


def test_too_many_streams_are_refused_one_by_one(log: Log) -> None:
    release = threading.Event()

    def serve(channel: Channel) -> None:
        channel.receive_message("request", WAIT)
        assert release.wait(WAIT)
        channel.send(b"done")

    with (
        plain_listener(log, serve, LinkOptions(max_streams=3)) as listener,
        BarePeer(listener.address) as peer,
    ):
        peer.hello()
        streams = [new_id() for _ in range(4)]
        for stream in streams:
            peer.send(CONTROL, b"{}", stream)
        stream, payload = peer.frame_of(ERROR)
        assert stream == streams[3] and b"3 streams are open" in payload and b"Refused" in payload
        assert "bob at" in error_of(log, Refused)
        release.set()
        assert {peer.frame_of(DATA)[0] for _ in range(3)} == set(streams[:3])


def test_a_stream_that_nobody_claims_is_failed_after_a_while(log: Log) -> None:
    options = LinkOptions(unclaimed_after=0.1, ping_every=0.1)
    with plain_listener(log, options=options) as listener, BarePeer(listener.address) as peer:
        peer.hello()
        stream = new_id()
        peer.send(DATA, b"anybody?", stream)
        got, payload = peer.frame_of(ERROR)
        assert got == stream and b"nobody took up stream" in payload and b"0.1 s" in payload


def test_credit_for_what_was_never_sent_fails_the_stream(log: Log) -> None:
    with plain_listener(log) as listener, BarePeer(listener.address) as peer:
        peer.hello()
        channel = log.link().channel(new_id())
        channel.send(b"abc")
        peer.send(CREDIT, (4).to_bytes(8, "big"), channel.stream)
        assert "claims 4 bytes consumed" in error_of(log, WireError)
        with pytest.raises(WireError, match="claims 4 bytes"):
            channel.receive(1, "x", WAIT)


def test_frames_for_streams_that_are_over_or_unknown_do_no_harm(log: Log) -> None:
    with plain_listener(log) as listener, BarePeer(listener.address) as peer:
        peer.hello()
        link = log.link()
        over = link.channel(new_id())
        over.close()
        for kind, payload in (
            (DATA, b"x"),
            (CONTROL, b"{}"),
            (CREDIT, bytes(8)),
            (ERROR, b'{"kind":"PeerLost","message":"","hint":""}'),
            (GOODBYE, b""),
        ):
            peer.send(kind, payload, over.stream)
            peer.send(kind, payload, new_id())
        peer.send(PING, b"8 bytes!", bytes(16))
        assert peer.frame_of(PONG)[1] == b"8 bytes!"
        assert link.reason is None


def test_a_bad_frame_ends_its_link_only(log: Log) -> None:
    def serve(channel: Channel) -> None:
        channel.receive_message("request", WAIT)
        channel.send(b"fine")

    with (
        plain_listener(log, serve) as listener,
        BarePeer(listener.address) as good,
        BarePeer(listener.address) as bad,
    ):
        good.hello()
        bad.hello()
        log.link()
        channel = log.link().channel(new_id())
        bad.sock.sendall(b"\x01\x63")
        assert b"expected a frame kind of 1" in bad.frame_of(ERROR)[1]
        with pytest.raises(EOFError):
            bad.frame()
        assert "got 99" in error_of(log, WireError)
        with pytest.raises(WireError, match=r"bob at 127\.0\.0\.1:\d+ sent bytes that are not"):
            channel.receive(1, "x", WAIT)
        good.send(CONTROL, b"{}", new_id())
        assert good.frame_of(DATA)[1] == b"fine"


def test_answers_that_nobody_reads_end_the_link(log: Log) -> None:
    with plain_listener(log) as listener, BarePeer(listener.address) as peer:
        peer.hello()
        ping = b"\x01\x05\0\0\0\0\0\x08" + bytes(16) + b"answer!!"
        with pytest.raises(OSError):
            while True:
                peer.sock.sendall(ping * 4000)
        error = log.error()
        assert isinstance(error, PeerError) and "without reading" in str(error)


# ── silence ──


def test_a_silent_peer_is_noticed(log: Log) -> None:
    options = LinkOptions(ping_every=0.1, dead_after=0.3)
    with plain_listener(log, options=options) as listener, BarePeer(listener.address) as peer:
        peer.hello()
        channel = log.link().channel(new_id())
        with pytest.raises(PeerLost, match=r"connection to bob at .* sent nothing for .* round 1"):
            channel.receive(1, "round 1", WAIT)
        assert peer.frame()[0] == PING
        assert isinstance(log.closed.get(timeout=WAIT), PeerLost)


def test_an_idle_link_stays_alive(network: Network) -> None:
    options = LinkOptions(ping_every=0.05, dead_after=0.3)
    alice, bob = network.pair(options=options)
    with pytest.raises(PeerTimeout):
        alice.channel(new_id()).receive(1, "nothing", 0.8)
    assert alice.reason is None and bob.reason is None
    assert alice.counters.overhead_received > 0


# ── emulated networks ──


@pytest.mark.parametrize(
    ("text", "profile"),
    [
        ("loopback", LOOPBACK),
        ("lan", LAN),
        ("wan", WAN),
        ("40,100", WAN),
        ("0.5,1000", LAN),
        ("0,inf", LOOPBACK),
    ],
)
def test_profiles_are_named_or_written_out(text: str, profile: NetworkProfile) -> None:
    assert NetworkProfile.parse(text) == profile
    assert profile.is_real == (profile is LOOPBACK)


@pytest.mark.parametrize(
    "text", ["", "moon", "1", "1,2,3", "-1,5", "5,0", "5,-1", "nan,5", "5,nan"]
)
def test_other_profiles_are_errors(text: str) -> None:
    with pytest.raises(ConfigError, match="expected loopback, lan, wan or RTT_MS,MBIT"):
        NetworkProfile.parse(text)


def test_a_line_delays_by_its_formula_without_losing_throughput() -> None:
    line = Line(NetworkProfile(rtt_s=0.2, bits_per_s=8000))  # 1000 bytes take a second
    line.push(10.0, b"a" * 1000)
    line.push(10.0, b"b" * 500)
    line.push(20.0, b"c" * 100)
    arrivals = []
    for tick in range(100_000, 220_000):
        while (batch := line.pop(tick / 10_000)) is not None:
            arrivals.append((tick / 10_000, batch[:1]))
    assert [batch for _, batch in arrivals] == [b"a", b"b", b"c"]
    assert [time for time, _ in arrivals] == pytest.approx([11.1, 11.6, 20.2], abs=2e-4)
    assert line.wait(30.0, more=False) is None
    assert line.wait(30.0, more=True) == 0
    line.push(30.0, b"d" * 1000)
    assert line.wait(30.0, more=False) == pytest.approx(1.1, abs=2e-4)
    assert not line.takes(30.5) and line.takes(31.0)


def test_an_emulated_network_delays_every_message_by_half_a_round_trip(network: Network) -> None:
    options = LinkOptions(network=NetworkProfile(0.06, 1e9))
    alice, bob = network.pair(options=options)
    stream = new_id()
    one, other = alice.channel(stream), bob.channel(stream)

    def three_round_trips() -> float:
        started = time.monotonic()
        for _ in range(3):
            one.send(b"ping")
            other.receive(4, "ping", WAIT)
            other.send(b"pong")
            one.receive(4, "pong", WAIT)
        return time.monotonic() - started

    assert 0.179 <= quickest(three_round_trips, 0.5) < 0.5


def test_an_emulated_network_throttles_but_overlaps_its_delay(network: Network) -> None:
    options = LinkOptions(network=NetworkProfile(0.1, 100e6))  # 4 MB take 0.32 s
    alice, bob = network.pair(options=options)
    stream = new_id()
    out, into = bob.channel(stream), alice.channel(stream)

    def four_megabytes() -> float:
        started = time.monotonic()
        for _ in range(40):  # one by one they would take 40 half round trips: 2 s
            out.send(bytes(100_000))
        into.receive(4_000_000, "data", WAIT)
        return time.monotonic() - started

    assert 0.37 <= quickest(four_megabytes, 1.2) < 1.2


# ── promises in numbers ──


def test_a_small_message_takes_well_under_a_millisecond(tls: Network) -> None:
    """Both ends in this process share one interpreter, so the bound is generous."""
    alice, bob = tls.pair()
    stream = new_id()
    near, far = bob.channel(stream), alice.channel(stream)
    rounds = 100

    def answer() -> None:
        for _ in range(rounds):
            far.send(far.receive(64, "ping", WAIT))

    def median_round_trip() -> float:
        thread = threading.Thread(target=answer)
        thread.start()
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            near.send(bytes(64))
            near.receive(64, "pong", WAIT)
            times.append(time.perf_counter() - started)
        thread.join(WAIT)
        return sorted(times)[rounds // 2]

    median = quickest(median_round_trip, 0.002)
    print(f"median round trip {median * 1e6:.0f} µs")
    assert median < 0.002
