"""`mpcserve verify`: how far the fixed-point plan and the protocol are from the float model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpcserve.cli.model import CALIBRATE, DISCLOSE, FRAC_BITS, INPUT_RANGE, RING, TARGET_ERROR
from mpcserve.cli.options import FILE, JSON

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mpcserve.arrays import Array
    from mpcserve.compiler import CompiledModel, Disclosure, LayerError, Ring
    from mpcserve.plan import Bill, Plan

MAX_BATCH = 32
"""Rows per evaluation unless --batch says otherwise: enough to be quick, little enough memory."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Outputs of all rows, by the reference and by the protocol, and what was seen on the way."""

    reference: list[Any]
    protocol: list[Any]
    peaks: Mapping[int, int]
    bill: Bill


@click.command("verify")
@click.argument("model", type=FILE)
@click.option(
    "--data", type=FILE, required=True, help="Inputs, .npy, .npz or .csv; one row per sample."
)
@click.option("--labels", type=FILE, help="The right class of each row, .npy: accuracies too.")
@CALIBRATE
@INPUT_RANGE
@click.option("--batch", type=click.IntRange(1), help="Rows per evaluation; default up to 32.")
@RING
@FRAC_BITS
@TARGET_ERROR
@DISCLOSE
@JSON
def verify_command(
    model: Path,
    data: Path,
    labels: Path | None,
    calibrate: Path | None,
    input_range: tuple[float, float] | None,
    batch: int | None,
    ring: Ring,
    frac_bits: int | None,
    target_error: float | None,
    disclose: tuple[Disclosure, ...],
    as_json: bool,
) -> None:
    """Compare MODEL on --data: float, fixed-point reference, and the real protocol in one process.

    Says of each layer how near it came to its bound, and how much error it adds. Exit 3 when a
    value exceeds its bound: then results can be wrong, and the layer is named.

    \b
    Example:
      mpcserve verify model.onnx --data test.npy --labels labels.npy --calibrate train.npy
    """
    from mpcserve.arrays import fitted, read_arrays
    from mpcserve.cli.arrays import load_one
    from mpcserve.cli.output import print_json, progress
    from mpcserve.cli.plaintext import Plaintext
    from mpcserve.compiler import compile_model

    plaintext = Plaintext(model)
    inputs = fitted(read_arrays(data), plaintext.inputs, data)
    rows = len(next(iter(inputs.values())))
    expected = plaintext.run(inputs)
    with progress(f"compiling {model}"):
        compiled = compile_model(
            model,
            calibrate=calibrate,
            input_range=input_range,
            batch=batch or plaintext.batch or min(rows, MAX_BATCH),
            ring=ring,
            frac_bits=frac_bits,
            target_error=target_error,
            trace=True,
            disclose=disclose,
        )
    with progress("evaluating"):
        got = _evaluate(compiled.plan, compiled.weights, inputs)
        errors = _layer_errors(compiled, inputs)
    report = _report(compiled.plan, expected, got, load_one(labels) if labels else None)
    report["rows"] = rows
    report["layer_errors"] = [asdict(e) for e in errors]
    if as_json:
        print_json(report)
    else:
        _print(report)
    _refuse_broken(model, report)


def _evaluate(
    plan: Plan, weights: Mapping[str, NDArray[np.int64]], inputs: Mapping[str, Array]
) -> Evaluated:
    from mpcserve.protocol.together import Together
    from mpcserve.reference import evaluate_clear
    from mpcserve.serving.inputs import batches, check_inputs, join_outputs

    peaks: dict[int, int] = {}

    def watch(id: int, values: NDArray[np.int64]) -> None:
        if values.size:
            peak = max(int(values.max()), -int(values.min()))
            peaks[id] = max(peaks.get(id, 0), peak)

    together = Together(plan, weights)
    reference, protocol = [], []
    for used, rows in batches(plan, check_inputs(plan, inputs, "error")):
        reference.append((used, evaluate_clear(plan, weights, rows, watch)))
        outputs, bill = together.infer(rows)
        protocol.append((used, outputs))
    joined = [list(join_outputs(plan, parts).values()) for parts in (reference, protocol)]
    return Evaluated(joined[0], joined[1], peaks, bill)


def _layer_errors(compiled: CompiledModel, inputs: Mapping[str, Array]) -> list[LayerError]:
    """Of the first batch."""
    from mpcserve.compiler import layer_errors
    from mpcserve.serving.inputs import batches, check_inputs

    plan = compiled.plan
    _, rows = next(iter(batches(plan, check_inputs(plan, inputs, "error"))))
    return layer_errors(compiled, {i.name: x for i, x in zip(plan.inputs, rows, strict=True)})


def _report(
    plan: Plan, expected: list[Array], got: Evaluated, labels: Array | None
) -> dict[str, Any]:
    from mpcserve.cli.plaintext import compare

    outputs = []
    for spec, exact, reference, real in zip(
        plan.outputs, expected, got.reference, got.protocol, strict=True
    ):
        entry: dict[str, Any] = {
            "output": spec.name,
            "reference": asdict(compare(reference, exact)),
            "protocol": asdict(compare(real, exact)),
            "protocol_vs_reference": asdict(compare(real, reference)),
        }
        if labels is not None:
            triples = (("float", exact), ("reference", reference), ("protocol", real))
            entry["accuracy"] = {k: _accuracy(v, labels, spec.columns) for k, v in triples}
        outputs.append(entry)
    return {
        "model": plan.name,
        "plan_digest": plan.digest,
        "batch": plan.batch,
        "outputs": outputs,
        "rounds": got.bill.rounds,
        "bytes": dict(got.bill.bytes),
        "dealt_bytes": got.bill.dealt_bytes,
        "on_the_client": list(plan.on_client()),
        "notes": list(plan.notes),
        "layers": _headroom(plan, got.peaks),
    }


def _accuracy(values: Array, labels: Array, columns: Sequence[str] | Sequence[int]) -> float | None:
    """Of the largest logits, or of labels themselves; None where there are no classes."""
    import numpy as np

    from mpcserve.cli.plaintext import predictions
    from mpcserve.errors import InputError

    text = values.dtype.kind in "OU"
    classes: Array | None = values.ravel().astype(np.str_) if text else predictions(values)
    if classes is not None and columns and not text:
        classes = np.array(columns)[classes]
    if classes is None or (classes.dtype.kind == "U") != (labels.dtype.kind == "U"):
        return None
    if labels.shape != classes.shape:
        raise InputError(
            f"--labels: expected one class for each of {len(classes)} rows, got {labels.shape}",
            "give a one-dimensional array of classes, by number or by name",
        )
    return float((classes == labels).mean())


def _headroom(plan: Plan, peaks: Mapping[int, int]) -> list[dict[str, Any]]:
    """Of each layer the value that came nearest to its bound; negative bits: it went past it."""
    nearest: dict[str, dict[str, Any]] = {}
    for i in plan.instructions:
        if i.id not in peaks or i.op in ("weight", "constant", "sign"):
            continue
        if i.value.bound == 0 and peaks[i.id] <= 1:
            continue  # a bit, which is as near as it can be
        scale = i.value.frac_bits
        bits = i.value.bound - math.log2(max(peaks[i.id], 1))
        layer = i.layer or str(i.attrs.get("name", ""))
        row: dict[str, Any] = {
            "layer": layer,
            "op": i.op,
            "largest": math.ldexp(peaks[i.id], -scale),
            "bound": math.ldexp(1.0, i.value.bound - scale),
            "known": i.value.known,
            "headroom_bits": round(bits, 2),
            "holds": peaks[i.id] <= 1 << i.value.bound,
        }
        best = nearest.get(layer)
        if best is None or row["headroom_bits"] < best["headroom_bits"]:
            nearest[layer] = row
    return list(nearest.values())


def _print(report: Mapping[str, Any]) -> None:
    from mpcserve.cli.output import table
    from mpcserve.units import human_bytes

    for output in report["outputs"]:
        accuracy = output.get("accuracy", {})
        pairs = (
            ("reference", "fixed point vs float"),
            ("protocol", "protocol vs float"),
            ("protocol_vs_reference", "protocol vs fixed point"),
        )
        table(
            ("comparison", "max error", "mean error", "top-1 agreement", "accuracy"),
            (
                (
                    title,
                    f"{output[key]['max_error']:.3g}",
                    f"{output[key]['mean_error']:.3g}",
                    _percent(output[key]["top1"]),
                    _percent(accuracy.get(key)),
                )
                for key, title in pairs
            ),
            title=f"{output['output']}: {report['rows']} rows"
            + (f", float accuracy {_percent(accuracy['float'])}" if accuracy else ""),
        )
    table(
        ("layer", "nearest", "known", "largest", "bound", "headroom"),
        (
            (
                r["layer"],
                r["op"],
                r["known"],
                f"{r['largest']:.4g}",
                f"{r['bound']:.4g}",
                f"{r['headroom_bits']:.1f} bits" if r["holds"] else "EXCEEDED",
            )
            for r in report["layers"]
        ),
        left=3,
        title="headroom: how near each layer came to its bound",
    )
    _print_errors(report["layer_errors"])
    dealt, online = report["dealt_bytes"], report["bytes"]["alice->bob"]
    click.echo(
        f"{report['rounds']} rounds, {human_bytes(online)} each way and {human_bytes(dealt)} dealt "
        f"per {report['batch']} rows"
    )
    for line in report["on_the_client"]:
        click.echo(line)
    for line in report["notes"]:
        click.echo(f"note: {line}")


def _print_errors(errors: Sequence[Mapping[str, Any]]) -> None:
    """Layers that round: the others only pass on what they read."""
    from mpcserve.cli.output import table

    rounding = [e for e in errors if e["own"]]
    table(
        ("layer", "operator", "max error", "mean error", "of its range", "growth", "adds"),
        (
            (
                e["layer"],
                e["op"],
                f"{e['max_error']:.2g}",
                f"{e['mean_error']:.2g}",
                f"{e['relative']:.2g}",
                "" if e["growth"] is None else f"{e['growth']:.2g}",
                f"{e['own']:.2g}",
            )
            for e in rounding
        ),
        left=2,
        title="error of each layer, fixed point vs float; relative to its range from the third on",
    )
    if rounding:
        worst = max(rounding, key=lambda e: float(e["own"]))
        click.echo(
            f"most error enters at {worst['layer']!r} ({worst['op']}): {worst['own']:.2g} of its "
            "range were its operands exact"
        )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _refuse_broken(model: Path, report: Mapping[str, Any]) -> None:
    from mpcserve.errors import ModelError

    broken = [r for r in report["layers"] if not r["holds"]]
    if broken:
        raise ModelError(
            f"{model}: values of {', '.join(repr(r['layer']) for r in broken)} exceed their bound: "
            "results can be wrong",
            "calibrate with more typical samples, or state the input's range with --input-range",
            tuple(
                f"layer {r['layer']!r}: |x| reached {r['largest']:.4g}, bound {r['bound']:.4g} "
                f"({r['known']})"
                for r in broken
            ),
        )
