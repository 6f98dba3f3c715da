"""ONNX's own node tests through the real protocol: `python -m tests.node_suite [-k PATTERN]`.

Every case of the onnx package is classified by what it is, never by whether it passes: common or
rare operators, a constant (no output depends on a secret), or excluded with a reason. A case passes
when every output has the expected type and shape and lies within the case's own tolerance or within
1e-3·max(1, |expected|); outputs that are not floating must be equal.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mpcserve.errors import MpcError
from mpcserve.onnx_backend import FLOATS, parameters_of, prepare

RESULTS = Path(__file__).parent / "node_suite.json"
"""What every case came to: none that passes may fail again, and docs/operators.md is made of it."""

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")

RARE = frozenset(
    [
        "Acos",
        "Acosh",
        "AffineGrid",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "BlackmanWindow",
        "CausalConvWithState",
        "CenterCropPad",
        "Col2Im",
        "Compress",
        "Cosh",
        "CumProd",
        "DFT",
        "DeformConv",
        "Det",
        "FlexAttention",
        "GridSample",
        "HammingWindow",
        "HannWindow",
        "Hardmax",
        "LinearAttention",
        "Loop",
        "LpPool",
        "MaxUnpool",
        "MeanVarianceNormalization",
        "MelWeightMatrix",
        "NegativeLogLikelihoodLoss",
        "ReverseSequence",
        "RoiAlign",
        "STFT",
        "Scan",
        "Scatter",
        "Shrink",
        "Sinh",
        "SoftmaxCrossEntropyLoss",
        "Tan",
        "TensorScatter",
        "Upsample",
        "ArrayFeatureExtractor",
        "Binarizer",
        "LabelEncoder",
        "TreeEnsemble",
    ]
)
"""Operators that few exported models hold."""

RANDOM = frozenset(
    [
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    ]
)
QUANTISED = frozenset(
    [
        "ConvInteger",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
        "QuantizeLinear",
    ]
)
SHAPED_BY_DATA = frozenset(["NonMaxSuppression", "NonZero", "Unique"])
BITS = frozenset(["BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"])

LARGEST = 1e30
"""Some cases were made from memory that nobody had written to; they hold 10^199."""

ERROR = 1e-3
"""Largest error, relative to the larger of 1 and the expected magnitude."""


@dataclass(frozen=True, slots=True)
class Case:
    """`op`: the operator under test; `group`: common, rare, constant or excluded (for `reason`).

    `public`: inputs that are parameters of it, in the models of its definition too.
    """

    name: str
    kind: str
    op: str
    group: str
    reason: str
    model: onnx.ModelProto
    data_sets: Sequence[tuple[Sequence[Any], Sequence[Any]]]
    rtol: float
    atol: float
    public: frozenset[str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`status`: passed, failed, or excluded. `error`: largest, as a part of max(1, |expected|).

    `rounds` and `sent`, bytes online, took the `elements` of all outputs together.
    """

    name: str
    op: str
    group: str
    status: str
    reason: str = ""
    error: float = 0.0
    rounds: int = 0
    sent: int = 0
    elements: int = 0
    seconds: float = 0.0


@cache
def cases() -> tuple[Case, ...]:
    """Every case that the onnx package holds."""
    from onnx.backend.test import loader

    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in KINDS:
            found |= {case.name: case for case in loader.load_model_tests(kind=kind)}
    return tuple(_classified(case, found) for case in found.values())


def results() -> dict[str, Outcome]:
    """The recorded outcomes by name."""
    recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return {row["name"]: Outcome(**row) for row in recorded}


def passing() -> list[str]:
    """Names of the cases that are recorded as passing."""
    return [o.name for o in results().values() if o.status == "passed"]


def record(outcomes: Sequence[Outcome]) -> None:
    """Write what was run into the record, a line per case."""
    known = results() | {o.name: replace(o, seconds=0.0) for o in outcomes}
    blank = asdict(Outcome("", "", "", ""))
    rows = []
    for o in sorted(known.values(), key=lambda o: o.name):
        told = {k: v for k, v in asdict(o).items() if v != blank[k]}
        rows.append(json.dumps(told | {"error": float(f"{o.error:.2g}")} if o.error else told))
    RESULTS.write_text("[\n" + ",\n".join(rows) + "\n]\n")


def selected(pattern: str = "") -> list[Case]:
    """Cases whose name, operator or group matches a regular expression."""
    wanted = re.compile(pattern, re.IGNORECASE)
    return [c for c in cases() if any(map(wanted.search, (c.name, c.op, c.group)))]


def run(case: Case) -> Outcome:
    """One case through the protocol."""
    start = time.process_time()
    if case.group == "excluded":
        return Outcome(case.name, case.op, case.group, "excluded", case.reason)
    reason, error, bill, elements = "", 0.0, None, 0
    try:
        model = prepare(case.model, public=case.public)
        for inputs, expected in case.data_sets:
            elements = sum(np.size(want) for want in expected)
            for got, want in zip(model.run(list(inputs)), expected, strict=True):
                why, off = _difference(got, want, case)
                reason, error = reason or why, max(error, off)
        bill = model.bill
    except MpcError as e:
        reason = str(e).partition(": ")[2] or str(e)
    except Exception as e:  # a crash of one case is an outcome, the others run
        reason = f"crash: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    status = "failed" if reason else "passed"
    seconds = time.process_time() - start
    rounds, sent = (bill.rounds, bill.online_bytes) if bill is not None else (0, 0)
    cost = rounds, sent, elements, seconds
    return Outcome(case.name, case.op, case.group, status, reason, error, *cost)


def _difference(got: Any, want: Any, case: Case) -> tuple[str, float]:
    """(what is wrong with an output, its error)."""
    got, want = np.asarray(got), np.asarray(want)
    if got.dtype != want.dtype:
        return f"type {got.dtype}, expected {want.dtype}", 0.0
    if got.shape != want.shape:
        return f"shape {list(got.shape)}, expected {list(want.shape)}", 0.0
    if str(want.dtype) not in FLOATS:
        wrong = int(np.count_nonzero(got != want))
        return (f"{wrong} of {want.size} elements differ" if wrong else ""), 0.0
    # ONNX's own runner allows two units in the last place of bfloat16.
    rtol = max(case.rtol, 2**-6) if want.dtype.name == "bfloat16" else case.rtol
    got, want = got.astype(np.float64), want.astype(np.float64)
    off = np.abs(got - want) / np.maximum(1.0, np.abs(want))
    close = (off <= ERROR) | (np.abs(got - want) <= case.atol + rtol * np.abs(want))
    error = float(off.max(initial=0.0))
    return ("" if close.all() else f"error {error:.2g}"), error


def _operator(model: onnx.ModelProto) -> str:
    """The operator of a model's last node that is no constant."""
    ops = [n.op_type for n in model.graph.node if n.op_type != "Constant"]
    return ops[-1] if ops else "Constant"


def _classified(case: Any, found: Mapping[str, Any]) -> Case:
    model, data_sets = case.model, case.data_sets
    if model is None:
        model, data_sets = _read(Path(case.model_dir))
    data_sets = [tuple([_array(x) for x in side] for side in ends) for ends in data_sets]
    base = found.get(re.sub(r"_expanded(_ver\d+|_function_.*)?$", "", case.name), case)
    tested = model if base.model is None else base.model
    op = _operator(tested)
    public = frozenset(parameters_of(tested.graph))
    reason = _excluded(op, model, data_sets)
    group = "excluded" if reason else _group(op, model, data_sets, public)
    tolerance = case.rtol, case.atol
    return Case(case.name, case.kind, op, group, reason, model, data_sets, *tolerance, public)


def _excluded(op: str, model: onnx.ModelProto, data_sets: Any) -> str:
    """Why a case cannot be asked of encrypted inference; empty if it can."""
    kinds = {i.type.WhichOneof("value") for i in _ends(model.graph)}
    nodes = {n.op_type for n in _nodes(model.graph)}
    types = set(_types(model.graph))
    training = {n.op_type for n in model.graph.node if _trains(n)}
    rules = [
        (op == "ImageDecoder", "image decoding"),
        ("string" in types or nodes & {"TfIdfVectorizer"}, "strings"),
        (kinds - {"tensor_type"} or any("Sequence" in n for n in nodes - {"ReverseSequence"}),
         "sequences and optionals"),
        (training or any("training" in n.domain for n in model.graph.node) or "Gradient" in nodes,
         "training"),
        (nodes & RANDOM, "random"),
        (nodes & QUANTISED or any(re.search(r"float[48]|int[24]$", t) for t in types),
         "low-bit or quantised types"),
        (nodes & BITS, "bit patterns"),
        (nodes & SHAPED_BY_DATA, "shapes that depend on data"),
        (nodes & {"IsNaN", "IsInf"} or not _finite(data_sets), "NaN and infinity"),
        (_largest(data_sets) > LARGEST, "uninitialised numbers"),
        (not any(t in FLOATS for t in types), "only integers and booleans"),
    ]  # fmt: skip
    return next((reason for holds, reason in rules if holds), "")


def _group(op: str, model: onnx.ModelProto, data_sets: Any, public: frozenset[str]) -> str:
    if not _depends_on_secret(model, data_sets, public):
        return "constant"
    return "rare" if op in RARE else "common"


def _depends_on_secret(model: onnx.ModelProto, data_sets: Any, parameters: frozenset[str]) -> bool:
    constants = {t.name for t in model.graph.initializer}
    inputs = [i.name for i in model.graph.input if i.name not in constants]
    secret = {
        name
        for name, x in zip(inputs, data_sets[0][0], strict=False)
        if str(np.asarray(x).dtype) in FLOATS and np.asarray(x).size and name not in parameters
    }
    for node in model.graph.node:
        if node.op_type not in ("Shape", "Size") and _reads(node) & secret:
            secret |= set(node.output)
    return any(o.name in secret for o in model.graph.output)


def _reads(node: onnx.NodeProto) -> set[str]:
    if node.op_type == "EyeLike":
        return set()
    names = set(node.input[:1] if node.op_type == "CastLike" else node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            names |= {i for inner in attribute.g.node for i in _reads(inner)}
    return names


def _trains(node: onnx.NodeProto) -> bool:
    on = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
    if node.op_type == "Dropout" and len(node.input) > 2:
        return True
    return node.op_type == "BatchNormalization" and on.get("training_mode", 0) == 1


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _ends(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    return [*graph.input, *graph.output]


def _types(graph: onnx.GraphProto) -> Iterator[str]:
    """Element types of inputs, outputs and what a cast makes."""
    numbers = [i.type.tensor_type.elem_type for i in _ends(graph) if i.type.HasField("tensor_type")]
    numbers += [a.i for n in graph.node if n.op_type == "Cast" for a in n.attribute
                if a.name == "to"]  # fmt: skip
    for number in numbers:
        if number == onnx.TensorProto.STRING:
            yield "string"
        elif number:
            yield str(helper.tensor_dtype_to_np_dtype(number))


def _largest(data_sets: Any) -> float:
    arrays = [x for ends in data_sets for side in ends for x in side if hasattr(x, "dtype")]
    floats = [np.asarray(x, np.float64) for x in arrays if str(x.dtype) in FLOATS]
    return max((float(np.abs(x).max(initial=0.0)) for x in floats), default=0.0)


def _finite(data_sets: Any) -> bool:
    arrays = [x for ends in data_sets for side in ends for x in side if hasattr(x, "dtype")]
    floats = [np.asarray(x, np.float64) for x in arrays if str(x.dtype) in FLOATS]
    return all(np.isfinite(x).all() for x in floats)


def _read(folder: Path) -> tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]:
    """A case that is kept as files."""
    model = onnx.load(folder / "model.onnx")
    sets = []
    for data in sorted(folder.glob("test_data_set_*")):
        sides = []
        for side, infos in (("input", model.graph.input), ("output", model.graph.output)):
            files = sorted(data.glob(f"{side}_*.pb"), key=lambda p: int(p.stem.split("_")[1]))
            sides.append([_tensor(f, i) for f, i in zip(files, infos, strict=False)])
        sets.append((sides[0], sides[1]))
    return model, sets


def _tensor(file: Path, info: onnx.ValueInfoProto) -> Any:
    if not info.type.HasField("tensor_type"):
        return None
    return numpy_helper.to_array(onnx.load_tensor(file))


def _array(x: Any) -> Any:
    return numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else x


def report(outcomes: Sequence[Outcome]) -> str:
    """Totals by operator, by reason and by group."""
    lines = ["", "by operator:"]
    by_op: dict[str, Counter[str]] = defaultdict(Counter)
    for o in outcomes:
        if o.status != "excluded":
            by_op[o.op][o.status] += 1
    for op, count in sorted(by_op.items()):
        lines.append(f"  {op:28} {count['passed']:4} of {count.total():4}")
    for status in ("excluded", "failed"):
        lines.append(f"{status}:")
        reasons = Counter(re.sub(r"'[^']*'|\d[\d.e+-]*", "…", o.reason) for o in outcomes
                          if o.status == status)  # fmt: skip
        lines += [f"  {n:5}  {reason}" for reason, n in reasons.most_common()]
    lines.append("in all:")
    for group in ("common", "rare", "constant"):
        count = Counter(o.status for o in outcomes if o.group == group)
        lines.append(f"  {group:10} {count['passed']:5} of {count.total():5}")
    return "\n".join(lines)


def main() -> None:
    """Run what is selected, print a line per case and the totals."""
    parser = argparse.ArgumentParser(prog="python -m tests.node_suite")
    parser.add_argument("-k", default="", metavar="PATTERN", help="name, operator or group")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes")
    parser.add_argument(
        "--record", action="store_true", help="write what comes out into the record"
    )
    parser.add_argument("--failed", action="store_true", help="print only what fails")
    options = parser.parse_args()
    outcomes = []
    for case in selected(options.k):
        o = run(case)
        outcomes.append(o)
        if o.status != "excluded" and not (options.failed and o.status == "passed"):
            note = o.reason or f"error {o.error:.1e}"
            print(f"{o.status} {1e3 * o.seconds:6.0f} ms {o.name}: {note}", flush=True)
    print(report(outcomes))
    if options.record:
        record(outcomes)
    if options.json:
        options.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    sys.exit(any(o.status == "failed" for o in outcomes))


if __name__ == "__main__":
    main()
