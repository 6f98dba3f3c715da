"""How far rounding is felt: the variance of an output per unit of variance in each value.

Rounding errors are small, many and nearly independent, so their variances add up and pass through
the program by squares: a product multiplies them by the squared norm of its weights, a ReLU lets
through those of its active elements. What is estimated is one number per value, the mean over its
elements; samples tell how large and how often active values are, ranges where there are none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, inf, log, prod

import numpy as np

from mpcserve.compiler.draft import Draft, Step
from mpcserve.compiler.ranges import combination
from mpcserve.compiler.sensitivity import Change, Felt
from mpcserve.plan.ops import OPS, PRODUCTS

NEAREST = 1 / 12
"""Variance of rounding to the nearest, in ulp²: inputs and weights."""

STOCHASTIC = 1 / 6
"""Of a product's stochastic truncation, on average."""

SHIFTED = 3 / 12
"""Of a local shift, which rounds Δ and both mask shares."""

ACTIVE = 0.5
"""Share of a select's elements that are let through, where no samples tell."""

LEAST_ACTIVE = 1 / 32
"""No fewer are taken to be let through: other inputs may move what samples left as it is."""

LEAST_POWER = 2.0**-24
"""An output's mean square is taken to be no less: one of nothing but zeros allows no error."""

UNSEEN_POWER = 1.0
"""Nor more, where no sample has shown the output: ranges are far too wide to tell its size."""


@dataclass(frozen=True)
class Noise:
    """Per value id. `power`: its mean square. `gain`: variance of the outputs, each in units of
    its squared tolerance, per unit of variance in the value's elements."""

    draft: Draft
    power: tuple[float, ...]
    gain: tuple[float, ...]

    def of_rounding(self, id: int) -> float:
        """What one ulp² of the value's own rounding adds to the outputs' variance."""
        step = self.draft.steps[id]
        if step.op in PRODUCTS:
            return STOCHASTIC * self.gain[id]
        if step.op in ("input", "weight"):
            return NEAREST * self.gain[id]
        return SHIFTED * self.gain[id] if step.op == "shift" else 0.0

    @property
    def variance(self) -> float:
        """Of the outputs, from the rounding of every value."""
        return sum(self.of_rounding(j) * 4.0**-s.frac_bits for j, s in enumerate(self.draft.steps))


def noise_of(draft: Draft, tolerance: float, felt: Felt | None = None) -> Noise:
    """Powers forwards, gains backwards. `tolerance`: error of an output, both root mean squares.

    `felt`: what trials say of inputs and of some layers; layers between those are corrected by what
    lies between.
    """
    power = powers_of(draft)
    found = _Gains(draft, power, tolerance)
    gain, steps = list(found.gain), draft.steps

    def by_trial(changes: Mapping[str, Change], name: str) -> float | None:
        if name not in changes:
            return None
        outputs = zip(draft.outputs, changes[name], strict=True)
        return sum(found.allowed(o.id) * c for o, c in outputs)

    if felt is not None:
        products = _single(draft)
        weights = {j: p for p in products for j in steps[p].inputs[:2] if steps[j].op == "weight"}
        for i in draft.inputs:
            gain[i.id] = by_trial(felt.inputs, i.name) or gain[i.id]
        _correct(gain, {p: by_trial(felt.results, steps[p].layer) for p in products})
        _correct(gain, {w: by_trial(felt.weights, steps[p].layer) for w, p in weights.items()})
    return Noise(draft, power, tuple(gain))


def noise_of_weights(draft: Draft, tolerance: float, felt: Felt) -> dict[int, float]:
    """What rounding each weight of a layer adds to the outputs' variance, as trials tell.

    Also where gains through the graph are none to add up, as those of a root's thresholds. Layers
    between those that were tried are taken to lie between, geometrically.
    """
    powers, steps = powers_of(draft), draft.steps
    rate = [_allowed(draft, powers, tolerance, o.id) for o in draft.outputs]
    operands = ((p, j) for p in _single(draft) for j in steps[p].inputs[:2])
    own = {j: steps[p].layer for p, j in operands if steps[j].op == "weight"}
    tried = {
        k: log(gain)
        for k, layer in enumerate(own.values())
        if layer in felt.weights
        and 0 < (gain := sum(r * c for r, c in zip(rate, felt.weights[layer], strict=True))) < inf
    }
    if not tried:
        return {}
    gains = np.interp(range(len(own)), list(tried), list(tried.values()))
    return {
        w: NEAREST * exp(gain) * 4.0 ** -steps[w].frac_bits
        for w, gain in zip(own, gains, strict=True)
    }


def _single(draft: Draft) -> list[int]:
    """Products that are the only one of their node."""
    products = [id for id, step in enumerate(draft.steps) if step.op in PRODUCTS]
    count = Counter(draft.steps[p].layer for p in products)
    return [p for p in products if count[draft.steps[p].layer] == 1]


def _correct(gain: list[float], tried: Mapping[int, float | None]) -> None:
    """Gains as tried, and all between by a factor that lies between, geometrically."""
    ids = list(tried)
    # A gain may be beyond all floats, or below: then the trial says nothing of its neighbours.
    factors = {
        k: log(ratio)
        for k, id in enumerate(ids)
        if (value := tried[id]) and gain[id] and 0 < (ratio := value / gain[id]) < inf
    }
    if factors:
        between = np.interp(range(len(ids)), list(factors), list(factors.values()))
        for id, factor in zip(ids, between, strict=True):
            gain[id] *= exp(factor)


def inner(step: Step, steps: tuple[Step, ...]) -> int:
    """Terms of each sum that a product computes."""
    if step.op == "matmul":
        return steps[step.inputs[0]].shape[-1]
    return prod(steps[step.inputs[1]].shape[1:]) if step.op == "conv" else 1


def factor_of(draft: Draft, product: int, operand: int, power: tuple[float, ...]) -> float:
    """Sum of the squares that an element of `operand` is multiplied by, per element of the result.

    Of a weight this is its mean squared norm; of a secret value it follows from its mean square.
    """
    step = draft.steps[product]
    x, y = step.inputs[:2]
    return inner(step, draft.steps) * power[y if operand == x else x]


def powers_of(draft: Draft) -> tuple[float, ...]:
    """Mean square of each value."""
    found: list[float] = []
    for step in draft.steps:
        found.append(_power(draft, step, found))
    return tuple(found)


def _power(draft: Draft, step: Step, known: list[float]) -> float:
    if step.op == "weight":
        flat = draft.arrays[step.attrs["name"]].ravel("K")
        return float(flat @ flat) / max(flat.size, 1)
    most = step.interval.magnitude**2
    if step.power is not None:
        return step.power
    if not step.inputs:
        low, high = step.interval.low, step.interval.high
        return float(((low * low + low * high + high * high) / 3).mean())
    xs = [known[j] for j in step.inputs]
    return min(_combined(draft, step, xs), most)


def _combined(draft: Draft, step: Step, xs: list[float]) -> float:
    """Mean square of a step's value, were its operands independent and of mean zero."""
    if step.is_bit:
        return 0.5
    if step.op == "tally":
        values = np.ldexp(np.asarray(step.attrs["values"], np.float64), -step.frac_bits)
        return float(np.square(values).sum()) * ACTIVE
    if step.op in PRODUCTS:
        return inner(step, draft.steps) * xs[0] * xs[1] + sum(xs[2:])
    if step.op == "select":
        return _let_through(step, draft.steps) * sum(xs[1::2])
    if step.op == "sum":
        return xs[0] * prod(draft.steps[step.inputs[0]].shape) / prod(step.shape)
    if step.op == "combine":
        return xs[0] * _squares(step)
    if step.op in ("add", "sub"):
        return xs[0] + xs[1]
    return max(xs) * _factor(draft, step) ** 2


def _squares(step: Step) -> float:
    """Mean over the elements of a `combine` of their squared factors' sum."""
    factors = combination(step)[1]
    return float(np.square(factors).sum() / factors.shape[1])


def _let_through(step: Step, steps: tuple[Step, ...]) -> float:
    """Share of the elements of each operand that a select passes on, constants left aside."""
    count = max(sum(_constant(steps[j]) is None for j in step.inputs[1::2]), 1)
    if step.active is not None and count == 1:
        return max(step.active, LEAST_ACTIVE)
    return ACTIVE / count


def _constant(step: Step) -> float | None:
    """The one number that a value holds, if that is all it holds."""
    held = step.interval
    return held.least if held.least == held.most else None


def _factor(draft: Draft, step: Step) -> float:
    """By what scale and shift multiply the real number."""
    if step.op not in ("scale", "shift"):
        return 1.0
    bits = draft.steps[step.inputs[0]].frac_bits - step.frac_bits
    if step.op == "shift":
        return 2.0 ** (bits - int(step.attrs["bits"]))
    return float(np.ldexp(float(step.attrs["factor"]), bits))


@dataclass
class _Gains:
    """One backward walk."""

    draft: Draft
    power: tuple[float, ...]
    tolerance: float
    gain: list[float] = field(init=False)

    def __post_init__(self) -> None:
        steps = self.draft.steps
        self.gain = [0.0] * len(steps)
        for o in self.draft.outputs:
            self.gain[o.id] += self.allowed(o.id)
        for id in reversed(range(len(steps))):
            step = steps[id]
            if (pair := _extremum(step, steps)) is not None:
                # Each element is that of one operand or the other.
                for j in pair:
                    self.gain[j] += self.gain[id] / 2
            else:
                for position, j in enumerate(step.inputs):
                    self.gain[j] += self._through(id, step, position, j)

    def _through(self, id: int, step: Step, position: int, operand: int) -> float:
        steps, gain = self.draft.steps, self.gain[id]
        if step.op in PRODUCTS and position < 2:
            return gain * factor_of(self.draft, id, operand, self.power)
        if step.op == "select":
            is_bit = position % 2 == 0
            return self._decides(step, position) if is_bit else gain * _let_through(step, steps)
        if step.is_bit:
            return gain
        if step.op == "tally":
            return max((self.allowed(j) for j in _compared(steps, operand)), default=0.0)
        if step.op == "sum":
            return gain * prod(steps[operand].shape) / prod(step.shape)
        if step.op == "combine":
            return gain * _squares(step)
        if step.op in ("concat", "pad"):
            return gain * min(prod(steps[operand].shape) / prod(step.shape), 1.0)
        if step.op == "spectral":
            return gain * _steepest(step, steps[operand]) ** 2
        assert OPS[step.op].local or step.op in (*PRODUCTS, "extend")
        return gain * _factor(self.draft, step) ** 2

    def _decides(self, step: Step, position: int) -> float:
        """Gain of a bit: of a comparison that chooses among other values, as of an output.

        A bit that lets through what it compares does so continuously, and so does one that chooses
        between values that are equal where it changes: an error in it is no more than the error of
        the value.
        """
        bit, chosen = step.inputs[position], step.inputs[position + 1]
        compared = _compared(self.draft.steps, bit)
        if chosen in compared:
            return 0.0
        jumps = (j for j in compared if not _continuous(step, j, self.draft.steps))
        return max(map(self.allowed, jumps), default=0.0)

    def allowed(self, id: int) -> float:
        """Gain of an output."""
        return _allowed(self.draft, self.power, self.tolerance, id)


def _allowed(draft: Draft, power: tuple[float, ...], tolerance: float, id: int) -> float:
    """Gain of an output: one over its squared tolerance."""
    most = UNSEEN_POWER if draft.steps[id].power is None else power[id]
    return 1 / (tolerance**2 * max(min(power[id], most), LEAST_POWER))


def _steepest(step: Step, x: Step) -> float:
    """The steepest slope of sums of waves on the range of their operand."""
    at = step.attrs
    points = np.linspace(x.interval.least, x.interval.most, SAMPLES)
    turn = 2 * np.pi / 2.0 ** (at["width"] - x.frac_bits) * np.arange(1, len(at["waves"]) + 1)
    turns = np.outer(turn, points)
    sine, cosine = (np.reshape(at[name], (at["sums"], -1)) * turn for name in ("sine", "cosine"))
    slopes = sine @ np.cos(turns) - cosine @ np.sin(turns)
    return float(np.abs(slopes).max() / (1 << at["bits"]))


SAMPLES = 513
"""Points at which the slope of a sum of waves is looked at."""


def _compared(steps: tuple[Step, ...], bit: int) -> list[int]:
    """Values whose signs make a bit."""
    step = steps[bit]
    if not step.is_bit:
        return []
    if step.op == "sign":
        return [step.inputs[0]]
    return [j for b in step.inputs for j in _compared(steps, b)]


def _continuous(step: Step, compared: int, steps: tuple[Step, ...]) -> bool:
    """Whether what a select chooses by the sign of a value is the same on both sides of zero.

    So it is at the ends of a Clip, whose bits exclude each other.
    """
    pairs = zip(step.inputs[::2], step.inputs[1::2], strict=True)
    values = [_at_zero(compared, x, steps) for bit, x in pairs if compared in _compared(steps, bit)]
    if len(values) == 1:
        return values[0] == 0.0
    return len(values) == 2 and values[0] is not None and values[0] == values[1]


def _at_zero(compared: int, x: int, steps: tuple[Step, ...]) -> float | None:
    """x where a compared value is zero: a constant, or the same but for public offsets."""
    if (constant := _constant(steps[x])) is not None:
        return constant
    (first, before), (second, by) = _offset(compared, steps), _offset(x, steps)
    return by - before if first == second else None


def _offset(id: int, steps: tuple[Step, ...]) -> tuple[int, float]:
    """(value, number to add to it) that make up a value."""
    total = 0.0
    while steps[id].op == "offset":
        total += float(np.ldexp(float(steps[id].attrs["value"]), -steps[id].frac_bits))
        id = steps[id].inputs[0]
    return id, total


def _extremum(step: Step, steps: tuple[Step, ...]) -> tuple[int, int] | None:
    """x and y of a step that is max(x, y) = y + relu(x − y) or min(x, y) = x − relu(x − y)."""
    if step.op not in ("add", "sub"):
        return None
    rest, part = step.inputs
    choice = steps[part]
    if choice.op != "select" or not choice.attrs["nonnegative"] or len(choice.inputs) != 2:
        return None
    gap = steps[choice.inputs[1]]
    if gap.op != "sub" or rest != gap.inputs[1 if step.op == "add" else 0]:
        return None
    return gap.inputs[0], gap.inputs[1]
