"""Bundles dealt ahead: alice's pool decides when one is made, bob's shelf keeps his halves of them.

Alice coordinates. Her workers keep `depth` bundles of every deployment ready while all of them
together stay under `max_bytes`; a request that finds none ready has one made for it: slower, never
wrong. Bundles come out first in, first out, each exactly once. Requests come before stock.
A bundle is good only as long as the link over which its two halves were agreed on: when that
link drops, both sides drop what they hold of it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from mpcserve.errors import MpcError, PeerTimeout, Refused
from mpcserve.serving.log import log, named_error

BACK_OFF = (1.0, 30.0)
"""Seconds before the next attempt to make stock after a failure: first, and at most."""


class Stocked(Protocol):
    """What a pool holds: `nbytes` counts against the cap, `link` says what its life hangs on."""

    @property
    def nbytes(self) -> int: ...

    @property
    def link(self) -> Hashable: ...


T = TypeVar("T", bound=Stocked)


@dataclass(slots=True, eq=False)
class _Waiter(Generic[T]):
    entry: T | None = None
    error: MpcError | None = None


@dataclass(slots=True)
class _Stock(Generic[T]):
    """Of one deployment, whose last bundle had `nbytes`; `making` more are under way.

    After a failure no stock is made before `not_before`.
    """

    nbytes: int
    ready: deque[T] = field(default_factory=deque)
    waiters: deque[_Waiter[T]] = field(default_factory=deque)
    making: int = 0
    delay: float = 0.0
    not_before: float = 0.0


class Pool(Generic[T]):
    """`make(deployment)` returns a fresh bundle or raises; it runs in `workers` threads."""

    def __init__(
        self, make: Callable[[bytes], T], depth: int, max_bytes: int, workers: int = 1
    ) -> None:
        self._make = make
        self._depth = depth
        self._max_bytes = max_bytes
        self._stocks: dict[bytes, _Stock[T]] = {}
        self._changed = threading.Condition()
        self._closed = False
        for number in range(workers):
            threading.Thread(target=self._work, name=f"dealing-{number}", daemon=True).start()

    def add(self, deployment: bytes, nbytes: int) -> None:
        """Begin to keep bundles of `deployment`; `nbytes` is a guess until one has been made."""
        with self._changed:
            self._stocks.setdefault(deployment, _Stock(nbytes))
            self._changed.notify_all()

    def remove(self, deployment: bytes) -> None:
        """Drop a deployment's bundles and refuse those who wait for one."""
        with self._changed:
            if stock := self._stocks.pop(deployment, None):
                for waiter in stock.waiters:
                    waiter.error = _retired(deployment)
                self._changed.notify_all()

    def take(self, deployment: bytes, timeout: float) -> T:
        """The oldest bundle ready, or one made now. Raises: PeerTimeout, Refused, or why not."""
        waiter: _Waiter[T] = _Waiter()
        with self._changed:
            stock = self._stocks.get(deployment)
            if stock is None:
                raise _retired(deployment)
            stock.waiters.append(waiter)
            self._hand_out(stock)
            self._changed.wait_for(lambda: waiter.entry or waiter.error, timeout)
            if waiter.entry is not None:
                return waiter.entry
            if waiter in stock.waiters:
                stock.waiters.remove(waiter)
        raise waiter.error or PeerTimeout(
            f"no bundle of deployment {deployment.hex()} was dealt in {timeout:.1f} s",
            "carol deals them: is she up, and is `deadlines.request` long enough?",
        )

    def drop(self, link: Hashable) -> None:
        """Forget every bundle agreed on over `link`."""
        with self._changed:
            for stock in self._stocks.values():
                stock.ready = deque(e for e in stock.ready if e.link != link)
            self._changed.notify_all()

    def retry(self) -> None:
        """Make stock again at once: whatever made it fail may be gone, such as a peer's absence."""
        with self._changed:
            for stock in self._stocks.values():
                stock.delay = stock.not_before = 0.0
            self._changed.notify_all()

    def ready(self, deployment: bytes) -> int:
        """How many bundles of `deployment` wait to be taken."""
        with self._changed:
            stock = self._stocks.get(deployment)
            return len(stock.ready) if stock else 0

    def waiting(self, deployment: bytes) -> int:
        """How many requests wait for a bundle of `deployment`."""
        with self._changed:
            stock = self._stocks.get(deployment)
            return len(stock.waiters) if stock else 0

    def wait_filled(self, timeout: float) -> bool:
        """Wait until no stock is wanting; whether that came true."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not any(s.making or self._wants(s) for s in self._stocks.values()), timeout
            )

    def close(self) -> None:
        """Stop the workers after the bundle at hand; refuse all who wait."""
        with self._changed:
            self._closed = True
            for deployment in list(self._stocks):
                self.remove(deployment)

    def _hand_out(self, stock: _Stock[T]) -> None:
        while stock.ready and stock.waiters:
            stock.waiters.popleft().entry = stock.ready.popleft()
        self._changed.notify_all()

    def _wants(self, stock: _Stock[T]) -> bool:
        """Whether to make one: for a waiter always, for stock while depth and bytes allow."""
        if stock.making < len(stock.waiters):
            return True
        ahead = len(stock.ready) + stock.making - len(stock.waiters)
        return ahead < self._depth and self._held() + stock.nbytes <= self._max_bytes

    def _held(self) -> int:
        """Bytes of all bundles ready, and of those being made as far as known."""
        return sum(
            sum(e.nbytes for e in s.ready) + s.making * s.nbytes for s in self._stocks.values()
        )

    def _next(self) -> bytes | None:
        """The deployment to make a bundle for now: those with requests waiting come first."""
        now = time.monotonic()
        wanting = [
            (not s.waiters, id)
            for id, s in self._stocks.items()
            if self._wants(s) and (s.waiters or s.not_before <= now)
        ]
        return min(wanting)[1] if wanting else None

    def _pause(self) -> float | None:
        """Seconds until a delayed stock may be tried again; None: until something changes."""
        waits = [s.not_before for s in self._stocks.values() if self._wants(s)]
        return max(min(waits) - time.monotonic(), 0.0) if waits else None

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (deployment := self._next()) is None:
                    self._changed.wait(self._pause())
                if self._closed:
                    return
                assert deployment is not None
                stock = self._stocks[deployment]
                stock.making += 1
            self._settle(stock, self._attempt(deployment))

    def _attempt(self, deployment: bytes) -> T | MpcError:
        try:
            return self._make(deployment)
        except Exception as e:
            error = named_error(e)
            log.warning("no bundle of deployment %s: %s", deployment.hex(), error)
            return error

    def _settle(self, stock: _Stock[T], made: T | MpcError) -> None:
        with self._changed:
            stock.making -= 1
            if isinstance(made, MpcError):
                if stock.waiters:
                    stock.waiters.popleft().error = made
                stock.delay = min(max(2 * stock.delay, BACK_OFF[0]), BACK_OFF[1])
                stock.not_before = time.monotonic() + stock.delay
            else:
                stock.delay, stock.nbytes = 0.0, made.nbytes
                stock.ready.append(made)
                self._hand_out(stock)
            self._changed.notify_all()


class Shelf(Generic[T]):
    """Bob's prepared bundles by id: alice names the one to take."""

    def __init__(self) -> None:
        self._entries: dict[bytes, tuple[bytes, T]] = {}
        self._lock = threading.Lock()

    def put(self, bundle: bytes, deployment: bytes, entry: T) -> None:
        """Keep `entry` until it is taken or dropped."""
        with self._lock:
            self._entries[bundle] = deployment, entry

    def take(self, bundle: bytes, deployment: bytes) -> T:
        """The entry, once. Raises: Refused."""
        with self._lock:
            found = self._entries.pop(bundle, None)
        if found is None or found[0] != deployment:
            raise Refused(
                f"bundle {bundle.hex()} of deployment {deployment.hex()} is not here",
                "it was used or dropped: repeat the request",
            )
        return found[1]

    def discard(self, bundle: bytes) -> None:
        """Forget one bundle, if it is here."""
        with self._lock:
            self._entries.pop(bundle, None)

    def drop(self, link: Hashable) -> None:
        """Forget every bundle agreed on over `link`."""
        self._keep(lambda deployment, entry: entry.link != link)

    def remove(self, deployment: bytes) -> None:
        """Forget the bundles of a retired deployment."""
        self._keep(lambda owner, entry: owner != deployment)

    def __len__(self) -> int:
        return len(self._entries)

    def _keep(self, wanted: Callable[[bytes, T], bool]) -> None:
        with self._lock:
            self._entries = {i: e for i, e in self._entries.items() if wanted(*e)}


def _retired(deployment: bytes) -> Refused:
    return Refused(
        f"deployment {deployment.hex()} is retired", "list what is deployed with `mpcserve models`"
    )
