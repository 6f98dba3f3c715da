"""Threads for streams: reused, bounded, and gone when their link is."""

from __future__ import annotations

import threading
import time

import pytest

from mpcserve.transport import crew as module
from mpcserve.transport.crew import Crew

WAIT = 10.0


def rest(crew: Crew) -> None:
    """Until no thread of it is at work."""
    end = time.monotonic() + WAIT
    while crew._tasks or crew._idle < len(crew._threads):
        assert time.monotonic() < end
        time.sleep(0.001)


def test_tasks_at_once_have_threads_of_their_own_and_later_ones_reuse_them() -> None:
    crew, gate, seen = Crew(), threading.Event(), []

    def task() -> None:
        seen.append(threading.current_thread())
        gate.wait(WAIT)

    for _ in range(5):
        crew.call(task, "tested")
    gate.set()
    rest(crew)
    assert len(set(seen)) == 5 and {t.name for t in seen} == {"tested"}
    for _ in range(20):
        crew.call(task, "tested")
        rest(crew)
    assert len(seen) == 25 and len(set(seen)) == 5
    crew.close()
    crew.join(WAIT)
    assert not any(t.is_alive() for t in seen)


def test_no_more_threads_stay_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_IDLE", 2)
    crew, gate = Crew(), threading.Event()

    def task() -> None:
        gate.wait(WAIT)

    for _ in range(6):
        crew.call(task, "tested")
    assert len(crew._threads) == 6
    gate.set()
    rest(crew)
    assert len(crew._threads) == 2
    crew.close()


def test_an_idle_thread_ends_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.01)
    crew = Crew()
    crew.call(lambda: None, "tested")
    crew.join(WAIT)
    assert not crew._threads and not crew._idle


def test_a_task_that_was_called_for_is_done_though_the_crew_is_closed() -> None:
    for _ in range(200):
        crew, done = Crew(), threading.Event()
        crew.call(lambda: None, "tested")
        rest(crew)
        crew.call(done.set, "tested")
        crew.close()
        assert done.wait(WAIT)
        crew.join(WAIT)


def test_a_task_may_join_its_own_crew() -> None:
    crew, done = Crew(), threading.Event()

    def task() -> None:
        crew.close()
        crew.join(WAIT)
        done.set()

    began = time.monotonic()
    crew.call(task, "tested")
    assert done.wait(WAIT) and time.monotonic() - began < WAIT / 2
