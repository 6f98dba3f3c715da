"""Networks as torch exports them, by both of its exporters: they compile, and the protocol agrees.

The files are written by `python models/nets.py --tests`. With `-m zoo` the networks are exported
anew in full size, which takes torch and a lot of time; `python models/zoo.py` measures them too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from mpcserve.compiler import compile_model, layer_errors
from mpcserve.plan import bill_of
from mpcserve.protocol import simulate
from tests.onnx_cases import Array, plain, rng_of

ROOT = Path(__file__).parent.parent
FILES = sorted((Path(__file__).parent / "data" / "zoo").glob("*.onnx"))
NAMES = [path.stem for path in FILES]

LARGEST_ERROR = 2e-2
"""Of outputs whose standard deviation is about 4."""


def rows_of(model: onnx.ModelProto, count: int) -> Array:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    rng = rng_of(11)
    return rng.standard_normal((count, *(d.dim_value for d in dims[1:]))).astype(np.float32)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_an_exported_network_is_computed_by_the_protocol(path: Path) -> None:
    model = onnx.load(path)
    rows = rows_of(model, 17)
    x = rows[-1:]
    compiled = compile_model(path, calibrate=rows[:-1])
    (got,), _ = simulate(compiled.plan, compiled.weights, [x])
    (expected,) = plain(model, x)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < LARGEST_ERROR
    last = [got.reshape(-1), expected.reshape(-1)]
    assert last[1][last[0].argmax()] > last[1].max() - LARGEST_ERROR


def test_every_family_is_there_by_both_exporters() -> None:
    stems = {name.rpartition(".")[0] for name in NAMES}
    assert sorted(f"{s}.{e}" for s in stems for e in ("dynamo", "legacy")) == NAMES
    assert len(stems) >= 16


def test_both_exports_of_a_network_cost_about_the_same() -> None:
    bills = []
    for path in (p for p in FILES if p.stem.startswith("mobilenet_v2")):
        plan = compile_model(path, calibrate=rows_of(onnx.load(path), 16)).plan
        bills.append(bill_of(plan))
    assert bills[0].rounds == bills[1].rounds
    assert abs(bills[0].online_bytes / bills[1].online_bytes - 1) < 0.05


def test_layers_of_an_exported_network_are_named_as_the_export_names_them() -> None:
    path = next(p for p in FILES if p.stem == "resnet18.legacy")
    model = onnx.load(path)
    rows = rows_of(model, 17)
    compiled = compile_model(path, calibrate=rows[:-1], trace=True)
    errors = layer_errors(compiled, {compiled.plan.inputs[0].name: rows[-1:]})
    convolutions = [n.name for n in model.graph.node if n.op_type == "Conv"]
    assert sorted(e.layer for e in errors if e.op == "Conv") == sorted(convolutions)
    assert all(e.own <= e.relative * 3 + 1e-3 for e in errors)


@pytest.mark.slow
@pytest.mark.zoo
def test_networks_of_full_size_agree_with_onnxruntime() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "models" / "zoo.py"), "--exporter", "dynamo"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(NAMES) // 2
    assert [line for line in lines if "100.00%" not in line] == []
