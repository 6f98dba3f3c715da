"""Equal steps on equal operands are one step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable

import numpy as np

from mpcserve.compiler.draft import Draft, Step
from mpcserve.plan.table import written


def deduplicate(draft: Draft) -> Draft:
    """The first of equal steps serves all readers. Weights are equal when all their numbers are."""
    first: dict[Hashable, int] = {}
    same: dict[int, int] = {}
    for id, step in enumerate(draft.steps):
        key = _key(draft, step, same)
        if step.op != "input":
            same[id] = first.setdefault(key, id)
    kept = [id for id in range(len(draft.steps)) if same.get(id, id) == id]
    return draft.keep(kept, same)


def _key(draft: Draft, step: Step, same: dict[int, int]) -> Hashable:
    inputs = tuple(same.get(j, j) for j in step.inputs)
    if step.op == "weight":
        content = hashlib.sha256(
            np.ascontiguousarray(draft.arrays[step.attrs["name"]]).data
        ).digest()
        return step.op, step.shape, step.frac_bits, content
    attrs = json.dumps({k: written(v) for k, v in step.attrs.items()}, sort_keys=True)
    return step.op, inputs, attrs, step.shape, step.frac_bits
