"""One row measured: mpcserve on three processes over TLS, and onnxruntime on one thread.

Two ways of running, as in `mpcserve bench`. With the pool *full*, every inference begins when its
randomness lies ready at alice and bob and carol has been stopped: on one machine she would
otherwise deal the next bundle on the very cores that are measured. With the pool *empty*, carol
deals while the client waits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from numpy.typing import NDArray

from benchmarks.floors import Speeds, work_of
from benchmarks.rows import Row
from mpcserve.cli.measure import DEADLINE, POOL_BYTES, Sample, measure, report_of
from mpcserve.cli.plaintext import Plaintext
from mpcserve.compiler import CompiledModel, compile_model
from mpcserve.errors import PeerTimeout
from mpcserve.plan import Plan, bill_of
from mpcserve.serving import LocalCluster

Inputs = Mapping[str, NDArray[Any]]


def measure_row(row: Row, folder: Path, runs: int, network: str, speeds: Speeds) -> dict[str, Any]:
    """All that is known of a row; its model and its input are left in `folder` for the peers.

    Raises: ModelError when the compiler does not serve the model.
    """
    load = os.getloadavg()[0]
    model = row.build()
    path = folder / f"{row.name}.onnx"
    onnx.save(model, path)
    inputs = row.inputs(model)
    began = time.perf_counter()
    compiled = compile_model(path, calibrate=inputs, batch=row.shape[0])
    compile_seconds = time.perf_counter() - began
    filled = measure_filled(compiled, inputs, runs, network)
    empty = measure(compiled, inputs, runs, network, pool_depth=0)
    return {
        "row": row.name,
        "title": row.title,
        "group": row.group,
        "shape": list(row.shape),
        "load_before": load,
        "compile_seconds": compile_seconds,
        "plan": _facts(compiled.plan, speeds),
        "mpcserve": report_of(compiled.plan, Plaintext(path, threads=1), filled, empty, network),
    }


def measure_filled(
    compiled: CompiledModel, inputs: Inputs, runs: int, network: str
) -> list[Sample]:
    """`runs` inferences, after one to warm up, each with a full pool and carol stopped."""
    samples = []
    with LocalCluster(
        pool_depth=1, pool_bytes=POOL_BYTES, network=network, seconds=DEADLINE
    ) as cluster:
        cluster.deploy(compiled)
        for number in range(runs + 1):
            if number:
                cluster.start("carol")
            if not cluster.client.wait_for_bundles(DEADLINE):
                raise PeerTimeout(
                    f"the pool was not full after {DEADLINE:g} s", "a bundle may be too large"
                )
            cluster.stop("carol")
            outputs, report = cluster.client.infer_report(inputs)
            samples.append(Sample(inputs, outputs, report))
    return samples[1:]


def _facts(plan: Plan, speeds: Speeds) -> dict[str, Any]:
    work, bill = work_of(plan), bill_of(plan)
    return {
        **asdict(work),
        "instructions": len(plan.instructions),
        "rounds": bill.rounds,
        "online_bytes": bill.online_bytes,
        "dealt_bytes": bill.dealt_bytes,
        "floors": work.seconds(speeds),
    }


def scratch() -> TemporaryDirectory[str]:
    """A folder for models and inputs."""
    return TemporaryDirectory(prefix="mpcserve-bench-")
