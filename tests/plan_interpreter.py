"""A plan on Python integers: slow, exact, independent of the protocol and of its reference.

Every value is checked against its bound, every accumulator against its ring. Truncations err as the
protocol's may: `rng` draws the stochastic rounding and the shares of every shift; without it they
round to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from mpcserve.plan import Instruction, Plan

Big = Any
"""An object array of Python integers."""


class Interpreter:
    """`values[id]`: the integers of value `id` after `run`."""

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Any],
        rng: np.random.Generator | None = None,
    ) -> None:
        self.plan, self.weights, self.rng = plan, weights, rng
        self.values: dict[int, Big] = {}

    def run(self, *inputs: Any) -> list[Any]:
        """Outputs as reals, of the outputs' dtypes."""
        given = {s.id: (s, x) for s, x in zip(self.plan.inputs, inputs, strict=True)}
        for i in self.plan.instructions:
            xs = [self.values[j] for j in i.inputs]
            if i.op == "input":
                spec, x = given[i.id]
                out = big(spec.encoded(x, i.value))
            elif i.op == "weight":
                out = big(self.weights[i.attrs["name"]])
            else:
                out = getattr(self, f"op_{i.op}")(i, xs)
            out = np.asarray(out, object)
            assert out.shape == i.value.shape, (i, out.shape)
            self._within(i, out, 0)
            self.values[i.id] = out
        return [
            o.decoded(np.ldexp(self.values[o.id].astype(np.float64), -self._frac(o.id)))
            for o in self.plan.outputs
        ]

    def headroom(self) -> float:
        """Bits between the largest value of any instruction and its bound; the least of all."""
        least = 64.0
        for id, x in self.values.items():
            peak = max((abs(v) for v in x.ravel()), default=0)
            least = min(least, self.plan.value(id).bound - np.log2(peak)) if peak > 1 else least
        return least

    def _frac(self, id: int) -> int:
        return self.plan.value(id).frac_bits

    def _within(self, i: Instruction, x: Big, spare: int) -> None:
        limit = 1 << (i.value.bound + spare)
        peak = max((abs(v) for v in x.ravel()), default=0)
        if i.value.width == 1:
            assert peak <= 1
        elif i.op != "wrap" or x.min() < -limit:
            assert peak < limit, f"{i.op} of {i.layer}: |x| = {peak} >= 2^{i.value.bound + spare}"

    def _truncated(self, i: Instruction, z: Big, bits: int) -> Big:
        if not bits:
            return z
        if self.rng is None:
            return (z + (1 << (bits - 1))) >> bits
        return (z + big(self.rng.integers(0, 1 << bits, z.shape, np.int64))) >> bits

    def _product(self, i: Instruction, z: Big, xs: Sequence[Big]) -> Big:
        z = z + xs[2] if len(xs) == 3 else z
        z = np.asarray(z, object)
        limit = 1 << (i.attrs["ring"] - 1)
        assert all(-limit <= v < limit for v in z.ravel()), f"accumulator of {i.layer} wraps"
        return self._truncated(i, z, i.attrs["truncate"])

    def op_constant(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return big(i.attrs["values"]).reshape(i.value.shape)

    def op_add(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return xs[0] + xs[1]

    def op_sub(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return xs[0] - xs[1]

    def op_scale(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return xs[0] * int(i.attrs["factor"])

    def op_offset(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return xs[0] + int(i.attrs["value"])

    def op_shift(self, i: Instruction, xs: Sequence[Big]) -> Big:
        bits = i.attrs["bits"]
        if self.rng is None:
            return (xs[0] + (1 << (bits - 1))) >> bits
        # Delta and the two mask shares are shifted one by one, as the servers do.
        a, b = (big(self.rng.integers(0, 1 << 40, xs[0].shape, np.int64)) for _ in range(2))
        return ((xs[0] + a + b - (1 << (bits - 1))) >> bits) - (a >> bits) - (b >> bits)

    def op_reshape(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return xs[0].reshape(i.attrs["shape"])

    def op_transpose(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return xs[0].transpose(i.attrs["perm"])

    def op_slice(self, i: Instruction, xs: Sequence[Big]) -> Big:
        a = i.attrs
        return xs[0][tuple(map(slice, a["starts"], a["stops"], a["steps"]))]

    def op_concat(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return np.concatenate(xs, axis=i.attrs["axis"])

    def op_pad(self, i: Instruction, xs: Sequence[Big]) -> Big:
        out = np.full(i.value.shape, int(i.attrs["value"]), object)
        inner = tuple(slice(b, b + d) for b, d in zip(i.attrs["before"], xs[0].shape, strict=True))
        out[inner] = xs[0]
        return out

    def op_expand(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return np.broadcast_to(xs[0], i.attrs["shape"])

    def op_gather(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return np.take(xs[0], np.asarray(i.attrs["indices"]), i.attrs["axis"])

    def op_combine(self, i: Instruction, xs: Sequence[Big]) -> Big:
        axis, x = i.attrs["axis"], np.moveaxis(xs[0], i.attrs["axis"], -1)
        tables = (
            np.reshape(list(i.attrs[k]), (i.attrs["taps"], -1)) for k in ("indices", "factors")
        )
        matrix = np.zeros((x.shape[-1], i.value.shape[axis]), object)
        for index, factor in zip(*tables, strict=True):
            for k, (row, value) in enumerate(zip(index, factor, strict=True)):
                matrix[row, k] += int(value)
        return np.moveaxis(x @ matrix, -1, axis)

    def op_sum(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return np.sum(xs[0], axis=tuple(i.attrs["axes"]))

    def op_mul(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return self._product(i, xs[0] * xs[1], xs)

    def op_matmul(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return self._product(i, np.matmul(xs[0], xs[1]), xs)

    def op_conv(self, i: Instruction, xs: Sequence[Big]) -> Big:
        a, (x, w) = i.attrs, xs[:2]
        top, left, bottom, right = a["pads"]
        n, c, h, v = x.shape
        padded = np.zeros((n, c, h + top + bottom, v + left + right), object)
        padded[:, :, top : top + h, left : left + v] = x
        out = np.zeros(i.value.shape, object)
        per, rows = w.shape[1], w.shape[0] // a["groups"]
        (sh, sw), (dh, dw) = a["strides"], a["dilations"]
        oh, ow = out.shape[2:]
        for o, ki, kj in product(range(w.shape[0]), range(w.shape[2]), range(w.shape[3])):
            start = o // rows * per
            there = padded[:, start : start + per, ki * dh :, kj * dw :]
            taps = there[:, :, : (oh - 1) * sh + 1 : sh, : (ow - 1) * sw + 1 : sw]
            out[:, o] += (taps * w[o, :, ki, kj].reshape(1, -1, 1, 1)).sum(axis=1)
        return self._product(i, out, xs)

    def op_sign(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return big(np.asarray(xs[0] < 0))

    def op_all(self, i: Instruction, xs: Sequence[Big]) -> Big:
        held = [x == w for x, w in zip(xs, i.attrs["when"], strict=True)]
        return big(np.logical_and.reduce(held))

    def op_select(self, i: Instruction, xs: Sequence[Big]) -> Big:
        held = [xs[k] == i.attrs["when"] for k in range(0, len(xs), 2)]
        assert i.attrs.get("many") or np.max(np.sum(held, axis=0)) <= 1
        chosen = sum(np.where(b, x, 0) for b, x in zip(held, xs[1::2], strict=True))
        if i.attrs["nonnegative"]:
            assert all(v >= 0 for v in chosen.ravel())
        return chosen

    def op_rectify(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return big(np.maximum(xs[0], 0))

    def op_wrap(self, i: Instruction, xs: Sequence[Big]) -> Big:
        half = 1 << (i.attrs["bits"] - 1)
        return (xs[0] + half) % (2 * half) - half

    def op_odd(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return xs[0] % 2

    def op_xor(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return (sum(xs) + i.attrs["flip"]) % 2

    def op_tally(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return sum(v * x for v, x in zip(i.attrs["values"], xs[0], strict=True))

    def op_spectral(self, i: Instruction, xs: Sequence[Big]) -> Big:
        at = i.attrs
        angle = np.asarray(xs[0] % (1 << at["width"]), np.float64) * (2 * np.pi / 2 ** at["width"])
        count = len(at["waves"])
        sums = [
            sum(
                at["sine"][row + k] * np.sin((k + 1) * angle)
                + at["cosine"][row + k] * np.cos((k + 1) * angle)
                for k in range(count)
            )
            for row in range(0, count * at["sums"], count)
        ]
        waves = np.stack(sums, -1).reshape(i.value.shape)
        return big(np.rint(np.ldexp(waves, max(at["waves"]) - at["truncate"])))

    def op_extend(self, i: Instruction, xs: Sequence[Big]) -> Big:
        return xs[0]


def big(x: Any) -> Big:
    """Any integers (or integral floats) as Python integers."""
    array = np.asarray(x)
    return np.array([int(v) for v in array.ravel()], object).reshape(array.shape)
