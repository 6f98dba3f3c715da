"""The pool: bundles ahead, on demand, in order, each once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from mpcserve.errors import PeerLost, PeerTimeout, Refused
from mpcserve.serving.pool import Pool, Shelf
from tests.serving_support import until

A, B = b"a" * 16, b"b" * 16
WAIT = 20.0


@dataclass(frozen=True)
class Entry:
    number: int
    deployment: bytes = A
    nbytes: int = 100
    link: str = "link"


class Maker:
    """Numbers the bundles it makes; can be told to wait and to fail."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.open = threading.Event()
        self.open.set()
        self.failing = False
        self.made: list[bytes] = []

    def __call__(self, deployment: bytes) -> Entry:
        assert self.open.wait(WAIT)
        self.made.append(deployment)
        if self.failing:
            raise PeerLost("carol is gone", "start her")
        return Entry(next(self.numbers), deployment)


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture
def pool_of(maker: Maker) -> Iterator[Callable[..., Pool[Entry]]]:
    pools = []

    def build(depth: int = 2, max_bytes: int = 10**9, workers: int = 1) -> Pool[Entry]:
        pools.append(Pool(maker, depth, max_bytes, workers))
        return pools[-1]

    yield build
    maker.open.set()
    for pool in pools:
        pool.close()


def test_depth_bundles_are_kept_ready_and_come_out_in_order(
    pool_of: Callable[..., Pool[Entry]],
) -> None:
    pool = pool_of(depth=3)
    pool.add(A, 100)
    assert pool.wait_filled(WAIT)
    assert pool.ready(A) == 3
    assert [pool.take(A, WAIT).number for _ in range(5)] == [0, 1, 2, 3, 4]
    assert pool.wait_filled(WAIT) and pool.ready(A) == 3


def test_no_bundle_comes_out_twice_to_many_threads(pool_of: Callable[..., Pool[Entry]]) -> None:
    pool = pool_of(depth=4, workers=2)
    pool.add(A, 100)
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda _: pool.take(A, WAIT).number, range(64)))
    assert len(set(taken)) == 64


def test_without_depth_a_bundle_is_made_for_each_request_and_none_ahead(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    pool = pool_of(depth=0)
    pool.add(A, 100)
    assert pool.wait_filled(WAIT) and maker.made == []
    assert [pool.take(A, WAIT).number for _ in range(3)] == [0, 1, 2]
    assert pool.wait_filled(WAIT) and len(maker.made) == 3


def test_the_byte_cap_holds_stock_back_but_not_requests(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    pool = pool_of(depth=5, max_bytes=250)
    pool.add(A, 100)
    pool.add(B, 100)
    assert pool.wait_filled(WAIT)
    assert (pool.ready(A) + pool.ready(B)) * 100 <= 250
    assert [pool.take(B, WAIT).deployment for _ in range(4)] == [B] * 4


def test_requests_come_before_stock(pool_of: Callable[..., Pool[Entry]], maker: Maker) -> None:
    maker.open.clear()
    pool = pool_of(depth=3)
    pool.add(A, 100)
    pool.add(B, 100)
    with ThreadPoolExecutor(1) as threads:
        taken = threads.submit(pool.take, B, WAIT)
        until(lambda: pool.waiting(B) > 0)
        maker.open.set()
        assert taken.result(WAIT).deployment == B
    assert B in maker.made[:2]


def test_a_request_is_told_why_its_bundle_failed_and_the_next_succeeds(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    pool = pool_of(depth=0)
    pool.add(A, 100)
    maker.failing = True
    with pytest.raises(PeerLost, match="carol is gone"):
        pool.take(A, WAIT)
    maker.failing = False
    assert pool.take(A, WAIT).number == 0


def test_a_defect_while_making_does_not_stop_the_pool(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    pool = pool_of(depth=0)
    pool.add(A, 100)
    maker.numbers = iter(())  # type: ignore[assignment]
    with pytest.raises(Exception, match="internal error: StopIteration"):
        pool.take(A, WAIT)
    maker.numbers = itertools.count(7)
    assert pool.take(A, WAIT).number == 7


def test_a_failed_stock_is_tried_again_at_once_when_told(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    maker.failing = True
    pool = pool_of(depth=1)
    pool.add(A, 100)
    until(lambda: bool(maker.made))
    maker.failing = False
    pool.retry()
    assert pool.wait_filled(WAIT) and pool.ready(A) == 1


def test_waiting_ends_at_the_deadline(pool_of: Callable[..., Pool[Entry]], maker: Maker) -> None:
    maker.open.clear()
    pool = pool_of(depth=1)
    pool.add(A, 100)
    with pytest.raises(PeerTimeout, match=r"0\.1 s"):
        pool.take(A, 0.1)
    maker.open.set()
    assert pool.take(A, WAIT).number == 0


def test_bundles_of_a_lost_link_are_dropped(pool_of: Callable[..., Pool[Entry]]) -> None:
    pool = pool_of(depth=2)
    pool.add(A, 100)
    assert pool.wait_filled(WAIT)
    pool.drop("link")
    assert pool.take(A, WAIT).number >= 2


def test_removing_a_deployment_refuses_those_who_wait(
    pool_of: Callable[..., Pool[Entry]], maker: Maker
) -> None:
    maker.open.clear()
    pool = pool_of(depth=1)
    pool.add(A, 100)
    with ThreadPoolExecutor(1) as threads:
        taken = threads.submit(pool.take, A, WAIT)
        until(lambda: pool.waiting(A) > 0)
        pool.remove(A)
        with pytest.raises(Refused, match="retired"):
            taken.result(WAIT)
    with pytest.raises(Refused, match="retired"):
        pool.take(A, WAIT)


def test_the_shelf_gives_a_bundle_once_and_only_for_its_deployment() -> None:
    shelf: Shelf[Entry] = Shelf()
    shelf.put(b"1" * 16, A, Entry(1))
    shelf.put(b"2" * 16, A, Entry(2))
    assert shelf.take(b"1" * 16, A).number == 1
    for bundle, deployment in ((b"1" * 16, A), (b"2" * 16, B), (b"3" * 16, A)):
        with pytest.raises(Refused, match="not here"):
            shelf.take(bundle, deployment)


def test_the_shelf_drops_by_link_and_by_deployment() -> None:
    shelf: Shelf[Entry] = Shelf()
    shelf.put(b"1" * 16, A, Entry(1, A, link="old"))
    shelf.put(b"2" * 16, A, Entry(2, A, link="new"))
    shelf.put(b"3" * 16, B, Entry(3, B, link="new"))
    shelf.drop("old")
    assert len(shelf) == 2
    shelf.remove(B)
    assert len(shelf) == 1 and shelf.take(b"2" * 16, A).number == 2
