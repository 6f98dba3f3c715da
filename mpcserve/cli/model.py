"""`mpcserve check | compile | inspect`: from an ONNX model to a plan, before it is deployed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpcserve.cli.options import FILE, JSON

if TYPE_CHECKING:
    from mpcserve.compiler import CompiledModel, Disclosure, NodeReport, Ring
    from mpcserve.plan import Plan

CALIBRATE = click.option(
    "--calibrate",
    type=FILE,
    metavar="SAMPLES|random:N",
    help="Typical inputs, .npy, .npz or .csv: narrower ranges than can be proved. Or N random ones "
    "in --input-range (else normally distributed): to try a model of which there are no samples.",
)
INPUT_RANGE = click.option(
    "--input-range",
    type=float,
    nargs=2,
    metavar="LO HI",
    help="Every input value lies in [LO, HI]; else samples tell, else it is assumed.",
)
RING = click.option(
    "--ring",
    type=click.Choice(("auto", "32", "64")),
    default="auto",
    show_default=True,
    callback=lambda context, option, value: value if value == "auto" else int(value),
    help="Bits of the products: 32 is fast, 64 exact; auto is 32 where that is accurate enough.",
)
DISCLOSE = click.option(
    "--disclose",
    multiple=True,
    type=click.Choice(("text-categories", "number-categories", "imputed-values")),
    help="Let the plan tell this of encoders and imputers that read the input itself, so that the "
    "data owner's client runs them: text needs it. May be repeated.",
)
TARGET_ERROR = click.option(
    "--target-error",
    type=click.FloatRange(0, min_open=True),
    metavar="E",
    help="Raise precision until no output is off by more than E, as simulated on the calibration "
    "samples; the plan of fewest bytes. Compiles several times.",
)
FRAC_BITS = click.option(
    "--frac-bits",
    type=click.IntRange(4, 30),
    help="The same bits after the binary point everywhere, in 64 bits unless --ring 32 is given; "
    "default 16, and in 32 bits what each range leaves.",
)


@click.command("check")
@click.argument("model", type=FILE)
@CALIBRATE
@INPUT_RANGE
@DISCLOSE
@JSON
def check_command(
    model: Path,
    calibrate: Path | None,
    input_range: tuple[float, float] | None,
    disclose: tuple[Disclosure, ...],
    as_json: bool,
) -> None:
    """Say of every node of MODEL whether it is supported, and what to do about those that are not.

    Lists all problems at once; exit 3 if there is any. Some nodes need a narrow range of what they
    read: give --calibrate or --input-range as to `mpcserve compile`.

    \b
    Example:
      mpcserve check model.onnx --input-range 0 1
    """
    from mpcserve.cli.output import print_json
    from mpcserve.compiler import check_model
    from mpcserve.errors import ModelError

    reports = check_model(model, calibrate=calibrate, input_range=input_range, disclose=disclose)
    bad = [r for r in reports if r.status == "unsupported"]
    if as_json:
        print_json({"supported": not bad, "nodes": [asdict(r) for r in reports]})
    else:
        _print_check(reports)
    if bad:
        places = len({r.node for r in bad})
        raise ModelError(
            f"{model}: {len(bad)} problem{'s' * (len(bad) > 1)} in {places} "
            f"place{'s' * (places > 1)}, listed above",
            bad[0].hint or "change the model as said above, or export it without these operators",
        )


@click.command("compile")
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, help="Plan file; default: the model's name with .plan.")
@CALIBRATE
@INPUT_RANGE
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Inputs per evaluation."
)
@RING
@FRAC_BITS
@TARGET_ERROR
@click.option(
    "--tree-depth",
    type=click.IntRange(1),
    help="Pad trees to this depth; default: that of the deepest, which the plan then tells.",
)
@click.option(
    "--tree-leaves",
    type=click.IntRange(1),
    help="Pad trees too deep to be completed to so many leaves; default: the most, rounded up.",
)
@click.option(
    "--network",
    metavar="loopback|lan|wan|RTT_MS,MBIT",
    help="Choose the fastest plan for servers so joined; default: the one of few bytes.",
)
@DISCLOSE
@JSON
def compile_command(
    model: Path,
    output: Path | None,
    calibrate: Path | None,
    input_range: tuple[float, float] | None,
    batch: int,
    ring: Ring,
    frac_bits: int | None,
    target_error: float | None,
    tree_depth: int | None,
    tree_leaves: int | None,
    network: str | None,
    disclose: tuple[Disclosure, ...],
    as_json: bool,
) -> None:
    """Compile MODEL (ONNX) into a public .plan and private .weights beside it.

    Prints what every layer costs and how its range is known: exact, proved from the weights,
    calibrated from samples, or assumed.

    \b
    Example:
      mpcserve compile model.onnx --calibrate samples.npy --batch 8 -o model.plan
    """
    from mpcserve.cli.layers import line_of
    from mpcserve.cli.output import progress
    from mpcserve.compiler import compile_model

    plan_path = output or model.with_suffix(".plan")
    begin = time.perf_counter()
    with progress(f"compiling {model}"):
        compiled = compile_model(
            model,
            calibrate=calibrate,
            input_range=input_range,
            batch=batch,
            ring=ring,
            frac_bits=frac_bits,
            line=line_of(network) if network else None,
            target_error=target_error,
            tree_depth=tree_depth,
            tree_leaves=tree_leaves,
            disclose=disclose,
        )
    seconds = time.perf_counter() - begin
    weights_path = _save(compiled, plan_path)
    if as_json:
        files = {"plan": str(plan_path), "weights": str(weights_path)}
        _print_json(compiled.plan, files=files, seconds=seconds)
    else:
        _print_compiled(compiled.plan, plan_path, weights_path, seconds)


@click.command("inspect")
@click.argument("plan", type=FILE)
@click.option("--layers", is_flag=True, help="The table of layers instead of all instructions.")
@JSON
def inspect_command(plan: Path, layers: bool, as_json: bool) -> None:
    """Show PLAN: its text form, and the rounds and bytes of one evaluation.

    \b
    Example:
      mpcserve inspect model.plan --json
    """
    from mpcserve.cli.layers import print_bill, print_layers, print_notes
    from mpcserve.plan import load_plan, plan_text

    loaded = load_plan(plan)
    if as_json:
        _print_json(loaded)
        return
    click.echo(f"digest {loaded.digest}")
    if layers:
        print_layers(loaded)
    else:
        click.echo(plan_text(loaded))
    print_bill(loaded)
    print_notes(loaded)


def _save(compiled: CompiledModel, path: Path) -> Path:
    from mpcserve.cli.results import unwritten

    try:
        return compiled.save(path)
    except OSError as e:
        raise unwritten(path, e, "-o") from None


def _print_check(reports: Sequence[NodeReport]) -> None:
    from collections import Counter

    from mpcserve.cli.output import table

    fine = Counter((r.op, r.status) for r in reports if not r.reason)
    if fine:
        table(("operator", "status", "nodes"), ((*k, n) for k, n in sorted(fine.items())), left=2)
    for r in reports:
        if r.reason:
            where = f"{r.node} ({r.op})" if r.op else r.node
            advice = f"; {r.hint}" if r.hint else ""
            status = "needs a range" if r.status == "range" else r.status
            click.echo(f"{status}: {where}: {r.reason}{advice}".replace(": : ", ": "))


def _print_json(plan: Plan, **more: Any) -> None:
    from mpcserve.cli.layers import bill_json, layer_rows
    from mpcserve.cli.output import print_json
    from mpcserve.plan.estimate import LINES, online_seconds

    print_json(
        {
            "model": plan.name,
            "plan_digest": plan.digest,
            "model_digest": plan.model_digest,
            "batch": plan.batch,
            "opset": plan.opset,
            "raw_inputs": [asdict(i) for i in plan.raw_inputs],
            "on_the_client": list(plan.on_client()),
            "inputs": [asdict(i) for i in plan.inputs],
            "outputs": [asdict(o) for o in plan.outputs],
            "layers": [asdict(r) for r in layer_rows(plan)],
            **bill_json(plan),
            "estimated_seconds": {line.name: online_seconds(plan, line) for line in LINES},
            "notes": plan.notes,
            "alternatives": [
                asdict(replace(a, seconds=dict(a.seconds))) for a in plan.alternatives
            ],
            **more,
        }
    )


def _print_compiled(plan: Plan, plan_path: Path, weights_path: Path, seconds: float) -> None:
    from mpcserve.cli.layers import print_layers, print_notes
    from mpcserve.units import human_seconds

    print_layers(plan)
    print_notes(plan)
    click.echo(f"plan     {plan_path} (public), digest {plan.digest[:16]}…")
    click.echo(f"weights  {weights_path} (private)")
    click.echo(f"compiled in {human_seconds(seconds)}")
