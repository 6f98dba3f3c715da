"""Memory that a large bundle has left free goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest

from mpcserve.serving.heap import LARGE_BYTES, give_back


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="speaks to glibc, looks into /proc")
def test_what_a_large_bundle_left_free_is_given_back() -> None:
    """Arrays too small for pages of their own, before one that may keep the heap from shrinking."""
    arrays = [np.ones(64 << 10, np.uint8) for _ in range(2000)]
    last = np.ones(64 << 10, np.uint8)
    held = resident()
    arrays.clear()
    give_back(LARGE_BYTES)
    assert resident() < held - 100e6
    assert last.all()


def test_what_a_small_bundle_left_free_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(name: object) -> None:
        raise AssertionError("the next bundle would have to fault it in anew")

    monkeypatch.setattr(ctypes, "CDLL", asked)
    give_back(LARGE_BYTES - 1)
