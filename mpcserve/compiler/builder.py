"""The Builder that lowering functions call: each method emits one instruction, returns its value.

A `Ref` names a secret value of the plan. Widths, rings and chunks are decided later, by demand; the
Builder keeps shapes, fraction bits and intervals (see `values`). Steps that would do nothing are
not emitted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import inf, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler import interval as iv
from mpcserve.compiler.draft import Draft, Seen, Shape, Step
from mpcserve.compiler.dtypes import is_integer
from mpcserve.compiler.fourier import Fits
from mpcserve.compiler.interval import Interval
from mpcserve.compiler.padding import TreeBounds
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.ranges import encoded, spanned
from mpcserve.compiler.values import Ref, Values, excess_of
from mpcserve.plan.ops import BIT_MOVES, BITS, MAX_ALL, OPS
from mpcserve.plan.plan import InputSpec, OutputSpec
from mpcserve.plan.table import listed

__all__ = ["WAVE_BITS", "Array", "Builder", "Operand", "Ref"]

Array = NDArray[Any]

REARRANGES = ("reshape", "transpose", "slice", "gather", "expand")

WAVE_BITS = 20
"""Bits of sines and coefficients: a dozen of them err by 1e-5 together."""


Operand = Ref | Array
"""What a lowering function receives per ONNX input: a secret value, or a constant of the model."""


class Builder(Values):
    """Emits the draft. `layer`, `n_outputs` and `opset` describe the ONNX node being lowered,
    `seen` what samples showed of its first output.

    `group`: of how many values a maximum may be found at once (see `strategy`). `trees`: what
    their padding may tell. `halve_from`: elements from which on an activation is made of two
    halves: two more rounds, for a third of the dealt bytes. `coarse`: layers whose operands give up
    fraction bits where a product of them needs more than 64 bits.
    """

    def __init__(
        self,
        frac_bits: int,
        opset: int,
        group: int = 2,
        trees: TreeBounds | None = None,
        halve_from: float = inf,
        coarse: Collection[str] = (),
    ) -> None:
        super().__init__(frac_bits)
        self.trees = trees or TreeBounds()
        self.halve_from = halve_from
        self.coarse = coarse
        self.fits = Fits()
        self.group = group
        self.opset = opset
        self.layer = ""
        self.n_outputs = 1
        self.seen: Seen | None = None
        self._arrays: dict[str, NDArray[np.floating]] = {}
        self._inputs: list[InputSpec] = []
        self._outputs: list[OutputSpec] = []
        self._labels: dict[int, tuple[str, ...]] = {}
        self.choices: dict[int, Ref] = {}
        self.found: dict[int, Ref] = {}

    # sources

    def input(
        self,
        name: str,
        dtype: str,
        shape: Shape,
        reach: tuple[float, float, str],
        classes: int = 0,
    ) -> Ref:
        """A data owner's input with its declared range (low, high, known).

        With `classes`, each whole number is shared as a row of so many, a 1 in its place.
        """
        low, high, known = reach
        frac_bits = 0 if is_integer(dtype) else self.frac_bits
        whole = (*shape, classes) if classes else shape
        held = iv.uniform(0.0, 1.0, len(whole)) if classes else iv.uniform(low, high, len(whole))
        held = held if classes else iv.widen(held, 2.0 ** -(frac_bits + 1))
        ref = self._emit("input", (), {"name": name}, whole, frac_bits, (held, known))
        self._inputs.append(InputSpec(name, ref.id, dtype, shape, low, high, known, classes))
        return ref

    def output(self, name: str, dtype: str, x: Ref) -> None:
        """A result that is revealed to the data owner."""
        labels = self.labels(x)
        self._outputs.append(OutputSpec(name, x.id, "str" if labels else dtype, x.shape, labels))

    def labelled(self, x: Ref, labels: Sequence[str]) -> Ref:
        """x, an index of names that the plan shows to the data owner; the same Ref."""
        self._labels[x.id] = tuple(labels)
        return x

    def labels(self, x: Ref) -> tuple[str, ...]:
        """The names that x, or what it merely rearranges, is an index of; none for a number."""
        step = self._steps[x.id]
        if x.id not in self._labels and step.op in REARRANGES:
            return self.labels(self.ref(step.inputs[0]))
        return self._labels.get(x.id, ())

    def weight(
        self,
        values: Array,
        frac_bits: int | None = None,
        span: tuple[float, float] | None = None,
    ) -> Ref:
        """A secret tensor of the model owner. Fraction bits may be tuned later.

        `span`: what bounds are computed from instead of the values, of which they then tell less.
        """
        frac_bits = self.frac_bits if frac_bits is None else frac_bits
        reals = np.asarray(values)
        if reals.dtype != np.float32:  # kept as it is: half the memory
            reals = reals.astype(np.float64)
        if not np.isfinite(reals).all():
            raise Unsupported(
                "adds or multiplies infinite numbers", "an infinite mask must go into a softmax"
            )
        name = f"w{len(self._arrays)}"
        self._arrays[name] = reals
        rank = reals.ndim
        held = iv.uniform(*span, rank) if span else iv.exactly(encoded(reals, frac_bits))
        ref = self._emit("weight", (), {"name": name}, reals.shape, frac_bits, (held, "exact"))
        if span is not None:
            self._steps[ref.id] = spanned(self._steps[ref.id], *span)
        return ref

    def constant(self, values: Array, frac_bits: int = 0) -> Ref:
        """A public tensor that the plan itself shows: structure, never a weight."""
        array = np.asarray(values, np.float64)
        words = np.rint(np.ldexp(array, frac_bits)).astype(np.int64)
        attrs = {"shape": list(array.shape), "values": listed(words.ravel())}
        held = iv.exactly(encoded(array, frac_bits))
        return self._emit("constant", (), attrs, array.shape, frac_bits, (held, "exact"))

    # local: no rounds, no bytes

    def add(self, x: Ref, y: Ref) -> Ref:
        """x + y with broadcasting; equal fraction bits."""
        return self._local("add", [x, y], np.broadcast_shapes(x.shape, y.shape))

    def sub(self, x: Ref, y: Ref) -> Ref:
        """x − y with broadcasting; equal fraction bits."""
        return self._local("sub", [x, y], np.broadcast_shapes(x.shape, y.shape))

    def scale(self, x: Ref, factor: int, raise_bits: int = 0) -> Ref:
        """x · factor as integers; read with `raise_bits` more fraction bits."""
        if factor == 1 and raise_bits == 0:
            return x
        frac_bits = x.frac_bits + raise_bits
        return self._emit("scale", (x.id,), {"factor": int(factor)}, x.shape, frac_bits)

    def offset(self, x: Ref, value: float) -> Ref:
        """x + a public real number."""
        steps = int(np.rint(np.ldexp(value, x.frac_bits)))
        return self._local("offset", [x], x.shape, value=steps) if steps else x

    def shift(self, x: Ref, bits: int, lower_bits: int | None = None) -> Ref:
        """The integers divided by 2^bits, rounded; read with `lower_bits` (default: bits) fewer."""
        if bits == 0 and not lower_bits:
            return x
        frac_bits = x.frac_bits - (bits if lower_bits is None else lower_bits)
        return self._emit("shift", (x.id,), {"bits": bits}, x.shape, frac_bits)

    def reshape(self, x: Ref, shape: Sequence[int]) -> Ref:
        """The same elements in another shape."""
        new = tuple(map(int, shape))
        return x if new == x.shape else self._local("reshape", [x], new, shape=list(new))

    def transpose(self, x: Ref, perm: Sequence[int]) -> Ref:
        """Axes permuted as by numpy.transpose: a reshape where only axes of length 1 move."""
        perm = [int(p) for p in perm]
        shape = tuple(x.shape[p] for p in perm)
        long = [p for p in perm if x.shape[p] > 1]
        if long == sorted(long):
            return self.reshape(x, shape)
        return self._local("transpose", [x], shape, perm=perm)

    def slice(self, x: Ref, axis: int, start: int, stop: int, step: int = 1) -> Ref:
        """x[start:stop:step] along one axis; 0 ≤ start ≤ stop, step ≥ 1."""
        if (start, stop, step) == (0, x.shape[axis], 1):
            return x
        part, first = self._joined_there(x, axis, start, stop)
        if part is not x:
            return self.slice(part, axis, start - first, stop - first, step)
        starts, stops, steps = [0] * len(x.shape), list(x.shape), [1] * len(x.shape)
        starts[axis], stops[axis], steps[axis] = int(start), int(stop), int(step)
        length = len(range(start, stop, step))
        shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
        return self._local("slice", [x], shape, starts=starts, stops=stops, steps=steps)

    def concat(self, xs: Sequence[Ref], axis: int) -> Ref:
        """Joined along an axis; equal fraction bits."""
        if len(xs) == 1:
            return xs[0]
        length = sum(x.shape[axis] for x in xs)
        shape = (*xs[0].shape[:axis], length, *xs[0].shape[axis + 1 :])
        return self._local("concat", xs, shape, axis=axis)

    def pad(self, x: Ref, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Ref:
        """Surrounded by a public value."""
        if not any(before) and not any(after):
            return x
        shape = tuple(d + b + a for d, b, a in zip(x.shape, before, after, strict=True))
        if not np.isfinite(value):
            raise Unsupported("pads with an infinite number", "pad with a large finite one")
        word = int(np.rint(np.ldexp(value, x.frac_bits)))
        return self._local("pad", [x], shape, before=list(before), after=list(after), value=word)

    def expand(self, x: Ref, shape: Sequence[int]) -> Ref:
        """Broadcast to `shape`."""
        new = tuple(map(int, shape))
        return x if new == x.shape else self._local("expand", [x], new, shape=list(new))

    def gather(self, x: Ref, axis: int, indices: Sequence[int] | Array) -> Ref:
        """Elements at public indices along an axis."""
        where = np.asarray(indices, np.int64)
        if np.array_equal(where, np.arange(x.shape[axis])):
            return x
        if where.size:
            part, first = self._joined_there(x, axis, int(where.min()), int(where.max()) + 1)
            if part is not x:
                return self.gather(part, axis, where - first)
        shape = (*x.shape[:axis], len(where), *x.shape[axis + 1 :])
        return self._local("gather", [x], shape, axis=axis, indices=listed(where))

    def _joined_there(self, x: Ref, axis: int, start: int, stop: int) -> tuple[Ref, int]:
        """Where x joins parts along `axis`: the part of these elements, and at which it begins."""
        unit = prod(x.shape[axis + 1 :])
        if stop <= start or prod(x.shape[:axis]) > 1:
            return x, 0
        part, first = self.part_of(x, start * unit, stop * unit)
        count = prod(part.shape)
        if count == prod(x.shape) or count % unit or first % unit:
            return x, 0
        shape = (*x.shape[:axis], count // unit, *x.shape[axis + 1 :])
        return self.reshape(part, shape), first // unit

    def combine(self, x: Ref, axis: int, indices: Array, factors: Array) -> Ref:
        """Σ_t factors[t, k] · x[indices[t, k]] along an axis, whole numbers both: local."""
        shape = (*x.shape[:axis], indices.shape[1], *x.shape[axis + 1 :])
        tables = {"indices": listed(indices.ravel()), "factors": listed(factors.ravel())}
        return self._local("combine", [x], shape, axis=axis, taps=len(indices), **tables)

    def sum(self, x: Ref, axes: Sequence[int]) -> Ref:
        """Sum over `axes`, which are dropped."""
        if not axes:
            return x
        shape = tuple(d for i, d in enumerate(x.shape) if i not in axes)
        return self._local("sum", [x], shape, axes=sorted(int(a) for a in axes))

    # bits: xor and what moves them is local

    def is_bit(self, x: Ref) -> bool:
        """Whether x is a bit, shared mod 2, and not a number."""
        return self._steps[x.id].is_bit

    def xor(self, bits: Sequence[Ref], flip: int = 0) -> Ref:
        """The sum of bits mod 2, and `flip`: local."""
        shape = np.broadcast_shapes(*(x.shape for x in bits))
        if len(bits) == 1:
            step = self._steps[bits[0].id]
            if step.op == "xor" and len(step.inputs) == 1:
                bits, flip = [self.ref(step.inputs[0])], flip ^ step.attrs["flip"]
            if not flip:
                return bits[0]
        return self._local("xor", [self.expand(x, shape) for x in bits], shape, flip=flip)

    def flip(self, bit: Ref) -> Ref:
        """Not `bit`: local."""
        return self.xor([bit], 1)

    def odd(self, x: Ref) -> Ref:
        """The lowest bit of an integer, so the bit of a number that is 0 or 1: local."""
        if x.frac_bits:
            raise AssertionError("the lowest bit of a number with fraction bits")
        return self._local("odd", [x], x.shape)

    def wrap(self, x: Ref, bits: int) -> Ref:
        """x mod 2^bits ulp, as the number next to zero: local. Only signs and promised
        selects can read it, as it has no bit to spare."""
        return x if self.bound(x) < bits else self._local("wrap", [x], x.shape, bits=bits)

    # interactive: one round or more

    def mul(self, x: Ref, y: Ref, addend: Ref | None = None, to: int | None = None) -> Ref:
        """x · y elementwise (+ addend); `to`: fraction bits of the result."""
        shape = np.broadcast_shapes(x.shape, y.shape)
        return self._product("mul", x, y, addend, to, shape, {})

    def matmul(self, x: Ref, y: Ref, addend: Ref | None = None, to: int | None = None) -> Ref:
        """x @ y (+ addend), batch axes broadcast; both of rank ≥ 2."""
        lead = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        return self._product("matmul", x, y, addend, to, (*lead, x.shape[-2], y.shape[-1]), {})

    def conv(
        self,
        x: Ref,
        w: Ref,
        addend: Ref | None = None,
        to: int | None = None,
        *,
        strides: Sequence[int] = (1, 1),
        pads: Sequence[int] = (0, 0, 0, 0),
        dilations: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> Ref:
        """2-d convolution of N×C×H×W by O×C/groups×kh×kw; pads top, left, bottom, right."""
        attrs: dict[str, Any] = {
            "strides": list(map(int, strides)),
            "pads": list(map(int, pads)),
            "dilations": list(map(int, dilations)),
            "groups": int(groups),
        }
        return self._product("conv", x, w, addend, to, None, attrs)

    def extend(self, x: Ref) -> Ref:
        """x with as many bits as its readers need: what makes x may then have few."""
        return self._emit("extend", (x.id,), {}, x.shape, x.frac_bits)

    def sign(self, x: Ref) -> Ref:
        """The bit [x < 0]."""
        bits = iv.uniform(0.0, 1.0, len(x.shape))
        return self._emit("sign", (x.id,), {}, x.shape, 0, (bits, "proved"))

    def all(self, bits: Sequence[Ref], when: Sequence[int]) -> Ref:
        """The bit [every bit equals its `when`]: a round for up to 8 bits, two up to 64, …."""
        while len(bits) > MAX_ALL:
            parts = [slice(k, k + MAX_ALL) for k in range(0, len(bits), MAX_ALL)]
            bits = [self.all(bits[p], when[p]) for p in parts]
            when = [1] * len(bits)
        if len(bits) == 1:
            return self.xor(bits, 1 - when[0])
        return self._emit("all", tuple(x.id for x in bits), {"when": list(when)}, bits[0].shape, 0)

    def choose(self, bits: Sequence[Ref], xs: Sequence[Ref], nonnegative: bool = False) -> Ref:
        """The x whose bit is set, else 0; at most one bit may be set. One round."""
        ids = tuple(r.id for pair in zip(bits, xs, strict=True) for r in pair)
        attrs = {"when": 1, "nonnegative": nonnegative}
        return self._emit("select", ids, attrs, xs[0].shape, xs[0].frac_bits)

    def select(self, bit: Ref, x: Ref, when: int, nonnegative: bool = False) -> Ref:
        """x where bit = `when`, else 0. `nonnegative` promises x ≥ 0 where selected."""
        attrs = {"when": when, "nonnegative": nonnegative}
        return self._emit("select", (bit.id, x.id), attrs, x.shape, x.frac_bits)

    def weighted(self, bits: Sequence[Ref], values: Sequence[float], frac_bits: int) -> Ref:
        """The sum of the public values whose bits are set, however many. One round."""
        rows = [self.reshape(x, (1, *x.shape)) for x in bits]
        return self.tally(self.concat(rows, 0), values, frac_bits)

    def tally(self, bits: Ref, values: Sequence[float], frac_bits: int = 0) -> Ref:
        """The sum along the first axis of the public values whose bits are set. One round."""
        words = np.rint(np.ldexp(np.asarray(values, np.float64), frac_bits)).astype(np.int64)
        return self._emit("tally", (bits.id,), {"values": listed(words)}, bits.shape[1:], frac_bits)

    def number(self, bit: Ref, value: float = 1.0, frac_bits: int = 0) -> Ref:
        """A public value where the bit is set, else 0. One round."""
        return self.weighted([bit], [value], frac_bits)

    def pick(self, bits: Sequence[Ref], xs: Sequence[Ref], nonnegative: bool = False) -> Ref:
        """The sum of the x whose bits are set, however many. One round."""
        ids = tuple(r.id for pair in zip(bits, xs, strict=True) for r in pair)
        attrs = {"when": 1, "nonnegative": nonnegative, "many": True}
        return self._emit("select", ids, attrs, xs[0].shape, xs[0].frac_bits)

    def spectral(
        self,
        x: Ref,
        period_bits: int,
        sine: Array,
        cosine: Array,
        to: int | None = None,
        bits: int = WAVE_BITS,
        waves: Sequence[int] | None = None,
    ) -> Ref:
        """Σ_k sine[k]·sin((k + 1)ωx) + cosine[k]·cos((k + 1)ωx), a turn per 2^period_bits ulp.

        Several sums where sine and cosine have a row for each: they lie along a new last axis.
        `to`: fraction bits of the result; `bits`: of coefficients; `waves`: of each harmonic.
        """
        to = self.frac_bits if to is None else to
        rows = np.rint(np.ldexp(np.stack([np.atleast_2d(sine), np.atleast_2d(cosine)]), bits))
        sums = rows.shape[1]
        waves = list(waves or [bits] * rows.shape[2])
        attrs = {
            "width": period_bits,
            "bits": bits,
            "waves": waves,
            "sums": sums,
            "truncate": bits + max(waves) - to,
            "sine": listed(rows[0].astype(np.int64).ravel()),
            "cosine": listed(rows[1].astype(np.int64).ravel()),
        }
        shape = x.shape if sums == 1 else (*x.shape, sums)
        return self._emit("spectral", (x.id,), attrs, shape, to)

    # the whole

    def draft(self) -> Draft:
        """Everything emitted so far."""
        return Draft(
            tuple(self._steps), tuple(self._inputs), tuple(self._outputs), dict(self._arrays)
        )

    # emission

    def _product(
        self,
        op: str,
        x: Ref,
        y: Ref,
        addend: Ref | None,
        to: int | None,
        shape: Shape | None,
        attrs: dict[str, Any],
    ) -> Ref:
        full = x.frac_bits + y.frac_bits
        to = self.frac_bits if to is None else to
        attrs = attrs | {"truncate": max(full - to, 0)}
        if shape is None:
            rule = OPS[op].shape
            assert rule is not None
            shape = rule([x.shape, y.shape], attrs)
        if addend is not None and addend.frac_bits != full:
            raise AssertionError(f"addend has {addend.frac_bits} fraction bits, expected {full}")
        ids = (x.id, y.id) if addend is None else (x.id, y.id, addend.id)
        made = self._emit(op, ids, attrs, shape, full - attrs["truncate"])
        short = excess_of(self.step(made))
        if short <= 0 or addend is not None or self.layer not in self.coarse:
            return made
        coarser = self._coarser(x, y, short)
        if coarser == (x, y):
            return made
        return self._product(op, *coarser, None, to, shape, attrs)

    def _coarser(self, x: Ref, y: Ref, bits: int) -> tuple[Ref, Ref]:
        """Factors whose product needs so many bits less, as far as they have any after the point.

        A weight stays as it is; it is tuned later. Error: 1.5 ulp of the coarser factors.
        """
        known = [self.step(r).op == "weight" for r in (x, y)]
        if x == y:
            half = self.shift(x, min(-(-bits // 2), x.frac_bits))
            return half, half
        if known[0] or (not known[1] and self.bound(y) > self.bound(x)):
            return x, self.shift(y, min(bits, y.frac_bits))
        return self.shift(x, min(bits, x.frac_bits)), y

    def _local(self, op: str, xs: Sequence[Ref], shape: Shape, /, **attrs: Any) -> Ref:
        frac_bits = {0 if op == "odd" else x.frac_bits for x in xs}
        if len(frac_bits) != 1:
            raise AssertionError(f"{op} of values with fraction bits {sorted(frac_bits)}")
        return self._emit(op, tuple(x.id for x in xs), attrs, tuple(shape), frac_bits.pop())

    def _emit(
        self,
        op: str,
        inputs: tuple[int, ...],
        attrs: Mapping[str, Any],
        shape: Sequence[int],
        frac_bits: int,
        held: tuple[Interval, str] | None = None,
    ) -> Ref:
        if prod(shape) == 0:
            raise Unsupported("a tensor with no elements", "remove the empty branch")
        interval, known = held or (iv.uniform(0.0, 0.0, len(shape)), "exact")
        moved = op in BIT_MOVES and all(self._steps[j].is_bit for j in inputs)
        step = Step(
            op, inputs, attrs, tuple(shape), frac_bits, interval, known, self.layer,
            is_bit=op in BITS or moved,
        )  # fmt: skip
        self._steps.append(self._settle(step))
        return Ref(len(self._steps) - 1, tuple(shape), frac_bits)
