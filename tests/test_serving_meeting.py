"""The two halves of a request meet; the gate lets a few in and keeps order."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mpcserve.errors import PeerError, PeerLost, PeerTimeout, Refused
from mpcserve.serving.gate import Gate
from mpcserve.serving.meeting import Meeting
from tests.serving_support import until

A, B = b"a" * 16, b"b" * 16
WAIT = 20.0


@pytest.mark.parametrize("first", ["offer", "claim"])
def test_the_halves_meet_whichever_comes_first(first: str) -> None:
    meeting: Meeting[str] = Meeting(4)
    claimed = threading.Event()

    def claim() -> str:
        claimed.set()
        with meeting.claim(A, "the owner", WAIT) as value:
            return value

    with ThreadPoolExecutor(2) as threads:
        if first == "claim":
            claiming = threads.submit(claim)
            assert claimed.wait(WAIT)
        offering = threads.submit(meeting.offer, A, "half", "alice", WAIT)
        if first == "offer":
            until(lambda: bool(meeting))
            claiming = threads.submit(claim)
        assert claiming.result(WAIT) == "half"
        offering.result(WAIT)
    assert not meeting


def test_the_offerer_waits_until_the_claimer_is_done_and_shares_its_error() -> None:
    meeting: Meeting[str] = Meeting(4)
    with ThreadPoolExecutor(1) as threads:
        offering = threads.submit(meeting.offer, A, "half", "alice", 0.2)
        with pytest.raises(PeerError), meeting.claim(A, "the owner", WAIT):
            assert not offering.done()
            raise PeerError("broken")
        with pytest.raises(PeerError, match="broken"):
            offering.result(WAIT)


def test_an_offer_that_nobody_claims_ends_in_time() -> None:
    meeting: Meeting[str] = Meeting(4)
    with pytest.raises(PeerTimeout, match=r"alice did not take up .* in 0\.1 s"):
        meeting.offer(A, "half", "alice", 0.1)
    assert not meeting


def test_a_claim_that_nobody_answers_ends_in_time() -> None:
    meeting: Meeting[str] = Meeting(4)
    with (
        pytest.raises(PeerTimeout, match=r"the data owner did not send .* in 0\.1 s"),
        meeting.claim(A, "the data owner", 0.1),
    ):
        pass


def test_one_id_is_offered_once_and_offers_are_bounded() -> None:
    meeting: Meeting[str] = Meeting(1)
    with ThreadPoolExecutor(1) as threads:
        offering = threads.submit(meeting.offer, A, "half", "alice", WAIT)
        until(lambda: bool(meeting))
        with pytest.raises(Refused, match="sent twice"):
            meeting.offer(A, "again", "alice", WAIT)
        with pytest.raises(Refused, match="busy"):
            meeting.offer(B, "other", "alice", WAIT)
        meeting.refuse_all(PeerLost("alice is gone"))
        with pytest.raises(PeerLost, match="alice is gone"):
            offering.result(WAIT)


def test_the_gate_lets_so_many_in_and_then_the_next_in_line() -> None:
    gate, order = Gate(1, 2), []
    with ThreadPoolExecutor(2) as threads, gate.enter(None, WAIT):
        threads.submit(_pass, gate, "first", order)
        until(lambda: gate.counts == (1, 1))
        threads.submit(_pass, gate, "second", order)
        until(lambda: gate.counts == (1, 2))
        with (
            pytest.raises(Refused, match="busy: 1 evaluations run and 2 requests wait"),
            gate.enter(None, WAIT),
        ):
            pass
    assert order == ["first", "second"]
    assert gate.counts == (0, 0)


def test_who_has_to_wait_at_the_gate_does_something_before() -> None:
    gate: Gate[None] = Gate(1, 1)
    did: list[tuple[int, int]] = []

    def before() -> None:
        did.append(gate.counts)

    with gate.enter(None, WAIT, before_waiting=before):
        assert did == []
        with (
            pytest.raises(Refused, match="no turn"),
            gate.enter(None, 0.1, before_waiting=before),
        ):
            pass
        assert did == [(1, 0)]
        with (
            pytest.raises(PeerLost),
            gate.enter(None, WAIT, before_waiting=_lose),
        ):
            pass
        assert gate.counts == (1, 0)
    assert gate.counts == (0, 0)


def _lose() -> None:
    raise PeerLost("bob is gone")


def test_who_waits_too_long_at_the_gate_is_refused() -> None:
    gate: Gate[None] = Gate(1, 1)
    with gate.enter(None, WAIT):
        with pytest.raises(Refused, match=r"no turn in 0\.1 s"), gate.enter(None, 0.1):
            pass
        assert gate.counts == (1, 0)


def _pass(gate: Gate[None], name: str, order: list[str]) -> None:
    with gate.enter(None, WAIT):
        order.append(name)
