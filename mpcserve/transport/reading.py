"""Who reads a link's socket: its reader thread, or in its place a thread that waits for a stream.

Waking the reader, which wakes whoever waits, costs a round of a small layer more than its
arithmetic. So a stream may be *attended*. While it is the only one, its thread reads for itself
when it waits, and glances at the socket between two pieces of its work. The reader thread gives
way where it waits already, and stands by: it reads again when that thread is busy with something
else for long, when several streams are attended, and when there is an error to tell.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

STANDBY_S = 0.05
"""For so long nobody may read while an attending thread computes: it glances in between. A reader
that woke up more often would cost, where all cores compute, more than what it reads."""

BRIEF_S = 0.002
"""The same while an attending thread may wait for what other streams bring."""

_LARGE = 32 << 10  # where this much has come at once, more is on its way


class Source(Protocol):
    """What is read, one thread at a time; any may interrupt it."""

    def read(self, seconds: float, brisk: bool = False) -> int | None:
        """How many bytes came, 0 at the end; None if none came in `seconds`, or sooner when
        interrupted. `brisk`: they are due any moment."""
        ...

    def interrupt(self) -> None:
        """The `read` in progress, or the next, waits no longer."""
        ...

    def hand_on(self) -> None:
        """What had come before the first read."""
        ...

    def close(self) -> None:
        """Nobody reads any more."""
        ...


class Reading:
    """Whose turn it is to read from a source. `tick`: seconds that a read waits.

    `asked`: all that comes is an answer to a stream of this side. While no stream wants anything
    the reader thread need not come back at once.
    """

    def __init__(self, source: Source, tick: float, asked: bool = False) -> None:
        self._source = source
        self._tick = tick
        self._asked = asked
        self._turn = threading.Lock()  # the right to read
        self._lock = threading.Lock()  # of `_attended` and `_relying`
        self._attended: list[object] = []
        self._sole: object | None = None  # the stream that is attended, where there is just one
        self._relying = 0  # threads that wait for what another reads
        self._needed = threading.Event()  # the reader thread does not stand by
        self._needed.set()
        self._trouble: Exception | None = None  # met by another thread: the reader's to raise
        self._ended = False
        self._flowing = False
        self._standby, self._brisk = BRIEF_S, False
        self._until = 0.0  # for so long the reader thread stands by, unless it is needed
        self._claim = threading.Lock()  # the right to be the next to read

    def read(self) -> bool | None:
        """For the reader thread. True after bytes, False at the end, None after a tick without any.

        Raises: whatever the source raises, also in a thread that read in its place.
        """
        if not (self._flowing or self._needed.wait(self._until - time.monotonic())):
            now = time.monotonic()
            if now < self._until:  # somebody attends who was only expected before
                return None
            self._until = now + self._standby  # for after it was interrupted, too
            if self._turn.locked():
                return None
            with self._lock:
                if not self._attended:  # whoever was expected has not come
                    self._needed.set()
        with self._claim:
            pass  # whoever was told that it is next is next
        if not self._turn.acquire(timeout=self._tick):
            return None
        try:
            if self._trouble is not None:
                raise self._trouble
            return self._once(self._tick)
        finally:
            self._turn.release()

    @contextmanager
    def attended(self, stream: object, standby: float, brisk: bool) -> Iterator[None]:
        """While this lasts, `wait_for` and `glance` read for the stream.

        `standby`: seconds for which nobody may read, while the attending thread does other things.
        `brisk`: what it waits for is due any moment.
        """
        with self._lock:
            self._attended.append(stream)
            self._brisk = brisk
            self._stand_by(standby)
            self._settle()
        try:
            yield
        finally:
            with self._lock:
                self._attended.remove(stream)
                self._settle()

    def expected(self) -> None:
        """A stream is about to be attended: for BRIEF_S, the reader thread gives way already.

        What that costs is paid while whoever says so waits for something else.
        """
        with self._lock:
            if not self._attended and self._is_idle() and self._needed.is_set():
                self._stand_by(BRIEF_S)
                self._needed.clear()
                self._source.interrupt()

    def give_way(self, seconds: float) -> None:
        """The same, said by the thread that reads."""
        with self._lock:
            if not self._attended and self._is_idle():
                self._stand_by(seconds)
                self._needed.clear()

    def resume(self) -> None:
        """The reader thread is needed, whoever attends."""
        self._needed.set()

    def begin(self) -> None:
        """Hand on what came before the first read, in turn."""
        with self._turn:
            self._source.hand_on()

    def look_up(self, stream: object) -> None:
        """Whoever reads for the stream asks again whether it wants something."""
        if stream in self._attended:
            self._source.interrupt()

    def close(self) -> None:
        """Nobody reads any more, or will: the number of a closed file may soon be another's."""
        with self._turn:
            self._ended = True
            self._source.close()

    def wait_for(self, stream: object, wants: Callable[[], bool], deadline: float) -> None:
        """Read in this thread as long as the stream `wants` something, up to the deadline.

        Returns at once where the stream is not the only one attended: rely on the reader then.
        """
        if self._sole is stream and self._take_over(deadline):
            try:
                while wants() and not self._ended and self._trouble is None:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        break
                    self._once(min(left, self._tick), self._brisk)
            except BaseException as error:
                self._leave(error)
            finally:
                self._turn.release()

    @contextmanager
    def relied_on(self) -> Iterator[None]:
        """While this lasts the reader thread does not stand by."""
        with self._lock:
            self._relying += 1
            self._settle()
        try:
            yield
        finally:
            with self._lock:
                self._relying -= 1
                self._settle()

    def glance(self, stream: object) -> None:
        """Read what has come, where the stream is the only one attended; wait for nothing."""
        if self._sole is stream and self._turn.acquire(blocking=False):
            try:
                self._once(0.0)
            except BaseException as error:
                self._leave(error)
            finally:
                self._turn.release()

    def _leave(self, error: BaseException) -> None:
        """What another thread has met while it read is left to the reader."""
        if isinstance(error, Exception):
            self._trouble = error
        else:  # Ctrl-C: what this thread had read may be lost
            self._trouble = ConnectionAbortedError("the thread that read was interrupted")
        self._needed.set()
        if not isinstance(error, Exception):
            raise error

    def _take_over(self, deadline: float) -> bool:
        """Let this thread read: the reader gives way, and does not come between."""
        if self._turn.acquire(blocking=False):
            return True
        with self._claim:
            self._source.interrupt()
            return self._turn.acquire(timeout=max(0.0, deadline - time.monotonic()))

    def _once(self, seconds: float, brisk: bool = False) -> bool | None:
        if self._ended:
            return False
        got = self._source.read(seconds, brisk)
        self._flowing = got is not None and got >= _LARGE
        if got is None:
            return None
        if not got:
            self._ended = True
            self._needed.set()
            return False
        return True

    def _stand_by(self, seconds: float) -> None:
        self._standby, self._until = seconds, time.monotonic() + seconds

    def _settle(self) -> None:
        self._sole = self._attended[0] if len(self._attended) == 1 else None
        if self._sole is not None and self._is_idle():
            if self._needed.is_set():
                self._stand_by(self._standby)
                self._needed.clear()
                self._source.interrupt()
        elif self._attended or not (self._asked and self._is_idle()):
            self._needed.set()

    def _is_idle(self) -> bool:
        """Nothing but a stream that is attended needs the reader thread."""
        return self._trouble is None and not self._ended and not self._relying
