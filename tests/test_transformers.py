"""Transformers as torch exports them, through the real protocol, against onnxruntime.

The files are written by `python models/transformers.py tests`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from mpcserve.compiler import compile_model
from mpcserve.compiler.check import import_model
from mpcserve.compiler.graph import FUSED
from mpcserve.compiler.passes import rewritten
from mpcserve.compiler.registry import registry
from mpcserve.plan import bill_of
from mpcserve.protocol import Together

DATA = Path(__file__).parent / "data" / "transformers"
FILES = [
    f"{name}_{how}" for name in ("bert", "gpt2", "llama", "vit") for how in ("dynamo", "legacy")
]


@pytest.mark.parametrize("name", FILES)
def test_an_exported_transformer_agrees_with_onnxruntime(name: str) -> None:
    path = DATA / f"{name}.onnx"
    with np.load(path.with_suffix(".calibration.npz")) as file:
        samples = {k: file[k] for k in file.files}
    made = compile_model(path, calibrate=samples)
    inputs = [samples[i.name][1:2] for i in made.plan.inputs]
    (got,), bill = Together(made.plan, made.weights).infer(inputs)
    assert bill == bill_of(made.plan) and bill.rounds <= 80
    run = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {i.name: x for i, x in zip(made.plan.inputs, inputs, strict=True)}
    expected = run.run(None, feed)[0]
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 2e-3


@pytest.mark.parametrize("name", FILES)
def test_what_exporters_write_out_is_found(name: str) -> None:
    graph = import_model(DATA / f"{name}.onnx", 1, registry()).graph
    assert graph is not None
    kinds = Counter(n.op for n in rewritten(graph).nodes if n.domain == FUSED)
    assert kinds["Attend"] == 1 and kinds["ScaledMatMul"] + kinds["Scale"] >= 1
    wanted = {"bert": "Gelu", "gpt2": "Gelu", "llama": "Swish", "vit": "Gelu"}[name.split("_")[0]]
    written = Counter(n.op for n in rewritten(graph).nodes)
    assert written[wanted] == 1
    norms = written["LayerNormalization"] + written["Normalize"]
    assert norms == 3
    assert not written["Softmax"] and not written["Erf"] and not written["Tanh"]
