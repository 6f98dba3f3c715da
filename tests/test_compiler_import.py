"""From files to graphs: opsets, constants, external data, batches, and all that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mpcserve.compiler import check_model, compile_model, importing, running
from mpcserve.errors import ConfigError, ModelError
from tests.onnx_cases import NEWEST, Array, agree, model_of, node, ops_of, rng_of

pytestmark = pytest.mark.slow

SHAPE = ("N", 2, 6, 6)


def network(rng: np.random.Generator, opset: int) -> tuple[onnx.ModelProto, Array]:
    """Conv, BatchNormalization, Relu, MaxPool, Dropout, Clip, Squeeze, Gemm in an opset's form."""
    constants: dict[str, Any] = {
        "w": (rng.integers(-64, 65, (4, 2, 3, 3)) / 256).astype(np.float32),
        "g": (rng.integers(-64, 65, (16, 3)) / 256).astype(np.float32),
        "c": np.array([0.5, -0.25, 1.0], np.float32),
        **{k: np.array([0.5, 1.0, 2.0, 0.25], np.float32) for k in ("s", "m", "v")},
        "b": np.zeros(4, np.float32),
    }
    nodes = [
        node("Conv", ["x", "w"], ["h1"]),
        node("BatchNormalization", ["h1", "s", "b", "m", "v"], ["h2"], epsilon=0.0),
        node("Relu", ["h2"], ["h3"]),
        node("MaxPool", ["h3"], ["h4"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Dropout", ["h4"], ["h5"]),
    ]
    if opset < 11:
        nodes.append(node("Clip", ["h5"], ["h6"], min=0.0, max=3.0))
    else:
        nodes.append(node("Clip", ["h5", "low", "high"], ["h6"]))
        constants |= {"low": np.float32(0), "high": np.float32(3)}
    nodes += [
        node("Flatten", ["h6"], ["h7"]),
        node("Gemm", ["h7", "g", "c"], ["y"]),
    ]
    x = rng.uniform(-4, 4, (2, *SHAPE[1:])).astype(np.float32)
    return model_of(nodes, {"x": SHAPE}, constants, opset=opset), x


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 15, 17, 19, 21, NEWEST])
def test_one_network_gives_one_plan_in_every_opset(opset: int) -> None:
    model, x = network(rng_of(1), opset)
    compiled = agree(model, [x], ulps=40, batch=2)
    newest = compile_model(network(rng_of(1), NEWEST)[0], input_range=(-8, 8), batch=2)
    assert ops_of(compiled.plan) == ops_of(newest.plan)
    assert compiled.plan.opset == newest.plan.opset


@pytest.mark.parametrize("opset", [7, 9, 11, 13])
def test_a_model_that_cannot_be_converted_is_lowered_in_its_own_opset(
    opset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no adapter")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    model, x = network(rng_of(1), opset)
    assert agree(model, [x], ulps=40, batch=2).plan.opset == opset


def test_a_model_older_than_any_lowering_is_refused_if_it_cannot_be_converted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of([node("Relu", ["x"])], {"x": (1, 2)}, opset=6)
    assert ops_of(compile_model(model).plan) == ["sign", "select"]

    def refuse(*_: Any) -> None:
        raise RuntimeError("no adapter")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    with pytest.raises(ModelError, match="opset 6 is older than 7, and cannot be converted"):
        compile_model(model)


def test_a_model_newer_than_onnx_is_refused() -> None:
    newest = onnx.defs.onnx_opset_version()
    model = model_of([node("Relu", ["x"])], {"x": (1, 2)}, opset=newest + 1)
    with pytest.raises(ModelError, match=f"opset {newest + 1} is newer than {newest}"):
        compile_model(model)


def test_constant_nodes_are_initializers() -> None:
    model, _ = network(rng_of(1), 13)
    constant = onnx.ModelProto()
    constant.CopyFrom(model)
    del constant.graph.initializer[:]
    for t in reversed(model.graph.initializer):
        constant.graph.node.insert(0, helper.make_node("Constant", [], [t.name], value=t))
    plans = [compile_model(m, input_range=(-8, 8)) for m in (model, constant)]
    assert ops_of(plans[0].plan) == ops_of(plans[1].plan)
    for name, value in plans[0].weights.items():
        assert np.array_equal(value, plans[1].weights[name])


def test_initializers_may_be_listed_as_inputs() -> None:
    model, x = network(rng_of(1), 9)
    for t in model.graph.initializer:
        info = helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        model.graph.input.append(info)
    assert len(agree(model, [x], ulps=40, batch=2).plan.inputs) == 1


def test_local_functions_are_inlined() -> None:
    model = model_of([node("Twice", ["x"])], {"x": (2, 3)})
    model.graph.node[0].domain = "own"
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    opsets = [helper.make_opsetid("", NEWEST)]
    model.functions.append(helper.make_function("own", "Twice", ["a"], ["b"], body, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))
    assert ops_of(compile_model(model).plan) == ["add"]


@pytest.mark.parametrize("first", ["N", None, 0, -1])
def test_the_batch_is_whatever_the_first_axis_leaves_open(first: Any) -> None:
    model = model_of([node("Relu", ["x"])], {"x": (1, 3)})
    dim = model.graph.input[0].type.tensor_type.shape.dim[0]
    dim.Clear()
    if isinstance(first, str):
        dim.dim_param = first
    elif first is not None:
        dim.dim_value = first
    plan = compile_model(model, batch=5).plan
    assert (plan.batch, plan.inputs[0].shape, plan.outputs[0].shape) == (5, (5, 3), (5, 3))


def test_two_inputs_share_the_symbol_of_the_batch() -> None:
    model = model_of([node("Add", ["x", "z"])], {"x": ("N", 3), "z": (1, "N", 3)})
    plan = compile_model(model, batch=4).plan
    assert [i.shape for i in plan.inputs] == [(4, 3), (1, 4, 3)]


def test_external_data_is_read_from_beside_the_model(tmp_path: Path) -> None:
    model, _ = network(rng_of(1), 17)
    path = tmp_path / "net.onnx"
    direct = compile_model(model, input_range=(-8, 8), name="net")
    onnx.save(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
    read = compile_model(path, input_range=(-8, 8))
    assert read.plan.name == "net"
    assert all(np.array_equal(v, read.weights[k]) for k, v in direct.weights.items())


def test_missing_and_short_external_data_are_named(tmp_path: Path) -> None:
    model, _ = network(rng_of(1), 17)
    path = tmp_path / "net.onnx"
    onnx.save(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
    data = tmp_path / "net.data"
    data.write_bytes(data.read_bytes()[:64])
    with pytest.raises(ModelError, match=r"ends at byte \d+ of '.*net.data', which has 64 bytes"):
        compile_model(path)
    data.unlink()
    with pytest.raises(ModelError, match=r"net.data', which does not exist") as caught:
        compile_model(path)
    assert len(caught.value.problems) == len(model.graph.initializer)
    with pytest.raises(ModelError, match=r"is kept in the external file 'net.data'"):
        compile_model(path.read_bytes())
    assert any("does not exist" in r.reason for r in check_model(path))


@pytest.mark.parametrize("outside", ["absolute", "above"])
def test_external_data_outside_of_the_models_folder_is_refused(
    outside: str, tmp_path: Path
) -> None:
    model, _ = network(rng_of(1), 17)
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(
        model,
        folder / "net.onnx",
        save_as_external_data=True,
        location="net.data",
        size_threshold=0,
    )
    (folder / "net.data").rename(tmp_path / "net.data")
    read = onnx.load(folder / "net.onnx", load_external_data=False)
    for tensor in read.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(tmp_path / "net.data") if outside == "absolute" else "../net.data"
    (folder / "net.onnx").write_bytes(read.SerializeToString())
    with pytest.raises(ModelError) as refused:
        compile_model(folder / "net.onnx")
    assert refused.value.hint == "keep the data file beside the model"


@pytest.mark.parametrize("content", [b"", b"hello world " * 50, b"\x08", bytes(range(256)) * 8])
def test_what_is_not_onnx_is_refused_with_its_path(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"other.onnx: not an ONNX model") as caught:
        compile_model(path)
    assert caught.value.hint and caught.value.exit_code == 3


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ModelError, match=r"nowhere.onnx: cannot read the model: No such file"):
        compile_model("nowhere.onnx")


def broken() -> onnx.ModelProto:
    """A NaN, shapes that depend on data, random numbers."""
    weights = np.ones((2, 3, 3, 3), np.float32)
    weights[0, 0, 0, 0] = np.nan
    model = model_of(
        [
            node("Conv", ["x", "w"], ["a"]),
            node("NonZero", ["a"], ["b"]),
            node("RandomNormalLike", ["a"], ["c"]),
            node("RandomUniformLike", ["a"], ["y"]),
        ],
        {"x": ("N", 3, 6, 6)},
        {"w": weights},
        outputs=["b", "y"],
    )
    return model


def test_all_problems_are_raised_at_once() -> None:
    with pytest.raises(ModelError) as caught:
        compile_model(broken())
    problems = caught.value.problems
    expected = ["'Conv:a'", "'RandomNormalLike:c'", "'RandomUniformLike:y'", "'NonZero:b'"]
    assert [next(p for p in problems if e in p) for e in expected] == list(problems)
    assert "constant 'w' holds 1 numbers that are NaN or infinite" in problems[0]
    assert caught.value.hint


def test_check_reports_every_node_and_what_to_do() -> None:
    reports = check_model(broken())
    by_node = {r.node: r for r in reports}
    assert [r.op for r in reports] == ["Conv", "NonZero", "RandomNormalLike", "RandomUniformLike"]
    assert {r.status for r in reports} == {"unsupported"}
    assert by_node["RandomUniformLike:y"].reason == "draws random numbers"


def test_check_tells_supported_nodes_from_constant_ones() -> None:
    model = model_of(
        [
            node("Shape", ["x"], ["s"]),
            node("Reshape", ["x", "s"], ["r"]),
            node("Relu", ["r"]),
        ],
        {"x": ("N", 3)},
    )
    assert [r.status for r in check_model(model)] == ["constant", "supported", "supported"]


def test_check_goes_on_where_shapes_are_open() -> None:
    model = model_of(
        [node("NonZero", ["x"], ["h"]), node("Relu", ["h"])], {"x": ("N", 3, "height", 6)}
    )
    reports = check_model(model)
    assert reports[0].node == "input 'x'"
    assert reports[0].reason == "axis 2 ('height') has no fixed length"
    assert [(r.op, r.status) for r in reports[1:]] == [
        ("NonZero", "unsupported"),
        ("Relu", "supported"),
    ]


def test_lengths_that_a_model_leaves_open_are_those_of_its_samples() -> None:
    model = model_of([node("Add", ["x", "z"])], {"x": ("N", "long"), "z": ("N", "long")})
    five, six = np.ones((4, 5), np.float32), np.ones((4, 6), np.float32)
    made = compile_model(model, calibrate={"x": five, "z": five})
    assert [made.plan.value(i.id).shape for i in made.plan.inputs] == [(1, 5), (1, 5)]
    with pytest.raises(ModelError, match=r"axis 1 \('long'\) has no fixed length"):
        compile_model(model, calibrate={"x": five, "z": six})
    with pytest.raises(ModelError, match="has no fixed length"):
        compile_model(model, calibrate="random:16")
    alone = model_of([node("Relu", ["x"])], {"x": ("N", 2, "long")})
    assert compile_model(alone, calibrate=np.ones((3, 2, 7), np.float32)).plan.inputs
    assert check_model(alone, calibrate=np.ones((3, 2, 7), np.float32))[0].status == "supported"


def test_operators_of_unknown_domains_are_reported() -> None:
    model = model_of([node("Foo", ["x"], ["h"], domain="mine"), node("Relu", ["h"])], {"x": (1, 2)})
    model.opset_import.append(helper.make_opsetid("mine", 1))
    with pytest.raises(ModelError, match=r"node 'Foo:h' \(Foo\): operator of domain 'mine'"):
        compile_model(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (model_of([node("MatMul", ["x", "x"])], {"x": (2, 3)}), "shapes do not fit"),
        (model_of([node("Relu", ["z"])], {"x": (1, 2)}), "input 'z'"),
        (model_of([node("Relu", ["x"])], {"x": (1, 2)}, kind=8), "reads text"),
        (
            model_of([node("Relu", ["x"], ["h"]), node("Neg", ["c"])], {"x": (1,)}, {"c": 1.0}),
            "output 'y' depends on no input",
        ),
    ],
)
def test_models_that_cannot_work_say_why(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        compile_model(model)


def test_a_batch_other_than_the_fixed_one_is_refused() -> None:
    with pytest.raises(ModelError, match="has a fixed batch of 3, expected 4"):
        compile_model(model_of([node("Relu", ["x"])], {"x": (3, 2)}), batch=4)


@pytest.mark.parametrize("options", [{"batch": 0}, {"frac_bits": 0}, {"frac_bits": 40}])
def test_options_out_of_range_are_refused(options: Any) -> None:
    with pytest.raises(ConfigError):
        compile_model(model_of([node("Relu", ["x"])], {"x": ("N", 2)}), **options)


def test_the_digest_is_of_the_structure_not_of_the_weights() -> None:
    def digest(scale: float, kernel: int = 3) -> str:
        model = model_of(
            [node("MatMul", ["x", "w"])], {"x": (1, 2)}, {"w": scale * np.ones((2, kernel))}
        )
        return compile_model(model).plan.model_digest

    assert digest(1.0) == digest(1.25) != digest(1.0, kernel=4)


@pytest.mark.parametrize("calibrated", [True, False])
def test_models_beyond_a_protobuf_travel_by_file(
    calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network(rng_of(1), 17)
    options: Any = {"batch": 2} | ({"calibrate": x} if calibrated else {})
    expected = compile_model(model, **options)
    monkeypatch.setattr(running, "LARGE_BYTES", 1)
    monkeypatch.setattr(importing, "HELD_BYTES", 12)
    got = compile_model(model, **options)
    assert got.plan.digest == expected.plan.digest
    for name, values in expected.weights.items():
        # onnxruntime folds BatchNormalization in float32, we in float64.
        assert np.allclose(values, got.weights[name], rtol=1e-6, atol=1)


def test_half_precision_models_compile() -> None:
    weights = numpy_helper.from_array(np.array([[0.5, 2.0]], np.float16), "w")
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, [3, 1])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, [3, 2])
    graph = helper.make_graph([node("MatMul", ["x", "w"])], "half", [x], [y], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    agree(model, [np.array([[0.5], [1.25], [-3]], np.float16)], ulps=1)


def test_lists_of_tensors_are_refused_by_name_whatever_the_samples() -> None:
    nodes = [
        node("SplitToSequence", ["x"], ["s"], axis=1),
        node("ConcatFromSequence", ["s"], axis=1),
    ]
    model = model_of(nodes, {"x": [1, 6]})
    with pytest.raises(ModelError) as refused:
        compile_model(model, calibrate=np.ones((2, 6), np.float32))
    assert len(refused.value.problems) == 2
    assert all("sequences and optionals" in p for p in refused.value.problems)


def test_a_secret_quotient_of_whole_numbers_is_refused() -> None:
    """A product with 1 / 3 would be rounded, where the quotient is cut off."""
    nodes = [node("Div", ["x", "three"])]
    kind = onnx.TensorProto.INT64
    model = model_of(nodes, {"x": [1, 4]}, {"three": np.array(3)}, kind=kind)
    with pytest.raises(ModelError, match="drops the remainder"):
        compile_model(model, input_range=(-100, 100))
