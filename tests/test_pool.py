"""The pool: bundles ahead, on demand, in order, each once, and on the disk beyond the memory."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mpcserve.errors import PeerLost, Refused
from mpcserve.serving.pool import Agreement, Pool, Shelf
from tests.serving_support import until

A, B = b"a" * 16, b"b" * 16
WAIT = 20.0


class Entry:
    """A bundle that is prepared when its maker's gate is open."""

    def __init__(self, maker: Maker, number: int, deployment: bytes, spooled: bool) -> None:
        self.maker, self.number, self.deployment = maker, number, deployment
        self.spooled, self.alive, self.link = spooled, True, "link"
        self.nbytes = 0
        self.did: list[str] = []

    def load(self) -> None:
        assert self.spooled
        self.did.append("load")

    def finish(self) -> None:
        self.did.append("finish")
        assert self.maker.open.wait(WAIT)
        if self.maker.failing:
            raise PeerLost("carol is gone", "start her")
        self.nbytes = 100

    def abandon(self) -> None:
        self.did.append("abandon")


class Maker:
    """Numbers the bundles it agrees on; can be told to wait and to fail."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.open = threading.Event()
        self.open.set()
        self.failing = False
        self.made: list[Entry] = []

    def __call__(self, deployment: bytes, purpose: Agreement, slots: int) -> Entry:
        if self.failing:
            raise PeerLost("carol is gone", "start her")
        self.made.append(Entry(self, next(self.numbers), deployment, purpose == "spool"))
        return self.made[-1]


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture
def pool_of(maker: Maker) -> Iterator[Callable[..., Pool[Entry]]]:
    pools = []

    def build(depth: int = 2, max_bytes: int = 10**9) -> Pool[Entry]:
        pools.append(Pool(maker, depth, max_bytes))
        return pools[-1]

    yield build
    maker.open.set()
    for pool in pools:
        pool.close()


def take(pool: Pool[Entry], deployment: bytes = A) -> Entry:
    """Use one bundle."""
    with pool.bundle(deployment) as entry:
        return entry


def test_depth_bundles_are_kept_ready_and_come_out_in_order(
    pool_of: Callable[..., Pool[Entry]],
) -> None:
    pool = pool_of(depth=3)
    pool.add(A, 100)
    assert pool.wait_filled(WAIT)
    assert pool.ready(A) == 3
    assert [take(pool).number for _ in range(3)] == [0, 1, 2]
    assert pool.wait_filled(WAIT) and pool.ready(A) == 3


def test_no_bundle_comes_out_twice_to_many_threads(pool_of: Callable[..., Pool[Entry]]) -> None:
    pool = pool_of(depth=4)
    pool.add(A, 100)
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda _: take(pool).number, range(64)))
    assert len(set(taken)) == 64


def test_without_depth_a_bundle_is_made_for_each_request_and_none_ahead(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    pool = pool_of(depth=0)
    pool.add(A, 100)
    assert pool.wait_filled(WAIT) and maker.made == []
    assert [take(pool).number for _ in range(3)] == [0, 1, 2]
    assert pool.wait_filled(WAIT) and len(maker.made) == 3
    assert all(e.did == [] for e in maker.made)  # the evaluation has it prepared


def test_no_stock_is_made_while_a_request_is_evaluated(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    pool = pool_of(depth=1)
    pool.add(A, 100)
    assert pool.wait_filled(WAIT)
    with pool.bundle(A) as first, pool.bundle(A) as second:
        assert not pool.wait_filled(0.05)
        assert [e.number for e in maker.made] == [first.number, second.number]
    assert pool.wait_filled(WAIT) and len(maker.made) == 3


def test_a_request_takes_the_bundle_that_is_being_prepared(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    maker.open.clear()
    pool = pool_of(depth=1)
    pool.add(A, 100)
    until(lambda: bool(maker.made) and "finish" in maker.made[0].did)
    with pool.bundle(A) as entry:
        assert entry.number == 0 and len(maker.made) == 1
        maker.open.set()
    assert pool.wait_filled(WAIT) and pool.ready(A) == 1
    assert take(pool).number == 1, "what was taken is not put in stock"


def test_a_bundle_that_fails_in_the_hands_of_a_request_does_not_delay_stock(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    maker.open.clear()
    pool = pool_of(depth=1)
    pool.add(A, 100)
    until(lambda: bool(maker.made) and "finish" in maker.made[0].did)
    with pytest.raises(Refused), pool.bundle(A) as entry:
        maker.failing = True
        maker.open.set()
        raise Refused("it failed")
    assert "abandon" in entry.did
    maker.failing = False
    pool.retry()
    assert pool.wait_filled(WAIT) and pool.ready(A) == 1


def test_what_memory_does_not_hold_is_spooled_up_to_the_depth(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    pool = pool_of(depth=5, max_bytes=250)
    pool.add(A, 100)
    pool.add(B, 100)
    assert pool.wait_filled(WAIT)
    assert pool.ready(A) == pool.ready(B) == 5
    assert pool.prepared_bytes() == 200
    assert sorted(e.spooled for e in maker.made) == [False] * 2 + [True] * 8
    assert all(e.did == [] for e in maker.made if e.spooled)


def test_a_first_bundle_that_is_larger_than_guessed_is_not_kept_beyond_the_memory(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    pool = pool_of(depth=3, max_bytes=150)
    pool.add(A, 100)
    assert pool.wait_filled(WAIT)
    pool.add(B, 1)  # a guess: it takes 100
    assert pool.wait_filled(WAIT)
    assert pool.prepared_bytes() == 100
    assert (pool.ready(A), pool.ready(B)) == (3, 3)
    first = next(e for e in maker.made if e.deployment == B)
    assert first.did == ["finish", "abandon"]


def test_memory_that_becomes_free_is_filled_from_the_disk(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    pool = pool_of(depth=2, max_bytes=100)
    pool.add(A, 100)
    assert pool.wait_filled(WAIT)
    assert [e.spooled for e in maker.made] == [False, True]
    assert take(pool) is maker.made[0]
    assert pool.wait_filled(WAIT)
    assert maker.made[1].did == ["load", "finish"]
    assert [e.spooled for e in maker.made] == [False, True, True]
    assert pool.ready(A) == 2 and pool.prepared_bytes() == 100


def test_without_memory_requests_take_from_the_disk(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    pool = pool_of(depth=2, max_bytes=0)
    pool.add(A, 100)
    assert pool.wait_filled(WAIT) and pool.ready(A) == 2
    assert take(pool).did == [] and maker.made[0].spooled
    assert pool.wait_filled(WAIT) and pool.prepared_bytes() == 0


def test_a_request_is_told_why_its_bundle_failed_and_the_next_succeeds(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    pool = pool_of(depth=0)
    pool.add(A, 100)
    maker.failing = True
    with pytest.raises(PeerLost, match="carol is gone"):
        take(pool)
    maker.failing = False
    assert take(pool).number == 0


def test_a_defect_while_making_does_not_stop_the_pool(
    pool_of: Callable[..., Pool[Entry]], maker: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    maker.numbers = iter(())  # type: ignore[assignment]
    pool = pool_of(depth=1)
    pool.add(A, 100)
    until(lambda: "internal error: StopIteration" in caplog.text)
    maker.numbers = itertools.count(7)
    pool.retry()
    assert pool.wait_filled(WAIT) and take(pool).number == 7


def test_a_failed_stock_is_tried_again_at_once_when_told(
    pool_of: Callable[..., Pool[Entry]], maker: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    maker.failing = True
    pool = pool_of(depth=1)
    pool.add(A, 100)
    until(lambda: "carol is gone" in caplog.text)
    maker.failing = False
    pool.retry()
    assert pool.wait_filled(WAIT) and pool.ready(A) == 1


def test_bundles_of_a_lost_link_are_dropped(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    pool = pool_of(depth=2, max_bytes=100)
    pool.add(A, 100)
    assert pool.wait_filled(WAIT)
    pool.drop("link")
    assert [e.did[-1] for e in maker.made[:2]] == ["abandon"] * 2
    assert take(pool).number >= 2


def test_a_bundle_whose_link_was_lost_while_it_was_made_is_not_put_in_stock(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    maker.open.clear()
    pool = pool_of(depth=1)
    pool.add(A, 100)
    until(lambda: bool(maker.made) and "finish" in maker.made[0].did)
    maker.made[0].alive = False
    maker.open.set()
    assert pool.wait_filled(WAIT)
    assert take(pool).number == 1 and maker.made[0].did[-1] == "abandon"


def test_a_retired_deployment_has_no_bundles(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    pool = pool_of(depth=1)
    pool.add(A, 100)
    assert pool.wait_filled(WAIT)
    pool.remove(A)
    assert maker.made[0].did[-1] == "abandon"
    with pytest.raises(Refused, match="retired"):
        take(pool)


def entry(number: int, link: str = "link") -> Entry:
    """For a shelf."""
    made = Entry(Maker(), number, A, False)
    made.link = link
    return made


def test_the_shelf_gives_a_bundle_once_and_only_for_its_deployment() -> None:
    shelf: Shelf[Entry] = Shelf()
    shelf.put(b"1" * 16, A, entry(1))
    shelf.put(b"2" * 16, A, entry(2))
    assert shelf.take(b"1" * 16, A).number == 1
    for bundle, deployment in ((b"1" * 16, A), (b"2" * 16, B), (b"3" * 16, A)):
        with pytest.raises(Refused, match="not here"):
            shelf.take(bundle, deployment)


def test_the_shelf_drops_by_link_and_by_deployment() -> None:
    shelf: Shelf[Entry] = Shelf()
    shelf.put(b"1" * 16, A, entry(1, "old"))
    shelf.put(b"2" * 16, A, entry(2, "new"))
    shelf.put(b"3" * 16, B, entry(3, "new"))
    shelf.drop("old")
    assert len(shelf) == 2
    shelf.remove(B)
    assert len(shelf) == 1 and shelf.take(b"2" * 16, A).number == 2


def test_the_shelf_tells_why_a_bundle_failed() -> None:
    shelf: Shelf[Entry] = Shelf()
    failed = entry(1)
    shelf.put(b"1" * 16, A, failed)
    shelf.fail(b"1" * 16, PeerLost("carol is gone"))
    assert failed.did == ["abandon"] and len(shelf) == 0
    with pytest.raises(PeerLost, match="carol is gone"):
        shelf.take(b"1" * 16, A)


def test_the_shelf_keeps_nothing_of_a_lost_link() -> None:
    shelf: Shelf[Entry] = Shelf()
    late = entry(1)
    late.alive = False
    shelf.put(b"1" * 16, A, late)
    assert len(shelf) == 0 and late.did == ["abandon"]
