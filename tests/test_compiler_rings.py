"""Products mod 2^32: which ones, with how many fraction bits, and how far that is felt."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mpcserve.cli import run
from mpcserve.compiler import compile_model, narrow, pipeline
from mpcserve.compiler.planning import Precision
from mpcserve.compiler.rings import Allocation, Family, Product
from mpcserve.errors import ConfigError, ModelError
from mpcserve.plan import Instruction, Plan, bill_of
from mpcserve.protocol.together import simulate
from mpcserve.reference import evaluate_clear
from tests.onnx_cases import model_of, node, ops_of, plain, rng_of
from tests.plan_interpreter import Interpreter
from tests.test_compiler_random import grown

pytestmark = pytest.mark.slow

MODELS = Path(__file__).parent.parent / "models"
CALIBRATION = MODELS / "mnist_calibration.npy"


def products(plan: Plan) -> list[Instruction]:
    return [i for i in plan.instructions if i.op in ("mul", "matmul", "conv")]


def rings(plan: Plan) -> list[int]:
    return [i.attrs["ring"] for i in products(plan)]


def operand_bits(plan: Plan) -> list[int]:
    return [plan.value(i.inputs[0]).frac_bits for i in products(plan)]


def size_of(x: Any) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


def layers(*ops: str, n: int = 8, seed: int = 1) -> onnx.ModelProto:
    """MatMul by a random matrix of norm about one, Relu …, one after the other."""
    rng = np.random.default_rng(seed)
    nodes, constants, name = [], {}, "x"
    for k, op in enumerate(ops):
        out = "y" if k == len(ops) - 1 else f"h{k}"
        if op == "MatMul":
            constants[f"w{k}"] = rng.normal(0, n**-0.5, (n, n))
        nodes.append(node(op, [name, f"w{k}"] if op == "MatMul" else [name], [out]))
        name = out
    return model_of(nodes, {"x": ("N", n)}, constants)


# --- what each of the three choices means


def test_ring_64_is_sixteen_fraction_bits_everywhere() -> None:
    samples = np.load(CALIBRATION)
    plan = compile_model(MODELS / "mnist_cnn.onnx", ring=64, calibrate=samples).plan
    same = compile_model(MODELS / "mnist_cnn.onnx", frac_bits=16, calibrate=samples).plan
    assert plan.digest == same.digest
    assert {i.value.frac_bits for i in products(plan)} == {16} and min(rings(plan)) > 32


def test_a_number_of_fraction_bits_is_kept_in_either_ring() -> None:
    samples = np.load(CALIBRATION)
    for options in ({}, {"ring": 32}):
        plan = compile_model(
            MODELS / "mnist_mlp.onnx", frac_bits=11, calibrate=samples, **options
        ).plan
        assert set(operand_bits(plan)[1:]) == {11}
        assert (max(rings(plan)) <= 32) or not options


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("known", ["calibrated", "declared"])
def test_every_product_of_a_random_network_runs_in_32_bits(seed: int, known: str) -> None:
    rng = rng_of(seed)
    model, x = grown(rng)
    ranges: Any = {"calibrate": x} if known == "calibrated" else {"input_range": (-2, 2)}
    compiled = compile_model(model, ring=32, **ranges)
    assert all(r <= 32 for r in rings(compiled.plan))
    # The interpreter asserts the bound of each value and the ring of each accumulator.
    (got,) = Interpreter(compiled.plan, compiled.weights, rng).run(x)
    (expected,) = plain(model, x)
    allowed = 2.0**-9 if known == "calibrated" else 2.0**-5
    assert np.abs(got - expected).max() <= allowed * size_of(expected)


@pytest.mark.parametrize("seed", range(30))
def test_auto_is_accurate_on_a_random_network(seed: int) -> None:
    rng = rng_of(seed)
    model, x = grown(rng)
    compiled = compile_model(model, calibrate=x)
    (got,) = Interpreter(compiled.plan, compiled.weights, rng).run(x)
    (expected,) = plain(model, x)
    assert np.abs(got - expected).max() <= 8 * narrow.TOLERANCE * size_of(expected)


@pytest.mark.parametrize("seed", range(200, 206))
def test_the_protocol_runs_a_narrow_network_as_billed(seed: int) -> None:
    model, x = grown(rng_of(seed))
    compiled = compile_model(model, calibrate=x, ring=32)
    outputs, bill = simulate(compiled.plan, compiled.weights, [x])
    assert bill == bill_of(compiled.plan)
    (expected,) = plain(model, x)
    assert np.abs(outputs[0] - expected).max() <= 2.0**-9 * size_of(expected)


def test_layers_that_need_more_get_64_bits_and_the_others_do_not() -> None:
    samples = np.load(MODELS / "breast_cancer_calibration.npy")
    x = np.load(MODELS / "breast_cancer_samples.npy")
    path = MODELS / "breast_cancer_mlp.onnx"
    compiled = compile_model(path, calibrate=samples, batch=len(x))
    # Measurements up to 4,254 beside others of 0.01: 32 bits cannot hold both at one scale.
    assert [r > 32 for r in rings(compiled.plan)] == [True, False, False]
    assert "2 of 3 products in the ring of 2^32" in compiled.plan.notes[1]
    (expected,) = plain(onnx.load(path), x)
    (got,) = evaluate_clear(compiled.plan, compiled.weights, [x])
    assert np.abs(got - expected).max() < 2.0**-10


def test_without_samples_nothing_is_narrowed_that_only_wide_ranges_excuse() -> None:
    x = np.load(MODELS / "breast_cancer_samples.npy")
    path = MODELS / "breast_cancer_mlp.onnx"
    compiled = compile_model(path, input_range=(0, 5000), batch=len(x))
    assert min(rings(compiled.plan)) > 32
    assert "expected error" not in " ".join(compiled.plan.notes)


def test_a_stricter_tolerance_costs_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.load(MODELS / "mnist_samples.npy")
    path, samples = MODELS / "mnist_cnn.onnx", np.load(CALIBRATION)
    (expected,) = plain(onnx.load(path), x)
    wide, errors = [], []
    for exponent in (-11, -13, -20):
        stricter = partial(Precision, tolerance=2.0**exponent)
        monkeypatch.setattr(pipeline, "Precision", stricter)
        monkeypatch.setattr(narrow, "AS_WIDE", 1.0)
        compiled = compile_model(path, calibrate=samples, batch=len(x))
        wide.append(sum(r > 32 for r in rings(compiled.plan)))
        (got,) = evaluate_clear(compiled.plan, compiled.weights, [x])
        errors.append(np.abs(got - expected).max())
    assert wide[0] == 0 < wide[1] < wide[2] == 4
    assert errors[0] > errors[1] > errors[2]


# --- chains of products, means


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_chain_of_linear_layers_is_extended_where_all_shall_be_narrow(count: int) -> None:
    rng = rng_of(count)
    x = rng.uniform(-1, 1, (3, 8)).astype(np.float32)
    model = layers(*["MatMul"] * count)
    compiled = compile_model(model, ring=32, calibrate=x, batch=3)
    assert max(rings(compiled.plan)) <= 32
    assert ops_of(compiled.plan).count("extend") == count - 1
    (got,) = Interpreter(compiled.plan, compiled.weights, rng).run(x)
    (expected,) = plain(model, x)
    assert np.abs(got - expected).max() <= 2.0**-9 * size_of(expected)


def test_auto_spends_no_round_on_a_narrower_ring() -> None:
    x = rng_of(5).uniform(-1, 1, (3, 8)).astype(np.float32)
    model = layers("MatMul", "MatMul", "Relu", "MatMul")
    plan = compile_model(model, calibrate=x, batch=3).plan
    assert "extend" not in ops_of(plan)
    assert [r > 32 for r in rings(plan)] == [True, False, False]
    assert bill_of(plan).rounds == bill_of(compile_model(model, ring=64).plan).rounds


def test_a_sum_over_a_picture_is_read_with_fewer_bits_than_its_pixels_have() -> None:
    rng = rng_of(6)
    nodes = [
        node("Conv", ["x", "v"], ["c"], pads=[1] * 4),
        node("Relu", ["c"], ["r"]),
        node("GlobalAveragePool", ["r"], ["h"]),
        node("Flatten", ["h"], ["f"]),
        node("Gemm", ["f", "w"]),
    ]
    constants = {"v": rng.normal(0, 0.2, (16, 4, 3, 3)), "w": rng.normal(0, 0.3, (16, 10))}
    model = model_of(nodes, {"x": (1, 4, 14, 7)}, constants)
    x = rng.normal(size=(1, 4, 14, 7)).astype(np.float32)
    compiled = compile_model(model, calibrate=x, ring=32)
    assert ops_of(compiled.plan)[-3:] == ["reshape", "shift", "matmul"]
    pixels, means = operand_bits(compiled.plan)[0], operand_bits(compiled.plan)[1]
    assert means < pixels and max(rings(compiled.plan)) <= 32
    (got,) = Interpreter(compiled.plan, compiled.weights, rng).run(x)
    (expected,) = plain(model, x)
    assert np.abs(got - expected).max() <= 2.0**-9 * size_of(expected)


# --- what cannot be


def test_a_range_too_wide_for_32_bits_says_which_node_and_how_many_bits() -> None:
    model = model_of([node("MatMul", ["x", "w"])], {"x": (1, 3)}, {"w": np.full((3, 2), 2.0**10)})
    with pytest.raises(ModelError) as caught:
        compile_model(model, ring=32, input_range=(-(2.0**20), 2.0**20))
    # ±3·2^30 < 2^32 and no fraction bits at all: 32 + 0 + 1, one more than there are.
    assert "node 'MatMul:y' (matmul)" in caught.value.message
    assert "its range ±2^32 leaves 32 bits 1 bit short" in caught.value.message
    assert "--ring auto" in caught.value.hint
    assert compile_model(model, input_range=(-(2.0**20), 2.0**20)).plan
    assert compile_model(model, ring=32, input_range=(-(2.0**18), 2.0**18)).plan


def test_every_node_that_cannot_is_listed() -> None:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"])]
    model = model_of([*nodes, node("MatMul", ["r", "w"])], {"x": (1, 3)}, {"w": 2.0**9 * np.eye(3)})
    with pytest.raises(ModelError) as caught:
        compile_model(model, ring=32, input_range=(-(2.0**24), 2.0**24))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("ring", [16, 48, "32", None])
def test_a_ring_that_is_none_is_refused(ring: Any) -> None:
    with pytest.raises(ConfigError, match="expected 'auto', 32 or 64"):
        compile_model(layers("MatMul"), ring=ring)


# --- the choice itself


def some_product(name: str, family: int, result: int, room: int, noise: float) -> Product:
    return Product((name, 0), (family,), result, room, noise, 16, 2, None, 100, True)


def test_the_choice_is_the_best_of_all() -> None:
    """Against every assignment of fraction bits to three families, one with two readers."""
    rng = rng_of(7)
    for _ in range(20):
        families = tuple(Family(float(4 ** rng.uniform(6, 12)), 1, None) for _ in range(3))
        made = [
            some_product(f"p{k}", *ends, int(rng.integers(14, 20)), float(4 ** rng.uniform(6, 12)))
            for k, ends in enumerate([(0, 1), (1, 2), (0, 2)])
        ]
        choice = Allocation(16, families, tuple(made)).all_narrow()

        def variance(bits: tuple[int, ...], made: Any = made, families: Any = families) -> float:
            total = sum(f.noise * 4.0**-b for f, b in zip(families, bits, strict=True))
            for p in made:
                weight = p.room - bits[p.families[0]]
                if weight < p.fewest or bits[p.result] > p.room:
                    return float("inf")
                total += p.weight_noise * 4.0**-weight
            return total

        best = min(product(range(1, 17), repeat=3), key=variance)
        assert choice.variance == pytest.approx(variance(best))
        assert variance(choice.frac_bits) == pytest.approx(variance(best))


def test_bits_go_where_they_are_felt() -> None:
    """Large weights ask for a fine operand, large operands for fine weights."""
    rng = rng_of(8)
    found = {}
    for name, scale in (("weights", 64.0), ("operand", 1 / 64)):
        w = (rng.normal(size=(8, 8)) * scale).astype(np.float32)
        x = (rng.normal(size=(20, 8)) / scale).astype(np.float32)
        model = model_of([node("MatMul", ["x", "w"])], {"x": ("N", 8)}, {"w": w})
        plan = compile_model(model, calibrate=x, ring=32).plan
        (matmul,) = products(plan)
        found[name] = [plan.value(j).frac_bits for j in matmul.inputs]
    assert found["weights"][0] - found["weights"][1] >= 8
    assert found["operand"][1] - found["operand"][0] >= 8


@pytest.mark.parametrize("model", ["mnist_mlp", "mnist_cnn"])
def test_the_expected_error_is_near_the_measured_one(model: str) -> None:
    samples, x = np.load(CALIBRATION), np.load(MODELS / "mnist_samples.npy")
    path = MODELS / f"{model}.onnx"
    compiled = compile_model(path, calibrate=samples, batch=len(x), ring=32)
    (stated,) = (
        re.search(r"2\^(-\d+) of its size", n) for n in compiled.plan.notes if "expected" in n
    )
    assert stated is not None
    outputs, _ = simulate(compiled.plan, compiled.weights, [x])
    (expected,) = plain(onnx.load(path), x)
    measured = size_of(outputs[0] - expected) / size_of(expected)
    assert 1 / 3 < measured / 2.0 ** int(stated[1]) < 2


def test_the_same_model_and_samples_make_the_same_plan() -> None:
    digests = {
        compile_model(MODELS / "mnist_cnn.onnx", calibrate=np.load(CALIBRATION)).plan.digest
        for _ in range(2)
    }
    assert len(digests) == 1


# --- the command line


def test_the_commands_take_a_ring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, samples = str(MODELS / "mnist_mlp.onnx"), ["--calibrate", str(CALIBRATION)]
    bits = {}
    for ring in ("auto", "32", "64"):
        plan = str(tmp_path / "mlp.plan")
        assert run(["compile", path, "-o", plan, *samples, "--ring", ring, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        bits[ring] = report["bytes"]["alice->bob"]
        assert any("ring of 2^32" in line for line in report["notes"]) == (ring != "64")
    assert bits["auto"] == bits["32"] < bits["64"]
    data = [
        "--data",
        str(MODELS / "mnist_samples.npy"),
        "--labels",
        str(MODELS / "mnist_labels.npy"),
    ]
    assert run(["verify", path, *data, *samples, "--ring", "32"]) == 0
    out = capsys.readouterr().out
    assert "3 of 3 products in the ring of 2^32" in out and "100.00 %" in out


def test_verify_shows_what_32_bits_cost_a_deep_network(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(MODELS / "mnist_samples.npy"), "--calibrate", str(CALIBRATION)]
    arguments += ["--labels", str(MODELS / "mnist_labels.npy"), "--ring", "32", "--json"]
    assert run(["verify", str(MODELS / "mnist_resnet20.onnx"), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    (output,) = report["outputs"]
    assert output["protocol"]["max_error"] <= 2.0**-8 and output["protocol"]["top1"] == 1.0
    assert output["accuracy"] == {"float": 1.0, "reference": 1.0, "protocol": 1.0}
    assert any("22 of 22 products in the ring of 2^32" in line for line in report["notes"])
