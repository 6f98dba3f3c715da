"""Where the CPU seconds of a row go, by kind of work: online on a server, and before the input.

    python benchmarks/breakdown.py ROW [--runs 3]

All three roles run in one process without a network, under Python's profiler on a clock of CPU
time. A kernel's time is its own; what NumPy does for it counts as copies. Frames, TLS and waiting
are not in it: `mpcserve bench --profile` shows a server as it runs.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.rows import ROWS, Row
from mpcserve.compiler import compile_model
from mpcserve.protocol.owners import share_input
from mpcserve.protocol.together import Together, drive

COPIES = ("astype", "ascontiguousarray", "copy", "concatenate", "array")
KINDS = {
    "linear_micro.py": "ring products",
    "linear.py": "ring products",
    "linear_image.py": "ring products",
    "sign.py": "comparisons",
    "select.py": "selections and extensions",
    "product.py": "truncation and masks of products, packed",
    "local_ops.py": "local operations",
    "randomness.py": "streams",
    "ring.py": "copies and reductions",
    "compare.py": "comparisons",
    "packing.py": "packing",
}
KERNELS = {
    "finish_product": "truncation and masks of products, packed",
    "pack_blocks": "packing",
    "unpack_blocks": "packing",
    "slice_bits": "comparisons",
    "monomials": "comparisons",
    "select_share": "selections and extensions",
    "wide_masks": "selections and extensions",
    "mask_facts": "selections and extensions",
}


def main() -> None:
    """Profile one row and print two columns of milliseconds."""
    rows = {row.name: row for row in ROWS}
    parser = argparse.ArgumentParser(description="CPU time of a row by kind of work")
    parser.add_argument("row", choices=list(rows), metavar="ROW", help=", ".join(rows))
    parser.add_argument("--runs", type=int, default=3, help="evaluations (default 3)")
    options = parser.parse_args()
    before, online = profile_row(rows[options.row], options.runs)
    print(f"{'CPU ms':40}{'one server, online':>20}{'all three, before':>20}")
    for kind in sorted({*before, *online}, key=lambda k: -online[k]):
        print(f"{kind:40}{_milliseconds(online[kind])}{_milliseconds(before[kind])}")
    print(f"{'total':40}{_milliseconds(online.total())}{_milliseconds(before.total())}")


def profile_row(row: Row, runs: int) -> tuple[Counter[str], Counter[str]]:
    """CPU seconds by kind: of the preparation on all three, of the evaluation on one server."""
    model = row.build()
    inputs = row.inputs(model)
    compiled = compile_model(model, calibrate=inputs, batch=row.shape[0])
    together = Together(compiled.plan, compiled.weights)
    clocks = [cProfile.Profile(timer=time.thread_time) for _ in range(2)]
    for number in range(runs + 1):
        with _running(clocks[0], number > 0):
            alice, bob, _ = together.prepare()
        seeds = zip(alice.input_seeds, bob.input_seeds, strict=True)
        packed = [
            b"".join(share_input(compiled.plan, k, x, a, b))
            for k, (x, (a, b)) in enumerate(zip(inputs.values(), seeds, strict=True))
        ]
        with _running(clocks[1], number > 0):
            drive(together.alice.evaluate(alice, packed), together.bob.evaluate(bob, packed))
    before, online = (_by_kind(clock) for clock in clocks)
    return _divided(before, runs), _divided(online, 2 * runs)


@contextmanager
def _running(clock: cProfile.Profile, counts: bool) -> Iterator[None]:
    """Profile the block; the first run only warms up."""
    if counts:
        clock.enable()
    yield
    clock.disable()


def _by_kind(clock: cProfile.Profile) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for (file, _, function), (_, _, seconds, *_) in pstats.Stats(clock).stats.items():  # type: ignore[attr-defined]
        kinds[_kind(PurePath(file).name, function)] += seconds
    return kinds


def _kind(file: str, function: str) -> str:
    if function in KERNELS:
        return KERNELS[function]
    if file in KINDS:
        return KINDS[file]
    if "update_into" in function or "encryption_ctx" in function:
        return "streams"
    copies = any(word in function for word in COPIES)
    return "copies and reductions" if copies else "everything else"


def _divided(kinds: Counter[str], by: int) -> Counter[str]:
    return Counter({kind: seconds / by for kind, seconds in kinds.items()})


def _milliseconds(seconds: float) -> str:
    return f"{report.digits(seconds * 1e3):>20}"


if __name__ == "__main__":
    main()
