"""How fast the linear kernels multiply: 64-bit and 32-bit ring products next to float64 BLAS.

    python benchmarks/kernels.py [--runs 5] [--json FILE]

One thread each; 64 and 32 are uint64 and uint32. GFMA/s is products and additions per second:
m·k·n over the median of the thread's CPU time, so that other work on the machine counts less. `raw`
multiplies arrays as they lie, `packed` a weight packed before the clock starts, `tiled` a packed
weight tile by tile, `fewer` the same as servers do where fewer products pay, in rings of 44 and of
32 bits: its rate is that of the products that the definition has. The float64 column of a
convolution is BLAS on ready-made image columns. Last come the microseconds of a call that has next
to nothing to compute.
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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import llvmlite  # type: ignore[import-untyped]
import numba
import numpy as np

from mpcserve.kernels import linear, linear_panels, linear_weights
from mpcserve.kernels.linear_bilinear import bilinear_for
from mpcserve.kernels.linear_image import geometry_of
from mpcserve.ring import Words

# A BLAS reads them once, when NumPy loads it.
BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
ONE_THREAD = dict.fromkeys(BLAS, "1")

DTYPES = ("uint64", "uint32")
RINGS = {"uint64": 44, "uint32": 32}
KINDS = ("raw", "packed", "tiled", "fewer")
COLUMNS = (*(f"{kind} {bits}" for bits in (64, 32) for kind in KINDS), "float64")

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
    ((10000, 100), (100, 1)),
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
        start = time.thread_time()
        work()
        seconds.append(time.thread_time() - start)
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
        "tiles": ", ".join(
            f"{linear_panels.ROWS} rows of {linear_panels.lanes_of(dtype)} {dtype}"
            for dtype in DTYPES
        ),
        "uint64": "in one instruction" if linear_panels.NATIVE else "by 32-bit halves",
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def words(dtype: str, *shape: int) -> Words:
    """Full-range words."""
    rng = np.random.default_rng(1)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def measure_matmul(left: Shape, right: Shape, runs: int) -> dict[str, Any]:
    """GFMA/s of one matmul shape."""
    work: dict[str, Callable[[], object]] = {}
    for dtype in DTYPES:
        a, b = words(dtype, *left), words(dtype, *right)
        packed, out = linear_weights.pack_matmul_b(b), linear.matmul(a, b)
        work |= _named(
            dtype,
            partial(linear.matmul, a, b),
            partial(linear.matmul, a, packed),
            partial(_last, linear.matmul_tiles, a, packed),
        )
    rng = np.random.default_rng(1)
    work["float64"] = partial(np.matmul, rng.random(left), rng.random(right))
    return _row(f"{_text(left)} @ {_text(right)}", out.size * left[-1], runs, work)


def measure_conv(
    name: str, x_shape: Shape, w_shape: Shape, stride: int, pad: int, groups: int, runs: int
) -> dict[str, Any]:
    """GFMA/s of one convolution."""
    work: dict[str, Callable[[], object]] = {}
    how = ((stride, stride), (pad, pad, pad, pad), (1, 1), groups)
    for dtype in DTYPES:
        x, w = words(dtype, *x_shape), words(dtype, *w_shape)
        packed, out = linear_weights.pack_conv_w(w, groups), linear.conv2d(x, w, *how)
        work |= _named(
            dtype,
            partial(linear.conv2d, x, w, *how),
            partial(linear.conv2d, x, packed, *how),
            partial(_last, linear.conv2d_tiles, x, packed, *how),
        )
        by = bilinear_for(geometry_of(x_shape, w_shape, *how), RINGS[dtype])
        if by:
            packed = linear_weights.pack_conv_w(w, groups, by)
            fewer = partial(_last, linear.conv2d_tiles, x, packed, *how)
            work[f"fewer {dtype.removeprefix('uint')}"] = fewer
    deep = w[0].size
    rng = np.random.default_rng(1)
    rows = rng.random((x_shape[0] * groups, w_shape[0] // groups, deep))
    columns = rng.random((x_shape[0] * groups, deep, out[0, 0].size))
    work["float64"] = partial(np.matmul, rows, columns)
    return _row(f"{name}: {_text(x_shape)} * {_text(w_shape)}", out.size * deep, runs, work)


def measure_calls(runs: int) -> dict[str, float]:
    """Microseconds of calls that have next to nothing to compute."""
    a, x, w = (words("uint64", *shape) for shape in ((4, 4), (1, 1, 4, 4), (1, 1, 3, 3)))
    b, packed = linear_weights.pack_matmul_b(a), linear_weights.pack_conv_w(w, 1)
    how = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
    calls = {
        "matmul": partial(linear.matmul, a, a),
        "matmul, packed": partial(linear.matmul, a, b),
        "conv2d, packed, padded": partial(linear.conv2d, x, packed, *how),
    }
    return {name: median_seconds(call, 100 * runs) * 1e6 for name, call in calls.items()}


def _named(dtype: str, *kinds: Callable[[], object]) -> dict[str, Callable[[], object]]:
    names = (f"{kind} {dtype.removeprefix('uint')}" for kind in KINDS)
    return dict(zip(names, kinds, strict=False))


def _last(tiles: Callable[..., Iterator[linear.Tile]], *operands: object) -> None:
    for _ in tiles(*operands):
        pass


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _row(
    name: str, products: int, runs: int, work: dict[str, Callable[[], object]]
) -> dict[str, Any]:
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
    print(f"\n{'GFMA/s, median of ' + str(options.runs):46}" + "".join(f"{k:>10}" for k in COLUMNS))
    rows = []
    for left, right in MATMULS:
        rows.append(measure_matmul(left, right, options.runs))
        _print_row(rows[-1])
    for conv in CONVS:
        rows.append(measure_conv(*conv, options.runs))
        _print_row(rows[-1])
    calls = measure_calls(options.runs)
    for name, microseconds in calls.items():
        print(f"{name + ' of nothing, µs':46}{microseconds:10.1f}")
    if options.json:
        report = {"machine": about, "runs": options.runs, "results": rows, "call_us": calls}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _print_row(row: dict[str, Any]) -> None:
    rates = row["gfma_per_second"]
    cells = (f"{rates[kind]:10.2f}" if kind in rates else f"{'–':>10}" for kind in COLUMNS)
    print(f"{row['shape']:46}" + "".join(cells))


if __name__ == "__main__":
    main()
