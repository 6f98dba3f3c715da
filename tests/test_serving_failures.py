"""Lost and late peers: the request fails with a named error in time, and the next one succeeds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpcserve.errors import MpcError, PeerError, PeerLost, PeerTimeout, Refused
from mpcserve.plan import Plan, bill_of
from mpcserve.plan.bill import SEED_BYTES
from mpcserve.plan.ops import packed_bytes
from mpcserve.protocol import Dealer, Round, ServerProgram
from mpcserve.protocol.owners import mask_input
from mpcserve.serving.alice import Alice
from mpcserve.serving.bob import Bob
from mpcserve.serving.client import Both
from mpcserve.serving.deployment import Store
from mpcserve.serving.ledger import Ledger
from mpcserve.transport import Channel
from tests.serving_support import (
    Trio,
    as_model,
    dense_relu,
    dense_relu_plan,
    dense_weights,
    some_rows,
    until,
)

pytestmark = pytest.mark.slow

PLAN = dense_relu_plan()
WEIGHTS = dense_weights(PLAN)
MODEL = as_model(PLAN, WEIGHTS)
X = some_rows(PLAN, 2)
ROUNDS = bill_of(PLAN).rounds
SERVERS = ("alice", "bob", "carol")
Act = Callable[[], None]
MakeTrio = Callable[..., Trio]


@pytest.fixture
def make_trio(tmp_path: Path) -> Iterator[MakeTrio]:
    trios = []

    def make(**options: Any) -> Trio:
        trios.append(Trio(tmp_path, **options))
        trios[-1].client().deploy(MODEL)
        return trios[-1]

    yield make
    for trio in trios:
        trio.close()


def check_serves(trio: Trio) -> None:
    """The next request succeeds."""
    y = trio.client().infer(X)
    assert np.abs(y - dense_relu(X, WEIGHTS)).max() < 2.0**-8


def at_round(monkeypatch: pytest.MonkeyPatch, role: str, round: int, act: Act) -> None:
    """Once: when `role` begins `round` of an evaluation, act instead."""
    evaluate, once = ServerProgram.evaluate, [act]

    def watched(self: ServerProgram, *arguments: Any) -> Generator[Round, Any, bytes]:
        steps = evaluate(self, *arguments)
        reply, number = None, 0
        while True:
            if self.role == role and number == round and once:
                once.pop()()
            try:
                step = next(steps) if reply is None else steps.send(reply)
            except StopIteration as end:
                return bytes(end.value)
            reply = yield step
            number += 1

    monkeypatch.setattr(ServerProgram, "evaluate", watched)


def severing(trio: Trio, role: str) -> Act:
    def act() -> None:
        trio.sever(role)
        raise PeerLost("crashed")

    return act


@pytest.mark.parametrize("round", range(ROUNDS + 1))
@pytest.mark.parametrize("role", ["alice", "bob"])
def test_a_server_lost_at_any_round_ends_the_request_and_only_it(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch, role: str, round: int
) -> None:
    trio = make_trio()
    client = trio.client()
    at_round(monkeypatch, role, round, severing(trio, role))
    began = time.monotonic()
    with pytest.raises(PeerLost, match=rf"{role} at 127\.0\.0\.1:\d+"):
        client.infer(X)
    assert time.monotonic() - began < 10
    trio.restart(role)
    check_serves(trio)


def test_the_survivor_names_the_round_and_its_instruction(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trio = make_trio()
    at_round(monkeypatch, "bob", 1, severing(trio, "bob"))
    with pytest.raises(PeerLost):
        trio.client().infer(X)
    trio.restart("bob")
    assert "round 2 of 3, instruction 3 sign (dense)" in caplog.text


def test_a_late_server_is_named_with_round_and_seconds(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio, awake = make_trio(round=0.5), threading.Event()
    assert trio.client().wait_for_bundles(20.0)  # else the deadline is that of the request
    at_round(monkeypatch, "bob", 2, lambda: bool(awake.wait(20)) and None)
    with pytest.raises(PeerTimeout) as caught:
        trio.client().infer(X)
    for word in ("bob at 127.0.0.1", "round 3 of 3", "instruction 3 sign", "0.5 s"):
        assert word in caught.value.message, word
    awake.set()
    check_serves(trio)


def test_a_failed_request_wastes_its_bundle_on_both_sides(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio = make_trio()

    def fail() -> None:
        raise PeerError("as if something broke")

    client = trio.client()
    assert client.wait_for_bundles(20.0)
    at_round(monkeypatch, "alice", 1, fail)
    with pytest.raises(PeerError, match="as if something broke"):
        client.infer(X)
    assert client.wait_for_bundles(20.0)
    alice, bob = trio.servers["alice"], trio.servers["bob"]
    assert isinstance(alice, Alice) and isinstance(bob, Bob)
    assert alice.pool.ready(alice.store.find(None).id) == len(bob.shelf) == 1
    assert alice.ledger.counts() == (2, 1)
    check_serves(trio)


def test_a_defect_ends_the_request_and_shows_no_value(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio = make_trio()

    def break_down() -> None:
        raise ValueError("the secret is 42")

    at_round(monkeypatch, "bob", 0, break_down)
    with pytest.raises(MpcError, match="internal error: ValueError") as caught:
        trio.client().infer(X)
    assert "secret" not in caught.value.message
    check_serves(trio)


@pytest.mark.parametrize("pieces", range(4))
def test_carol_lost_while_dealing_ends_the_request_and_only_it(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    trio = make_trio(depth=0)
    deal, once = Dealer.deal, [severing(trio, "carol")]

    def watched(self: Dealer, bundle: bytes, slots: int = 1) -> Iterator[memoryview]:
        for number, piece in enumerate(deal(self, bundle, slots)):
            if number == pieces and once:
                once.pop()()
            yield piece

    monkeypatch.setattr(Dealer, "deal", watched)
    with pytest.raises(PeerLost, match=r"carol at 127\.0\.0\.1"):
        trio.client().infer(X)
    trio.restart("carol")
    check_serves(trio)


def test_a_late_carol_is_named(make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch) -> None:
    trio, awake = make_trio(depth=0, round=0.5), threading.Event()
    deal, once = Dealer.deal, [awake]

    def watched(self: Dealer, bundle: bytes, slots: int = 1) -> Iterator[memoryview]:
        if once:
            assert once.pop().wait(20)
        yield from deal(self, bundle, slots)

    monkeypatch.setattr(Dealer, "deal", watched)
    with pytest.raises(PeerTimeout, match=r"0\.5 s for dealt bytes 0 … of 224 from carol at"):
        trio.client().infer(X)
    awake.set()
    check_serves(trio)


def test_a_bundle_that_cannot_be_written_down_is_not_used_and_leaves_nothing(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio = make_trio(depth=0)
    client, record, full = trio.client(), Ledger._record, ["alice", "bob"]
    links = [trio.servers["alice"].links.get("bob"), trio.servers["bob"].links.get("alice")]
    until(lambda: not any(link._streams.all() for link in links))

    def refusing(self: Ledger, *arguments: Any) -> None:
        (_, _, path), *_ = self._database.execute("PRAGMA database_list")
        if full and Path(path).parent.name == full[0]:
            raise Refused("the disk is full", "see to it")
        record(self, *arguments)

    monkeypatch.setattr(Ledger, "_record", refusing)
    while full:
        with pytest.raises(MpcError, match="the disk is full"):
            client.infer(X)
        until(lambda: not any(link._streams.all() for link in links))
        assert not len(trio.servers["bob"].shelf)
        del full[0]
    check_serves(trio)


@pytest.mark.parametrize("role", SERVERS)
def test_without_a_server_requests_fail_by_name_and_recover(make_trio: MakeTrio, role: str) -> None:
    trio = make_trio(depth=0)
    trio.crash(role)
    with pytest.raises(PeerError, match=role):
        trio.client().infer(X)
    trio.start(role)
    trio.wait_up()
    check_serves(trio)


def test_an_owner_who_leaves_is_forgotten(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio = make_trio()
    leaving = trio.client()

    def leave() -> None:
        for link in leaving._links.values():
            link._made_of.sock.shutdown(2)

    at_round(monkeypatch, "alice", 1, leave)
    with pytest.raises(PeerLost):
        leaving.infer(X)
    check_serves(trio)
    bob = trio.servers["bob"]
    assert isinstance(bob, Bob)
    until(lambda: not bob.meeting)


@pytest.mark.parametrize("given", [0, 1])
def test_who_sends_an_input_to_one_server_only_is_named(make_trio: MakeTrio, given: int) -> None:
    """And not the server that waits for the input, though the other waits for that server."""
    trio = make_trio(round=3.0, request=3.0)
    seeds = SEED_BYTES * len(PLAN.inputs)
    value = PLAN.value(PLAN.inputs[0].id)
    with (
        pytest.raises(PeerTimeout, match=r"input 'x'.* from data-owner"),
        trio.client()._request("data-owner") as both,
    ):
        for channel in both.channels[:: 1 - 2 * given]:  # who has the input has less time left
            channel.send_message({"type": "infer", "model": PLAN.name, "digest": PLAN.digest})
            time.sleep(0.2)
        both.ask(lambda c, s: (c.receive_message("ready", s), c.receive(seeds, "seeds", s)), 20.0)
        both.channels[given].send(bytes(packed_bytes(value.size, value.width)))
        both.ask(lambda c, s: c.receive(1, "the result", s), 20.0)


def test_a_request_that_is_interrupted_is_over_on_both_servers(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program may catch Ctrl-C and go on: neither server is left to wait for an input."""
    trio = make_trio()
    client = trio.client()
    share, ctrl_c = mask_input, [KeyboardInterrupt] * 3  # more than are served at once

    def interrupted(*arguments: Any) -> Iterator[memoryview]:
        if ctrl_c:
            raise ctrl_c.pop()
        return share(*arguments)

    monkeypatch.setattr("mpcserve.serving.client.mask_input", interrupted)
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            client.infer(X)
    assert np.abs(client.infer(X) - dense_relu(X, WEIGHTS)).max() < 2.0**-8
    assert time.monotonic() - began < trio.config.deadlines.round / 2


@pytest.mark.parametrize("liar", [0, 1])
@pytest.mark.parametrize("depth", [0, 1])
def test_an_owner_who_sends_different_inputs_learns_nothing(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch, liar: int, depth: int
) -> None:
    trio = make_trio(depth=depth)
    received: list[memoryview] = []
    receive = Channel.receive

    def lie(self: Both, data: memoryview, fresh: bool) -> None:
        for number, channel in enumerate(self.channels):
            channel.send(bytes([data[0] ^ (number == liar)]) + data[1:])

    def watched(self: Channel, n: int, what: str, timeout: float) -> memoryview:
        data = receive(self, n, what, timeout)
        received.extend([data] if what == "the result" else [])
        return data

    with monkeypatch.context() as patch:
        patch.setattr(Both, "send", lie)
        patch.setattr(Channel, "receive", watched)
        with pytest.raises(Refused, match="sent alice and bob different inputs"):
            trio.client().infer(X)
    assert received == []
    check_serves(trio)
    served = [s.health()["requests"] for s in trio.servers.values() if s.role != "carol"]
    assert [r["failed"] for r in served] == [1, 1]


# -- deployments ----------------------------------------------------------------------------------


def on_store(monkeypatch: pytest.MonkeyPatch, trio: Trio, role: str, method: str, act: Act) -> None:
    """Once: when `role` stages or commits, act instead."""
    original, once, store = getattr(Store, method), [act], trio.servers[role].store

    def watched(self: Store, *arguments: Any) -> Any:
        if self is store and once:
            once.pop()()
        return original(self, *arguments)

    monkeypatch.setattr(Store, method, watched)


def nothing_is_left_of(trio: Trio, name: str) -> None:
    for server in trio.servers.values():
        assert server.store.named(name) is None
        directory = server.store._directory  # the client may hear of it before all have undone it
        until(lambda directory=directory: len(list(directory.iterdir())) == 1)
    assert [d.name for server in trio.servers.values() for d in server.store] == ["dense"] * 3


@pytest.mark.parametrize("role", SERVERS)
def test_a_deployment_that_one_cannot_store_is_undone_by_all(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    trio = make_trio()

    def refuse() -> None:
        raise Refused("no room")

    on_store(monkeypatch, trio, role, "stage", refuse)
    with pytest.raises(Refused, match=rf"{role} at .*no room"):
        trio.client().deploy(MODEL, name="second")
    nothing_is_left_of(trio, "second")
    trio.client().deploy(MODEL, name="second")
    assert np.abs(trio.client().infer(X, model="second") - dense_relu(X, WEIGHTS)).max() < 2.0**-8


@pytest.mark.parametrize("role", SERVERS)
def test_a_server_lost_while_deploying_leaves_no_half_deployment(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    trio = make_trio()
    on_store(monkeypatch, trio, role, "stage", severing(trio, role))
    with pytest.raises(PeerError, match=role):
        trio.client().deploy(MODEL, name="second")
    trio.restart(role)
    nothing_is_left_of(trio, "second")
    trio.client().deploy(MODEL, name="second")


@pytest.mark.parametrize("role", ["bob", "carol"])
def test_a_follower_lost_before_it_commits_learns_it_when_it_is_back(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    trio = make_trio()
    on_store(monkeypatch, trio, role, "commit", severing(trio, role))
    with pytest.raises(PeerError, match=role):
        trio.client().deploy(MODEL, name="second")
    trio.restart(role)
    for server in trio.servers.values():
        assert server.store.named("second") is not None
    assert np.abs(trio.client().infer(X, model="second") - dense_relu(X, WEIGHTS)).max() < 2.0**-8


def test_alice_lost_before_she_commits_leaves_no_half_deployment(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio = make_trio()
    on_store(monkeypatch, trio, "alice", "commit", severing(trio, "alice"))
    with pytest.raises(PeerError, match="alice"):
        trio.client().deploy(MODEL, name="second")
    trio.restart("alice")
    nothing_is_left_of(trio, "second")
    check_serves(trio)


def test_servers_with_different_plans_refuse_each_other_with_both_digests(
    make_trio: MakeTrio,
) -> None:
    from dataclasses import replace

    trio = make_trio(depth=0)
    bob = trio.servers["bob"]
    assert isinstance(bob, Bob)
    (id, live), *_ = bob._live.items()
    other: Plan = dense_relu_plan("other")
    bob._live[id] = replace(live, deployment=replace(live.deployment, plan=other))
    with pytest.raises(Refused) as caught:
        trio.client().infer(X)
    assert PLAN.digest in caught.value.message and other.digest in caught.value.message
