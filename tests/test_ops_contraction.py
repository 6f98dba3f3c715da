"""Einsum, Det, DFT and STFT against onnxruntime and numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpcserve.compiler import compile_model
from mpcserve.errors import ModelError
from mpcserve.plan import bill_of
from mpcserve.plan.store import plan_bytes
from tests.onnx_cases import agree, model_of, node, on_grid, ops_of, rng_of
from tests.plan_interpreter import Interpreter

EQUATIONS: list[tuple[str, list[Any], int]] = [
    ("ij,jk->ik", [(3, 4), (4, 2)], 1),
    ("ij,jk", [(3, 4), (4, 2)], 1),
    ("bhid,bhjd->bhij", [(2, 2, 3, 4), (2, 2, 5, 4)], 1),
    ("...ij,...jk->...ik", [(2, 1, 3, 4), (1, 3, 4, 2)], 1),
    ("ij,ij->", [(3, 4), (3, 4)], 1),
    ("i,j->ij", [(3,), (4,)], 1),
    ("ij,ij->ij", [(3, 4), (3, 4)], 1),
    ("ii->i", [(4, 4)], 0),
    ("iij->j", [(3, 3, 2)], 0),
    ("...ab->...ba", [(2, 3, 4)], 0),
    ("ij->", [(3, 4)], 0),
    ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 2)], 2),
    ("ijk,k->j", [(2, 3, 4), (4,)], 1),
    ("bi,oi->bo", [(1, 4), (3, 4)], 1),
    ("i...->...", [(3, 2, 2)], 0),
]


@pytest.mark.parametrize(("equation", "shapes", "products"), EQUATIONS)
def test_an_equation_takes_a_product_per_pair(equation: str, shapes: Any, products: int) -> None:
    rng = rng_of(1)
    names = [f"x{k}" for k in range(len(shapes))]
    model = model_of(
        [node("Einsum", names, equation=equation)], dict(zip(names, shapes, strict=True))
    )
    values = [rng.uniform(-2, 2, s).astype(np.float32) for s in shapes]
    compiled = agree(model, values, ulps=12, rng=rng, input_range=(-2, 2))
    assert sum(o in ("matmul", "mul") for o in ops_of(compiled.plan)) == products


def test_a_weight_of_an_equation_is_turned_when_compiling() -> None:
    rng = rng_of(2)
    w = (rng.integers(-256, 257, (5, 3, 4)) / 256).astype(np.float32)
    model = model_of([node("Einsum", ["x", "w"], equation="bd,hkd->bhk")], {"x": (2, 4)}, {"w": w})
    agree(model, [rng.uniform(-4, 4, (2, 4)).astype(np.float32)], ulps=2, rng=rng)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_determinants(n: int) -> None:
    rng = rng_of(n)
    x = rng.uniform(-1, 1, (3, n, n)).astype(np.float32)
    model = model_of([node("Det", ["x"])], {"x": x.shape})
    compiled = agree(model, [x], ulps=4 * n, rng=rng, input_range=(-1, 1))
    assert bill_of(compiled.plan).rounds <= max(n - 1, n if n > 4 else 0)


def test_a_large_determinant_is_refused() -> None:
    with pytest.raises(ModelError, match="9×9"):
        compile_model(model_of([node("Det", ["x"])], {"x": (9, 9)}))


@pytest.mark.parametrize("length", [None, 6, 12])
@pytest.mark.parametrize("onesided", [0, 1])
@pytest.mark.parametrize("inverse", [0, 1])
def test_fourier_transforms_are_local(inverse: int, onesided: int, length: int | None) -> None:
    rng = rng_of(3)
    parts = 1 if onesided and not inverse else 2
    x = rng.uniform(-1, 1, (2, 9, 3, parts)).astype(np.float32)
    given = {"a": np.int64(1)} | ({} if length is None else {"n": np.int64(length)})
    attrs = {"inverse": inverse, "onesided": onesided}
    names = ["x", "" if length is None else "n", "a"]
    model = model_of([node("DFT", names, **attrs)], {"x": x.shape}, given)
    compiled = compile_model(model, input_range=(-1, 1), ring=64)
    assert bill_of(compiled.plan).rounds == 0
    grid = on_grid(compiled.plan, 0, x).astype(np.float64)
    (got,) = Interpreter(compiled.plan, compiled.weights, rng).run(grid)
    signal = grid[..., 0] + (1j * grid[..., 1] if parts == 2 else 0)
    if inverse and onesided:
        expected = np.fft.irfft(signal, length, axis=1)[..., None]
    else:
        found = (np.fft.ifft if inverse else np.fft.fft)(signal, length, axis=1)
        found = found[:, : found.shape[1] // 2 + 1] if onesided else found
        expected = np.stack([found.real, found.imag], axis=-1)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 3 * 2.0**-16


@pytest.mark.parametrize("shape", [(2, 64, 1), (2, 64)])
def test_frames_are_transformed_with_a_window(shape: Any) -> None:
    rng = rng_of(4)
    x = rng.uniform(-1, 1, shape).astype(np.float32)
    given = {"s": np.int64(8), "w": np.hanning(16).astype(np.float32)}
    model = model_of([node("STFT", ["x", "s", "w"])], {"x": x.shape}, given)
    compiled = agree(model, [x], ulps=4, rng=rng, input_range=(-1, 1))
    assert bill_of(compiled.plan).rounds == 0


def test_the_matrix_of_a_transform_is_written_compactly() -> None:
    given = {"s": np.int64(160), "w": np.hanning(400).astype(np.float32)}
    model = model_of([node("STFT", ["x", "s", "w"])], {"x": (1, 1600, 1)}, given)
    assert len(plan_bytes(compile_model(model, input_range=(-1, 1)).plan)) < 800_000
