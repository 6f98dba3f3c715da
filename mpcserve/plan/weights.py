"""The weights file: private to the model owner. NumPy's .npz without pickle, bound to one plan."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpcserve.errors import PlanError
from mpcserve.plan.plan import Plan

_DIGEST = "plan_digest"
_PREFIX = "weight/"
"""Weight names are free; the prefix keeps them apart from the digest."""


def weights_path(plan_path: Path | str) -> Path:
    """model.plan → model.weights."""
    return Path(plan_path).with_suffix(".weights")


def save_weights(path: Path | str, plan: Plan, weights: Mapping[str, NDArray[np.int64]]) -> None:
    """Write the weights of a plan, whole or not at all, readable by the owner only."""
    path = Path(path)
    _check(str(path), plan, weights)
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)
    # Created with 0600 from the start: at no moment can others read it.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        arrays = {_PREFIX + k: np.asarray(v, np.int64) for k, v in weights.items()}
        np.savez(file, **{_DIGEST: np.array(plan.digest)}, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


def load_weights(path: Path | str, plan: Plan) -> dict[str, NDArray[np.int64]]:
    """Read the weights of a plan. Raises: PlanError when they belong to another plan."""
    path = Path(path)
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            digest = str(file[_DIGEST])
            arrays = {k.removeprefix(_PREFIX): file[k] for k in file.files if k.startswith(_PREFIX)}
    except OSError as e:
        raise PlanError(
            f"{path}: cannot read the weights: {e.strerror or e}",
            "it is written beside the plan by `mpcserve compile`",
        ) from None
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as e:
        raise PlanError(
            f"{path}: not a weights file: {type(e).__name__}", "compile the model again"
        ) from None
    if digest != plan.digest:
        raise PlanError(
            f"{path}: weights of plan {digest}, expected {plan.digest} ({plan.name})",
            "compile the model again, or give the plan that the weights were written with",
        )
    _check(str(path), plan, arrays)
    return arrays


def _check(path: str, plan: Plan, weights: Mapping[str, NDArray[np.int64]]) -> None:
    problems = [f"no weight {name!r}" for name in plan.weights if name not in weights]
    problems += [f"unknown weight {name!r}" for name in weights if name not in plan.weights]
    for name, id in plan.weights.items():
        if name in weights and weights[name].shape != plan.value(id).shape:
            shape = list(weights[name].shape)
            problems.append(
                f"weight {name!r} of shape {shape}, expected {list(plan.value(id).shape)}"
            )
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise PlanError(f"{path}: {problems[0]}{more}", "compile the model again", tuple(problems))
