"""Steps that no output needs are dropped."""

from __future__ import annotations

from mpcserve.compiler.draft import Draft


def remove_unused(draft: Draft) -> Draft:
    """Inputs stay: they are the model's interface."""
    needed = {o.id for o in draft.outputs} | {i.id for i in draft.inputs}
    for id in reversed(range(len(draft.steps))):
        if id in needed:
            needed.update(draft.steps[id].inputs)
    return draft.keep(sorted(needed))
