"""Work that falls apart into tasks: run one by one, or on several cores by whoever has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeAlias, TypeVar

T = TypeVar("T")

Task: TypeAlias = Callable[[], T]
"""Does one part of the work; tasks do not wait for each other, and may run in any order."""


class Run(Protocol):
    """Runs tasks, perhaps several at once and some ahead; their results come in order."""

    def __call__(self, tasks: Iterable[Task[T]], /) -> Iterator[T]: ...


def one_by_one(tasks: Iterable[Task[T]], /) -> Iterator[T]:
    """Each task when its result is asked for."""
    return (task() for task in tasks)
