"""The heap of a server: one for all threads, and not kept when large.

Only glibc is spoken to; other C libraries do such things by themselves, or not at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""

LARGE_BYTES = 512 << 20
"""A bundle of so much memory leaves holes that the next one may not fit."""


def share_one_heap() -> None:
    """Have glibc keep one heap for all threads, unless MALLOC_ARENA_MAX says otherwise.

    What one thread received and another one used up would leave holes that no third thread fills.
    """
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def give_back(nbytes: int) -> None:
    """Return to the system what a bundle of so many bytes has left free, if it was large.

    Faulting the pages in anew takes the next one a tenth of a second a gigabyte.
    """
    if sys.platform == "linux" and nbytes >= LARGE_BYTES:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
