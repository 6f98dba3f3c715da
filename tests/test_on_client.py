"""What runs on the data owner's client: only what needs no secret, or what was disclosed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import mpcserve
from mpcserve.compiler import CompiledModel, check_model, compile_model
from mpcserve.errors import ConfigError, InputError, ModelError, PlanError
from mpcserve.plan import load_plan, plan_text
from mpcserve.plan.client import ClientProgram, RawInput, Step
from mpcserve.plan.plan import plan_from_json
from mpcserve.plan.store import plan_bytes, plan_from_bytes
from mpcserve.protocol import Together
from mpcserve.serving.inputs import batches, check_inputs, join_outputs
from tests.onnx_cases import plain
from tests.table_cases import (
    AGE,
    COMPLETE,
    EVERYTHING,
    FARE,
    OFFSETS,
    SCALES,
    as_csv,
    ml,
    model_of,
    passengers,
    some_passengers,
)

FLOAT, INT64, TEXT = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING
ROWS = 24


def compiled(disclose: tuple[str, ...], batch: int = 8) -> CompiledModel:
    samples = some_passengers(64, missing="imputed-values" in disclose)
    return compile_model(passengers(), batch=batch, calibrate=samples, disclose=disclose)


def protocol(model: CompiledModel, rows: dict[str, Any]) -> dict[str, Any]:
    """All rows by the three roles in this process."""
    together = Together(model.plan, model.weights)
    cut = batches(model.plan, check_inputs(model.plan, rows, "error"))
    return join_outputs(model.plan, [(used, together.infer(part)[0]) for used, part in cut])


def steps_of(plan: mpcserve.Plan) -> list[tuple[str, str]]:
    return [(s.op, s.output) for s in plan.client.steps]


def encoder(op: str, kind: int, columns: int = 1, **attrs: Any) -> onnx.ModelProto:
    """One node on a text or number, and then a weight."""
    width = columns * len(attrs.get("cats_strings", attrs.get("cats_int64s", [0])))
    weights = np.linspace(-1, 1, width, dtype=np.float32)[:, None]
    nodes = [ml(op, ["x"], "e", "enc", **attrs)]
    whole = "values_int64s" in attrs or "classes_strings" in attrs
    nodes += [helper.make_node("Cast", ["e"], ["c"], "cast", to=FLOAT)] if whole else []
    nodes += [
        helper.make_node("Reshape", ["c" if whole else "e", "s"], ["f"], "flat"),
        helper.make_node("MatMul", ["f", "w"], ["y"], "dense"),
    ]
    return model_of(nodes, {"x": (kind, columns)}, {"y": FLOAT}, s=np.array([-1, width]), w=weights)


@pytest.mark.parametrize("disclose", [COMPLETE, EVERYTHING], ids=len)
def test_a_table_with_text_is_answered_as_in_the_clear(disclose: tuple[str, ...]) -> None:
    rows = some_passengers(ROWS, missing=disclose == EVERYTHING)
    got = protocol(compiled(disclose), rows)
    label, chances = plain(passengers(), *rows.values())
    np.testing.assert_array_equal(got["label"], label)
    expected = [[row["died"], row["survived"]] for row in chances]
    np.testing.assert_allclose(got["chances"], expected, atol=1e-3)


def test_text_is_refused_unless_its_categories_may_be_public() -> None:
    with pytest.raises(ModelError) as caught:
        compile_model(passengers(), disclose=("number-categories", "imputed-values"))
    assert len(caught.value.problems) == 2
    assert "node 'enc_sex' (OneHotEncoder)" in caught.value.problems[0]
    assert "if its 2 categories become public" in caught.value.problems[0]
    assert "--disclose text-categories" in caught.value.hint


def test_nothing_undisclosed_stands_in_the_plan() -> None:
    data = plan_bytes(compiled(COMPLETE).plan).decode()
    assert "female" in data
    assert not any(str(x) in data for x in (AGE, FARE, *OFFSETS, *SCALES))
    assert [step[2] for step in json.loads(data)["client"][1]] == ["sexes", "ports"]


def test_a_model_without_text_tells_none_of_its_categories_unasked() -> None:
    secrets = [[65, 66, 71], [93, 98, 95]]
    plans = [
        compile_model(encoder("OneHotEncoder", INT64, cats_int64s=s), input_range=(0, 127)).plan
        for s in secrets
    ]
    assert plans[0].digest == plans[1].digest
    assert not plans[0].client.steps


def test_what_is_disclosed_is_said() -> None:
    plan = compiled(EVERYTHING).plan
    said = list(plan.on_client())
    assert "on the client: OneHotEncoder 'enc_port' (3 categories are public)" in said
    assert "on the client: Imputer 'fill' (2 imputed values are public)" in said
    assert "on the client: a map by name of 2 classes in 'chances' (public)" in said
    assert "client ports = one_hot(port) categories=C,Q,S zeros=1" in plan_text(plan)
    assert "columns died,survived" in plan_text(plan)


def test_an_imputer_that_could_help_is_mentioned() -> None:
    (note,) = [n for n in compiled(COMPLETE).plan.notes if "missing" in n]
    assert "--disclose imputed-values" in note
    assert "2 imputed values become public" in note
    assert not [n for n in compiled(EVERYTHING).plan.notes if "missing" in n]


def test_encoders_that_could_move_are_mentioned() -> None:
    (note,) = [n for n in compiled(COMPLETE).plan.notes if "enc_class" in n]
    assert "compares with 3 categories, which are secret" in note
    assert "--disclose number-categories" in note


def test_what_only_moves_elements_goes_along_with_what_moves() -> None:
    assert steps_of(compiled(COMPLETE).plan) == [("one_hot", "sexes"), ("one_hot", "ports")]
    assert steps_of(compiled(EVERYTHING).plan)[0] == ("arrange", "numbers")


def test_a_plan_with_a_program_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = compiled(EVERYTHING)
    model.save(tmp_path / "m.plan")
    again = load_plan(tmp_path / "m.plan")
    assert again.client == plan_from_json(model.plan.to_json()).client
    assert again.digest == model.plan.digest
    assert plan_text(again) == plan_text(model.plan)
    rows = some_passengers(ROWS)
    for mine, theirs in zip(
        check_inputs(model.plan, rows, "error"), check_inputs(again, rows, "error"), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_the_digest_covers_the_program() -> None:
    categories = (["a", "b"], ["a", "c"])
    plans = [
        compile_model(encoder("OneHotEncoder", TEXT, cats_strings=c), disclose=COMPLETE).plan
        for c in categories
    ]
    assert plans[0].digest != plans[1].digest


def test_raw_inputs_are_what_the_data_owner_gives() -> None:
    plan = compiled(EVERYTHING).plan
    assert [i.name for i in plan.raw_inputs] == ["age", "fare", "sex", "port", "pclass"]
    assert [i.dtype for i in plan.raw_inputs] == ["float32", "float32", "str", "str", "int64"]
    assert [i.name for i in plan.inputs] == ["filled", "sexes", "ports", "classes"]


@pytest.mark.parametrize(
    ("op", "kind", "values", "attrs"),
    [
        ("OneHotEncoder", TEXT, ["b", "a", "?", "c"], {"cats_strings": ["c", "a", "b"]}),
        ("OneHotEncoder", INT64, [5, 7, 1, 9], {"cats_int64s": [7, 5, 1]}),
        ("OneHotEncoder", FLOAT, [5.5, 7.0, 1.9, 9.0], {"cats_int64s": [7, 5, 1]}),
        (
            "LabelEncoder",
            TEXT,
            ["b", "a", "?", "c"],
            {"keys_strings": ["a", "b", "c"], "values_int64s": [0, 1, 2]},
        ),
        (
            "LabelEncoder",
            TEXT,
            ["b", "a", "?", "c"],
            {
                "keys_strings": ["a", "b", "c"],
                "values_floats": [0.75, -2.5, 3.25],
                "default_float": 0.5,
            },
        ),
        (
            "LabelEncoder",
            INT64,
            [4, 2, 9, 3],
            {"keys_int64s": [4, 2, 3], "values_floats": [1.5, -0.5, 2.25]},
        ),
    ],
)
def test_encoders_are_as_onnxruntime_has_them(
    op: str, kind: int, values: list[Any], attrs: dict[str, Any]
) -> None:
    model = encoder(op, kind, **attrs)
    made = compile_model(
        model, batch=2, disclose=("text-categories", "number-categories"), input_range=(-16, 16)
    )
    assert made.plan.client.steps
    dtype = {TEXT: np.str_, INT64: np.int64, FLOAT: np.float32}[kind]
    x = np.array(values, dtype)[:, None]
    np.testing.assert_allclose(protocol(made, {"x": x})["y"], plain(model, x)[0], atol=1e-3)


def test_numbers_that_text_stands_for_stay_secret_unless_they_are_an_order() -> None:
    def plan_of(values: list[float]) -> mpcserve.Plan:
        attrs = {"keys_strings": ["a", "b", "c"], "values_floats": values}
        return compile_model(encoder("LabelEncoder", TEXT, **attrs), disclose=COMPLETE).plan

    trained = [0.7371, -2.5917, 3.2533]
    plan = plan_of(trained)
    assert steps_of(plan) == [("one_hot", "e/categories")]
    assert not any(str(abs(v)) in plan_bytes(plan).decode() for v in trained)
    assert steps_of(plan_of([0.0, 1.0, 2.0])) == [("lookup", "e")]


def test_a_category_that_stands_for_no_number_is_refused() -> None:
    attrs = {"keys_strings": ["a", "b"], "values_floats": [0.25, 4.5]}
    model = encoder("LabelEncoder", TEXT, **attrs, default_float=float("nan"))
    plan = compile_model(model, disclose=COMPLETE).plan
    with pytest.raises(InputError, match="row 0, column 0: 'c' is none of the 2 categories"):
        check_inputs(plan, {"x": np.array([["c"]])}, "error")


@pytest.mark.parametrize("norm", ["MAX", "L1", "L2"])
def test_rows_are_normalised_on_the_client_for_nothing(norm: str) -> None:
    nodes = [
        ml("Normalizer", ["x"], "n", "norm", norm=norm),
        helper.make_node("MatMul", ["n", "w"], ["y"], "dense"),
    ]
    weights = np.array([[0.5], [-1.25], [2.0]], np.float32)
    model = model_of(nodes, {"x": (FLOAT, 3)}, {"y": FLOAT}, w=weights)
    made = compile_model(model, batch=3, input_range=(0, 100))
    assert steps_of(made.plan) == [("normalize", "n")]
    assert made.plan.inputs[0].high == 1.0 and made.plan.inputs[0].known == "proved"
    x = np.array([[1, 2, 3], [0, 0, 0], [99, 0.5, 7]], np.float32)
    np.testing.assert_allclose(protocol(made, {"x": x})["y"], plain(model, x)[0], atol=1e-3)


def test_rows_of_what_a_secret_has_scaled_are_normalised_in_the_protocol() -> None:
    nodes = [
        ml("Scaler", ["x"], "z", "scale", offset=[0.5] * 3, scale=[2.0] * 3),
        ml("Normalizer", ["z"], "y", "norm", norm="L2"),
    ]
    model = model_of(nodes, {"x": (FLOAT, 3)}, {"y": FLOAT})
    assert not compile_model(model, input_range=(1, 2), disclose=EVERYTHING).plan.client.steps


def test_text_is_moved_about_before_it_is_encoded() -> None:
    """One matrix of text, its columns split, swapped, sliced and joined."""
    nodes = [
        helper.make_node("Split", ["x"], ["left", "right"], "split", axis=1, num_outputs=2),
        helper.make_node("Transpose", ["left"], ["t"], "turn", perm=[1, 0]),
        helper.make_node("Gather", ["t", "swap"], ["g"], "pick", axis=0),
        helper.make_node("Transpose", ["g"], ["a"], "back", perm=[1, 0]),
        helper.make_node("Slice", ["right", "zero", "one", "one"], ["b"], "cut"),
        helper.make_node("Concat", ["a", "b"], ["c"], "join", axis=1),
        ml("OneHotEncoder", ["c"], "e", "enc", cats_strings=["p", "q"]),
        helper.make_node("Reshape", ["e", "s"], ["f"], "flat"),
        helper.make_node("MatMul", ["f", "w"], ["y"], "dense"),
    ]
    weights = np.array([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]], np.float32)
    index = {k: np.array(v) for k, v in (("swap", [1, 0]), ("zero", [0]), ("one", [1]))}
    shape = np.array([-1, 6])
    model = model_of(nodes, {"x": (TEXT, 4)}, {"y": FLOAT}, w=weights, s=shape, **index)
    made = compile_model(model, batch=2, disclose=COMPLETE)
    x = np.array([["p", "q", "p", "r"], ["r", "p", "q", "q"], ["q", "r", "p", "p"]])
    expected = ReferenceEvaluator(model).run(None, {"x": x})[0]  # onnxruntime turns text wrongly
    np.testing.assert_allclose(protocol(made, {"x": x})["y"], expected, atol=1e-3)


def test_text_may_be_numbers_spelt_out() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["n"], "parse", to=FLOAT),
        helper.make_node("MatMul", ["n", "w"], ["y"], "dense"),
    ]
    model = model_of(nodes, {"x": (TEXT, 2)}, {"y": FLOAT}, w=np.ones((2, 1), np.float32))
    made = compile_model(model)
    got = protocol(made, {"x": np.array([["1.5", "-2"]])})["y"]
    np.testing.assert_allclose(got, [[-0.5]], atol=1e-3)
    with pytest.raises(InputError, match="input 'x': row 0, column 1: 'two' is not a number"):
        protocol(made, {"x": np.array([["1.5", "two"]])})


def test_an_unknown_category_is_named_with_its_row() -> None:
    made = compile_model(
        encoder("OneHotEncoder", TEXT, cats_strings=["a", "b"], zeros=0),
        batch=2,
        disclose=COMPLETE,
    )
    x = np.array([["a"], ["b"], ["b"], ["mauve"], ["a"]])
    with pytest.raises(InputError, match="input 'x': row 3, column 0: 'mauve' is none of the 2"):
        check_inputs(made.plan, {"x": x}, "error")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sex": np.zeros((3, 1), np.float32)}, "input 'sex': expected text, got float32"),
        (
            {"sex": np.array([["male"], [None], ["male"]])},
            "input 'sex': expected text, got NoneType at ",
        ),
        ({"age": np.array([["1"]] * 3)}, "input 'age': expected float32, got <U1"),
        ({"port": np.array(["C", "C", "C"])}, r"input 'port': expected shape \[rows, 1\]"),
        ({"fare": np.full((3, 1), 1e9, np.float32)}, "input 'filled', made of 'age', 'fare': 3"),
        ({"age": np.ones((2, 1), np.float32)}, "different numbers of rows: 'age' 2, 'fare' 3"),
        ({"age": np.full((3, 1), np.inf, np.float32)}, "'age', 'fare': not a finite number"),
    ],
)
def test_a_mistake_names_what_the_data_owner_gave(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_inputs(compiled(EVERYTHING).plan, some_passengers(3) | change, "error")


def test_text_of_pandas_is_text() -> None:
    rows = some_passengers(3)
    objects = rows | {"sex": rows["sex"].astype(object)}
    plan = compiled(EVERYTHING).plan
    mine, theirs = (check_inputs(plan, x, "error") for x in (rows, objects))
    np.testing.assert_array_equal(mine[1], theirs[1])


def test_rows_with_missing_values_are_refused_where_nothing_fills_them_in() -> None:
    with pytest.raises(InputError, match=r"input 'age': not a finite number at \(0, 0\)"):
        check_inputs(compiled(COMPLETE).plan, some_passengers(3), "error")


def test_a_zipmap_comes_out_as_a_map_for_every_row() -> None:
    answer, _ = mpcserve.simulate(compiled(EVERYTHING), some_passengers(5))
    assert isinstance(answer, dict)
    expected = plain(passengers(), *some_passengers(5).values())[1]
    assert [list(row) for row in answer["chances"]] == [["died", "survived"]] * 5
    for mine, theirs in zip(answer["chances"], expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize(
    ("classes", "disclose", "columns"),
    [([0, 1], (), (0, 1)), ([4, 9, 1], (), ()), ([4, 9, 1], ("number-categories",), (4, 9, 1))],
)
def test_numbers_of_classes_are_told_if_they_are_no_secret(
    classes: list[int], disclose: tuple[str, ...], columns: tuple[int, ...]
) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["s"], "dense"),
        ml("ZipMap", ["s"], "y", "zip", classlabels_int64s=classes),
    ]
    weights = np.ones((2, len(classes)), np.float32)
    model = model_of(nodes, {"x": (FLOAT, 2)}, {"y": None}, w=weights)
    plan = compile_model(model, disclose=disclose).plan
    assert plan.outputs[0].columns == columns
    assert any("classes are secret" in n for n in plan.notes) == (not columns)


def test_check_says_what_runs_on_the_client() -> None:
    reports = {r.node: r for r in check_model(passengers(), disclose=COMPLETE)}
    there = {name for name, r in reports.items() if r.status == "on the client"}
    assert there == {"enc_sex", "enc_port", "zip"}
    assert reports["zip"].op == "ZipMap"
    without = {r.node: r for r in check_model(passengers())}
    assert without["enc_sex"].status == "unsupported"
    assert without["enc_class"].status == "supported"


@pytest.mark.parametrize("disclose", [(), EVERYTHING], ids=len)
def test_text_that_reaches_something_else_is_refused_with_its_node(
    disclose: tuple[str, ...],
) -> None:
    nodes = [
        helper.make_node("StringNormalizer", ["x"], ["l"], "lower", case_change_action="LOWER"),
        ml("OneHotEncoder", ["l"], "e", "enc", cats_strings=["a"]),
    ]
    model = model_of(nodes, {"x": (TEXT, 1)}, {"e": FLOAT})
    bad = [r for r in check_model(model, disclose=disclose) if r.status == "unsupported"]
    assert ("lower", "reads text, which cannot be shared") in [(r.node, r.reason) for r in bad]


def test_text_that_is_only_passed_on_is_refused() -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["z"], "pass"),
        helper.make_node("MatMul", ["n", "w"], ["y"], "dense"),
    ]
    inputs = {"x": (TEXT, 1), "n": (FLOAT, 2)}
    model = model_of(nodes, inputs, {"y": FLOAT, "z": TEXT}, w=np.ones((2, 1), np.float32))
    with pytest.raises(ModelError, match="output 'z': is text of an input"):
        compile_model(model)


def test_what_may_be_disclosed_is_a_closed_list() -> None:
    with pytest.raises(ConfigError, match="disclose is 'weights', expected text-categories"):
        compile_model(passengers(), disclose=("weights",))  # type: ignore[arg-type]


def test_declared_ranges_are_those_of_raw_inputs() -> None:
    plan = compile_model(
        passengers(), input_range={"age": (0, 128), "fare": (0, 512)}, disclose=EVERYTHING
    ).plan
    reaches = {i.name: (i.low, i.high, i.known) for i in plan.inputs}
    assert reaches["filled"] == (0.0, 512.0, "proved")
    assert reaches["sexes"] == (0.0, 1.0, "proved")


def test_samples_may_be_a_table(tmp_path: Path) -> None:
    path = tmp_path / "samples.csv"
    path.write_text(as_csv(some_passengers(64)))
    from_file = compile_model(passengers(), batch=8, calibrate=path, disclose=EVERYTHING)
    assert from_file.plan.digest == compiled(EVERYTHING).plan.digest


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Step("shell", ("x",), "y", {})], "unknown op 'shell'"),
        ([Step("cast", ("x",), "y", {})], "missing attributes dtype"),
        ([Step("cast", ("z",), "y", {"dtype": "str"})], "reads 'z' before it is made"),
        ([Step("cast", ("x",), "x", {"dtype": "str"})], "made twice"),
    ],
)
def test_a_program_that_breaks_the_law_is_refused(steps: list[Step], message: str) -> None:
    plan = compile_model(encoder("OneHotEncoder", TEXT, cats_strings=["a"]), disclose=COMPLETE).plan
    program = ClientProgram((RawInput("x", "str", (1, 1)),), tuple(steps))
    data = plan.to_json() | {"client": program.to_json()}
    with pytest.raises(PlanError, match=message):
        plan_from_bytes(json.dumps(data).encode())


def test_steps_that_do_not_fit_are_an_error_and_no_crash() -> None:
    step = Step("arrange", ("x",), "y", {"indices": [7], "shape": [1]}, "Gather 'g'")
    program = ClientProgram((RawInput("x", "float32", (1, 1)),), (step,))
    with pytest.raises(InputError, match="Gather 'g' on the client: index 7 is out of bounds"):
        program.run({"x": np.zeros((1, 1), np.float32)})
