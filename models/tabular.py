"""Models of tables: train, export, compile, verify and measure all of them.

    python -m models.tabular               # every model, some minutes
    python -m models.tabular -k forest     # those whose name, family or data hold a word
    python -m models.tabular --write       # and write docs/models/tabular.json
    python -m models.tabular --passengers  # train the bundled model of a table, write its tables

Every fifth row is a test row. Each model is compiled on its training rows and evaluated on all test
rows by the real protocol of the three roles in one process, then compared with onnxruntime on the
exported model. Needs scikit-learn and skl2onnx; xgboost, lightgbm and onnxmltools for theirs.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from models.tabular_cases import FAMILIES, Case, texts

Array = NDArray[Any]

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "models" / "tabular.json"
TEST_EVERY = 5
BATCH = 64
TIE = 1e-3
"""Scores nearer than this are a tie: then either class is right."""


@dataclass(frozen=True)
class Result:
    """One line. `agreement`: of labels, ties aside; else of values within 1e-3 of their range.

    Rounds and bytes are those of one row; `online_mb` both ways between the servers, `seconds` of
    processor time for one row: dealing, preparing and evaluating by all three roles.
    """

    family: str
    model: str
    dataset: str
    parameters: int
    max_abs_error: float
    agreement: float
    rounds: int
    online_mb: float
    dealt_mb: float
    seconds: float


@dataclass(frozen=True)
class Data:
    """Rows and targets, the test rows apart. `columns`: name → type, where each is an input."""

    train: Array
    train_targets: Array
    test: Array
    test_targets: Array
    columns: Mapping[str, type] = field(default_factory=dict)

    def fed(self, rows: Array) -> Array | dict[str, Array]:
        """Rows as the exported model takes them."""
        if not self.columns:
            return rows
        cells = zip(self.columns.items(), rows.T, strict=True)
        return {name: cell.astype(kind)[:, None] for (name, kind), cell in cells}


def load(name: str) -> Data:
    """One of scikit-learn's data sets as float32, or the passengers."""
    from sklearn import datasets

    columns: Mapping[str, type] = {}
    if name == "passengers":
        rows, targets, columns = passengers()
    else:
        rows, targets = getattr(datasets, f"load_{name}")(return_X_y=True)
        rows = rows.astype(np.float32)
    test = np.arange(len(rows)) % TEST_EVERY == TEST_EVERY - 1
    return Data(rows[~test], targets[~test], rows[test], targets[test], columns)


def passengers(count: int = 900) -> tuple[Array, Array, Mapping[str, type]]:
    """Made-up passengers of a ship: numbers, of which some are missing, and text."""
    rng = np.random.default_rng(1912)
    sex, port = rng.choice(["female", "male"], count), rng.choice(["C", "Q", "S"], count)
    deck = rng.choice([*"ABCDEFG", "unknown"], count)
    kind = rng.integers(1, 4, count)
    age = rng.gamma(6, 5, count).astype(np.float32)
    fare = (90 / kind * rng.lognormal(0, 0.5, count)).astype(np.float32)
    odds = 2.4 * (sex == "female") - 0.9 * (kind - 2) - 0.03 * age + 0.5 * (port == "C") - 0.4
    odds += 0.15 * np.char.find("ABCDEFGunknown", deck) * (deck != "unknown")
    survived = odds + rng.logistic(0, 0.5, count) > 0
    age[rng.random(count) < 0.2] = np.nan
    columns = {"age": np.float32, "fare": np.float32, "class": np.int64}
    columns |= dict.fromkeys(("sex", "port", "deck"), np.str_)
    rows = np.array([age, fare, kind, sex, port, deck], object).T
    return rows, np.where(survived, "survived", "died"), columns


# how it is exported


def exported(case: Case, data: Data) -> onnx.ModelProto:
    """Trained and converted as users do."""
    estimator = case.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.alone:
            estimator.fit(data.train)
        else:
            estimator.fit(data.train, data.train_targets)
        if case.family in ("xgboost", "lightgbm"):
            return _by_onnxmltools(estimator, case.family, data)
        from skl2onnx import to_onnx

        with mock.patch("skl2onnx.common._container.make_node", _make_node):
            versions = {"": 18, "ai.onnx.ml": 3}  # what all converters of skl2onnx know
            if data.columns:
                return to_onnx(estimator, initial_types=_types(data), target_opset=versions)
            return to_onnx(estimator, data.train[:1], target_opset=versions)


def _types(data: Data) -> list[tuple[str, Any]]:
    """An input for every column, as skl2onnx wants it."""
    from skl2onnx.common import data_types as of

    kinds = {np.float32: of.FloatTensorType, np.int64: of.Int64TensorType}
    return [(k, kinds.get(t, of.StringTensorType)([None, 1])) for k, t in data.columns.items()]


def _by_onnxmltools(estimator: Any, family: str, data: Data) -> onnx.ModelProto:
    import onnxmltools
    from onnxmltools.convert.common.data_types import FloatTensorType

    convert = getattr(onnxmltools, f"convert_{family}")
    kind = FloatTensorType([None, data.train.shape[1]])
    return convert(estimator, initial_types=[("X", kind)], target_opset=15)


def _make_node(op: str, *names: Any, **attrs: Any) -> onnx.NodeProto:
    """skl2onnx 1.20 hands NumPy's numbers to onnx, which takes Python's."""
    plain = {
        k: [x.item() if isinstance(x, np.generic) else int(x) if isinstance(x, bool) else x
            for x in v] if isinstance(v, list) else v
        for k, v in attrs.items()
    }  # fmt: skip
    return onnx.helper.make_node(op, *names, **plain)


# what is measured


def measured(case: Case) -> Result:
    """Train, export, compile, evaluate, compare."""
    from mpcserve import compile as compile_model
    from mpcserve.plan import bill_of
    from mpcserve.protocol import Together
    from mpcserve.serving.inputs import batches, check_inputs, join_outputs

    data = load(case.dataset)
    model = exported(case, data)
    options: dict[str, Any] = {"calibrate": data.fed(data.train), "disclose": case.disclose}
    compiled = compile_model(model, batch=BATCH, **options)
    together = Together(compiled.plan, compiled.weights)
    parts = [
        (used, together.infer(rows)[0])
        for used, rows in batches(
            compiled.plan, check_inputs(compiled.plan, data.fed(data.test), "clamp")
        )
    ]
    got = list(join_outputs(compiled.plan, parts).values())
    error, agreement = compared(got, plain(model, data.fed(data.test)))
    single = compile_model(model, **options)
    bill = bill_of(single.plan)
    return Result(
        case.family,
        case.model,
        case.dataset,
        parameters(model),
        error,
        agreement,
        bill.rounds,
        (bill.bytes["alice->bob"] + bill.bytes["bob->alice"]) / 1e6,
        bill.dealt_bytes / 1e6,
        seconds(
            Together(single.plan, single.weights),
            check_inputs(single.plan, data.fed(data.test[:1]), "clamp"),
        ),
    )


def plain(model: onnx.ModelProto, rows: Array | dict[str, Array]) -> list[Array]:
    """onnxruntime's answer; maps of probabilities as rows."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # onnxmltools declares labels for one row
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    feed = rows if isinstance(rows, dict) else {session.get_inputs()[0].name: rows}
    outputs = session.run(None, feed)
    return [
        np.array([list(row.values()) for row in o]) if isinstance(o, list) else np.asarray(o)
        for o in outputs
    ]


def compared(got: list[Array], expected: list[Array]) -> tuple[float, float]:
    """(largest error of the last output, agreement)."""
    scores, exact = (x[-1].astype(np.float64).reshape(len(x[-1]), -1) for x in (got, expected))
    error = float(np.abs(scores - exact).max())
    if len(expected) == 1:
        span = float(exact.max() - exact.min()) or 1.0
        return error, float(np.mean(np.abs(scores - exact) <= 1e-3 * span))
    labels, wanted = (x[0].ravel() for x in (got, expected))
    ordered = np.sort(exact, axis=1)
    if exact.shape[1] > 1:
        tied = ordered[:, -1] - ordered[:, -2] <= TIE
    else:
        tied = np.abs(exact[:, 0]) <= TIE
    return error, float(np.mean((labels == wanted) | tied))


LEARNED = (
    *("coefficients", "intercepts", "support_vectors", "nodes_values", "weights", "rho"),
    *("values_floats", "imputed_value_floats"),
)


def parameters(model: onnx.ModelProto) -> int:
    """Numbers that were learned: initialisers, coefficients, thresholds, leaves."""
    count = 0
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        count += array.size if array.dtype.kind == "f" else 0
    for node in model.graph.node:
        for a in node.attribute:
            if any(a.name.endswith(name) for name in LEARNED):
                count += len(a.floats)
    return count


def seconds(together: Any, row: list[Array], runs: int = 3) -> float:
    """Processor time of one row, the least of some."""
    together.infer(row)
    taken = []
    for _ in range(runs):
        begin = time.process_time()
        together.infer(row)
        taken.append(time.process_time() - begin)
    return min(taken)


def write_passengers() -> None:
    """The bundled model of a table with text: the .onnx, rows to calibrate on, rows to try."""
    case = next(c for c in texts() if c.dataset == "passengers")
    data = load(case.dataset)
    model = exported(case, data)
    model.graph.name = "passengers"
    onnx.save(model, HERE / "passengers.onnx")
    for name, rows in (("calibration", data.train[:200]), ("samples", data.test[:10])):
        with (HERE / f"passengers_{name}.csv").open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(data.columns)
            table.writerows(
                [["" if cell != cell else _short(cell) for cell in row] for row in rows]
            )
    np.save(HERE / "passengers_labels.npy", data.test_targets[:10])


def _short(cell: Any) -> Any:
    """A number as tables have it."""
    return round(float(cell), 2) if isinstance(cell, float | np.floating) else cell


def wanted(word: str, all_of_them: bool) -> Iterator[Case]:
    """Cases whose name holds a word; of libraries that are missing none, and that is said.

    Raises: SystemExit where one is missing and none may be.
    """
    for family in FAMILIES:
        try:
            cases = [*family()]
        except ModuleNotFoundError as e:
            told = f"{e.name} is not installed, so its models are left out; pip install {e.name}"
            if all_of_them:
                raise SystemExit(f"{told}: --write needs all of them") from None
            print(told, file=sys.stderr)
            continue
        yield from (c for c in cases if word in c.name)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-k", default="", metavar="WORD", help="only models of which it is a part")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--passengers", action="store_true", help="write the bundled table model")
    given = parser.parse_args()
    if given.passengers:
        write_passengers()
        return
    print(f"{'model':48} {'data':14} {'parameters':>10} {'error':>8} {'agree':>8} "
          f"{'rounds':>6} {'online MB':>10} {'dealt MB':>9} {'seconds':>8}")  # fmt: skip
    results = []
    for case in wanted(given.k, given.write):
        r = measured(case)
        results.append(r)
        name = f"{r.family}: {r.model}"
        print(f"{name:48} {r.dataset:14} {r.parameters:10} {r.max_abs_error:8.2g} "
              f"{100 * r.agreement:7.2f}% {r.rounds:6} {r.online_mb:10.4f} {r.dealt_mb:9.4f} "
              f"{r.seconds:8.4f}", flush=True)  # fmt: skip
    if given.write:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text("".join(json.dumps(asdict(r)) + "\n" for r in results))


if __name__ == "__main__":
    main()
