"""The kernels and the protocol on an emulated ARM processor (see aarch64.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = [*sorted(ROOT.glob("tests/test_kernels_*.py"))] + [
    ROOT / "tests" / f"test_{name}.py" for name in ("primitives", "bits", "bill", "stack")
]


def run(*arguments: str, **settings: str) -> str:
    """What a process on the emulated processor prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_kernels_and_primitives_compute_the_same_on_arm() -> None:
    options = ("-q", "-p", "no:cacheprovider", "-m", "not slow and not zoo")
    printed = run("-m", "tests.aarch64", *options, *map(str, TESTS))
    calls = re.search(r"([\d,]+) calls of kernels on neoverse-n1", printed)
    assert calls is not None, printed
    assert int(calls[1].replace(",", "")) > 10_000


MULTIPLY = """
from tests import aarch64

aarch64.compile_kernels()
from mpcserve.kernels import linear_micro

for version in linear_micro.multiply.versions:
    print(version.library.get_asm_str())
"""


@pytest.mark.slow
def test_the_innermost_loops_on_arm_are_of_vectors_in_registers(tmp_path: Path) -> None:
    asm = run("-c", MULTIPLY, NUMBA_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT))
    loops = re.findall(r"^(\.LBB\w+):\n((?:(?!\.LBB).*\n)*?\tb\.ne\t\1\n)", asm, flags=re.MULTILINE)
    for instruction in (
        r"umlal\tv\d+\.2d",  # the low halves of 6 rows by 4 words of 64 bits, two at once
        r"mla\tv\d+\.4s",  # 6 rows by 8 words of 32 bits, four at once
    ):
        inner = [loop for _, loop in loops if len(re.findall(instruction, loop)) == 12]
        assert any("[sp" not in loop for loop in inner), instruction
