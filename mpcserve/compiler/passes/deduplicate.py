"""Equal steps on equal operands are one step."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Hashable

import numpy as np

from mpcserve.compiler.draft import Draft, Step
from mpcserve.plan.table import written

GLANCED = 64
"""Elements of a weight that are compared first."""


def deduplicate(draft: Draft) -> Draft:
    """The first of equal steps serves all readers. Weights are equal when all their numbers are."""
    first: dict[Hashable, int] = {}
    lone = _lone_weights(draft)
    same: dict[int, int] = {}
    for id, step in enumerate(draft.steps):
        key = (step.op, id) if id in lone else _key(draft, step, same)
        if step.op != "input":
            same[id] = first.setdefault(key, id)
    kept = [id for id in range(len(draft.steps)) if same.get(id, id) == id]
    return draft.keep(kept, same)


def _lone_weights(draft: Draft) -> set[int]:
    """Weights that differ from all others at a glance; numbers of the rest are hashed."""
    glances = {k: _glance(draft, s) for k, s in enumerate(draft.steps) if s.op == "weight"}
    count = Counter(glances.values())
    return {id for id, glance in glances.items() if count[glance] == 1}


def _glance(draft: Draft, weight: Step) -> Hashable:
    """What equal weights share, of which little is looked at."""
    values = draft.arrays[weight.attrs["name"]]
    some = values.flat[:: max(values.size // GLANCED, 1)]
    return weight.shape, weight.frac_bits, some.tobytes()


def _key(draft: Draft, step: Step, same: dict[int, int]) -> Hashable:
    inputs = tuple(same.get(j, j) for j in step.inputs)
    if step.op == "weight":
        content = hashlib.sha256(
            np.ascontiguousarray(draft.arrays[step.attrs["name"]]).data
        ).digest()
        return step.op, step.shape, step.frac_bits, content
    attrs = json.dumps({k: written(v) for k, v in step.attrs.items()}, sort_keys=True)
    return step.op, inputs, attrs, step.shape, step.frac_bits
