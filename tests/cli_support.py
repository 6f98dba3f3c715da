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
    not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(),
    reason="looks for processes in /proc",
)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be collected does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def children_of(pid: int) -> list[int]:
    """Processes that `pid` has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


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
