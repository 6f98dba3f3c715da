"""Functions as exporters write them out: found, and lowered as one."""

from __future__ import annotations

from collections import Counter
from math import pi, sqrt
from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.compiler import compile_model
from mpcserve.compiler.check import import_model
from mpcserve.compiler.graph import FUSED, Graph, to_onnx
from mpcserve.compiler.passes.fuse_activations import fuse_activations
from mpcserve.compiler.passes.fuse_attention import fuse_attention
from mpcserve.compiler.passes.fuse_normalizations import fuse_normalizations
from mpcserve.compiler.passes.fuse_shares import fuse_shares
from mpcserve.compiler.passes.fuse_softmax import fuse_softmax
from mpcserve.compiler.passes.identities import remove_identities
from mpcserve.compiler.passes.lift_masks import lift_masks
from mpcserve.compiler.registry import registry
from mpcserve.plan import bill_of
from mpcserve.protocol import Together
from tests.onnx_cases import Array, model_of, node, on_grid, plain, rng_of

F32 = np.float32


@pytest.mark.parametrize(("exponential", "op"), [(True, "Softmax"), (False, "LogSoftmax")])
def test_shares_of_a_sum_of_exponentials(exponential: bool, op: str) -> None:
    """As naive Bayes is exported; what is compared is that the range of shares is known."""
    nodes = [
        node("ReduceLogSumExp", ["x", "axis"], ["t"], keepdims=0),
        node("Reshape", ["t", "column"], ["c"]),
        node("Sub", ["x", "c"], ["l" if exponential else "y"]),
    ]
    nodes += [node("Exp", ["l"], ["y"])] if exponential else []
    constants = {"axis": np.array([1]), "column": np.array([-1, 1])}
    model = model_of(nodes, {"x": [4, 5]}, constants)
    graph = import_model(model, 1, registry()).graph
    assert graph is not None
    graph = fuse_shares(graph)
    assert [n.op for n in graph.nodes] == [op]
    x = (8 * rng_of(3).normal(size=(4, 5))).astype(F32)
    (got,), (expected,) = (plain(m, x) for m in (to_onnx(graph), model))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    compiled_agrees(model, [np.clip(x, -16, 16)], 1e-3, 16.0)


def fused(model: onnx.ModelProto) -> Graph:
    """The graph behind the passes; written back, it computes what the model does."""
    graph = import_model(model, 1, registry()).graph
    assert graph is not None
    for run in (fuse_activations, fuse_normalizations, fuse_softmax, fuse_attention):
        graph = run(graph)
    return graph


def kinds(graph: Graph) -> Counter[str]:
    return Counter(n.op for n in graph.nodes if n.domain == FUSED)


def compiled_agrees(model: onnx.ModelProto, x: list[Array], error: float, reach: float) -> Any:
    made = compile_model(model, input_range=(-reach, reach))
    grid = [on_grid(made.plan, k, v) for k, v in enumerate(x)]
    outputs, bill = Together(made.plan, made.weights).infer(grid)
    assert bill == bill_of(made.plan)
    for got, expected in zip(outputs, plain(model, *grid), strict=True):
        assert np.abs(got - expected).max() <= error
    return bill


HALF = {"half": F32(0.5), "one": F32(1), "two": F32(2), "root": F32(sqrt(2))}
TANH = {"k": F32(sqrt(2 / pi)), "c": F32(0.044715), "three": F32(3), "half": F32(0.5)}
TANH |= {"one": F32(1)}

WRITTEN: dict[str, tuple[str, list[tuple[str, list[str], str]], dict[str, Any]]] = {
    "torch's erf GELU": (
        "Gelu",
        [("Div", ["x", "root"], "a"), ("Erf", ["a"], "b"), ("Add", ["b", "one"], "c"),
         ("Mul", ["x", "c"], "d"), ("Mul", ["d", "half"], "y")],
        HALF,
    ),
    "half first": (
        "Gelu",
        [("Mul", ["x", "half"], "h"), ("Div", ["x", "root"], "a"), ("Erf", ["a"], "b"),
         ("Add", ["one", "b"], "c"), ("Mul", ["h", "c"], "y")],
        HALF,
    ),
    "tanh GELU with Pow": (
        "Gelu",
        [("Pow", ["x", "three"], "p"), ("Mul", ["p", "c"], "q"), ("Add", ["x", "q"], "r"),
         ("Mul", ["r", "k"], "s"), ("Tanh", ["s"], "t"), ("Add", ["t", "one"], "u"),
         ("Mul", ["x", "half"], "h"), ("Mul", ["h", "u"], "y")],
        TANH,
    ),
    "SiLU": ("Swish", [("Sigmoid", ["x"], "s"), ("Mul", ["x", "s"], "y")], {}),
    "quick GELU": (
        "Swish",
        [("Mul", ["x", "g"], "a"), ("Sigmoid", ["a"], "s"), ("Mul", ["s", "x"], "y")],
        {"g": F32(1.702)},
    ),
    "Mish": (
        "Mish",
        [("Softplus", ["x"], "s"), ("Tanh", ["s"], "t"), ("Mul", ["x", "t"], "y")],
        {},
    ),
    "softplus": (
        "Softplus",
        [("Exp", ["x"], "e"), ("Add", ["e", "one"], "f"), ("Log", ["f"], "y")],
        HALF,
    ),
    "sigmoid": (
        "Sigmoid",
        [("Neg", ["x"], "m"), ("Exp", ["m"], "e"), ("Add", ["e", "one"], "f"),
         ("Reciprocal", ["f"], "y")],
        HALF,
    ),
    "HardSwish": (
        "HardSwish",
        [("Add", ["x", "three"], "a"), ("Clip", ["a", "zero", "six"], "b"),
         ("Mul", ["x", "b"], "c"), ("Div", ["c", "six"], "y")],
        {"three": F32(3), "zero": F32(0), "six": F32(6)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_a_written_out_activation_is_one_function(name: str) -> None:
    op, steps, constants = WRITTEN[name]
    nodes = [node(o, i, [y]) for o, i, y in steps]
    model = model_of(nodes, {"x": (2, 40)}, constants)
    graph = fused(model)
    assert [n.op for n in graph.nodes] == [op]
    x = np.linspace(-8, 8, 80, dtype=F32).reshape(2, 40)
    again = to_onnx(graph)
    assert np.abs(plain(model, x)[0] - plain(again, x)[0]).max() < 1e-5
    bill = compiled_agrees(model, [x], 2e-4, 8.0)
    assert bill.rounds <= (5 if op == "HardSwish" else 3)


def test_trained_gains_and_values_read_elsewhere_stay() -> None:
    nodes = [node("Mul", ["x", "g"], ["a"]), node("Sigmoid", ["a"], ["s"]), node("Mul", ["x", "s"])]
    assert not kinds(fused(model_of(nodes, {"x": (2, 3)}, {"g": F32(1.3)})))
    nodes = [node("Sigmoid", ["x"], ["s"]), node("Mul", ["x", "s"])]
    assert not kinds(fused(model_of(nodes, {"x": (2, 3)}, outputs=("y", "s"))))


def norm(centred: bool, how: str, axes: list[int], gain: Any) -> onnx.ModelProto:
    """A normalisation written out, then · gain, and + gain where it is centred."""
    rank = 4 if axes == [1] else 3
    shape = (2, 8, 3, 4) if axes == [1] else (2, 3, 8)
    top = "d" if centred else "x"
    nodes = [node("ReduceMean", ["x", "axes"], ["m"]), node("Sub", ["x", "m"], ["d"])]
    nodes = nodes if centred else []
    nodes += [node("Pow", [top, "two"], ["p"]), node("ReduceMean", ["p", "axes"], ["v"]),
              node("Add", ["v", "eps"], ["w"])]  # fmt: skip
    if how == "pow":
        nodes += [node("Pow", ["w", "power"], ["r"]), node("Mul", [top, "r"], ["n"])]
    else:
        nodes.append(node("Sqrt", ["w"], ["s"]))
    if how == "div":
        nodes.append(node("Div", [top, "s"], ["n"]))
    if how == "reciprocal":
        nodes += [node("Reciprocal", ["s"], ["r"]), node("Mul", ["r", top], ["n"])]
    nodes.append(node("Mul", ["gain", "n"], ["y" if not centred else "g"]))
    if centred:
        nodes.append(node("Add", ["g", "gain"]))
    constants = {"axes": np.array(axes), "two": F32(2), "eps": F32(1e-5), "power": F32(-0.5)}
    assert rank == len(shape)
    return model_of(nodes, {"x": shape}, constants | {"gain": gain})


@pytest.mark.parametrize("how", ["div", "reciprocal", "pow"])
@pytest.mark.parametrize("centred", [True, False])
def test_a_written_out_normalisation_is_one_function(how: str, centred: bool) -> None:
    rng = rng_of(5)
    gain = rng.uniform(0.5, 2, 8).astype(F32)
    model = norm(centred, how, [-1], gain)
    # onnxruntime itself finds the commonest form
    assert [n.op for n in fused(model).nodes] in (["Normalize"], ["LayerNormalization"])
    x = rng.uniform(-8, 8, (2, 3, 8)).astype(F32)
    assert compiled_agrees(model, [x], 2e-3, 8.0).rounds <= 12


def test_a_normalisation_over_channels_takes_their_gains_in() -> None:
    rng = rng_of(6)
    model = norm(True, "div", [1], rng.uniform(0.5, 2, (8, 1, 1)).astype(F32))
    assert [n.op for n in fused(model).nodes] == ["Normalize"]
    x = rng.uniform(-8, 8, (2, 8, 3, 4)).astype(F32)
    compiled_agrees(model, [x], 2e-3, 8.0)


def test_division_by_a_length_is_one_function() -> None:
    nodes = [node("ReduceL2", ["x", "axes"], ["l"]), node("Clip", ["l", "least"], ["c"]),
             node("Expand", ["c", "shape"], ["e"]), node("Div", ["x", "e"])]  # fmt: skip
    constants = {"axes": np.array([1]), "least": F32(1e-12), "shape": np.array([4, 8])}
    model = model_of(nodes, {"x": (4, 8)}, constants)
    assert kinds(fused(model)) == {"LpNormalization": 1}
    x = rng_of(7).uniform(-8, 8, (4, 8)).astype(F32)
    compiled_agrees(model, [x], 1e-3, 8.0)


def attention(mask: str, scale: str = "Div") -> tuple[list[Any], dict[str, Any]]:
    """Scores of q, k, masked, times v; as exporters write it."""
    seen = np.tril(np.ones((6, 6), bool))
    constants: dict[str, Any] = {
        "scale": F32(sqrt(8) if scale == "Div" else 1 / sqrt(8)),
        "added": np.where(seen, 0, -1e9).astype(F32),
        "seen": seen,
        "hidden": ~seen,
        "low": F32(np.finfo(F32).min),
        "zero": F32(0),
    }
    nodes = [
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "kt"], ["raw"]),
        node(scale, ["raw", "scale"], ["scaled"]),
    ]
    nodes += {
        "none": [node("Identity", ["scaled"], ["s"])],
        "add": [node("Add", ["scaled", "added"], ["s"])],
        "where": [node("Where", ["seen", "scaled", "low"], ["s"])],
        "hidden": [node("Where", ["hidden", "low", "scaled"], ["s"])],
    }[mask]
    nodes += [node("Softmax", ["s"], ["w"], axis=-1), node("IsNaN", ["w"], ["n"]),
              node("Where", ["n", "zero", "w"], ["g"]), node("MatMul", ["g", "v"])]  # fmt: skip
    return nodes, constants


@pytest.mark.parametrize("scale", ["Div", "Mul"])
@pytest.mark.parametrize("mask", ["none", "add", "where", "hidden"])
def test_written_out_attention_is_one_node_whose_mask_is_public(mask: str, scale: str) -> None:
    shape = (1, 2, 6, 8)
    nodes, constants = attention(mask, scale)
    model = model_of(nodes, {"q": shape, "k": shape, "v": shape}, constants)
    assert kinds(fused(model)) == {"ScaledMatMul": 1, "Attend": 1}
    rng = rng_of(8)
    x = [rng.uniform(-2, 2, shape).astype(F32) for _ in range(3)]
    bill = compiled_agrees(model, x, 1e-3, 2.0)
    direct = model_of(
        [node("Attention", ["q", "k", "v"], is_causal=int(mask != "none"))],
        {"q": shape, "k": shape, "v": shape},
    )
    assert bill.online_bytes <= 1.05 * compiled_agrees(direct, x, 1e-3, 2.0).online_bytes


def test_a_secret_mask_with_a_huge_number_hides_scores_without_wide_values() -> None:
    nodes = [node("Sub", ["one", "m"], ["n"]), node("Mul", ["n", "low"], ["p"]),
             node("Add", ["x", "p"], ["s"]), node("Softmax", ["s"], axis=-1)]  # fmt: skip
    constants = {"one": F32(1), "low": F32(np.finfo(F32).min)}
    model = model_of(nodes, {"x": (3, 8), "m": (1, 8)}, constants)
    rng = rng_of(9)
    mask = (np.arange(8) < 5).astype(F32)[None]
    x = [rng.uniform(-1, 1, (3, 8)).astype(F32), mask]
    compiled_agrees(model, x, 1e-3, 1.0)


@pytest.mark.parametrize("padded", [False, True])
def test_what_is_public_of_a_secret_mask_is_structure(padded: bool) -> None:
    """A mask of the data owner's, with what a causal mask or padding hides for everyone."""
    width = 5 if padded else 8
    border = np.zeros((3, 8), F32)
    border[:, 6:] = -np.inf
    first = node("Pad", ["m", "pads", "low"], ["p"]) if padded else node("Add", ["m", "b"], ["p"])
    nodes = [first, node("Add", ["p", "b"], ["q"]) if padded else node("Identity", ["p"], ["q"]),
             node("Add", ["x", "q"], ["s"]), node("Softmax", ["s"], axis=-1)]  # fmt: skip
    constants = {"pads": np.array([0, 0, 0, 8 - width]), "low": F32(-np.inf), "b": border}
    model = model_of(nodes, {"x": (3, 8), "m": (3, width)}, constants)
    graph = import_model(model, 1, registry()).graph
    assert graph is not None
    graph = fuse_attention(lift_masks(remove_identities(graph)))
    assert kinds(graph) == {"MaskedSoftmax": 1}
    rng = rng_of(12)
    x = [rng.uniform(-3, 3, s).astype(F32) for s in ((3, 8), (3, width))]
    for mine, theirs in zip(plain(to_onnx(graph), *x), plain(model, *x), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    compiled_agrees(model, x, 1e-3, 3.0)


def test_a_row_of_nothing_but_huge_numbers_is_uniform() -> None:
    mask = np.zeros((3, 8), F32)
    mask[1] = -1e9
    mask[2, 4:] = -1e9
    model = model_of(
        [node("Add", ["x", "m"], ["s"]), node("Softmax", ["s"], axis=-1)], {"x": (3, 8)},
        {"m": mask},
    )  # fmt: skip
    assert kinds(fused(model)) == {"MaskedSoftmax": 1}
    x = rng_of(10).uniform(-3, 3, (3, 8)).astype(F32)
    compiled_agrees(model, [x], 1e-3, 3.0)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "ReduceLogSumExp"])
def test_written_out_exponentials_of_large_numbers_are_one_function(op: str, centred: bool) -> None:
    centre = [node("ReduceMax", ["x", "axes"], ["m"]), node("Sub", ["x", "m"], ["c"])]
    c = "c" if centred else "x"
    nodes = [node("Exp", [c], ["e"]), node("ReduceSum", ["e", "axes"], ["s"])]
    nodes += {
        "Softmax": [node("Div", ["e", "s"])],
        "LogSoftmax": [node("Log", ["s"], ["l"]), node("Sub", [c, "l"])],
        "ReduceLogSumExp": [node("Log", ["s"])],
    }[op]
    model = model_of(
        [*(centre if centred else []), *nodes], {"x": (2, 6)}, {"axes": np.array([-1])}
    )
    assert op in kinds(fused(model))
    x = rng_of(11).uniform(-60, 60, (2, 6)).astype(F32)
    compiled_agrees(model, [x], 1e-3, 64.0)


@pytest.mark.parametrize("written_out", [True, False])
def test_the_log_of_a_softmax_is_exact_where_shares_are_tiny(written_out: bool) -> None:
    out = [
        node("Exp", ["x"], ["e"]),
        node("ReduceSum", ["e", "axes"], ["t"]),
        node("Div", ["e", "t"], ["s"]),
    ]
    nodes = out if written_out else [node("Softmax", ["x"], ["s"])]
    constants = {"axes": np.array([-1])} if written_out else {}
    model = model_of([*nodes, node("Log", ["s"])], {"x": (2, 6)}, constants)
    assert kinds(fused(model)) == {"LogSoftmax": 1}
    x = rng_of(12).uniform(-20, 20, (2, 6)).astype(F32)
    compiled_agrees(model, [x], 1e-3, 20.0)


def test_the_log_of_a_softmax_over_several_axes_stays() -> None:
    """Before opset 13, and where that could not be converted: all axes from `axis` on."""
    model = model_of(
        [node("Softmax", ["x"], ["s"]), node("Log", ["s"])], {"x": (2, 3, 4)}, opset=12
    )
    x = rng_of(13).uniform(-2, 2, (2, 3, 4)).astype(F32)
    compiled_agrees(model, [x], 5e-3, 2.0)  # over one axis alone it would be off by 1


def test_the_log_of_a_sigmoid_is_exact_where_that_is_tiny() -> None:
    model = model_of([node("Sigmoid", ["x"], ["s"]), node("Log", ["s"])], {"x": (1, 80)})
    assert kinds(fused(model)) == {"LogSigmoid": 1}
    made = compile_model(model, input_range=(-24, 24), ring=64)
    x = on_grid(made.plan, 0, np.linspace(-24, 24, 80, dtype=F32).reshape(1, 80))
    (got,), _ = Together(made.plan, made.weights).infer([x])
    assert np.abs(got + np.logaddexp(0, -x.astype(np.float64))).max() < 2e-4
