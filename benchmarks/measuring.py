"""One row measured: mpcserve on three processes over TLS, and onnxruntime on one thread.

Two ways of running, as in `mpcserve bench`, by the same code. With the pool *full*, every inference
begins when its randomness lies ready at alice and bob: that of all, which follow one another
then, or of one where it is large; no stock is dealt while one is evaluated. With the pool
*empty*, carol deals while the client waits.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from benchmarks.floors import Speeds, work_of
from benchmarks.rows import Row
from mpcserve.cli.layers import line_of
from mpcserve.cli.measure import measure, report_of
from mpcserve.cli.plaintext import Plaintext
from mpcserve.compiler import compile_model
from mpcserve.plan import Plan, bill_of


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
    filled, empty = (measure(compiled, inputs, runs, network, ahead) for ahead in (True, False))
    return {
        "row": row.name,
        "title": row.title,
        "group": row.group,
        "shape": list(row.shape),
        "load_before": load,
        "compile_seconds": compile_seconds,
        "plan": _facts(compiled.plan, speeds),
        "mpcserve": report_of(
            compiled.plan, Plaintext(path, threads=1), filled, empty, network, line_of(network)
        ),
    }


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
