"""Attention and rotary positions as ONNX models, through the real protocol, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpcserve.compiler import compile_model
from mpcserve.errors import ModelError
from mpcserve.plan import bill_of
from mpcserve.protocol import Together
from tests.onnx_cases import Array, model_of, node, on_grid, plain, rng_of

SHAPES = {"q": (2, 4, 5, 8), "k": (2, 2, 6, 8), "v": (2, 2, 6, 8)}
"""Two query heads share keys and values."""


def attended(constants: dict[str, Array] | None = None, error: float = 1e-3, **attrs: Any) -> Any:
    """Compile, run all three roles, compare with onnxruntime; the bill."""
    rng = rng_of(1)
    inputs = ["q", "k", "v", *(constants or {})]
    model = model_of([node("Attention", inputs, **attrs)], SHAPES, constants)
    x = [rng.uniform(-2, 2, s).astype(np.float32) for s in SHAPES.values()]
    made = compile_model(model, input_range=(-2.0, 2.0))
    grid = [on_grid(made.plan, k, v) for k, v in enumerate(x)]
    (got, *_), bill = Together(made.plan, made.weights).infer(grid)
    assert bill == bill_of(made.plan)
    expected = plain(model, *grid)[0]
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= error
    return bill


def test_attention_with_grouped_queries_agrees_in_few_rounds() -> None:
    assert attended().rounds <= 20


def test_hidden_keys_are_neither_compared_nor_computed() -> None:
    assert attended(is_causal=1).dealt_bytes < 0.75 * attended().dealt_bytes
    window = attended(is_causal=1, left_window_size=1)
    assert window.online_bytes < attended(is_causal=1).online_bytes


@pytest.mark.parametrize("low", [-1e9, -10000.0, float(np.finfo(np.float32).min), -np.inf])
def test_a_constant_mask_hides_whatever_its_large_number_is(low: float) -> None:
    seen = rng_of(2).random((5, 6)) < 0.6
    seen[:, 0] = True
    mask = np.where(seen, 0.0, low).astype(np.float32)
    as_floats, as_booleans = attended({"mask": mask}), attended({"mask": seen})
    assert as_floats == as_booleans
    assert as_floats.online_bytes < attended().online_bytes


def test_a_constant_bias_is_added() -> None:
    bias = rng_of(3).uniform(-3, 3, (4, 5, 6)).astype(np.float32)
    bias[:, 2:, 3] = -1e9
    attended({"bias": bias}, is_causal=1)


def test_scores_may_be_capped() -> None:
    attended(softcap=2.0)


def test_an_output_that_would_hold_infinities_is_refused() -> None:
    model = model_of(
        [node("Attention", ["q", "k", "v"], ["y", "", "", "s"], qk_matmul_output_mode=2,
              is_causal=1)],
        SHAPES,
        outputs=("y", "s"),
    )  # fmt: skip
    with pytest.raises(ModelError, match="-inf"):
        compile_model(model)


def test_an_infinite_constant_outside_of_a_mask_is_refused() -> None:
    model = model_of([node("Add", ["x", "c"])], {"x": (2, 3)}, {"c": np.float32(-np.inf)})
    with pytest.raises(ModelError, match="infinite"):
        compile_model(model)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("part", [0, 4])
def test_rotary_positions_are_one_product(interleaved: int, part: int) -> None:
    rng = rng_of(4)
    angles = rng.uniform(0, 6, (20, (part or 8) // 2))
    constants = {"c": np.cos(angles), "s": np.sin(angles), "p": np.array([[3, 7, 1], [0, 2, 19]])}
    attrs = {"interleaved": interleaved, "rotary_embedding_dim": part}
    model = model_of(
        [node("RotaryEmbedding", ["x", *constants], **attrs)], {"x": (2, 4, 3, 8)}, constants
    )
    x = rng.uniform(-2, 2, (2, 4, 3, 8)).astype(np.float32)
    made = compile_model(model, input_range=(-2.0, 2.0))
    (got,), bill = Together(made.plan, made.weights).infer([on_grid(made.plan, 0, x)])
    assert bill == bill_of(made.plan) and bill.rounds == 1
    assert np.abs(got - plain(model, x)[0]).max() < 2e-4
