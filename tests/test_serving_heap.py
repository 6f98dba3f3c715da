"""Memory that a large bundle has left free goes back to the system."""

from __future__ import annotations

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
    """Arrays too small for pages of their own, and one behind them that keeps the heap's end."""
    arrays = [np.ones(64 << 10, np.uint8) for _ in range(2000)]
    last = np.ones(64 << 10, np.uint8)
    held = resident()
    arrays.clear()
    give_back(LARGE_BYTES - 1)
    kept = resident()
    give_back(LARGE_BYTES)
    assert resident() < held - 100e6
    assert kept > held - 30e6
    assert last.all()
