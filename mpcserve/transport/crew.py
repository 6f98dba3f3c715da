"""Threads for the streams that a peer opens: who is done with one stays a while for the next.

To start a thread takes longer than a round of a small layer, to wake one does not.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

IDLE_S = 10.0
"""For so long a thread waits for its next task."""

MOST_IDLE = 8
"""So many wait for tasks at once."""


class Crew:
    """Runs each task in a thread of its own. Safe to call from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tasks: deque[Callable[[], None]] = deque()  # one for each idle thread, at most
        self._threads: set[threading.Thread] = set()
        self._ending: set[threading.Thread] = set()  # nothing is left to do for them
        self._idle = 0
        self._closed = False

    def call(self, task: Callable[[], None], name: str) -> None:
        """Begin `task`, which raises nothing, in a thread of this name.

        Raises: RuntimeError when no more threads can be started.
        """
        thread = threading.Thread(target=self._run, args=(task,), name=name, daemon=True)
        with self._changed:
            if self._idle > len(self._tasks):
                self._tasks.append(task)
                self._changed.notify()
                return
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            with self._changed:
                self._threads.discard(thread)
            raise

    def close(self) -> None:
        """No thread waits for a task any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def has_threads(self) -> bool:
        """Whether one is still there."""
        with self._changed:
            return bool(self._threads) or any(t.is_alive() for t in self._ending)

    def join(self, seconds: float) -> None:
        """Wait until all threads have ended (but for the calling one), so long at most."""
        end = time.monotonic() + seconds
        with self._changed:
            threads = (self._threads | self._ending) - {threading.current_thread()}
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self, task: Callable[[], None] | None) -> None:
        while task is not None:
            task()
            task = None  # what it holds is not needed while this thread waits
            task = self._next()
        this = threading.current_thread()
        with self._changed:
            self._threads.discard(this)
            self._ending = {t for t in self._ending if t.is_alive()} | {this}

    def _next(self) -> Callable[[], None] | None:
        """The next task; None if there is none for too long."""
        with self._changed:
            if self._closed or self._idle == MOST_IDLE:
                return None
            self._idle += 1
            self._changed.wait_for(lambda: self._tasks or self._closed, IDLE_S)
            self._idle -= 1
            return self._tasks.popleft() if self._tasks else None
