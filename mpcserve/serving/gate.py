"""The gate: how many requests run at once, how many may wait, and who is turned away."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from mpcserve.errors import Refused


class Gate:
    """`running` requests at once, `waiting` more in line, first come first served."""

    def __init__(self, running: int, waiting: int) -> None:
        self._limits = running, waiting
        self._running = 0
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def counts(self) -> tuple[int, int]:
        """(running, waiting) now."""
        with self._changed:
            return self._running, len(self._line)

    @contextmanager
    def enter(self, timeout: float) -> Iterator[None]:
        """Run the block when it is this request's turn. Raises: Refused."""
        self._wait_for_turn(timeout)
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _wait_for_turn(self, timeout: float) -> None:
        me, (most, longest) = object(), self._limits
        with self._changed:
            if self._running >= most and len(self._line) >= longest:
                raise Refused(
                    f"busy: {self._running} requests run and {len(self._line)} wait",
                    "try again later, or raise `limits.requests` or `limits.queue`",
                )
            self._line.append(me)
            came = self._changed.wait_for(
                lambda: self._running < most and self._line[0] is me, timeout
            )
            self._line.remove(me)
            if came:
                self._running += 1
            self._changed.notify_all()
        if not came:
            raise Refused(
                f"busy: no turn in {timeout:.1f} s, {most} requests run",
                "try again later, or raise `limits.requests` or `deadlines.request`",
            )
