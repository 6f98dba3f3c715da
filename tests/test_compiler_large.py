"""Models of hundreds of megabytes: shortcuts that spare copies change no result."""

from __future__ import annotations

import numpy as np
import pytest

from mpcserve.compiler import compile_model, running
from mpcserve.compiler import interval as iv
from mpcserve.compiler.builder import Builder
from mpcserve.compiler.check import import_model
from mpcserve.compiler.graph import Graph, large_constants, to_onnx
from mpcserve.compiler.passes.deduplicate import deduplicate
from mpcserve.compiler.ranges import encoded, in_ulps
from mpcserve.compiler.registry import registry
from mpcserve.errors import ModelError
from tests.onnx_cases import Array, model_of, node, plain, rng_of


@pytest.mark.parametrize("frac_bits", [0, 3, 11, 16, 24, 30])
def test_a_weight_in_float32_becomes_the_same_integers_as_in_float64(frac_bits: int) -> None:
    rng = rng_of(1)
    sizes = 2.0 ** rng.integers(-30, 20, 4000)
    values = np.append(rng.standard_normal(4000) * sizes, [0.5, 1.5, -2.5, 0.0]).astype(np.float32)
    exact = np.rint(np.ldexp(values.astype(np.float64), frac_bits))
    assert np.array_equal(in_ulps(values, frac_bits).astype(np.int64), exact.astype(np.int64))
    reals = encoded(values, frac_bits)
    assert reals.dtype == np.float32
    assert np.array_equal(reals.astype(np.float64), np.ldexp(exact, -frac_bits))


@pytest.mark.parametrize("turned", [False, True])
def test_bounds_of_a_large_matrix_are_found_part_by_part(turned: bool) -> None:
    rng = rng_of(2)
    values = rng.standard_normal((1200, 1000)).astype(np.float32)
    w = values.T if turned else values
    inner = w.shape[0]
    low = rng.standard_normal((2, inner))
    high = low + rng.random((2, inner))
    found = iv.matmul(inner, iv.Interval(low, high), iv.exactly(w))
    up, down = (np.maximum(s * w.astype(np.float64), 0) for s in (1, -1))
    least, most = low @ up - high @ down, high @ up - low @ down
    # Wider by what float64 may have rounded, and no more.
    assert np.all((found.low <= least) & (least - found.low < 1e-8))
    assert np.all((most <= found.high) & (found.high - most < 1e-8))


def test_weights_are_one_only_where_all_their_numbers_are_equal() -> None:
    rng = rng_of(3)
    first = rng.standard_normal((64, 64))
    other = first.copy()
    other[17, 5] += 1  # between the numbers that a glance takes in
    b = Builder(16, 20)
    x = b.input("x", "float32", (1, 64), (-1.0, 1.0, "proved"))
    for k, w in enumerate((first, other, first.copy(), 2 * first)):
        b.output(f"y{k}", "float32", b.matmul(x, b.weight(w)))
    draft = deduplicate(b.draft())
    assert [s.op for s in draft.steps].count("weight") == 3
    same = [o.id for o in draft.outputs]
    assert same[0] == same[2]
    assert len(set(same)) == 3


def wide(rng: np.random.Generator) -> tuple[Graph, Array]:
    """A graph with a constant of more than a megabyte, and an input."""
    weights = {k: rng.standard_normal((600, 600)).astype(np.float32) / 24 for k in ("v", "w")}
    nodes = [node("Gemm", ["x", "v"], ["h"], transB=1), node("MatMul", ["h", "w"])]
    graph = import_model(model_of(nodes, {"x": (1, 600)}, weights), 1, registry()).graph
    assert graph is not None
    return graph, rng.standard_normal((1, 600)).astype(np.float32)


def test_a_graph_runs_with_its_large_constants_kept_apart() -> None:
    graph, x = wide(rng_of(4))
    apart = large_constants(graph)
    assert len(apart) == 2
    model = to_onnx(graph, apart=apart)
    assert model.ByteSize() < 4096
    (got,) = running.runner(model, apart).run(None, {"x": x})
    assert np.array_equal(got, plain(to_onnx(graph), x)[0])


def test_the_slow_reference_is_given_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ModelError("onnxruntime cannot load the model", "")

    monkeypatch.setattr(running, "session", refuse)
    graph, x = wide(rng_of(5))
    apart = large_constants(graph)
    (got,) = running.runner(to_onnx(graph, apart=apart), apart).run(None, {"x": x})
    assert np.abs(got - plain(to_onnx(graph), x)[0]).max() < 1e-5


def test_ranges_are_sampled_of_a_model_with_large_constants() -> None:
    rng = rng_of(6)
    w = rng.standard_normal((600, 600)).astype(np.float32) / 24
    rows = rng.standard_normal((4, 600)).astype(np.float32)
    plan = compile_model(
        model_of([node("MatMul", ["x", "w"])], {"x": (1, 600)}, {"w": w}), calibrate=rows
    ).plan
    y = plan.value(plan.outputs[0].id)
    reach = 2.0 ** (y.bound - y.frac_bits)
    assert np.abs(rows @ w).max() <= reach <= 8 * np.abs(rows @ w).max()
