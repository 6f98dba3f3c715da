"""The heap of a server: one for all threads, and not kept when large.

Only glibc is spoken to; other C libraries do such things by themselves, or not at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = 1, -1, -3, -8
"""Of glibc's malloc.h."""

NO_FAST_BINS = 0
"""Otherwise whoever frees a large array joins all small pieces that were freed before."""

KEPT_BYTES = 256 << 20
"""So much may lie free at the end of the heap: an evaluation's values, and those of the next."""

APART_BYTES = 32 << 20
"""Larger arrays get pages of their own; what glibc comes to by itself, unless told what to keep."""

LARGE_BYTES = 1536 << 20
"""A bundle of so much memory leaves holes that the next one may not fit. After smaller ones all is
kept: an evaluation's values, too, would be faulted in anew, while the data owner waits."""


def share_one_heap() -> None:
    """Have glibc keep one heap for all threads, and memory for the next evaluation.

    What one thread received and another one used up would leave holes that no third thread fills;
    and what an evaluation gives back is faulted in by the next. An environment that speaks to glibc
    itself (MALLOC_…) is left alone.
    """
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(AttributeError):
            option = ctypes.CDLL(None).mallopt
            option(M_ARENA_MAX, 1)
            option(M_MXFAST, NO_FAST_BINS)
            option(M_MMAP_THRESHOLD, APART_BYTES)
            option(M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back(nbytes: int) -> None:
    """Return to the system what a bundle of so many bytes has left free, if it was large.

    Faulting the pages in anew takes the next one a tenth of a second a gigabyte.
    """
    if sys.platform == "linux" and nbytes >= LARGE_BYTES:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
