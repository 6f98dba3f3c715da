"""Requests that wait together share one evaluation, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpcserve.errors import MpcError, PeerError, PeerLost, PeerTimeout, Refused
from mpcserve.plan import bill_of
from mpcserve.plan.stack import stack
from mpcserve.serving import client as client_module
from mpcserve.serving import together
from mpcserve.serving.alice import Alice
from mpcserve.serving.bob import Bob
from mpcserve.serving.client import Client
from mpcserve.serving.gate import Gate
from mpcserve.serving.together import Member
from tests.serving_support import (
    Trio,
    as_model,
    dense_relu,
    dense_relu_plan,
    dense_weights,
    some_rows,
    until,
)

PLAN = dense_relu_plan()
WEIGHTS = dense_weights(PLAN)
ULP = 2.0**-8
WAIT = 20.0


@pytest.fixture
def trio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trio]:
    monkeypatch.setattr(together, "PATIENCE_S", 0.5)
    trio = Trio(tmp_path, depth=0, queue=16)
    trio.client().deploy(as_model(PLAN, WEIGHTS))
    yield trio
    trio.close()


@contextmanager
def all_waiting(trio: Trio, count: int) -> Iterator[None]:
    """Keep the gate shut until so many requests are in line when the block ends."""
    alice = trio.servers["alice"]
    assert isinstance(alice, Alice)
    with ExitStack() as first, alice.gate.enter(Member(None), WAIT):
        first.enter_context(alice.gate.enter(Member(None), WAIT))
        yield
        until(lambda: alice.gate.counts == (2, count))
        first.close()  # one place is free: the first in line takes all others with it
        until(lambda: alice.gate.counts[1] == 0)


def ask(client: Client, seed: int) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    outputs, report = client.infer_report(some_rows(PLAN, 2, seed=seed))
    return outputs["y"], report


def check(answer: tuple[np.ndarray[Any, Any], dict[str, Any]], seed: int) -> None:
    expected = dense_relu(some_rows(PLAN, 2, seed=seed), WEIGHTS)
    assert np.abs(answer[0] - expected).max() < ULP


def test_all_that_wait_share_one_bundle_and_its_cost(trio: Trio) -> None:
    client = trio.client()
    client.infer(some_rows(PLAN, 2))
    before = client.stats()["bob"]["bundles"]["spent"]
    with ThreadPoolExecutor(5) as threads:
        with all_waiting(trio, 5):
            asked = [threads.submit(ask, client, seed) for seed in range(5)]
        answers = [a.result(WAIT) for a in asked]
    for seed, answer in enumerate(answers):
        check(answer, seed)
    bill = bill_of(stack(PLAN, 5).plan)
    for _, report in answers:
        assert report["together"] == 5
        assert report["rounds"] == bill.rounds == bill_of(PLAN).rounds
        assert report["dealt_bytes"] == -(-bill.dealt_bytes // 5)
        for way in ("alice->bob", "bob->alice"):
            assert report["bytes"][way] == -(-bill.bytes[way] // 5)
    assert client.stats()["bob"]["bundles"]["spent"] == before + 1


def test_a_profile_is_of_an_evaluation_of_its_own(trio: Trio) -> None:
    client = trio.client()
    with ThreadPoolExecutor(3) as threads:
        with all_waiting(trio, 3):
            others = [threads.submit(ask, client, seed) for seed in range(2)]
            mine = threads.submit(client.infer_report, some_rows(PLAN, 2), profile=True)
        assert mine.result(WAIT)[1]["together"] == 1
        assert set(mine.result(WAIT)[1]["profile"]) == {"alice", "bob"}
        for seed, other in enumerate(others):
            check(other.result(WAIT), seed)


def send_badly(monkeypatch: pytest.MonkeyPatch, thread_name: str, act: Any) -> None:
    """What one client thread sends as its input goes through `act(channels, data)`."""
    original = client_module.Both.send

    def send(self: client_module.Both, data: memoryview, fresh: bool) -> None:
        if threading.current_thread().name == thread_name:
            act(self.channels, data)
        else:
            original(self, data, fresh)

    monkeypatch.setattr(client_module.Both, "send", send)


def bad_among_good(trio: Trio, good: int = 3) -> MpcError:
    """One client thread named `bad` asks with others; the others are answered. The error of it."""
    client, caught = trio.client(), []

    def ask_badly() -> None:
        try:
            ask(client, 99)
        except MpcError as error:
            caught.append(error)

    with ThreadPoolExecutor(good) as threads:
        with all_waiting(trio, good + 1):
            bad = threading.Thread(target=ask_badly, name="bad")
            bad.start()
            asked = [threads.submit(ask, trio.client(), seed) for seed in range(good)]
        for seed, answer in enumerate(asked):
            check(answer.result(WAIT), seed)
            assert answer.result(WAIT)[1]["together"] == good + 1
        bad.join(WAIT)
    bob = trio.servers["bob"]
    assert isinstance(bob, Bob)
    until(lambda: not bob.meeting and not bob.joining and not bob.shelf)
    (error,) = caught
    return error


def test_who_sends_no_input_leaves_and_the_others_go_on(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_badly(monkeypatch, "bad", lambda channels, data: None)
    error = bad_among_good(trio)
    assert isinstance(error, PeerTimeout)
    assert "waited" in error.message and "input 'x'" in error.message


def test_who_sends_an_input_to_one_server_only_leaves(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_badly(monkeypatch, "bad", lambda channels, data: channels[0].send(data))
    assert isinstance(bad_among_good(trio), PeerTimeout)


def test_who_sends_two_inputs_is_refused_and_learns_nothing(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(channels: Any, data: bytes) -> None:
        channels[0].send(data)
        channels[1].send(bytes([data[0] ^ 1]) + data[1:])

    send_badly(monkeypatch, "bad", differ)
    error = bad_among_good(trio)
    assert isinstance(error, Refused)
    assert "alice and bob different inputs" in error.message


def test_who_hangs_up_leaves(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang_up(channels: Any, data: bytes) -> None:
        raise PeerLost("the owner goes")

    send_badly(monkeypatch, "bad", hang_up)
    assert "the owner goes" in bad_among_good(trio).message


def test_who_asks_alice_alone_is_not_waited_for(trio: Trio) -> None:
    client = trio.client()
    alone = client._link("data-owner", "alice").channel(bytes([7]) * 16)
    request = {"type": "infer", "model": "dense", "digest": PLAN.digest, "profile": False}
    with ThreadPoolExecutor(2) as threads:
        alone.send_message(request)
        with all_waiting(trio, 2):
            asked = [threads.submit(ask, client, seed) for seed in range(2)]
        for seed, answer in enumerate(asked):
            check(answer.result(WAIT), seed)
            assert answer.result(WAIT)[1]["together"] == 2
    alone.fail(PeerLost("not wanted any more"))


def test_who_asks_alice_alone_has_no_place_for_long(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpcserve.serving.bob.HALF_S", 0.3)
    client, alice = trio.client(), trio.servers["alice"]
    assert isinstance(alice, Alice)
    request = {"type": "infer", "model": "dense", "digest": PLAN.digest, "profile": False}
    alone = [client._link("data-owner", "alice").channel(bytes([k]) * 16) for k in (8, 9)]
    until(lambda: alice.gate.counts == (0, 0))
    for channel in alone:  # as many as have a place
        channel.send_message(request)
    until(lambda: alice.gate.counts == (2, 0))
    check(ask(client, 1), 1)
    for channel in alone:
        with pytest.raises(PeerTimeout, match=r"the data owner did not send this half"):
            for _ in range(2):  # `ready` came first
                channel.receive_message("an answer", WAIT)
                channel.receive(32, "seeds", WAIT)


def test_what_ends_an_evaluation_ends_it_for_all_who_share_it(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise PeerError("broken on purpose")

    monkeypatch.setattr("mpcserve.serving.bob.evaluate_members", broken)
    client = trio.client()
    with ThreadPoolExecutor(3) as threads:
        with all_waiting(trio, 3):
            asked = [threads.submit(ask, client, seed) for seed in range(3)]
        for answer in asked:
            with pytest.raises(PeerError, match="broken on purpose"):
                answer.result(WAIT)
    monkeypatch.undo()
    check(ask(client, 1), 1)


def test_whoever_leads_takes_those_who_want_the_same() -> None:
    gate: Gate[str] = Gate(1, 8)
    seen: list[list[str]] = []

    def enter(name: str, key: object) -> None:
        with gate.enter(name, WAIT, key, lambda: 3) as group:
            if group:
                seen.append(group)

    names = [("a", 1), ("b", 2), ("c", 1), ("d", 1), ("e", 1), ("f", None), ("g", None)]
    with ThreadPoolExecutor(8) as threads, gate.enter("first", WAIT):
        for count, (name, key) in enumerate(names):
            threads.submit(enter, name, key)
            until(lambda count=count: gate.counts == (1, count + 1))  # type: ignore[misc]
    assert seen == [["a", "c", "d"], ["b"], ["e"], ["f"], ["g"]]
    assert gate.counts == (0, 0)
