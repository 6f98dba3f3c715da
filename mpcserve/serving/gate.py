"""How many evaluations run at once, how many requests wait, and which of those share one.

A request that finds a place free is evaluated alone, at once. Of those that wait, the first leads
when a place is free, and takes with it whoever else waits for the same thing: what an evaluation
costs is mostly paid per instruction, hardly per request.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from mpcserve.errors import Refused

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Place(Generic[T]):
    """One that waits: for its turn to lead or, once it is `led`, until that is done."""

    value: T
    key: Hashable
    led: bool = False
    done: bool = False


class Gate(Generic[T]):
    """`running` evaluations at once, `waiting` more requests in line, first come first served."""

    def __init__(self, running: int, waiting: int) -> None:
        self._limits = running, waiting
        self._running = 0
        self._line: deque[_Place[T]] = deque()
        self._changed = threading.Condition()

    @property
    def counts(self) -> tuple[int, int]:
        """(running, waiting) now."""
        with self._changed:
            return self._running, len(self._line)

    @contextmanager
    def enter(
        self,
        value: T,
        timeout: float,
        key: Hashable = None,
        most: Callable[[], int] = lambda: 1,
        before_waiting: Callable[[], None] = lambda: None,
    ) -> Iterator[list[T]]:
        """Run the block when it is this request's turn: with its value and those that it leads.

        It leads at most `most()` in all, itself included, whose `key` is the same. Without any
        values, somebody else has led this one, and is done. `before_waiting` is called when no
        place is free, before it is in line. Raises: Refused; what `before_waiting` raises.
        """
        me, end = _Place(value, key), time.monotonic() + timeout
        if self._is_free():
            group = [me]
        else:
            before_waiting()
            group = self._wait_for_turn(me, timeout, end, most)
        try:
            yield [place.value for place in group]
        finally:
            if group:
                with self._changed:
                    self._running -= 1
                    for place in group:
                        place.done = True
                    self._changed.notify_all()

    def _is_free(self) -> bool:
        """Take a place at once, if there is one and nobody is in line for it."""
        with self._changed:
            free = self._running < self._limits[0] and not self._line
            self._running += free
            if not free:
                self._check_room()
            return free

    def _check_room(self) -> None:
        """`_changed` held. Raises: Refused when the line is full."""
        limit, longest = self._limits
        if self._running >= limit and len(self._line) >= longest:
            raise Refused(
                f"busy: {self._running} evaluations run and {len(self._line)} requests wait",
                "try again later, or raise `limits.requests` or `limits.queue`",
            )

    def _wait_for_turn(
        self, me: _Place[T], timeout: float, end: float, most: Callable[[], int]
    ) -> list[_Place[T]]:
        """Until `end`, which was `timeout` seconds away."""
        limit = self._limits[0]
        with self._changed:
            self._check_room()
            self._line.append(me)
            came = self._changed.wait_for(
                lambda: me.led or (self._running < limit and self._line[0] is me),
                max(0.0, end - time.monotonic()),
            )
            if me.led:
                self._changed.wait_for(lambda: me.done)
                return []
            if came:
                self._running += 1
                group = self._take(me, most())
            else:
                self._line.remove(me)
            self._changed.notify_all()
        if not came:
            raise Refused(
                f"busy: no turn in {timeout:.1f} s, {limit} evaluations run",
                "try again later, or raise `limits.requests` or `deadlines.request`",
            )
        return group

    def _take(self, leader: _Place[T], most: int) -> list[_Place[T]]:
        """The leader and those whom it leads leave the line; `_changed` held."""
        alike = [place for place in self._line if place.key == leader.key]
        group = alike[: max(most, 1)] if leader.key is not None else [leader]
        for place in group:
            self._line.remove(place)
            place.led = place is not leader
        return group
