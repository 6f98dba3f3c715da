"""Measuring inferences on three server processes, and the report of them."""

from __future__ import annotations

import gc
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from mpcserve.arrays import Array
from mpcserve.cli.output import progress, table
from mpcserve.cli.plaintext import Plaintext, compare
from mpcserve.cli.results import print_traffic
from mpcserve.errors import PeerTimeout
from mpcserve.plan import Plan, bill_of
from mpcserve.plan.estimate import Line, online_seconds
from mpcserve.units import human_bytes, human_seconds
from mpcserve.version import __version__

if TYPE_CHECKING:
    from mpcserve.compiler import CompiledModel

PHASES = ("online", "evaluation", "preprocessing", "total")
"""`online` is what the data owner waits for, `evaluation` the part of it on alice and bob, from
masked inputs to shares of the result."""

DEADLINE = 3600.0
"""Seconds for one inference, or for dealing its randomness: a large network on a slow line."""

POOL_BYTES = "64 GB"
"""A benchmark's pool holds one bundle, however large."""

STOCK_BYTES = 256 << 20
"""Where carol deals no more for all inferences than this, all of it is dealt before the first."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One inference: its rows by input, its outputs, and what the servers and the client report."""

    rows: Mapping[str, Array]
    outputs: Mapping[str, Array]
    report: Mapping[str, Any]


def measure(
    compiled: CompiledModel, inputs: Mapping[str, Array], runs: int, network: str, ahead: bool
) -> list[Sample]:
    """`runs` inferences on fresh servers, one after the other, after one to warm up.

    With what is dealt `ahead` they follow one another at once; if that is large, each begins when
    its own has been dealt. The inputs are cut into batches, and begun again when they are used up.
    """
    return _measured(compiled, inputs, runs, network, ahead, False)


def profile_of(
    compiled: CompiledModel, inputs: Mapping[str, Array], network: str
) -> Mapping[str, Any]:
    """What alice and bob did when, in one inference that takes longer for it (see
    `serving.profile`)."""
    (sample,) = _measured(compiled, inputs, 1, network, True, True)
    profile: Mapping[str, Any] = sample.report["profile"]
    return profile


def _measured(
    compiled: CompiledModel,
    inputs: Mapping[str, Array],
    runs: int,
    network: str,
    ahead: bool,
    profiled: bool,
) -> list[Sample]:
    from mpcserve.serving import LocalCluster
    from mpcserve.serving.inputs import check_inputs, raw_batches

    plan = compiled.plan
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # a data owner has no compiler in memory whose objects are searched for garbage
    check_inputs(plan, inputs, "error")
    cut = list(raw_batches(plan, inputs))
    samples: list[Sample] = []
    small = (runs + 1) * bill_of(plan).dealt_bytes <= STOCK_BYTES
    stock = (runs + 1 if small else 1) if ahead else 0
    with progress("starting alice, bob and carol"):
        cluster = LocalCluster(
            pool_depth=stock, pool_bytes=POOL_BYTES, network=network, seconds=DEADLINE
        )
    with cluster:
        with progress("sharing the weights"):
            cluster.deploy(compiled)
        for number, rows in enumerate(islice(cycle(cut), runs + 1)):
            with progress(f"inference {number} of {runs}" if number else "warming up"):
                wait = ahead and not (small and samples)
                if wait and not cluster.client.wait_for_bundles(DEADLINE):
                    raise PeerTimeout(
                        f"the pool was not full after {DEADLINE:g} s",
                        "a bundle may be larger than the memory allows: try a smaller --batch",
                    )
                outputs, report = cluster.client.infer_report(rows, profile=profiled)
            samples.append(Sample(rows, outputs, report))
    return samples[1:]


def report_of(
    plan: Plan,
    plaintext: Plaintext,
    filled: Sequence[Sample],
    empty: Sequence[Sample],
    network: str,
    line: Line,
) -> dict[str, Any]:
    """What `bench --json` writes: medians of the runs with a full pool, and all the rest beside."""
    first = filled[0].report
    plain = plaintext.seconds(filled[0].rows, max(len(filled), 3))
    return {
        "model": plan.name,
        "plan_digest": plan.digest,
        "ring_bits": first["ring_bits"],
        "batch": plan.batch,
        "runs": len(filled),
        "network": network,
        "rounds": first["rounds"],
        "bytes": dict(first["bytes"]),
        "bytes_by_phase": _by_phase(first["bytes"]),
        "overhead_bytes": dict(first["overhead_bytes"]),
        "dealt_bytes": first["dealt_bytes"],
        "bill_holds": _bill_holds(plan, [*filled, *empty]),
        "seconds": _medians(filled, "seconds"),
        "estimated_online_seconds": online_seconds(plan, line),
        "spread": _spread(filled),
        "empty_pool": {"seconds": _medians(empty, "seconds"), "spread": _spread(empty)},
        "cpu_seconds": _medians(filled, "cpu_seconds"),
        "peak_rss_bytes": {
            role: max(s.report["peak_rss_bytes"][role] for s in (*filled, *empty))
            for role in first["peak_rss_bytes"]
        },
        "plaintext_seconds": statistics.median(plain),
        "plaintext_spread": [min(plain), max(plain)],
        **_accuracy(plaintext, [*filled, *empty]),
        "machine": _machine(),
    }


def _medians(samples: Sequence[Sample], key: str) -> dict[str, float]:
    names = samples[0].report[key]
    return {n: statistics.median(s.report[key][n] for s in samples) for n in names}


def _spread(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """[least, most] seconds of each phase."""
    columns = {p: [s.report["seconds"][p] for s in samples] for p in PHASES}
    return {p: [min(c), max(c)] for p, c in columns.items()}


def _by_phase(links: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """carol's links carry the preprocessing, all others the online phase."""
    dealt = {k: v for k, v in links.items() if k.startswith("carol")}
    return {"online": {k: v for k, v in links.items() if k not in dealt}, "preprocessing": dealt}


def _bill_holds(plan: Plan, samples: Sequence[Sample]) -> bool:
    """Whether every run took exactly the rounds and bytes that the plan's bill says."""
    bill = bill_of(plan)
    predicted = (bill.rounds, bill.bytes, bill.dealt_bytes)
    return all(
        (s.report["rounds"], dict(s.report["bytes"]), s.report["dealt_bytes"]) == predicted
        for s in samples
    )


def _accuracy(plaintext: Plaintext, samples: Sequence[Sample]) -> dict[str, float | None]:
    """Against onnxruntime, over all rows of all runs and all outputs."""
    errors, agreements = [], []
    for s in samples:
        for got, expected in zip(s.outputs.values(), plaintext.run(s.rows), strict=True):
            comparison = compare(got, expected)
            errors.append(comparison.max_error)
            if comparison.top1 is not None:
                agreements.append(comparison.top1)
    return {
        "max_abs_error": max(errors),
        "top1_agreement": float(np.mean(agreements)) if agreements else None,
    }


def _machine() -> dict[str, Any]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "mpcserve": __version__,
        **{name: version(name) for name in ("numpy", "numba", "onnxruntime")},
    }


def print_report(report: Mapping[str, Any]) -> None:
    """The same for people."""
    print(
        f"{report['model']}, batch {report['batch']}, {report['runs']} runs, "
        f"network {report['network']}, {report['machine']['cores']} cores"
    )
    empty, spread = report["empty_pool"], report["spread"]
    rows = [
        (name, *(human_seconds(s) for s in (seconds[p], *least_most[p])))
        for title, seconds, least_most in (
            ("", report["seconds"], spread),
            ("pool empty: ", empty["seconds"], empty["spread"]),
        )
        for p in PHASES
        for name in (title + p,)
    ]
    plain = (report["plaintext_seconds"], *report["plaintext_spread"])
    rows.append(("online, estimated", human_seconds(report["estimated_online_seconds"]), "", ""))
    rows.append(("onnxruntime, 1 thread", *map(human_seconds, plain)))
    table(("phase", "median", "least", "most"), rows)
    table(
        ("role", "CPU", "peak memory"),
        (
            (role, human_seconds(cpu), human_bytes(report["peak_rss_bytes"][role]))
            for role, cpu in report["cpu_seconds"].items()
        ),
    )
    print_traffic(report["bytes"], report["overhead_bytes"])
    agreement = report["top1_agreement"]
    top1 = "" if agreement is None else f", top-1 agreement {100 * agreement:.2f} %"
    print(
        f"{report['rounds']} rounds, {human_bytes(report['dealt_bytes'])} dealt, "
        f"{'as' if report['bill_holds'] else 'NOT as'} the plan's bill says\n"
        f"largest error {report['max_abs_error']:.3g}{top1}"
    )
