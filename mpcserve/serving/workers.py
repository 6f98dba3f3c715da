"""The threads of one server that compute: kernels release the GIL, so several cores help."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

from mpcserve.config import Config
from mpcserve.protocol import Run, Task, one_by_one

T = TypeVar("T")

SERVERS_ON_A_MACHINE = 3
"""They share its cores, where alice and bob listen on the same host."""


def threads_of(config: Config) -> int:
    """`limits.threads`, or as many as this server may use cores."""
    if config.limits.threads:
        return config.limits.threads
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    shared = config.servers.alice.host == config.servers.bob.host
    return max(1, cores // SERVERS_ON_A_MACHINE) if shared else cores


class Workers:
    """`threads` threads for the parts of large instructions: `run` has them work.

    With one, whoever asks does the work; others begin when they are needed first.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "mpcserve-kernels")
        self.run: Run = self._at_once if threads > 1 else one_by_one

    def _at_once(self, tasks: Iterable[Task[T]], /) -> Iterator[T]:
        """Results in order; a few tasks are begun ahead. A single one runs here."""
        waiting = iter(tasks)
        first = list(islice(waiting, 2))
        if len(first) < 2:
            for task in first:
                yield task()
            return
        ahead: deque[Future[T]] = deque()
        for task in chain(first, waiting):
            ahead.append(self._pool.submit(task))
            if len(ahead) > self._threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
