"""The ONNX backend: what it takes for secret, what for public, and ONNX's own runner on it."""

from __future__ import annotations

import unittest
import warnings

import numpy as np
import pytest
from onnx import TensorProto, helper

from mpcserve import onnx_backend
from mpcserve.errors import InputError
from mpcserve.onnx_backend import MpcBackend, outward, prepare
from tests.onnx_cases import model_of, node, rng_of

F32 = np.float32


@pytest.mark.slow
def test_the_runner_of_onnx_drives_it() -> None:
    from onnx.backend.test import BackendTest

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = BackendTest(MpcBackend, __name__)
    runner.include(
        r"^test_(relu|gemm_alpha|clip|where_example|softmax_example|shape|einsum_sum)_cpu$"
    )
    found = unittest.TestSuite(
        unittest.defaultTestLoader.loadTestsFromTestCase(case)
        for case in runner.test_cases.values()
    )
    result = unittest.TestResult()
    found.run(result)
    # ONNX asks for 1e-3 and 1e-7 together: exact results pass, so here only crashes are failures.
    assert not result.errors
    assert result.testsRun - len(result.skipped) >= 7


def test_floats_are_secret_and_parameters_integers_and_booleans_are_not() -> None:
    nodes = [node("Clip", ["x", "low"], ["c"]), node("Where", ["b", "c", "z"])]
    model = model_of(nodes, {"x": (2, 3), "low": (), "b": (2, 3), "z": (2, 3)})
    model.graph.input[2].type.tensor_type.elem_type = TensorProto.BOOL
    ready = prepare(model)
    x, z = (rng_of(k).uniform(-2, 2, (2, 3)).astype(F32) for k in (1, 2))
    b = np.array([[True, False, True], [False, True, True]])
    (y,) = ready.run([x, F32(0.5), b, z])
    assert np.abs(y - np.where(b, np.maximum(x, 0.5), z)).max() <= 1e-3
    specialised = ready.specialised({"x": x, "low": np.asarray(F32(0.5)), "b": b, "z": z})
    assert specialised.compiled is not None
    assert [i.name for i in specialised.compiled.plan.inputs] == ["x", "z"]
    assert ready.bill is not None and ready.bill.rounds > 0


def test_an_output_that_no_secret_enters_is_computed_when_compiling() -> None:
    nodes = [node("Shape", ["x"], ["s"]), node("Relu", ["x"])]
    model = model_of(nodes, {"x": (2, 3)}, outputs=["s", "y"])
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    s, y = prepare(model).run(np.array([[1, -1, 2], [0, 3, -4]], F32))
    assert s.tolist() == [2, 3] and s.dtype == np.int64
    assert np.abs(y - [[1, 0, 2], [0, 3, 0]]).max() <= 1e-4


def test_one_node_runs_alone() -> None:
    x = np.array([[1.0, -2.0], [3.0, 0.5]], F32)
    (y,) = onnx_backend.run_node(helper.make_node("Neg", ["x"], ["y"]), [x])
    assert np.abs(y + x).max() <= 1e-4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 5.0], (0.0, 8.0)),
        ([1.3, 5.7], (1.0, 8.0)),
        ([-3.0, 4.0], (-4.0, 4.0)),
        ([-3.0, -1.5], (-4.0, -1.0)),
        ([1.0, 1.0], (0.5, 2.0)),
        ([0.0, 0.0], (-1.0, 1.0)),
    ],
)
def test_a_range_is_rounded_outward_to_powers_of_two(
    values: list[float], expected: tuple[float, float]
) -> None:
    assert outward("x", np.array(values)) == expected


def test_what_does_not_fit_is_refused() -> None:
    model = model_of([node("Relu", ["x"])], {"x": (2,)})
    assert MpcBackend.supports_device("CPU") and not MpcBackend.supports_device("CUDA")
    with pytest.raises(InputError, match="device 'CUDA' is not supported"):
        prepare(model, "CUDA")
    with pytest.raises(InputError, match="expected 1 inputs, got 2"):
        prepare(model).run([np.ones(2, F32), np.ones(2, F32)])
    with pytest.raises(InputError, match="input 'x' is not finite"):
        prepare(model).run([np.array([1.0, np.nan], F32)])


def test_a_declared_range_is_kept() -> None:
    model = model_of([node("Mul", ["x", "w"])], {"x": (2,), "w": (2,)})
    ready = prepare(model, input_range={"x": (-4.0, 4.0), "w": (0.0, 1.0)})
    feed = {"x": np.array([3.0, -1.0], F32), "w": np.array([0.5, 0.25], F32)}
    assert np.abs(ready.run(feed)[0] - [1.5, -0.25]).max() <= 1e-4
    compiled = ready.specialised(feed).compiled
    assert compiled is not None
    assert [(i.low, i.high) for i in compiled.plan.inputs] == [(-4.0, 4.0), (0.0, 1.0)]
