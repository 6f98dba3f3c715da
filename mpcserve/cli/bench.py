"""`mpcserve bench`: what an encrypted inference costs on this machine, beside a plain one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mpcserve.cli.model import CALIBRATE, DISCLOSE, FRAC_BITS, INPUT_RANGE, RING
from mpcserve.cli.options import FILE

if TYPE_CHECKING:
    from mpcserve.arrays import Array
    from mpcserve.cli.plaintext import Plaintext
    from mpcserve.compiler import Disclosure, Ring


@click.command("bench")
@click.argument("model", type=FILE)
@click.option(
    "--input", "data", type=FILE, help="Inputs, .npy, .npz or .csv; else fixed values in ±1."
)
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
@RING
@FRAC_BITS
@DISCLOSE
@click.option("--profile", type=FILE, metavar="FILE", help="Write a Chrome trace of a run there.")
@click.option("--json", "json_path", type=FILE, metavar="FILE", help="Write the report there too.")
def bench_command(
    model: Path,
    data: Path | None,
    calibrate: Path | None,
    input_range: tuple[float, float] | None,
    batch: int | None,
    runs: int,
    network: str,
    ring: Ring,
    frac_bits: int | None,
    disclose: tuple[Disclosure, ...],
    profile: Path | None,
    json_path: Path | None,
) -> None:
    """Measure MODEL: three server processes over TLS here, and onnxruntime on one thread.

    First with the randomness of each inference dealt ahead, then dealt while it is used. Unless
    --calibrate or --input-range says otherwise, the inputs themselves calibrate the ranges.

    \b
    Example:
      mpcserve bench model.onnx --input test.npy --batch 8 --network lan --json bench.json
    """
    from mpcserve.cli.layers import line_of
    from mpcserve.cli.measure import measure, print_report, profile_of, report_of
    from mpcserve.cli.output import note, progress
    from mpcserve.cli.plaintext import Plaintext
    from mpcserve.cli.results import save_json
    from mpcserve.cli.signals import sigterm_interrupts
    from mpcserve.cli.trace import chrome_trace
    from mpcserve.compiler import compile_model

    line = line_of(network)  # wrong ones are refused before anything long begins
    plaintext = Plaintext(model, threads=1)
    size = batch or plaintext.batch or 1
    inputs = _inputs(plaintext, data, size)
    note(f"compiling {model}")
    with progress("compiling"):
        compiled = compile_model(
            model,
            calibrate=calibrate or (None if input_range else inputs),
            input_range=input_range,
            batch=size,
            ring=ring,
            frac_bits=frac_bits,
            line=line,
            disclose=disclose,
        )
    with sigterm_interrupts():
        note(f"{runs} inferences with randomness dealt ahead")
        filled = measure(compiled, inputs, runs, network, ahead=True)
        note(f"{runs} inferences with randomness dealt on demand")
        empty = measure(compiled, inputs, runs, network, ahead=False)
        if profile is not None:
            save_json(profile, chrome_trace(compiled.plan, profile_of(compiled, inputs, network)))
    report = report_of(compiled.plan, plaintext, filled, empty, network, line)
    print_report(report)
    if json_path is not None:
        save_json(json_path, report)


def _inputs(plaintext: Plaintext, data: Path | None, batch: int) -> dict[str, Array]:
    """The given rows, or one batch of fixed values. Raises: InputError."""
    from mpcserve.arrays import fitted, read_arrays
    from mpcserve.cli.arrays import uniform
    from mpcserve.errors import InputError

    if data is not None:
        return fitted(read_arrays(data), plaintext.inputs, data)
    for i in plaintext.inputs:
        if i.dtype == "str":
            raise InputError(
                f"{plaintext.model}: input {i.name!r} is text, for which there are no fixed values",
                "give data with --input",
            )
        if None in i.shape[1:] or not i.shape:
            raise InputError(
                f"{plaintext.model}: input {i.name!r} leaves more open than its batch: {i.shape}",
                "give data with --input",
            )
    return {
        i.name: uniform((batch, *(d or 1 for d in i.shape[1:])), -1.0, 1.0).astype(i.dtype)
        for i in plaintext.inputs
    }
