"""Precision until a target error is met, with the fewest bytes.

There are two ways to be more exact: a smaller tolerance of what rings of 32 bits may cost, and more
fraction bits in 64. Along either, errors about halve from one level to the next, so that a few
plans, each simulated on samples, find the first level that is enough. Of the two, the plan of fewer
bytes is taken. The simulation is off by a last bit as often as the protocol, which rounds at
random: a normalisation of equal numbers must not look exact. A part of the target is left for worse
luck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import shake_256
from math import ceil, log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.artifact import CompiledModel, Trace
from mpcserve.compiler.graph import Graph, to_onnx
from mpcserve.compiler.layer_errors import entering, layer_errors
from mpcserve.compiler.planning import Made, Precision, Task, encoded_weights, planned, varies
from mpcserve.compiler.running import runner
from mpcserve.errors import ConfigError, ModelError
from mpcserve.plan import Bill, Plan, bill_of
from mpcserve.reference import evaluate_clear

Array = NDArray[Any]
Ints = NDArray[np.int64]
Feed = Mapping[str, Array]

ROOM = 1.5
"""The target, over the simulated error that is allowed."""

TOLERANCES = range(4, 21)
"""Levels of the first way: the tolerance is 2^-level."""

FRAC_BITS = range(6, 27)
"""Levels of the second: fraction bits."""

GUESSES = 3
"""From then on the levels that are left are halved."""

SIMULATED = 8
"""Samples on which plans are simulated, or one batch."""

LIMITING = 5
"""Layers to name where the target is out of reach."""


@dataclass(frozen=True, slots=True)
class Try:
    """A plan and its simulated error."""

    level: int
    made: Made
    error: float

    @property
    def bill(self) -> Bill:
        """Of one evaluation."""
        return bill_of(self.made.plan)

    @property
    def bytes(self) -> int:
        """Online and dealt."""
        return self.bill.online_bytes + self.bill.dealt_bytes


@dataclass
class Way:
    """Levels of precision, each with its plan. `limit`: why there is none beyond."""

    task: Task
    levels: range
    precision: Callable[[int], Precision]
    error: Callable[[Made], float]
    tried: dict[int, Try] = field(default_factory=dict)
    limit: ModelError | None = None

    def at(self, level: int) -> Try | None:
        """None where there is no plan, as its bounds do not fit."""
        if level not in self.tried:
            try:
                made = planned(self.task, self.precision(level))
            except ModelError as e:
                self.limit = e
                return None
            self.tried[level] = Try(level, made, self.error(made))
        return self.tried[level]

    def first_within(self, allowed: float, start: int) -> Try | None:
        """The lowest level with no more than the allowed error."""
        fails, meets, level = self.levels.start - 1, self.levels.stop, start
        best: Try | None = None
        for count in range(len(self.levels)):
            if meets - fails <= 1:
                break
            found = self.at(level)
            if found is None or found.error <= allowed:
                best, meets = found or best, level
            else:
                fails = level
            by = ceil(log2(found.error / allowed)) if found and found.error else 0
            guess = level + by if by and count < GUESSES else (fails + meets) // 2
            level = min(max(guess, fails + 1), meets - 1)
        return best


def planned_within(target: float, task: Task, precision: Precision) -> Made:
    """The plan of fewest bytes whose simulated error leaves room below `target`.

    Raises: ModelError that names the layers where the error enters, if there is none.
    """
    if not target > 0 or precision.frac_bits is not None or not task.ranges.feeds:
        raise _refused(target, precision)
    feeds = task.ranges.feeds[: max(SIMULATED // task.about["batch"], 1)]
    exact = [_floats(task.graph, feed) for feed in feeds]

    def error(made: Made) -> float:
        return max(_error(made, f, e) for f, e in zip(feeds, exact, strict=True))

    usual = planned(task, precision)
    default = Try(0, usual, error(usual))
    ways = list(_ways(task, precision, default, error))
    found = [w.first_within(target / ROOM, start) for w, start in ways]
    enough = [t for t in (*found, default) if t is not None and t.error <= target / ROOM]
    if not enough:
        tried = [default, *(t for w, _ in ways for t in w.tried.values())]
        limit = next((w.limit for w, _ in ways if w.limit), None)
        raise _unreachable(target, task, min(tried, key=lambda t: t.error), limit, feeds[0])
    best = min(enough, key=lambda t: t.bytes)
    return replace(best.made, notes=(*best.made.notes, _cost(target, best, default)))


def _ways(
    task: Task, precision: Precision, default: Try, error: Callable[[Made], float]
) -> Iterator[tuple[Way, int]]:
    """(way, level to begin with)."""
    if precision.ring == "auto" and not varies(default.made.draft):
        way = Way(task, TOLERANCES, lambda k: Precision("auto", None, 2.0**-k), error)
        level = round(-log2(precision.tolerance))
        way.tried[level] = default
        yield way, level
    if precision.ring != 32:
        yield Way(task, FRAC_BITS, lambda k: Precision(64, k), error), 16


def _floats(graph: Graph, feed: Feed) -> list[Array]:
    names = [o.name for o in graph.outputs]
    return [np.asarray(y) for y in runner(to_onnx(graph)).run(names, dict(feed))]


def _error(made: Made, feed: Feed, exact: list[Array]) -> float:
    """Largest error of any real output, and no less than its last bit; labels have none."""
    plan = made.plan
    rows = [feed[i.name] for i in plan.inputs]
    watch = partial(_rounded_at_random, plan)
    got = evaluate_clear(plan, encoded_weights(plan, made.draft), rows, watch)
    errors = [0.0]
    for o, g, e in zip(plan.outputs, got, exact, strict=True):
        if e.dtype.kind == "f":
            if np.isnan(e).any():
                raise ModelError(
                    f"{plan.name}: output {o.name!r} is NaN on samples: its error cannot be told",
                    "calibrate with samples of which the model makes numbers",
                )
            frac_bits = plan.value(o.id).frac_bits
            last_bit = np.ldexp(1.0, -frac_bits) if frac_bits else 0.0
            errors.append(float(np.abs(g.astype(np.float64) - e).max(initial=last_bit)))
    return max(errors)


def _rounded_at_random(plan: Plan, id: int, nearest: Ints) -> Ints | None:
    """What rounding at random may make of what was rounded to the nearest integer.

    Of a fraction that may be any, the result is one more, or one less, in an eighth of all cases.
    """
    if id in plan.static or not plan[id].attrs.get("truncate"):
        return None
    drawn = shake_256(f"{plan.name} {id}".encode()).digest(nearest.size)
    eighth = np.frombuffer(drawn, np.uint8).reshape(nearest.shape) >> 5
    return np.asarray(nearest + (eighth == 1) - (eighth == 0))


def _cost(target: float, best: Try, default: Try) -> str:
    more = best.bytes / max(default.bytes, 1)
    return (
        f"target error {target:g}: simulated {best.error:.2g} on samples (by default "
        f"{default.error:.2g}), for {more:.2f} times the bytes and {best.bill.rounds} rounds "
        f"(by default {default.bill.rounds})"
    )


def _refused(target: float, precision: Precision) -> ConfigError:
    if not target > 0:
        return ConfigError(f"target error is {target:g}, expected more than 0", "give one")
    if precision.frac_bits is not None:
        return ConfigError(
            "both a target error and fraction bits are given", "leave --frac-bits out"
        )
    return ConfigError(
        "a target error needs samples to simulate on", "calibrate with samples (--calibrate)"
    )


def _unreachable(
    target: float, task: Task, best: Try, limit: ModelError | None, feed: Feed
) -> ModelError:
    plan, draft = best.made.plan, best.made.draft
    compiled = CompiledModel(plan, encoded_weights(plan, draft), Trace(task.graph, draft.tensors))
    errors = layer_errors(compiled, feed)
    worst = sorted((e for e in errors if e.own), key=lambda e: -e.own)[:LIMITING]
    where = entering(errors)
    hint = f"the most enters at layer {where.layer!r} ({where.op})" if where else "give more"
    if limit is not None:
        hint += f"; more bits do not fit: {limit.message}"
    return ModelError(
        f"{task.name}: no precision keeps the error below {target:g}: "
        f"simulated {best.error:.2g} at best, of which {ROOM:g} times must fit",
        hint,
        tuple(
            f"layer {e.layer!r} ({e.op}): adds {e.own:.2g} of its range, reaches {e.relative:.2g}"
            for e in worst
        ),
    )
