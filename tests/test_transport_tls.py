"""Who may link with whom: certificates, roles, plain TCP, addresses; the errors on both sides."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from mpcserve.errors import (
    ConfigError,
    MpcError,
    PeerError,
    PeerLost,
    PeerTimeout,
    Refused,
    WireError,
)
from mpcserve.transport import LinkOptions, Listener, TlsFiles, connect
from mpcserve.transport.codec import codecs
from mpcserve.transport.link import Connected, Link
from mpcserve.transport.options import Counters, Hooks
from mpcserve.wire import MAX_DATA, Session
from tests.transport_support import WAIT, Authority, Log, new_id

pytestmark = pytest.mark.slow

DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def alice(authority: Authority) -> TlsFiles:
    return authority.issue("alice")


@pytest.fixture(scope="module")
def bob(authority: Authority) -> TlsFiles:
    return authority.issue("bob")


@pytest.fixture
def log() -> Log:
    return Log()


@contextlib.contextmanager
def listening(files: TlsFiles | None, log: Log, **more: object) -> Iterator[str]:
    options = {"on_error": log.errors.put, **more}
    with Listener("127.0.0.1:0", files, log.links.put, **options) as listener:  # type: ignore[arg-type]
        yield listener.address


def refusal(
    address: str, files: TlsFiles | None, expected: str = "alice", **more: object
) -> MpcError:
    """The error that `connect` raises; it names the address and takes far less than its timeout."""
    started = time.monotonic()
    with pytest.raises(MpcError) as caught:
        connect(address, files, expected, WAIT, **more)  # type: ignore[arg-type]
    assert time.monotonic() - started < WAIT / 2
    assert caught.value.hint
    return caught.value


def told(log: Log) -> MpcError:
    error = log.error()
    assert isinstance(error, MpcError) and "127.0.0.1:" in error.message
    return error


def test_both_sides_know_each_other_by_certificate(
    alice: TlsFiles, bob: TlsFiles, log: Log
) -> None:
    with listening(alice, log) as address, connect(address, bob, "alice", WAIT) as link:
        accepted = log.link()
        assert (link.peer, accepted.peer) == ("alice", "bob")
        assert link.address == address
        assert repr(accepted).startswith("<Link to bob at 127.0.0.1:")
        assert "SSL" not in repr(link)


def test_the_link_is_tls_1_3(alice: TlsFiles, bob: TlsFiles, log: Log) -> None:
    with listening(alice, log) as address:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(bob.ca)
        context.load_cert_chain(bob.cert, bob.key)
        host, port = address.split(":")
        with (
            socket.create_connection((host, int(port)), WAIT) as sock,
            context.wrap_socket(sock) as wrapped,
        ):
            assert wrapped.version() == "TLSv1.3"
        told(log)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with (
            socket.create_connection((host, int(port)), WAIT) as sock,
            pytest.raises(ssl.SSLError, match=r"(?i)version"),
        ):
            context.wrap_socket(sock)
        assert "does not speak TLS 1.3" in told(log).message


def test_another_role_than_expected_is_named_on_both_sides(
    alice: TlsFiles, bob: TlsFiles, log: Log
) -> None:
    with listening(alice, log) as address:
        error = refusal(address, bob, "carol")
        assert isinstance(error, PeerError)
        assert error.message == f"expected carol at {address}, got alice"
        assert f"expected carol at {address}, got alice" in told(log).message


def test_a_role_that_is_not_accepted_is_refused_and_told(
    alice: TlsFiles, bob: TlsFiles, log: Log
) -> None:
    with listening(alice, log, accept_roles={"carol", "data-owner"}) as address:
        error = refusal(address, bob)
        assert isinstance(error, Refused) and error.exit_code == 5
        words = "alice accepts no link from bob, only from carol, data-owner"
        assert words in error.message and error.message.startswith(f"alice at {address}")
        assert words in log.error().args[0]
        assert log.links.empty()


def test_on_link_may_refuse(alice: TlsFiles, bob: TlsFiles) -> None:
    def refuse(link: Link) -> None:
        raise Refused(f"{link.peer} is linked already", "stop the other one")

    log = Log()
    with Listener("127.0.0.1:0", alice, refuse, on_error=log.errors.put) as listener:
        error = refusal(listener.address, bob)
        assert isinstance(error, Refused) and "bob is linked already" in error.message
        assert error.hint == "stop the other one"
        assert "bob is linked already" in log.error().args[0]
        assert listener.links == []


def test_a_defect_in_on_link_ends_that_link_only(alice: TlsFiles, bob: TlsFiles) -> None:
    log = Log()
    seen: list[Link] = []

    def stumble(link: Link) -> None:
        seen.append(link)
        if len(seen) == 1:
            raise ZeroDivisionError("with a secret in its text")

    with Listener("127.0.0.1:0", alice, stumble, on_error=log.errors.put) as listener:
        error = refusal(listener.address, bob)
        assert error.message.endswith(": alice failed inside: ZeroDivisionError")
        assert isinstance(log.error(), ZeroDivisionError)
        connect(listener.address, bob, "alice", WAIT).close()


def test_on_link_may_send_before_connect_returns(alice: TlsFiles, bob: TlsFiles) -> None:
    stream = new_id()

    def greet(link: Link) -> None:
        link.channel(stream).send_message({"welcome": link.peer})

    with (
        Listener("127.0.0.1:0", alice, greet) as listener,
        connect(listener.address, bob, "alice", WAIT) as link,
    ):
        assert link.channel(stream).receive_message("welcome", WAIT) == {"welcome": "bob"}


def test_hello_must_agree_with_the_certificate(alice: TlsFiles, bob: TlsFiles, log: Log) -> None:
    with listening(alice, log) as address:
        host, port = address.split(":")
        sock = socket.create_connection((host, int(port)), WAIT)
        codec, counters = codecs(bob)(False), Counters()
        assert codec.handshake(sock, time.monotonic() + WAIT, counters) == "alice"
        liar = Connected(sock, codec, "carol", "alice", address, True, lambda _: None, counters)
        link = Link(liar, Hooks(), LinkOptions())
        link.start()
        with pytest.raises(PeerError, match="says HELLO as carol, its certificate says bob"):
            link.wait_open(WAIT)
        assert "says HELLO as carol, its certificate says bob" in told(log).message


class Fragmenter:
    """A bob that cuts what it says into TLS records, and those into segments, as it likes."""

    def __init__(self, address: str, files: TlsFiles) -> None:
        host, port = address.split(":")
        self.sock = socket.create_connection((host, int(port)), WAIT)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.codec = codecs(files)(False)
        assert self.codec.handshake(self.sock, time.monotonic() + WAIT, Counters()) == "alice"
        self.session = Session("bob", 1 << 30, "alice")

    def say(self, plain: bytes, rng: random.Random, records: int, segments: int) -> None:
        """Records of up to so many bytes, in segments of up to so many."""
        wire, at = bytearray(), 0
        while at < len(plain):
            size = rng.randint(1, records)
            wire += self.codec.encrypt([plain[at : at + size]])
            at += size
        at = 0
        while at < len(wire):
            size = rng.randint(1, segments)
            self.sock.sendall(wire[at : at + size])
            at += size
            if rng.random() < 0.2:
                time.sleep(0.0005)


@pytest.mark.parametrize(("records", "segments"), [(7, 300), (40, 50), (30_000, 9_000)])
def test_rounds_arrive_however_they_are_cut(
    alice: TlsFiles, bob: TlsFiles, log: Log, records: int, segments: int
) -> None:
    """In frames of any size, between those of other streams and of the link, read ahead or not."""
    rng = random.Random(records)
    most = 3 * records + 100
    sizes = [rng.randint(1, most) for _ in range(60)]
    data, other = rng.randbytes(sum(sizes)), rng.randbytes(5_000)
    with listening(alice, log) as address:
        peer = Fragmenter(address, bob)
        mine, theirs, s = new_id(), new_id(), peer.session
        plain, left, noise = bytearray(), data, other
        while left:
            size = rng.randint(1, min(2 * most, len(left), MAX_DATA))
            plain += s.data_header(mine, size) + left[:size]
            left = left[size:]
            if rng.random() < 0.5:
                plain += s.ping(bytes(8))
            if noise and rng.random() < 0.5:
                size = rng.randint(1, len(noise))
                plain += s.data_header(theirs, size) + noise[:size]
                noise = noise[size:]
        if noise:
            plain += s.data_header(theirs, len(noise)) + noise
        peer.say(s.hello(), rng, records, segments)
        link = log.link()
        channel, quiet = link.channel(mine), link.channel(theirs)
        sender = threading.Thread(target=peer.say, args=(bytes(plain), rng, records, segments))
        got = []
        with channel.attended(brisk=True):
            sender.start()
            for k, size in enumerate(sizes):
                if k % 3:
                    channel.expect(size)
                    channel.glance()
                got.append(bytes(channel.receive(size, "a round", WAIT)))
        sender.join()
        assert b"".join(got) == data
        assert bytes(quiet.receive(len(other), "the rest", WAIT)) == other
        counters = link.counters
        assert counters.payload_received == len(data) + len(other)
        overhead = len(plain) + len(s.hello()) - counters.payload_received
        assert counters.overhead_received == overhead
        assert channel.payload_received == len(data)
        peer.sock.close()


@pytest.mark.parametrize("length", [0, MAX_DATA + 1, 0xFFFFFFFF])
def test_a_frame_of_a_wrong_length_ends_the_link_amid_a_round(
    alice: TlsFiles, bob: TlsFiles, log: Log, length: int
) -> None:
    rng = random.Random(length)
    with listening(alice, log) as address:
        peer = Fragmenter(address, bob)
        mine, s = new_id(), peer.session
        peer.say(s.hello(), rng, 1000, 1000)
        channel = log.link().channel(mine)
        header = bytearray(s.data_header(mine, 1))
        header[4:8] = length.to_bytes(4, "big")
        with channel.attended(brisk=True):
            good = s.data_header(mine, 10) + bytes(10)
            peer.say(good + bytes(header) + bytes(50), rng, 1000, 1000)
            assert bytes(channel.receive(10, "a round", WAIT)) == bytes(10)
            with pytest.raises(WireError, match=f"bytes in a DATA frame, got {length}"):
                channel.receive(20, "a round", WAIT)
        assert f"bytes in a DATA frame, got {length}" in told(log).message
        peer.sock.close()


@pytest.mark.parametrize("size", [1000, 200_000])
def test_wire_bytes_that_were_changed_end_the_link_amid_a_round(
    alice: TlsFiles, bob: TlsFiles, log: Log, size: int
) -> None:
    rng = random.Random(1)
    with listening(alice, log) as address:
        peer = Fragmenter(address, bob)
        mine, s = new_id(), peer.session
        peer.say(s.hello(), rng, 1000, 1000)
        channel = log.link().channel(mine)
        with channel.attended(brisk=True):
            wire = bytearray(peer.codec.encrypt([s.data_header(mine, size) + bytes(size)]))
            wire[500] ^= 1
            peer.sock.sendall(wire)
            with pytest.raises(PeerError, match="bad record mac"):
                channel.receive(size, "a round", WAIT)
        assert "bad record mac" in told(log).message
        peer.sock.close()


# ── certificates ──


def test_an_expired_certificate_is_named_on_both_sides(
    authority: Authority, alice: TlsFiles, bob: TlsFiles, log: Log
) -> None:
    old = {"starts": -3 * DAY, "ends": -1 * DAY}
    with listening(alice, log) as address:
        error = refusal(address, authority.issue("bob", **old))
        assert f"alice at {address} says that our certificate has expired" in error.message
        assert "keys issue" in error.hint
        assert "the certificate of the peer at" in told(log).message
    with listening(authority.issue("alice", **old), log) as address:
        error = refusal(address, bob)
        assert f"the certificate of alice at {address} has expired" in error.message
        assert "says that our certificate has expired" in told(log).message


def test_a_certificate_of_the_future_is_named(
    authority: Authority, alice: TlsFiles, log: Log
) -> None:
    with listening(alice, log) as address:
        error = refusal(address, authority.issue("bob", starts=DAY, ends=2 * DAY))
        assert "does not accept our certificate" in error.message
        error = told(log)
        assert "is not valid yet" in error.message and "clocks" in error.hint


@pytest.mark.parametrize("name", ["another CA", "test CA"])
def test_another_ca_is_named_on_both_sides(
    authority: Authority, alice: TlsFiles, tmp_path: Path, log: Log, name: str
) -> None:
    """Also when the other CA calls itself the same."""
    stranger = Authority(tmp_path, name).issue("bob")
    stranger_who_trusts_us = TlsFiles(authority.ca, stranger.cert, stranger.key)
    with listening(alice, log) as address:
        error = refusal(address, stranger)
        assert (
            f"the certificate of alice at {address} is signed by a CA that is not" in error.message
        )
        assert "does not know the CA that signed our certificate" in told(log).message
        error = refusal(address, stranger_who_trusts_us)
        assert (
            f"alice at {address} does not know the CA that signed our certificate" in error.message
        )
        assert "CA" in error.hint
        assert "is signed by a CA that is not ours" in told(log).message


def test_a_client_without_certificate_is_refused(alice: TlsFiles, log: Log) -> None:
    with listening(alice, log) as address:
        host, port = address.split(":")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(alice.ca)
        with (
            socket.create_connection((host, int(port)), WAIT) as sock,
            context.wrap_socket(sock) as wrapped,
            pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"),
        ):
            wrapped.recv(1)
        told(log)


@pytest.mark.parametrize(
    ("common", "uri"), [("bob", None), ("bob", "carol"), ("", "bob"), ("eve", "eve")]
)
def test_a_certificate_without_one_role_is_refused(
    authority: Authority, alice: TlsFiles, log: Log, common: str, uri: str | None
) -> None:
    files = authority.issue(common, uri=uri)
    with listening(alice, log) as address:
        error = refusal(address, files)
        assert isinstance(error, ConfigError) and str(files.cert) in error.message
        host, port = address.split(":")
        sock = socket.create_connection((host, int(port)), WAIT)
        codec = codecs(files)(False)
        with pytest.raises(PeerError):
            codec.handshake(sock, time.monotonic() + WAIT, Counters())
            made_of = Connected(
                sock, codec, "bob", "alice", address, True, lambda _: None, Counters()
            )
            link = Link(made_of, Hooks(), LinkOptions())
            link.start()
            link.wait_open(WAIT)
        assert "certificate with one role" in told(log).message


def test_files_that_cannot_be_used_are_named(
    authority: Authority, bob: TlsFiles, tmp_path: Path
) -> None:
    text = tmp_path / "text.pem"
    text.write_text("not PEM\n")
    locked = authority.issue("bob", password=b"secret")
    for files, named in (
        (TlsFiles(tmp_path / "none.pem", bob.cert, bob.key), "none.pem: cannot read"),
        (TlsFiles(bob.ca, tmp_path / "none.crt", bob.key), "none.crt: cannot read"),
        (TlsFiles(bob.ca, bob.cert, tmp_path / "none.key"), "none.key: cannot read"),
        (TlsFiles(text, bob.cert, bob.key), "text.pem: not a CA certificate"),
        (TlsFiles(bob.ca, text, bob.key), "text.pem"),
        (TlsFiles(bob.ca, bob.cert, text), "text.pem"),
        (TlsFiles(bob.ca, bob.cert, authority.issue("bob").key), "not a certificate and its"),
        (locked, "the key has a password"),
    ):
        error = refusal("127.0.0.1:1", files)
        assert isinstance(error, ConfigError) and named in error.message
        assert "secret" not in error.message
        with pytest.raises(ConfigError):
            Listener("127.0.0.1:0", files)


def test_the_own_certificate_must_have_the_own_role(bob: TlsFiles) -> None:
    error = refusal("127.0.0.1:1", bob, role="carol")
    assert isinstance(error, ConfigError)
    assert "expected a certificate of carol, got one of bob" in error.message


# ── plain TCP ──


def test_plain_tcp_is_refused_unless_asked_for_and_on_loopback() -> None:
    for address in ("127.0.0.1:0", "10.0.0.1:9000"):
        with pytest.raises(ConfigError, match="plain TCP was not asked for"):
            Listener(address, None)
        with pytest.raises(ConfigError, match="plain TCP was not asked for"):
            connect(address, None, "alice")
    for address in ("10.0.0.1:9000", "0.0.0.0:0", "[::]:0", "example.com:9000"):
        with pytest.raises(ConfigError, match="plain TCP is for loopback addresses only"):
            Listener(address, None, role="alice", insecure_plaintext=True)
        with pytest.raises(ConfigError, match="plain TCP is for loopback addresses only"):
            connect(address, None, "alice", role="bob", insecure_plaintext=True)
    with pytest.raises(ConfigError, match="own role"):
        Listener("127.0.0.1:0", None, insecure_plaintext=True)


def test_roles_are_checked_on_plain_links_too(log: Log) -> None:
    plain = {"insecure_plaintext": True}
    with listening(None, log, role="alice", accept_roles={"carol"}, **plain) as address:
        error = refusal(address, None, "bob", role="carol", **plain)
        assert error.message == f"expected bob at {address}, got alice"
        log.error()
        error = refusal(address, None, role="bob", **plain)
        assert isinstance(error, Refused) and "only from carol" in error.message


def test_tls_and_plain_do_not_meet(alice: TlsFiles, bob: TlsFiles, log: Log) -> None:
    plain = {"insecure_plaintext": True}
    with listening(None, log, role="alice", **plain) as address:
        error = refusal(address, bob)
        assert "does not speak TLS" in error.message
        assert "got a TLS record" in told(log).message
    with listening(alice, log) as address:
        error = refusal(address, None, role="bob", **plain)
        assert isinstance(error, PeerError) and address in error.message
        assert "does not speak TLS" in told(log).message


# ── addresses and deadlines ──


def test_a_port_in_use_is_named(alice: TlsFiles, log: Log) -> None:
    with listening(alice, log) as address, pytest.raises(ConfigError) as caught:
        Listener(address, alice)
    assert caught.value.message == f"cannot listen on {address}: the port is in use"
    assert "another port" in caught.value.hint
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:9000"):
        Listener("192.0.2.1:9000", alice)


@pytest.mark.parametrize(
    "address", ["", "localhost", ":9000", "host:", "host:x", "host:70000", "host:-1", "host:٣"]
)
def test_an_address_is_host_and_port(bob: TlsFiles, address: str) -> None:
    with pytest.raises(ConfigError, match="expected host:port"):
        connect(address, bob, "alice")


def test_ipv6_addresses_work(alice: TlsFiles, bob: TlsFiles) -> None:
    try:
        listener = Listener("[::1]:0", alice)
    except ConfigError as error:
        pytest.skip(error.message)
    with listener, connect(listener.address, bob, "alice", WAIT) as link:
        assert link.address == listener.address and link.address.startswith("[::1]:")


def test_a_refused_connection_and_an_unknown_host_are_named(bob: TlsFiles) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    error = refusal(address, bob)
    assert isinstance(error, PeerLost)
    assert f"alice at {address} refused the connection" in error.message
    error = refusal("no-such-host.invalid:9000", bob)
    assert isinstance(error, ConfigError) and "unknown host" in error.message


def test_a_silent_name_server_is_given_up_in_time(
    bob: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()

    def silent(*_: object, **__: object) -> list[object]:
        answer.wait(WAIT)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    with pytest.raises(PeerTimeout, match=r"alice at far\.example:9000: .* within 0\.05 s"):
        connect("far.example:9000", bob, "alice", 0.05)
    answer.set()


@pytest.mark.parametrize("plain", [False, True])
def test_a_server_that_does_not_answer_is_given_up_in_time(bob: TlsFiles, plain: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(PeerTimeout, match=rf"alice at {address} did not answer in time") as e:
            if plain:
                connect(address, None, "alice", 0.2, role="bob", insecure_plaintext=True)
            else:
                connect(address, bob, "alice", 0.2)
        assert "0.2 s" in e.value.message
        assert 0.2 <= time.monotonic() - started < WAIT / 2


def test_a_client_that_does_not_speak_is_given_up_in_time(alice: TlsFiles, log: Log) -> None:
    options = LinkOptions(handshake_timeout=0.1)
    for files, more in ((alice, {}), (None, {"role": "alice", "insecure_plaintext": True})):
        with listening(files, log, options=options, **more) as address:
            host, port = address.split(":")
            with socket.create_connection((host, int(port)), WAIT):
                error = told(log)
                assert isinstance(error, PeerTimeout)


def test_a_listener_serves_while_others_stall(alice: TlsFiles, bob: TlsFiles, log: Log) -> None:
    with listening(alice, log) as address:
        host, port = address.split(":")
        with contextlib.ExitStack() as stack:
            for _ in range(70):  # more than may shake hands at once: the rest is turned away
                stack.enter_context(socket.create_connection((host, int(port)), WAIT))
            assert "handshakes are under way" in log.error().args[0]
        with connect(address, bob, "alice", WAIT) as link:
            assert link.peer == "alice"


def test_closing_a_listener_ends_its_links_and_frees_the_port(
    alice: TlsFiles, bob: TlsFiles
) -> None:
    before = set(threading.enumerate())
    listener = Listener("127.0.0.1:0", alice)
    link = connect(listener.address, bob, "alice", WAIT)
    while not listener.links:  # it may not know yet that the handshake is over
        time.sleep(0.001)
    listener.close()
    with pytest.raises(PeerLost, match=r"alice at .* closed the link"):
        link.channel(new_id()).receive(1, "x", WAIT)
    link.close()
    assert set(threading.enumerate()) == before
    assert isinstance(refusal(listener.address, bob), PeerLost)
    Listener(listener.address, alice).close()
