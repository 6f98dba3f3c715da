"""Operators of onnxruntime's own domain compute what onnxruntime does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from mpcserve.compiler import compile_model
from mpcserve.errors import ModelError
from mpcserve.onnx_backend import prepare
from tests.onnx_cases import Array, model_of, node, plain, rng_of

F32 = np.float32


def drawn(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).uniform(-1, 1, shape)


CASES: dict[str, tuple[list[str], dict[str, Any], dict[str, Array]]] = {
    "FusedMatMul": (["x", "w"], {"transB": 1, "alpha": 0.5}, {"w": drawn(5, 8)}),
    "Gelu": (["x"], {}, {}),
    "FastGelu": (["x", "b"], {}, {"b": drawn(8)}),
    "BiasGelu": (["x", "b"], {}, {"b": drawn(8)}),
    "QuickGelu": (["x"], {"alpha": 1.702}, {}),
    "SkipLayerNormalization": (
        ["x", "s", "g", "b", "c"],
        {"epsilon": 1e-5},
        {"s": drawn(1, 4, 8), "g": drawn(8), "b": drawn(8), "c": drawn(8)},
    ),
    "SkipSimplifiedLayerNormalization": (
        ["x", "s", "g"],
        {"epsilon": 1e-5},
        {"s": drawn(1, 4, 8), "g": drawn(8)},
    ),
    "Attention": (
        ["x", "w", "b"],
        {"num_heads": 2, "unidirectional": 1},
        {"w": drawn(8, 24), "b": drawn(24)},
    ),
    "MultiHeadAttention": (
        ["x", "k", "v", "b"],
        {"num_heads": 2},
        {"k": drawn(1, 4, 8), "v": drawn(1, 4, 8), "b": drawn(24)},
    ),
}


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("opset", [17, 24])
def test_an_operator_of_onnxruntime_is_rewritten(op: str, opset: int) -> None:
    inputs, attrs, constants = CASES[op]
    nodes = [node(op, inputs, domain="com.microsoft", **attrs)]
    model = model_of(nodes, {"x": (1, 4, 8)}, constants, opset=opset)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    x = rng_of(1).uniform(-2, 2, (1, 4, 8)).astype(F32)
    (got,), (expected,) = prepare(model).run([x]), plain(model, x)
    assert np.abs(got - expected).max() <= 2e-3


def test_a_fused_convolution_is_rewritten() -> None:
    attrs: dict[str, Any] = {"activation": "LeakyRelu", "activation_params": [0.25]}
    nodes = [node("FusedConv", ["x", "w", "b"], domain="com.microsoft", **attrs)]
    model = model_of(nodes, {"x": (1, 2, 5, 5)}, {"w": drawn(3, 2, 3, 3), "b": drawn(3)}, opset=17)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    x = rng_of(2).uniform(-2, 2, (1, 2, 5, 5)).astype(F32)
    (got,), (expected,) = prepare(model).run([x]), plain(model, x)
    assert np.abs(got - expected).max() <= 1e-3


def test_parts_that_hold_state_are_refused() -> None:
    nodes = [node("MultiHeadAttention", ["x", "k", "v", "", "m"], num_heads=2,
                  domain="com.microsoft")]  # fmt: skip
    constants = {"k": drawn(1, 4, 8), "v": drawn(1, 4, 8), "m": np.ones((1, 4), np.int32)}
    model = model_of(nodes, {"x": (1, 4, 8)}, constants, opset=17)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ModelError, match=r"operator of domain .com\.microsoft. is not supported"):
        compile_model(model)
