"""How fast the linear kernels multiply: 64-bit ring products next to NumPy's float64 BLAS.

    python benchmarks/kernels.py [--runs 5] [--json FILE]

One thread each. GFMA/s is products and additions per second: m·k·n over the median time. `raw`
multiplies arrays as they lie, `packed` a weight packed before the clock starts, `tiled` a packed
weight tile by tile. The float64 column of a convolution is BLAS on ready-made image columns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite  # type: ignore[import-untyped]
import numba
import numpy as np

from mpcserve.kernels import linear, linear_micro
from mpcserve.ring import Words

# A BLAS reads them once, when NumPy loads it.
BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
ONE_THREAD = dict.fromkeys(BLAS, "1")

Shape = tuple[int, ...]

MATMULS: list[tuple[Shape, Shape]] = [
    ((256, 256), (256, 256)),
    ((512, 512), (512, 512)),
    ((1024, 1024), (1024, 1024)),
    ((128, 768), (768, 3072)),
    ((12, 128, 64), (12, 64, 128)),
    ((1, 2048), (2048, 1000)),
    ((8, 2048), (2048, 1000)),
    ((1000, 1000), (1000, 10)),
    ((4096, 4, 4), (4096, 4, 4)),
]

# name, x, w, stride, pad, groups
CONVS: list[tuple[str, Shape, Shape, int, int, int]] = [
    ("7x7 stride 2", (1, 3, 224, 224), (64, 3, 7, 7), 2, 3, 1),
    ("3x3 at 56", (1, 64, 56, 56), (64, 64, 3, 3), 1, 1, 1),
    ("3x3 stride 2", (1, 64, 56, 56), (128, 64, 3, 3), 2, 1, 1),
    ("3x3 at 14", (1, 256, 14, 14), (256, 256, 3, 3), 1, 1, 1),
    ("3x3 at 7", (1, 512, 7, 7), (512, 512, 3, 3), 1, 1, 1),
    ("3x3 at 224", (1, 64, 224, 224), (64, 64, 3, 3), 1, 1, 1),
    ("1x1", (1, 256, 28, 28), (512, 256, 1, 1), 1, 0, 1),
    ("1x1 stride 2", (1, 64, 56, 56), (128, 64, 1, 1), 2, 0, 1),
    ("depthwise at 112", (1, 32, 112, 112), (32, 1, 3, 3), 1, 1, 32),
    ("depthwise at 14", (1, 512, 14, 14), (512, 1, 3, 3), 1, 1, 512),
    ("32 groups at 56", (1, 128, 56, 56), (128, 4, 3, 3), 1, 1, 32),
    ("5x5, 64 digits", (64, 1, 28, 28), (8, 1, 5, 5), 1, 2, 1),
]


def median_seconds(work: Callable[[], object], runs: int) -> float:
    """The median of `runs` timed calls after one that is not timed."""
    work()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def machine() -> dict[str, Any]:
    """What a reader must know to compare the numbers."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
    )
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "tile": f"{linear_micro.ROWS} rows of {linear_micro.LANES} words",
        "products": "one instruction" if linear_micro.NATIVE else "of 32-bit halves",
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def words(*shape: int) -> Words:
    """Full-range words."""
    return np.random.default_rng(1).integers(0, 2**64, shape, np.uint64)


def measure_matmul(left: Shape, right: Shape, runs: int) -> dict[str, Any]:
    """GFMA/s of one matmul shape."""
    a, b = words(*left), words(*right)
    packed, out = linear.pack_matmul_b(b), linear.matmul(a, b)
    real_a, real_b = a.astype(np.float64), b.astype(np.float64)
    return _row(
        f"{_text(left)} @ {_text(right)}",
        out.size * left[-1],
        runs,
        raw=lambda: linear.matmul(a, b),
        packed=lambda: linear.matmul(a, packed),
        tiled=lambda: list(linear.matmul_tiles(a, packed, out)),
        float64=lambda: real_a @ real_b,
    )


def measure_conv(
    name: str, x_shape: Shape, w_shape: Shape, stride: int, pad: int, groups: int, runs: int
) -> dict[str, Any]:
    """GFMA/s of one convolution."""
    x, w = words(*x_shape), words(*w_shape)
    packed = linear.pack_conv_w(w, groups)
    strides, pads, once = (stride, stride), (pad, pad, pad, pad), (1, 1)
    out = linear.conv2d(x, packed, strides, pads, once, groups)
    deep = w[0].size
    rng = np.random.default_rng(1)
    rows = rng.random((x_shape[0] * groups, w_shape[0] // groups, deep))
    columns = rng.random((x_shape[0] * groups, deep, out[0, 0].size))
    return _row(
        f"{name}: {_text(x_shape)} * {_text(w_shape)}",
        out.size * deep,
        runs,
        raw=lambda: linear.conv2d(x, w, strides, pads, once, groups),
        packed=lambda: linear.conv2d(x, packed, strides, pads, once, groups),
        tiled=lambda: list(linear.conv2d_tiles(x, packed, strides, pads, once, groups, out)),
        float64=lambda: rows @ columns,
    )


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _row(name: str, products: int, runs: int, **work: Callable[[], object]) -> dict[str, Any]:
    rates = {kind: products / median_seconds(f, runs) / 1e9 for kind, f in work.items()}
    return {"shape": name, "products": products, "gfma_per_second": rates}


def main() -> None:
    """Measure, print a table, and write the same as JSON if asked."""
    parser = argparse.ArgumentParser(description="GFMA/s of the linear kernels and of float64 BLAS")
    parser.add_argument("--runs", type=int, default=5, help="timed calls per number (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    if not ONE_THREAD.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_THREAD})
    about = machine()
    for key, value in about.items():
        print(f"{key:9} {value}")
    kinds = ("raw", "packed", "tiled", "float64")
    print(f"\n{'GFMA/s, median of ' + str(options.runs):46}" + "".join(f"{k:>9}" for k in kinds))
    rows = []
    for left, right in MATMULS:
        rows.append(measure_matmul(left, right, options.runs))
        _print_row(rows[-1])
    for conv in CONVS:
        rows.append(measure_conv(*conv, options.runs))
        _print_row(rows[-1])
    if options.json:
        report = {"machine": about, "runs": options.runs, "results": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _print_row(row: dict[str, Any]) -> None:
    rates = row["gfma_per_second"].values()
    print(f"{row['shape']:46}" + "".join(f"{rate:9.2f}" for rate in rates))


if __name__ == "__main__":
    main()
