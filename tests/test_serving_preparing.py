"""Bundles that are prepared while they are used, and bundles that wait on the disk."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpcserve.errors import PeerError, PeerTimeout, Refused
from mpcserve.plan import bill_of
from mpcserve.protocol import OUTPUTS, Dealer, Round, ServerProgram, Together
from mpcserve.serving import halves, preparing
from mpcserve.serving.alice import Alice
from mpcserve.serving.bob import Bob
from mpcserve.serving.evaluation import in_blocks
from mpcserve.serving.preparing import Preparation
from mpcserve.serving.request import Deadline
from mpcserve.serving.spool import Spool, Spooled
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
MODEL = as_model(PLAN, WEIGHTS)
X = some_rows(PLAN, 2)
WAIT = 20.0
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


def check_serves(trio: Trio) -> dict[str, Any]:
    """The next request is right and costs its bill; its report."""
    outputs, report = trio.client().infer_report(X)
    assert np.abs(outputs["y"] - dense_relu(X, WEIGHTS)).max() < 2.0**-8
    bill = bill_of(PLAN)
    assert report["bytes"] == bill.bytes and report["dealt_bytes"] == bill.dealt_bytes
    assert report["seconds"]["preprocessing"] > 0 and report["cpu_seconds"]["carol"] > 0
    return report


def online(trio: Trio) -> tuple[Alice, Bob]:
    alice, bob = trio.servers["alice"], trio.servers["bob"]
    assert isinstance(alice, Alice) and isinstance(bob, Bob)
    return alice, bob


# -- streaming ------------------------------------------------------------------------------------


class Half(Preparation):
    """Alice's half of a bundle, prepared up to an instruction; then it waits, or fails."""

    def __init__(self, trio: Trio, stop_at: int, fails: bool = False) -> None:
        alice, _ = online(trio)
        (live,) = alice._live.values()
        link = alice.links.get("bob")
        super().__init__(live.program, os.urandom(16), link, "carol deals it")
        self.stop_at, self.fails, self.go_on = stop_at, fails, threading.Event()
        materials = live.program.materials

        def some(id: bytes, take: Any, slots: int) -> Iterator[tuple[int, Any]]:
            for instruction, material in materials(id, take, slots):
                if instruction == stop_at:
                    if fails:
                        raise PeerError("carol is lost")
                    assert self.go_on.wait(WAIT)
                yield instruction, material

        made = _Program(live.plan, live.program.bundle, some)
        self._program = made  # type: ignore[assignment]

    def work(self) -> None:
        self.fill()
        self.settle({"preprocessing_seconds": 1.0})


class _Program:
    def __init__(self, plan: Any, bundle: Any, materials: Any) -> None:
        self.plan, self.bundle, self.materials = plan, bundle, materials

    def plan_of(self, slots: int) -> Any:
        return self.plan


def test_a_material_is_there_as_soon_as_it_is_prepared_and_once(make_trio: MakeTrio) -> None:
    half = Half(make_trio(depth=0), stop_at=3)
    half.until(Deadline(WAIT))
    half.start()
    assert half.take(2) is not None and not half.whole
    half.go_on.set()
    assert half.facts() == {"preprocessing_seconds": 1.0}
    for id in (3, 4, OUTPUTS):
        half.take(id)
    assert half._parts == {}, "what is consumed is freed"
    half.finish()
    assert half.whole
    half.until(Deadline(0.0))
    with pytest.raises(PeerTimeout):
        half.take(3)


def test_a_late_material_is_named_with_who_deals_it(make_trio: MakeTrio) -> None:
    half = Half(make_trio(depth=0), stop_at=3)
    half.until(Deadline(0.05))
    half.start()
    with pytest.raises(PeerTimeout, match=r"instruction 3 sign \(dense\) .* carol deals it"):
        half.take(3)
    with pytest.raises(PeerTimeout, match="all instructions"):
        half.facts()
    half.go_on.set()
    half.finish()


def test_what_fails_in_preparing_is_raised_where_it_is_wanted(make_trio: MakeTrio) -> None:
    half = Half(make_trio(depth=0), stop_at=3, fails=True)
    half.until(Deadline(WAIT))
    half.start()
    for wanted in (half.finish, half.facts, lambda: half.take(3)):
        with pytest.raises(PeerError, match="carol is lost"):
            wanted()


def test_a_bundle_that_was_given_up_is_freed_and_prepared_no_further(make_trio: MakeTrio) -> None:
    half = Half(make_trio(depth=0), stop_at=3)
    half.until(Deadline(WAIT))
    half.start()
    until(lambda: 2 in half._parts)
    half.abandon()
    half.go_on.set()
    with pytest.raises(Refused, match="given up"):
        half.finish()
    assert half._parts == {} and not half.whole


def after_round(monkeypatch: pytest.MonkeyPatch, role: str, act: Callable[[], None]) -> None:
    """When `role` has the answer of its first round, act."""
    evaluate = ServerProgram.evaluate

    def watched(self: ServerProgram, *arguments: Any) -> Generator[Round, Any, bytes]:
        steps = evaluate(self, *arguments)
        reply = yield next(steps)
        if self.role == role:
            act()
        while True:
            try:
                reply = yield steps.send(reply)
            except StopIteration as end:
                return bytes(end.value)

    monkeypatch.setattr(ServerProgram, "evaluate", watched)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrections are sent as they are dealt, however few, and are prepared by another thread."""
    monkeypatch.setattr(halves, "BLOCK_BYTES", 1)
    monkeypatch.setattr(halves, "SMALL_BYTES", 0)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("role", ["alice", "bob"])
def test_a_request_is_evaluated_while_its_bundle_is_still_dealt(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    trio, evaluating = make_trio(depth=0), threading.Event()
    after_round(monkeypatch, role, evaluating.set)
    deal = Dealer.deal

    def hesitating(self: Dealer, bundle: bytes, slots: int = 1) -> Iterator[memoryview]:
        pieces = deal(self, bundle, slots)
        yield next(pieces)  # of the product
        assert evaluating.wait(WAIT)
        yield from pieces

    monkeypatch.setattr(Dealer, "deal", hesitating)
    check_serves(trio)


@pytest.mark.usefixtures("small_blocks")
def test_a_late_dealer_is_named_while_her_bundle_is_used(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio, awake = make_trio(depth=0, round=0.3), threading.Event()
    deal, once = Dealer.deal, [awake]

    def hesitating(self: Dealer, bundle: bytes, slots: int = 1) -> Iterator[memoryview]:
        pieces = deal(self, bundle, slots)
        yield next(pieces)
        if once:
            assert once.pop().wait(WAIT)
        yield from pieces

    monkeypatch.setattr(Dealer, "deal", hesitating)
    with pytest.raises(PeerTimeout, match=r"0\.3 s for dealt bytes \d+ … of 224 from carol at"):
        trio.client().infer(X)
    awake.set()
    check_serves(trio)


@pytest.mark.usefixtures("small_blocks")
def test_a_failed_request_ends_the_preparing_of_its_bundle_on_both_sides(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio, failed = make_trio(depth=0), threading.Event()
    deal, once = Dealer.deal, [failed]

    def hesitating(self: Dealer, bundle: bytes, slots: int = 1) -> Iterator[memoryview]:
        pieces = deal(self, bundle, slots)
        yield next(pieces)
        if once:
            assert once.pop().wait(WAIT)
        yield from pieces

    def fail() -> None:
        raise PeerError("as if something broke")

    monkeypatch.setattr(Dealer, "deal", hesitating)
    with monkeypatch.context() as patch:
        after_round(patch, "alice", fail)
        with pytest.raises(PeerError, match="as if something broke"):
            trio.client().infer(X)
    failed.set()
    until(lambda: preparing._CREW._idle == len(preparing._CREW._threads))
    _, bob = online(trio)
    until(lambda: len(bob.shelf) == 0)
    check_serves(trio)


@pytest.mark.parametrize("block", [1, 50, 100, 1 << 20])
def test_corrections_come_whole_whatever_the_blocks(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(halves, "BLOCK_BYTES", block)
    trio = make_trio(depth=0)
    for _ in range(2):
        check_serves(trio)


@pytest.mark.parametrize("size", [0, 1, 4, 5, 100])
def test_pieces_are_joined_up_to_a_size_in_order(size: int) -> None:
    pieces = [b"ab", b"", b"cdefg", b"h", b"ij"]
    blocks = list(in_blocks(pieces, size))
    assert b"".join(blocks) == b"abcdefghij"
    assert all(len(b) >= size for b in blocks[:-1])
    assert len(blocks) <= (len(pieces) if size < 2 else 10 // size + 1)


# -- the spool ------------------------------------------------------------------------------------


def test_bundles_beyond_the_memory_wait_on_the_disk_without_a_name(make_trio: MakeTrio) -> None:
    trio = make_trio(depth=3, max_bytes=1)
    assert trio.client().wait_for_bundles(WAIT)
    alice, bob = online(trio)
    assert alice.pool.ready(alice.store.find(None).id) == 3 and len(bob.shelf) == 3
    assert alice.pool.prepared_bytes() == 0 and list(bob.spool._directory.iterdir()) == []
    for _, half in bob.shelf._entries.values():
        assert half._spooled is not None and half.nbytes == 0
        status = os.fstat(half._spooled._file.fileno())
        assert stat.S_IMODE(status.st_mode) == 0o600 and status.st_nlink == 0
        assert status.st_size == bill_of(PLAN).dealt_bytes
    for _ in range(4):
        check_serves(trio)


def test_bundles_come_from_the_disk_when_there_is_room(make_trio: MakeTrio) -> None:
    one = Together(PLAN, WEIGHTS).prepare()[0].nbytes
    trio = make_trio(depth=3, max_bytes=3 * one // 2)
    alice, bob = online(trio)
    for _ in range(4):
        assert trio.client().wait_for_bundles(WAIT)
        on_disk = [h for _, h in bob.shelf._entries.values() if h._spooled and not h.whole]
        assert alice.pool.prepared_bytes() == one and len(on_disk) == 2
        assert len(bob.shelf) == 3
        check_serves(trio)
    assert alice.ledger.counts()[1] == 4


def test_a_full_disk_is_named_and_requests_are_served_without_stock(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Spooled, *arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Spooled, "fill", full)
    trio = make_trio(depth=1, max_bytes=1)
    until(lambda: "cannot keep a bundle on disk: No space left" in caplog.text)
    check_serves(trio)


def test_a_link_that_ends_takes_the_spooled_bundles_with_it(make_trio: MakeTrio) -> None:
    trio = make_trio(depth=2, max_bytes=1)
    assert trio.client().wait_for_bundles(WAIT)
    _, bob = online(trio)
    kept = [h._spooled for _, h in bob.shelf._entries.values()]
    trio.restart("alice")
    until(lambda: all(s is not None and s._file.closed for s in kept))
    check_serves(trio)


def test_a_spooled_bundle_that_is_closed_is_refused(tmp_path: Path) -> None:
    data = bytes(range(200))
    parts = iter([memoryview(data)])
    spooled = Spool(tmp_path / "spool").write(200, lambda n: next(parts))
    assert spooled.take(50) == data[:50] and spooled.take(150) == data[50:]
    with pytest.raises(Refused):
        spooled.take(1)
    spooled.close()
    with pytest.raises(Refused, match="given up"):
        spooled.take(1)


def test_an_evaluation_does_not_wait_for_the_deadline_when_its_bundle_is_lost(
    make_trio: MakeTrio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Dealer, bundle: bytes, slots: int = 1) -> Iterator[memoryview]:
        raise ValueError("a defect")
        yield memoryview(b"")

    trio, began = make_trio(depth=0), time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(Dealer, "deal", broken)
        with pytest.raises(PeerError, match=r"carol at .*internal error: ValueError"):
            trio.client().infer(X)
    assert time.monotonic() - began < 10
    check_serves(trio)
