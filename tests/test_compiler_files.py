"""The plan and weights files: public and private, whole or not at all, bound to each other."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpcserve.compiler import CompiledModel, compile_model, load_compiled
from mpcserve.errors import PlanError
from mpcserve.plan.weights import load_weights, save_weights, weights_path
from tests.onnx_cases import model_of, node


def compiled(kernel: int = 2) -> CompiledModel:
    nodes = [node("Gemm", ["x", "w", "c"])]
    constants = {"w": np.linspace(-1, 1, 3 * kernel).reshape(3, kernel), "c": np.ones(kernel)}
    return compile_model(model_of(nodes, {"x": (1, 3)}, constants))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    model, path = compiled(), tmp_path / "net.plan"
    assert model.save(path) == tmp_path / "net.weights" == weights_path(path)
    loaded = load_compiled(path)
    assert loaded.plan.digest == model.plan.digest
    assert loaded.weights.keys() == model.weights.keys()
    for name, values in model.weights.items():
        assert values.dtype == np.int64
        assert np.array_equal(values, loaded.weights[name])
    assert {p.name for p in tmp_path.iterdir()} == {"net.plan", "net.weights"}


def test_weights_are_the_encoded_integers(tmp_path: Path) -> None:
    model = compiled()
    (gemm,) = (i for i in model.plan.instructions if i.op == "matmul")
    names = {id: name for name, id in model.plan.weights.items()}
    w, c = (model.weights[names[j]] for j in gemm.inputs[1:])
    bits = [model.plan.value(j).frac_bits for j in gemm.inputs[1:]]
    assert np.array_equal(
        w, np.rint(np.linspace(-1, 1, 6).astype("f").reshape(3, 2) * 2.0 ** bits[0])
    )
    assert np.array_equal(c, np.full(2, 1 << bits[1]))


def test_only_the_owner_reads_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "net.plan"
    for _ in range(2):
        weights = compiled().save(path)
        assert stat.S_IMODE(weights.stat().st_mode) == 0o600


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = compiled(), tmp_path / "net.plan"
    weights = model.save(path)
    before = weights.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(path)
    assert weights.read_bytes() == before


def test_weights_of_another_plan_are_refused_with_both_digests(tmp_path: Path) -> None:
    one, other = compiled(2), compiled(4)
    path = tmp_path / "net.weights"
    save_weights(path, one.plan, one.weights)
    with pytest.raises(PlanError) as caught:
        load_weights(path, other.plan)
    for text in (str(path), one.plan.digest, other.plan.digest):
        assert text in caught.value.message


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04" + bytes(40)])
def test_what_is_no_weights_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.weights"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"net.weights: not a weights file"):
        load_weights(path, compiled().plan)


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"net.weights: cannot read the weights: No such file"):
        load_weights(tmp_path / "net.weights", compiled().plan)


def test_a_pickled_array_is_never_unpickled(tmp_path: Path) -> None:
    model, path = compiled(), tmp_path / "net.weights"
    with path.open("wb") as file:
        arrays: Any = {"weight/w0": np.array([{}])}
        np.savez(file, plan_digest=np.array(model.plan.digest), **arrays)
    with pytest.raises(PlanError, match="not a weights file"):
        load_weights(path, model.plan)


def test_weights_that_do_not_fit_the_plan_are_all_listed(tmp_path: Path) -> None:
    model = compiled()
    name, other = list(model.weights)
    wrong = {name: model.weights[name][:1], "strange": model.weights[other]}
    with pytest.raises(PlanError) as caught:
        save_weights(tmp_path / "net.weights", model.plan, wrong)
    assert len(caught.value.problems) == 3


def test_the_repr_of_a_compiled_model_shows_no_weight() -> None:
    assert "weights" not in repr(compiled())
