"""mul, matmul, conv: any bilinear z = a∘b + addend, truncated and opened in one round.

    alice: z_A = Δa∘Δb − Δa∘λb_A − λa_A∘Δb + γ_A + (Δd − λd_A)
    bob:   z_B =        − Δa∘λb_B − λa_B∘Δb + γ_B −       λd_B        γ = λa∘λb, dealt by carol

modulo 2^ring, the narrowest ring that holds the accumulator. When one operand is fixed at
deployment (a weight), alice keeps Δw − λw_A and bob −λw_B, packed for the kernel, and λx_i∘Δw is
computed before the input arrives: online each server does ONE ring product. A convolution of 3×3
taps has fewer multiplications than its definition, if shapes and ring allow, and its weight is laid
out in four times the memory (`kernels.linear_bilinear`). Each share is then
truncated on its own (see `kernels.local.finish_product`), masked afresh and exchanged.

Error: < 1 ulp of the result, unbiased. Cost: 1 round, `width` bits each way per output; `ring` bits
dealt. Leaks: nothing: the output is opened under a fresh mask.
Source: ASTRA, ABY2.0, Trio; truncation SecureML's, read in the ring it divides.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mpcserve.kernels import linear, linear_weights, local, packing
from mpcserve.kernels.linear_bilinear import Bilinear, bilinear_for
from mpcserve.kernels.linear_image import geometry_of
from mpcserve.kernels.tasks import Run, one_by_one
from mpcserve.plan.plan import Instruction, Plan
from mpcserve.protocol.opening import open_packed
from mpcserve.protocol.parties import DealIO, Known, Mask, PrepareIO, Side, Steps
from mpcserve.ring import Words, as_words, word_type

Operand = Words | linear_weights.Packed
Pair = tuple[int, int]
Pads = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, repr=False)
class Fixed:
    """A weight as one server uses it: operand `index`, online Δw − λw_A or −λw_B, and Δw."""

    index: int
    online: Operand
    delta: Operand


class Material(NamedTuple):
    """`rest`: all terms known before the input, minus a mask share; both halves if none fixed."""

    rest: Words
    lam: Words
    halves: tuple[Words, Words] | None


def layout_of(plan: Plan, i: Instruction, index: int) -> Hashable:
    """Equal for instructions that lay the same fixed operand out in the same way: in a loop over
    time, one copy serves every step."""
    by = _bilinear(plan, i) if index == 1 and i.op == "conv" else None
    return i.inputs[index], index, i.op, i.attrs["ring"], i.attrs.get("groups"), by


def ready(plan: Plan, i: Instruction, index: int, w: Words) -> Operand:
    """Lay a fixed operand out for the kernel, once per deployment, in words of the ring."""
    w = as_words(w, i.attrs["ring"])
    w = np.asarray(w, order="C")
    if index == 1 and i.op == "matmul":
        return linear_weights.pack_matmul_b(w)
    if index == 1 and i.op == "conv":
        return linear_weights.pack_conv_w(w, i.attrs["groups"], _bilinear(plan, i))
    return w


def _bilinear(plan: Plan, i: Instruction) -> Bilinear | None:
    """How a convolution by a fixed weight is computed with fewer products, if that is faster."""
    x, w = (plan.value(j).shape for j in i.inputs[:2])
    return bilinear_for(geometry_of(x, w, *_geometry(i)), i.attrs["ring"])


def fix(side: Side, plan: Plan, i: Instruction, index: int, delta: Words, half: Words) -> Fixed:
    """Prepare a weight for one server."""
    online = np.asarray(delta - half if side == "alice" else np.negative(half))
    return Fixed(index, ready(plan, i, index, online), ready(plan, i, index, delta))


def _tiles(i: Instruction, a: Operand, b: Operand, run: Run) -> Iterator[linear.Tile]:
    """a∘b front to back: (index of the first word, words that are valid until the next step)."""
    a, b = (as_words(v, i.attrs["ring"]) if isinstance(v, np.ndarray) else v for v in (a, b))
    assert isinstance(a, np.ndarray)
    if i.op == "mul":
        assert isinstance(b, np.ndarray)
        return iter([(0, np.asarray(a * b, order="C").reshape(-1))])
    if i.op == "matmul":
        return linear.matmul_tiles(a, b, run, ring=i.attrs["ring"])
    return linear.conv2d_tiles(a, b, *_geometry(i), run, ring=i.attrs["ring"])


def _whole(i: Instruction, a: Operand, b: Operand) -> Words:
    a, b = (as_words(v, i.attrs["ring"]) if isinstance(v, np.ndarray) else v for v in (a, b))
    assert isinstance(a, np.ndarray)
    if i.op == "mul":
        assert isinstance(b, np.ndarray)
        return np.asarray(a * b, order="C")
    if i.op == "matmul":
        return linear.matmul(a, b, ring=i.attrs["ring"])
    return linear.conv2d(a, b, *_geometry(i), ring=i.attrs["ring"])


def _geometry(i: Instruction) -> tuple[Pair, Pads, Pair, int]:
    at = i.attrs
    return tuple(at["strides"]), tuple(at["pads"]), tuple(at["dilations"]), at["groups"]


def _pair(index: int, fixed: Operand, other: Words) -> tuple[Operand, Operand]:
    return (other, fixed) if index == 1 else (fixed, other)


def deal(
    io: DealIO, i: Instruction, masks: Sequence[Mask], fixed: tuple[int, Operand] | None
) -> Mask:
    """Deal γ = λa∘λb. `fixed`: the operand whose mask belongs to the deployment, ready to use."""
    ring = i.attrs["ring"]
    if fixed is None:
        gamma = _whole(i, masks[0].total(ring), masks[1].total(ring))
    else:
        index, operand = fixed
        gamma = _whole(i, *_pair(index, operand, masks[1 - index].total(ring)))
    io.deal(gamma, ring)
    return io.fresh(i)


def prepare(
    io: PrepareIO,
    i: Instruction,
    halves: Sequence[Words],
    known: Known,
    fixed: Fixed | None,
    run: Run = one_by_one,
) -> tuple[Words, Material]:
    """γ_i − λd_i − λx_i∘Δw, and the output's mask share."""
    ring = i.attrs["ring"]
    rest = io.dealt(i.value.shape, ring)
    lam = io.fresh(i)
    both = None
    if fixed is None:
        both = (halves[0], halves[1])
    else:
        other = halves[1 - fixed.index]
        flat = rest.reshape(-1)
        for start, words in _tiles(i, *_pair(fixed.index, fixed.delta, other), run):
            flat[start : start + words.size] -= words
    if len(i.inputs) == 3:
        rest -= as_words(halves[2], ring)
        if io.leader and i.inputs[2] in known:
            rest += as_words(known[i.inputs[2]], ring)
    return lam, Material(rest.reshape(-1), lam.reshape(-1), both)


def evaluate(
    side: Side,
    i: Instruction,
    material: Material,
    deltas: Sequence[Words],
    known: Known,
    fixed: Fixed | None,
    run: Run = one_by_one,
) -> Steps[Words]:
    """1 round of `width` bits each way."""
    leader, rest, ring = side == "alice", material.rest, i.attrs["ring"]
    if fixed is not None:
        a, b = _pair(fixed.index, fixed.online, deltas[1 - fixed.index])
    else:
        assert material.halves is not None
        half_a, half_b = material.halves
        a, b = deltas[0], np.asarray(deltas[1] - half_b if leader else np.negative(half_b))
        rest = rest - _whole(i, half_a, deltas[1]).reshape(-1)
    if len(i.inputs) == 3 and leader and i.inputs[2] not in known:
        rest = (rest.reshape(i.value.shape) + as_words(deltas[2], ring)).reshape(-1)
    width, out = i.value.width, np.empty(i.value.size, word_type(i.value.width))

    def pieces() -> Iterator[memoryview]:
        for start, words in _tiles(i, a, b, run):
            stop = start + words.size
            count = (stop if stop == out.size else stop // 8 * 8) - start // 8 * 8
            space = packing.packed_space(count, width)
            local.finish_product(
                words,
                start,
                rest,
                material.lam,
                ring,
                i.attrs["truncate"],
                width,
                leader,
                out,
                space,
            )
            yield packing.packed_bytes(space)

    return (yield from open_packed(out, width, pieces())).reshape(i.value.shape)
