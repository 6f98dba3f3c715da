"""Looking after the processes that a test has started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

PATIENCE = 120.0
"""Seconds for what takes a few when the machine is idle."""

needs_proc = pytest.mark.skipif(
    not Path(f"/proc/{os.getpid()}/stat").exists(), reason="looks for processes in /proc"
)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be collected does not."""
    return _state_and_parent(pid)[0] not in "ZX"


def children_of(pid: int) -> list[int]:
    """Processes that `pid` has started and that run, whichever of its threads started them."""
    running = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    states = {child: _state_and_parent(child) for child in running}
    return [
        child for child, (state, parent) in states.items() if parent == pid and state not in "ZX"
    ]


def _state_and_parent(pid: int) -> tuple[str, int]:
    """The process's state, a letter, and who started it; "X" and 0 when it is gone.

    Any process may end between being listed and being read.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "X", 0
    state, parent = stat.rpartition(")")[2].split()[:2]
    return state, int(parent)


def heed_ctrl_c() -> None:
    """In a child that begins: what runs in the background was told to ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def await_true(what: str, condition: Callable[[], bool]) -> None:
    """Fail when it does not come true in time."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not in {PATIENCE:g} s: {what}"
        os.sched_yield()


def await_gone(pids: Collection[int]) -> None:
    """Fail when one of these processes is left behind."""
    await_true("all processes have ended", lambda: not any(map(is_alive, pids)))
