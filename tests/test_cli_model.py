"""`compile`, `inspect`, `verify`, `check` on real models: what is printed, written and refused."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mpcserve.bundled import bundled
from mpcserve.cli import run
from mpcserve.plan import bill_of, load_plan
from mpcserve.plan.plan import FORMAT
from tests import table_cases

MLP = str(bundled("models", "breast_cancer_mlp.onnx"))
SAMPLES = str(bundled("models", "breast_cancer_samples.npy"))
LABELS = str(bundled("models", "breast_cancer_labels.npy"))
CALIBRATION = str(bundled("models", "breast_cancer_calibration.npy"))

Capture = pytest.CaptureFixture[str]


def out_json(capsys: Capture) -> Any:
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def plan(tmp_path: Path, capsys: Capture) -> Path:
    path = tmp_path / "mlp.plan"
    assert run(["compile", MLP, "-o", str(path), "--calibrate", CALIBRATION, "--batch", "4"]) == 0
    capsys.readouterr()
    return path


def one_node(op: str, path: Path, shape: tuple[object, ...] = ("N", 3), **attrs: Any) -> str:
    """A model of one node of one input."""
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    node = helper.make_node(op, ["x"], ["y"], name="the_node", **attrs)
    graph = helper.make_graph([node], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return str(path)


# --- compile and inspect ------------------------------------------------------------------------


def test_compile_writes_a_public_plan_and_private_weights(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "mlp.plan"
    assert run(["compile", MLP, "-o", str(path), "--calibrate", CALIBRATION]) == 0
    out = capsys.readouterr().out
    assert stat.S_IMODE((tmp_path / "mlp.weights").stat().st_mode) == 0o600
    loaded = load_plan(path)
    assert loaded.digest[:16] in out
    for word in ("layer", "shape", "width", "known", "rounds", "each way", "dealt", "total"):
        assert word in out
    assert "calibrated" in out


def test_compile_names_the_plan_after_the_model(tmp_path: Path) -> None:
    model = tmp_path / "net.onnx"
    model.write_bytes(Path(MLP).read_bytes())
    assert run(["compile", str(model), "--input-range", "-8", "8"]) == 0
    assert (tmp_path / "net.plan").is_file()
    assert (tmp_path / "net.weights").is_file()


@pytest.fixture
def passengers(tmp_path: Path) -> str:
    """A model that reads text."""
    onnx.save(table_cases.passengers(), tmp_path / "p.onnx")
    return str(tmp_path / "p.onnx")


@pytest.mark.parametrize("command", ["compile", "check"])
def test_text_is_an_error_that_says_what_would_be_told(
    command: str, passengers: str, capsys: Capture
) -> None:
    assert run([command, passengers]) == 3
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "'enc_sex' (OneHotEncoder)" in said or "enc_sex (OneHotEncoder)" in said
    assert "if its 2 categories become public" in said
    assert "mpcserve: hint: disclose them: --disclose text-categories" in captured.err


def test_what_is_on_the_client_is_shown(passengers: str, capsys: Capture) -> None:
    line = "on the client: OneHotEncoder 'enc_sex' (2 categories are public)"
    disclosed = ["--disclose", "text-categories"]
    assert run(["check", passengers, *disclosed]) == 0
    assert re.search(r"OneHotEncoder +on the client +2\n", capsys.readouterr().out)
    assert run(["compile", passengers, *disclosed]) == 0
    assert line in capsys.readouterr().out.splitlines()
    plan = passengers.replace(".onnx", ".plan")
    assert run(["inspect", plan]) == 0
    out = capsys.readouterr().out.splitlines()
    assert line in out
    step = "client sexes = one_hot(sex) categories=female,male zeros=1  ; OneHotEncoder 'enc_sex'"
    assert step in out
    assert run(["inspect", plan, "--json"]) == 0
    report = out_json(capsys)
    assert line in report["on_the_client"]
    assert [i["name"] for i in report["raw_inputs"]] == ["age", "fare", "sex", "port", "pclass"]


def test_compile_prints_the_totals_of_the_bill(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "mlp.plan"
    assert run(["compile", MLP, "-o", str(path), "--json", "--batch", "3"]) == 0
    report = out_json(capsys)
    bill = bill_of(load_plan(path))
    assert report["batch"] == 3
    assert report["rounds"] == bill.rounds
    assert report["bytes"] == bill.bytes
    assert report["dealt_bytes"] == bill.dealt_bytes
    assert sum(r["bytes_each_way"] for r in report["layers"]) == bill.bytes["alice->bob"]
    assert sum(r["dealt_bytes"] for r in report["layers"]) == bill.dealt_bytes
    assert report["files"]["plan"] == str(path)


def test_inspect_shows_the_text_and_the_bill(plan: Path, capsys: Capture) -> None:
    assert run(["inspect", str(plan)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"digest {load_plan(plan).digest}\n")
    assert "= matmul(" in out
    assert "carol->bob" in out
    assert run(["inspect", str(plan), "--layers"]) == 0
    assert "= matmul(" not in capsys.readouterr().out


def test_inspect_json_is_the_whole_plan_for_a_machine(plan: Path, capsys: Capture) -> None:
    assert run(["inspect", str(plan), "--json"]) == 0
    report, loaded = out_json(capsys), load_plan(plan)
    assert report["plan_digest"] == loaded.digest
    assert report["inputs"][0]["shape"] == [4, 30]
    assert report["dealt_bytes"] == bill_of(loaded).dealt_bytes


# --- verify -------------------------------------------------------------------------------------


def test_verify_finds_the_protocol_near_the_float_model(capsys: Capture) -> None:
    arguments = ["--data", SAMPLES, "--labels", LABELS, "--calibrate", CALIBRATION, "--json"]
    assert run(["verify", MLP, *arguments, "--batch", "4"]) == 0
    report = out_json(capsys)
    assert report["rows"] == 10
    (output,) = report["outputs"]
    for name in ("reference", "protocol"):
        assert output[name]["top1"] == 1.0
        assert output[name]["max_error"] <= 2**-8
        assert output[name]["mean_error"] <= output[name]["max_error"]
    assert output["accuracy"]["protocol"] == output["accuracy"]["float"]
    assert all(r["holds"] and r["headroom_bits"] >= 0 for r in report["layers"])


def test_verify_reads_token_ids(capsys: Capture) -> None:
    folder = Path(__file__).parent / "data" / "transformers"
    samples = str(folder / "hf_bert_tiny_dynamo.calibration.npz")
    arguments = ["--data", samples, "--calibrate", samples, "--batch", "1", "--json"]
    assert run(["verify", str(folder / "hf_bert_tiny_dynamo.onnx"), *arguments]) == 0
    (output,) = out_json(capsys)["outputs"]
    assert output["protocol"]["max_error"] <= 2e-3


def test_verify_prints_tables_for_people(capsys: Capture) -> None:
    assert run(["verify", MLP, "--data", SAMPLES, "--calibrate", CALIBRATION]) == 0
    out = capsys.readouterr().out
    for text in ("protocol vs float", "100.00 %", "headroom", "bits", "each way", "dealt"):
        assert text in out


def test_verify_names_the_layer_that_exceeds_its_bound(tmp_path: Path, capsys: Capture) -> None:
    tame = tmp_path / "tame.npy"
    rows = np.load(CALIBRATION)
    np.save(tame, rows[:1] * np.float32(0.0) + rows.mean(axis=0, dtype=np.float32))
    wild = tmp_path / "wild.npy"
    np.save(wild, np.load(SAMPLES) * np.float32(1.5))
    declared = ["--input-range", "-16384", "16384"]
    words = ["verify", MLP, "--data", str(wild), "--calibrate", str(tame), *declared]
    assert run(words) == 3
    captured = capsys.readouterr()
    assert "EXCEEDED" in captured.out
    assert "exceed their bound" in captured.err
    assert "|x| reached" in captured.err


def test_verify_refuses_data_outside_the_declared_range(capsys: Capture) -> None:
    assert run(["verify", MLP, "--data", SAMPLES, "--input-range", "-1", "1"]) == 2
    assert "outside the range [-1, 1]" in capsys.readouterr().err


# --- what is wrong with a model or a file -------------------------------------------------------


def garbage(path: Path) -> str:
    (path / "m.onnx").write_bytes(b"this is no model")
    return str(path / "m.onnx")


def nan_weights(path: Path) -> str:
    model = onnx.load(MLP)
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path / "m.onnx")
    return str(path / "m.onnx")


def missing_data(path: Path) -> str:
    model = onnx.load(MLP)
    onnx.save(
        model,
        path / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    (path / "m.data").unlink()
    return str(path / "m.onnx")


BAD_MODELS: dict[str, tuple[Callable[[Path], str], list[str]]] = {
    "absent": (lambda p: str(p / "none.onnx"), ["none.onnx"]),
    "garbage": (garbage, ["m.onnx"]),
    "unsupported": (lambda p: one_node("NonZero", p / "m.onnx"), ["the_node", "NonZero"]),
    "dynamic": (lambda p: one_node("Relu", p / "m.onnx", ("N", "T")), ["'x'", "axis 1"]),
    "nan": (nan_weights, ["NaN"]),
    "external data": (missing_data, ["m.data"]),
}


@pytest.mark.parametrize("command", ["check", "compile"])
@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_bad_model_is_named_with_a_hint_and_exit_3(
    kind: str, command: str, tmp_path: Path, capsys: Capture
) -> None:
    make, expected = BAD_MODELS[kind]
    assert run([command, make(tmp_path)]) == 3
    captured = capsys.readouterr()
    everything = captured.out + captured.err
    assert all(text in everything for text in expected), everything
    assert "mpcserve: error: " in captured.err
    assert "mpcserve: hint: " in captured.err
    assert "Traceback" not in everything
    assert not list(tmp_path.glob("*.plan"))


def test_check_lists_all_unsupported_nodes_at_once(tmp_path: Path, capsys: Capture) -> None:
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ("N", 3))
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    nodes = [
        helper.make_node("Bernoulli", ["x"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="fine"),
        helper.make_node("RandomNormalLike", ["b"], ["y"], name="second"),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "m.onnx")
    assert run(["check", str(tmp_path / "m.onnx")]) == 3
    captured = capsys.readouterr()
    assert "first" in captured.out
    assert "second" in captured.out


def test_check_prints_no_table_where_no_node_is_fine(tmp_path: Path, capsys: Capture) -> None:
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ("N", 3))
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(
        [helper.make_node("Bernoulli", ["x"], ["y"], name="b")], "g", [x], [y]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    assert run(["check", str(tmp_path / "m.onnx")]) == 3
    out = capsys.readouterr().out
    assert "b (Bernoulli)" in out
    assert "status" not in out


def test_verify_hints_at_options_that_it_has(tmp_path: Path, capsys: Capture) -> None:
    far = np.load(SAMPLES) * 1000
    np.save(tmp_path / "far.npy", far)
    words = ["verify", MLP, "--data", str(tmp_path / "far.npy"), "--input-range", "0", "1"]
    assert run(words) == 2
    hint = capsys.readouterr().err.partition("hint: ")[2]
    assert hint.startswith("compile with a wider --input-range")
    assert "`mpcserve infer --on-range clamp`" in hint


def test_check_passes_a_model_that_compiles(capsys: Capture) -> None:
    assert run(["check", MLP]) == 0
    out = capsys.readouterr().out
    assert "Gemm" in out
    assert "supported" in out


BAD_ARRAYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda p: None, "No such file"),
    "garbage": (lambda p: p.write_bytes(b"junk"), "not a readable"),
    "text": (lambda p: np.save(p, np.array(["a"])), "expected numbers"),
    "objects": (lambda p: np.save(p, np.array([object()]), allow_pickle=True), "not a readable"),
    "shape": (lambda p: np.save(p, np.zeros((2, 7), np.float32)), "7"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_bad_data_is_named_with_a_hint_and_exit_2(
    kind: str, tmp_path: Path, capsys: Capture
) -> None:
    make, expected = BAD_ARRAYS[kind]
    path = tmp_path / "x.npy"
    make(path)
    assert run(["verify", MLP, "--data", str(path)]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert "Traceback" not in err


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"format": 99}'])
def test_a_file_that_is_no_plan_is_refused(content: bytes, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "m.plan"
    path.write_bytes(content)
    assert run(["inspect", str(path)]) == 3
    err = capsys.readouterr().err
    assert f"mpcserve: error: {path}: not a plan of format {FORMAT}" in err
