"""Transformers as torch exports them, through the real protocol, against onnxruntime.

Files named hf_* are those of HuggingFace's classes: `python -m models.huggingface --tests`; the
others are written in plain torch: `python models/transformers.py`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from mpcserve.compiler import compile_model
from mpcserve.compiler.check import import_model
from mpcserve.compiler.graph import FUSED, Graph
from mpcserve.compiler.passes import rewritten
from mpcserve.compiler.registry import registry
from mpcserve.plan import bill_of
from mpcserve.protocol import Together

DATA = Path(__file__).parent / "data" / "transformers"
FILES = [
    f"{name}_{how}" for name in ("bert", "gpt2", "llama", "vit") for how in ("dynamo", "legacy")
]
CLASSES = sorted(path.stem for path in DATA.glob("hf_*.onnx"))

LARGEST_ERROR = 3e-3
"""Of outputs whose standard deviation is about 1."""


def graph_of(name: str) -> Graph:
    graph = import_model(DATA / f"{name}.onnx", 1, registry()).graph
    assert graph is not None
    return rewritten(graph)


@pytest.mark.parametrize("name", [*FILES, *CLASSES])
def test_an_exported_transformer_agrees_with_onnxruntime(name: str) -> None:
    path = DATA / f"{name}.onnx"
    with np.load(path.with_suffix(".calibration.npz")) as file:
        samples = {k: file[k] for k in file.files}
    made = compile_model(path, calibrate=samples)
    inputs = [samples[i.name][1:2] for i in made.plan.inputs]
    (got,), bill = Together(made.plan, made.weights).infer(inputs)
    assert bill == bill_of(made.plan) and bill.rounds <= 120
    run = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {i.name: x for i, x in zip(made.plan.inputs, inputs, strict=True)}
    expected = run.run(None, feed)[0]
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= LARGEST_ERROR


def test_every_class_is_there_by_both_exporters() -> None:
    stems = {name.rpartition("_")[0] for name in CLASSES}
    assert sorted(f"{s}_{e}" for s in stems for e in ("dynamo", "legacy")) == CLASSES
    assert len(stems) >= 14


@pytest.mark.parametrize("name", FILES)
def test_what_exporters_write_out_is_found(name: str) -> None:
    graph = graph_of(name)
    kinds = Counter(n.op for n in graph.nodes if n.domain == FUSED)
    assert kinds["Attend"] == 1 and kinds["ScaledMatMul"] + kinds["Scale"] >= 1
    wanted = {"bert": "Gelu", "gpt2": "Gelu", "llama": "Swish", "vit": "Gelu"}[name.split("_")[0]]
    written = Counter(n.op for n in graph.nodes)
    assert written[wanted] == 1
    norms = written["LayerNormalization"] + written["Normalize"]
    assert norms == 3
    assert not written["Softmax"] and not written["Erf"] and not written["Tanh"]


@pytest.mark.parametrize("how", ["dynamo", "legacy"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "gemma"])
def test_logits_of_the_next_token_are_computed_for_no_other(name: str, how: str) -> None:
    graph = graph_of(f"hf_{name}_{how}")
    words = [n for n in graph.nodes if graph.shapes[n.outputs[0]][-1:] == (40,)]
    assert {int(np.prod(graph.shapes[n.outputs[0]])) for n in words} == {40}
    attended = next(n for n in graph.nodes if n.op == "Attend")
    assert graph.shapes[attended.outputs[0]][-2] == 1
