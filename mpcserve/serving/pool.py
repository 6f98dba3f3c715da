"""Bundles dealt ahead: alice's pool decides when one is made, bob's shelf keeps his halves of them.

Alice coordinates. While no request is evaluated, nor was a moment ago, her worker keeps `depth`
bundles of every deployment in stock: prepared, as long as all of them together stay under
`max_bytes` of memory, and beyond that as what carol dealt, on bob's disk, to be prepared when there
is room. A request gets the oldest that is prepared, else the one at hand, else one from the disk,
else a new one; what of it is still to be prepared is prepared while it is being evaluated: slower,
never wrong. Each comes out once. A bundle is good only as long as the link over which its two
halves were agreed on: when that link drops, both sides drop what they hold of it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar

from mpcserve.errors import MpcError, Refused
from mpcserve.serving.log import log, named_error

QUIET_S = 0.02
"""For so long after an evaluation no stock is made: bob may still be at it, and its owner too."""

BACK_OFF = (1.0, 30.0)
"""Seconds before the next attempt to make stock after a failure: first, and at most."""

REMEMBERED = 64
"""Bundles that could not be prepared, of which a shelf knows why."""


class Kept(Protocol):
    """What a shelf holds: `link` says what its life hangs on."""

    @property
    def link(self) -> Hashable: ...

    @property
    def alive(self) -> bool:
        """Whether the link is."""

    def abandon(self) -> None:
        """It is not wanted any more."""


class Stocked(Kept, Protocol):
    """What a pool holds: `nbytes` of memory once it is prepared."""

    @property
    def nbytes(self) -> int: ...

    def load(self) -> None:
        """From the disk: have the other side begin to prepare it."""

    def finish(self) -> None:
        """Return when it is prepared. Raises: why not."""


S = TypeVar("S", bound=Kept)
T = TypeVar("T", bound=Stocked)

Agreement: TypeAlias = Literal["now", "stock", "spool"]
"""What a fresh bundle is for: a request that waits for it, this machine's memory, bob's disk."""

Wish: TypeAlias = Literal["prepare", "spool", "load"]
"""What a stock wants: one more in memory, one more on the disk, one from the disk in memory."""


@dataclass(slots=True)
class _Stock(Generic[T]):
    """Of one deployment, whose last bundle had `nbytes` of memory.

    `at_hand` are being prepared and may be taken; `making` more may not be taken yet. After a
    failure nothing is made before `not_before`.
    """

    nbytes: int
    ready: deque[T] = field(default_factory=deque)
    at_hand: deque[T] = field(default_factory=deque)
    spooled: deque[T] = field(default_factory=deque)
    making: int = 0
    delay: float = 0.0
    not_before: float = 0.0

    @property
    def shelves(self) -> tuple[deque[T], ...]:
        """All that may be taken, the best first."""
        return self.ready, self.at_hand, self.spooled

    @property
    def count(self) -> int:
        """Bundles that are dealt, or about to be."""
        return sum(map(len, self.shelves)) + self.making

    @property
    def held(self) -> int:
        """Bytes of memory of what is prepared, and of what is being prepared as far as known."""
        under_way = len(self.at_hand) + self.making
        return sum(e.nbytes for e in self.ready) + under_way * self.nbytes


class Pool(Generic[T]):
    """`agree(deployment, what for, slots)` returns a fresh bundle, not yet prepared, or raises.

    To `spool`, it returns when the bundle lies on the disk of the other side; `now`, at once: the
    other side hears of it with the request that waits for it.
    """

    def __init__(
        self, agree: Callable[[bytes, Agreement, int], T], depth: int, max_bytes: int
    ) -> None:
        self._agree = agree
        self._depth = depth
        self._max_bytes = max_bytes
        self._stocks: dict[bytes, _Stock[T]] = {}
        self._changed = threading.Condition()
        self._evaluating = 0
        self._quiet_at = 0.0  # when stock may be made, if nothing is being evaluated then
        self._closed = False
        threading.Thread(target=self._work, name="mpcserve-stock", daemon=True).start()

    def add(self, deployment: bytes, nbytes: int) -> None:
        """Begin to keep bundles of `deployment`; `nbytes` is a guess until one has been made."""
        with self._changed:
            self._stocks.setdefault(deployment, _Stock(nbytes))
            self._changed.notify_all()

    def remove(self, deployment: bytes) -> None:
        """Drop a deployment's bundles."""
        with self._changed:
            stock = self._stocks.pop(deployment, None)
            self._changed.notify_all()
        if stock is not None:
            _abandon([e for shelf in stock.shelves for e in shelf])

    @contextmanager
    def bundle(self, deployment: bytes, slots: int = 1) -> Iterator[T]:
        """A bundle for an evaluation, which the block is; no stock is made meanwhile. It may still
        have to be started.

        One for several requests is never in stock: it is dealt now.

        Raises: Refused, or why there is none.
        """
        with self._changed:
            self._evaluating += 1
        try:
            entry = self._take(deployment) if slots == 1 else self._agree(deployment, "now", slots)
            try:
                yield entry
            except BaseException:
                entry.abandon()
                raise
        finally:
            with self._changed:
                self._evaluating -= 1
                self._quiet_at = time.monotonic() + QUIET_S
                if any(map(self._wish, self._stocks.values())):  # who has none is not woken
                    self._changed.notify_all()

    def drop(self, link: Hashable) -> None:
        """Forget every bundle agreed on over `link`."""
        dropped: list[T] = []
        with self._changed:
            for stock in self._stocks.values():
                for shelf in stock.shelves:
                    dropped += [e for e in shelf if e.link == link]
                    kept = [e for e in shelf if e.link != link]
                    shelf.clear()
                    shelf.extend(kept)
            self._changed.notify_all()
        _abandon(dropped)

    def retry(self) -> None:
        """Make stock again at once: whatever made it fail may be gone, such as a peer's absence."""
        with self._changed:
            for stock in self._stocks.values():
                stock.delay = stock.not_before = 0.0
            self._changed.notify_all()

    def ready(self, deployment: bytes) -> int:
        """How many bundles of `deployment` are in stock, prepared or on the disk."""
        with self._changed:
            stock = self._stocks.get(deployment)
            return len(stock.ready) + len(stock.spooled) if stock else 0

    def prepared_bytes(self) -> int:
        """Memory of all bundles in stock."""
        with self._changed:
            return sum(e.nbytes for s in self._stocks.values() for e in s.ready)

    def wait_filled(self, timeout: float) -> bool:
        """Wait until no stock is wanting; whether that came true."""
        with self._changed:
            return self._changed.wait_for(
                lambda: (
                    not any(s.making or s.at_hand or self._wish(s) for s in self._stocks.values())
                ),
                timeout,
            )

    def close(self) -> None:
        """Stop the worker after the bundle at hand; drop all."""
        with self._changed:
            self._closed = True
        for deployment in list(self._stocks):
            self.remove(deployment)

    def _take(self, deployment: bytes) -> T:
        with self._changed:
            stock = self._stocks.get(deployment)
            if stock is None:
                raise _retired(deployment)
            for shelf in stock.shelves:
                if shelf:
                    return shelf.popleft()
        return self._agree(deployment, "now", 1)

    # -- stock ------------------------------------------------------------------------------------

    def _wish(self, stock: _Stock[T]) -> Wish | None:
        held = sum(s.held for s in self._stocks.values())
        fits = held + stock.nbytes <= self._max_bytes
        if stock.spooled and fits:
            return "load"
        if stock.count >= self._depth:
            return None
        return "prepare" if fits else "spool"

    def _next(self) -> tuple[bytes, _Stock[T], Wish] | None:
        """What to do now; the deployment with the least stock comes first."""
        now = time.monotonic()
        if self._evaluating or now < self._quiet_at:
            return None
        for id, stock in sorted(self._stocks.items(), key=lambda item: item[1].count):
            if stock.not_before <= now and (wish := self._wish(stock)):
                return id, stock, wish
        return None

    def _pause(self) -> float | None:
        """Seconds until a delayed stock may be tried again; None: until something changes."""
        if self._evaluating:
            return None
        waits = [max(s.not_before, self._quiet_at) for s in self._stocks.values() if self._wish(s)]
        return max(min(waits) - time.monotonic(), 0.0) if waits else None

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (wanted := self._next()) is None:
                    self._changed.wait(self._pause())
                if self._closed:
                    return
                assert wanted is not None
                deployment, stock, wish = wanted
                stock.making += 1
                entry = stock.spooled.popleft() if wish == "load" else None
            try:
                entry = self._begin(deployment, stock, wish, entry)
                if wish != "spool":
                    self._finish(entry, deployment, stock)
                stock.delay = 0.0
            except Exception as e:
                log.warning("no bundle of deployment %s: %s", deployment.hex(), named_error(e))
                stock.delay = min(max(2 * stock.delay, BACK_OFF[0]), BACK_OFF[1])
                stock.not_before = time.monotonic() + stock.delay

    def _begin(self, deployment: bytes, stock: _Stock[T], wish: Wish, entry: T | None) -> T:
        """Agree on one or, if it is given, load it; from now on it may be taken."""
        begun, kept = entry, False
        try:
            if entry is not None:
                entry.load()
            else:
                begun = self._agree(deployment, "spool" if wish == "spool" else "stock", 1)
            kept = True
        finally:
            with self._changed:
                stock.making -= 1
                if kept and begun is not None:
                    shelf = stock.spooled if wish == "spool" else stock.at_hand
                    kept = self._place(begun, shelf, deployment, stock)
                self._changed.notify_all()
            if begun is not None and not kept:
                begun.abandon()
        assert begun is not None
        return begun

    def _finish(self, entry: T, deployment: bytes, stock: _Stock[T]) -> None:
        """Prepare it. Somebody may take it meanwhile: then an error is theirs."""
        error: Exception | None = None
        try:
            entry.finish()
        except Exception as e:
            error = e
        with self._changed:
            stock.nbytes = entry.nbytes or stock.nbytes
            if entry not in stock.at_hand:
                return
            fits = sum(s.held for s in self._stocks.values()) <= self._max_bytes
            stock.at_hand.remove(entry)
            # The first of a deployment may turn out larger than was guessed.
            wanted = error is None and fits
            kept = wanted and self._place(entry, stock.ready, deployment, stock)
            self._changed.notify_all()
        if not kept:
            entry.abandon()
        if error is not None:
            raise error

    def _place(self, entry: T, shelf: deque[T], deployment: bytes, stock: _Stock[T]) -> bool:
        """`_changed` held. False if nobody wants it; a link that ends later drops it then."""
        wanted = self._stocks.get(deployment) is stock and entry.alive
        if wanted:
            shelf.append(entry)
        return wanted


class Shelf(Generic[S]):
    """Bob's bundles by id, prepared or not: alice names the one to take."""

    def __init__(self) -> None:
        self._entries: dict[bytes, tuple[bytes, S]] = {}
        self._failed: OrderedDict[bytes, MpcError] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, bundle: bytes, deployment: bytes, entry: S) -> None:
        """Keep `entry` until it is taken or dropped: if its link has ended, that is now."""
        with self._lock:
            if entry.alive:
                self._entries[bundle] = deployment, entry
                return
        entry.abandon()

    def look(self, bundle: bytes, deployment: bytes) -> S:
        """The entry, which stays. Raises: Refused."""
        with self._lock:
            return self._found(bundle, deployment, self._entries.get(bundle))

    def take(self, bundle: bytes, deployment: bytes) -> S:
        """The entry, once. Raises: Refused."""
        with self._lock:
            return self._found(bundle, deployment, self._entries.pop(bundle, None))

    def fail(self, bundle: bytes, error: MpcError) -> None:
        """Abandon one bundle; whoever comes for it is told why."""
        self.discard(bundle)
        with self._lock:
            self._failed[bundle] = error
            if len(self._failed) > REMEMBERED:
                self._failed.popitem(last=False)

    def discard(self, bundle: bytes) -> None:
        """Abandon one bundle, if it is here."""
        self._keep(lambda id, deployment, entry: id != bundle)

    def drop(self, link: Hashable) -> None:
        """Abandon every bundle agreed on over `link`."""
        self._keep(lambda id, deployment, entry: entry.link != link)

    def remove(self, deployment: bytes) -> None:
        """Abandon the bundles of a retired deployment."""
        self._keep(lambda id, owner, entry: owner != deployment)

    def __len__(self) -> int:
        return len(self._entries)

    def _found(self, bundle: bytes, deployment: bytes, found: tuple[bytes, S] | None) -> S:
        if failed := self._failed.get(bundle):
            raise type(failed)(failed.message, failed.hint)
        if found is None or found[0] != deployment:
            raise Refused(
                f"bundle {bundle.hex()} of deployment {deployment.hex()} is not here",
                "it was used or dropped: repeat the request",
            )
        return found[1]

    def _keep(self, wanted: Callable[[bytes, bytes, S], bool]) -> None:
        with self._lock:
            dropped = {i: e for i, e in self._entries.items() if not wanted(i, *e)}
            for id in dropped:
                del self._entries[id]
        _abandon([entry for _, entry in dropped.values()])


def _abandon(entries: Sequence[Kept]) -> None:
    for entry in entries:
        entry.abandon()


def _retired(deployment: bytes) -> Refused:
    return Refused(
        f"deployment {deployment.hex()} is retired", "list what is deployed with `mpcserve models`"
    )
