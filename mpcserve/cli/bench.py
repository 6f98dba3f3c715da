"""`mpcserve bench`: what an encrypted inference costs on this machine, and what the plain one does."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpcserve.cli.model import CALIBRATE, FRAC_BITS, INPUT_RANGE
from mpcserve.cli.options import FILE

if TYPE_CHECKING:
    from mpcserve.cli.arrays import Array
    from mpcserve.cli.plaintext import Plaintext
    from mpcserve.compiler import CompiledModel

ROLES = ("alice", "bob", "carol")
PHASES = ("online", "preprocessing", "total")


@dataclass(frozen=True, slots=True)
class Sample:
    """One inference: the rows it was asked, what it answered, and the servers' report of it."""

    rows: Mapping[str, Array]
    outputs: Sequence[Array]
    report: Mapping[str, Any]


@click.command("bench")
@click.argument("model", type=FILE)
@click.option("--input", "data", type=FILE, help="Inputs, .npy or .npz; else fixed values in ±1.")
@CALIBRATE
@INPUT_RANGE
@click.option("--batch", type=click.IntRange(1), help="Rows per inference; default 1.")
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Inferences.")
@click.option(
    "--network",
    default="loopback",
    show_default=True,
    metavar="PROFILE",
    help="loopback, lan (0.5 ms, 1 Gbit/s), wan (40 ms, 100 Mbit/s) or RTT_MS,MBIT.",
)
@FRAC_BITS
@click.option("--json", "json_path", type=FILE, metavar="FILE", help="Write the report there too.")
def bench_command(
    model: Path,
    data: Path | None,
    calibrate: Path | None,
    input_range: tuple[float, float] | None,
    batch: int | None,
    runs: int,
    network: str,
    frac_bits: int,
    json_path: Path | None,
) -> None:
    """Measure MODEL: three server processes over TLS on this machine, and onnxruntime on one thread.

    Runs with randomness dealt ahead, then with none. Without --calibrate, the benchmark's own inputs
    calibrate the ranges.

    \b
    Example:
      mpcserve bench model.onnx --input test.npy --batch 8 --network lan --json bench.json
    """
    from mpcserve.cli.launch import sigterm_interrupts
    from mpcserve.cli.output import note, progress
    from mpcserve.cli.plaintext import Plaintext
    from mpcserve.cli.results import save_json
    from mpcserve.compiler import compile_model

    plaintext = Plaintext(model, threads=1)
    size = batch or plaintext.batch or 1
    inputs = _inputs(plaintext, data, size)
    note(f"compiling {model}")
    with progress("compiling"):
        compiled = compile_model(
            model,
            calibrate=calibrate if calibrate or input_range else inputs,
            input_range=input_range,
            batch=size,
            frac_bits=frac_bits,
        )
    with sigterm_interrupts():
        filled = _measure(compiled, inputs, runs, network, pool_depth=runs)
        empty = _measure(compiled, inputs, runs, network, pool_depth=0)
    report = _report(plaintext, compiled, filled, empty, network)
    _print(report)
    if json_path is not None:
        save_json(json_path, report)
