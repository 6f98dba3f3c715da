"""One function of the compiler, from a Builder to the three roles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

import numpy as np

from mpcserve.compiler.builder import Builder
from mpcserve.compiler.passes.deduplicate import deduplicate
from mpcserve.compiler.passes.unused import remove_unused
from mpcserve.compiler.pipeline import encoded_weights
from mpcserve.compiler.precision import check_fit
from mpcserve.compiler.widths import assign_widths, extended
from mpcserve.plan import Plan, bill_of, verify_plan
from mpcserve.plan.bill import Bill
from mpcserve.protocol import Together, Transcript
from tests.plan_interpreter import Interpreter
from tests.plans import inside

Array = Any
FRAC_BITS = 16
ULP = 2.0**-FRAC_BITS


@dataclass
class Compiled:
    """A plan of one function."""

    plan: Plan
    weights: Mapping[str, Array]

    @cached_property
    def bill(self) -> Bill:
        """As predicted."""
        return bill_of(self.plan)

    def run(self, *xs: Array) -> Array:
        """The real protocol; its measured bill is the predicted one."""
        outputs, bill = Together(self.plan, self.weights).infer(xs)
        assert bill == self.bill
        return outputs[0]

    def transcript(self, *xs: Array) -> Transcript:
        """What is sent in one run."""
        sent = Transcript()
        Together(self.plan, self.weights, sent).infer(xs)
        return sent

    def check_bounds(self, *xs: Array) -> None:
        """Every value stays within its bound, every accumulator within its ring."""
        Interpreter(self.plan, self.weights, np.random.default_rng(1)).run(*xs)

    def per_element(self, count: int) -> tuple[float, float]:
        """Bytes online, both ways, and dealt."""
        return self.bill.online_bytes / count, self.bill.dealt_bytes / count


def compiled(
    function: Callable[..., Any],
    shapes: Sequence[tuple[int, ...]],
    ranges: Sequence[tuple[float, float]],
    *,
    group: int = 2,
    known: str = "proved",
    many: float = inf,
) -> Compiled:
    """`function(b, *inputs)` as a plan; of `many` elements, fewer bytes are worth more rounds."""
    b = Builder(FRAC_BITS, 21, group, halve_from=many)
    ends = zip(shapes, ranges, strict=True)
    xs = [b.input(f"x{k}", "float64", shape, (*r, known)) for k, (shape, r) in enumerate(ends)]
    b.output("y", "float64", function(b, *xs))
    draft = remove_unused(deduplicate(b.draft()))
    assert check_fit(draft, FRAC_BITS) == []
    draft = extended(draft)
    plan = assign_widths(draft, "function", many=many)
    plan = inside(plan)  # what a function costs in a model
    verify_plan(plan)
    return Compiled(plan, encoded_weights(plan, draft))


def on_grid(x: Array) -> Array:
    """x as the client encodes it."""
    return np.rint(np.asarray(x, np.float64) / ULP) * ULP


def points(low: float, high: float, count: int) -> Array:
    """Even points and both ends, on the grid."""
    return on_grid(np.linspace(low, high, count))
