"""Estimated against measured seconds, of some rows on some networks.

    python benchmarks/estimates.py [--rows lenet resnet18] [--networks loopback lan wan] [--runs 5]

The estimate is the plan's (`mpcserve inspect`); the measured time is the median of `mpcserve bench`
with a full pool. Where they part by more than 30 %, `Rates` in mpcserve/plan/estimate.py needs
another look, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import seconds
from benchmarks.rows import ROWS, Row
from mpcserve.cli.layers import line_of
from mpcserve.cli.measure import PHASES, measure
from mpcserve.compiler import compile_model
from mpcserve.plan import bill_of
from mpcserve.plan.estimate import online_seconds

LIMIT = 0.3


def main() -> None:
    """Compile each row for each network, measure, compare. Exit 1 if one is off by over 30 %."""
    options = _options()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}")
    print("row          network   estimated   measured (least to most)       error  rounds")
    worst = 0.0
    for row in (r for r in ROWS if r.name in options.rows):
        for network in options.networks:
            error = _compare(row, network, options.runs)
            worst = max(worst, abs(error))
    sys.exit(1 if worst > LIMIT else 0)


def _compare(row: Row, network: str, runs: int) -> float:
    """How far the estimate is from the median, as a fraction of the median."""
    model = row.build()
    inputs = row.inputs(model)
    line = line_of(network)
    compiled = compile_model(model, calibrate=inputs, batch=row.shape[0], line=line)
    samples = measure(compiled, inputs, runs, network, ahead=True)
    measured = sorted(s.report["seconds"][PHASES[0]] for s in samples)
    estimate, median = online_seconds(compiled.plan, line), measured[len(measured) // 2]
    error = estimate / median - 1
    spread = f"{seconds(measured[0])} to {seconds(measured[-1])}"
    print(
        f"{row.name:12} {network:9} {seconds(estimate):>9}   {seconds(median):>8} ({spread})"
        f"   {100 * error:+5.0f} %  {bill_of(compiled.plan).rounds}",
        flush=True,
    )
    return error


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Estimated against measured online seconds.")
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=names, default=["lenet", "resnet18"])
    parser.add_argument("--networks", nargs="+", default=["loopback", "lan", "wan"])
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
