"""A compiled model: the public plan and the private weights, and the two files they live in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.graph import Graph
from mpcserve.plan import Plan, load_plan, save_plan
from mpcserve.plan.weights import load_weights, save_weights, weights_path


@dataclass(frozen=True, slots=True)
class Trace:
    """The float graph that a plan computes, and the plan's value of each of its tensors. Secret."""

    graph: Graph = field(repr=False)
    tensors: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class CompiledModel:
    """`weights`: integers per weight name, at the fraction bits of the plan's value. Secret.

    `trace`: there if it was asked for; no file holds it.
    """

    plan: Plan
    weights: Mapping[str, NDArray[np.int64]] = field(repr=False)
    trace: Trace | None = field(default=None, repr=False, compare=False)

    def save(self, path: Path | str) -> Path:
        """Write `path` (public) and the .weights file beside it (private, 0600); its path."""
        weights = weights_path(path)
        save_weights(weights, self.plan, self.weights)
        save_plan(self.plan, path)
        return weights


def load_compiled(path: Path | str) -> CompiledModel:
    """Read what `CompiledModel.save` wrote. Raises: PlanError naming the file."""
    plan = load_plan(path)
    return CompiledModel(plan, load_weights(weights_path(path), plan))
