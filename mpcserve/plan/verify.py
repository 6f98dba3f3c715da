"""The law of the plan: what must hold before a server runs it, checked after every compiler pass.

Above all: a bound that does not fit its width would wrap, and a wrapped value is a wrong answer.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpcserve.errors import PlanError
from mpcserve.plan.ops import BIT_MOVES, BITS, OPS, PRODUCTS
from mpcserve.plan.plan import RING_BITS, Instruction, Plan, Value

KNOWN = ("exact", "proved", "calibrated", "assumed")
MAX_CHUNK = 8
"""2^8 − 1 dealt bits for a chunk of eight: more is never cheaper than one more chunk."""
MAX_RECTIFIED = 6
"""Chunks of a `rectify`: nearly 300 dealt numbers an element."""

MIN_PERIOD, MAX_PERIOD = 11, 26
"""Bits of a spectral function's period: more than the coarse table has, few enough for the fine."""

MAX_HARMONICS, MAX_WAVE_BITS, MAX_SUMS = 64, 24, 8


def verify_plan(plan: Plan) -> None:
    """Check the whole law; collect every breach. Raises: PlanError listing all of them."""
    problems = [*_structure(plan)]
    if not problems:
        for i in plan.instructions:
            where = f"instruction {i.id} {i.op}" + (f" ({i.layer})" if i.layer else "")
            problems += [f"{where}: {p}" for p in _instruction(plan, i)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise PlanError(
            f"plan {plan.name!r} is not valid: {problems[0]}{more}",
            "compile the model again with this version of mpcserve",
            tuple(problems),
        )


def _structure(plan: Plan) -> Iterator[str]:
    for position, i in enumerate(plan.instructions):
        if i.id != position:
            yield f"instruction {position} has id {i.id}"
        if i.op not in OPS:
            yield f"instruction {position}: unknown op {i.op!r}"
            continue
        low, high = OPS[i.op].arity
        if not low <= len(i.inputs) <= high:
            yield f"instruction {position} {i.op}: {len(i.inputs)} operands, expected {low}..{high}"
        if any(not 0 <= j < position for j in i.inputs):
            yield f"instruction {position} {i.op}: operand not defined before it"
        if missing := [a for a in OPS[i.op].attrs if a not in i.attrs]:
            yield f"instruction {position} {i.op}: missing attributes {', '.join(missing)}"
    inputs = [i.id for i in plan.instructions if i.op == "input"]
    if sorted(s.id for s in plan.inputs) != inputs:
        yield "declared inputs are not the input instructions"
    if not plan.outputs:
        yield "no output"
    for o in plan.outputs:
        if not 0 <= o.id < len(plan.instructions):
            yield f"output {o.name!r} names no value"
        elif o.columns and (not o.shape or len(o.columns) != o.shape[-1]):
            yield f"output {o.name!r} has {len(o.columns)} names for columns of shape {o.shape}"
    yield from plan.client.problems([s.name for s in plan.inputs])
    names = [i.attrs.get("name") for i in plan.instructions if i.op == "weight"]
    if len(set(names)) != len(names):
        yield "two weights of one name"


def _instruction(plan: Plan, i: Instruction) -> Iterator[str]:
    v, xs = i.value, plan.operands(i)
    rule = OPS[i.op].shape
    if rule is not None:
        try:
            shape = rule([x.shape for x in xs], i.attrs)
        except (ValueError, TypeError, IndexError, KeyError) as e:
            yield str(e)
            return
        if shape != v.shape:
            yield f"shape {v.shape}, expected {shape}"
    if v.known not in KNOWN:
        yield f"bound known by {v.known!r}"
    if i.op in BITS or (i.op in BIT_MOVES and all(x.width == 1 for x in xs)):
        if (v.width, v.frac_bits, v.bound) != (1, 0, 0):
            yield "a bit has width 1, frac_bits 0 and bound 0"
    elif not 1 < v.width <= RING_BITS:
        yield f"width {v.width} outside 2..{RING_BITS}"
    elif not 0 <= v.bound <= v.width - 1:
        yield f"bound 2^{v.bound} does not fit width {v.width}"
    bits = xs[::2] if i.op == "select" else xs if i.op in ("all", "xor", "tally") else []
    if any(x.width != 1 for x in bits):
        yield "takes something for a bit that is none"
    moved = i.op in BIT_MOVES and v.width == 1
    if not moved and sum(x.width == 1 for x in xs) > len(bits):
        yield "takes a bit for a number"
    yield from _widths(i, v, xs)


def _widths(i: Instruction, v: Value, xs: list[Value]) -> Iterator[str]:
    if i.op in PRODUCTS:
        yield from _product(i, v, xs)
    elif i.op == "spectral":
        yield from _spectral(i, v, xs[0])
    elif i.op == "sign":
        m, (x,) = sum(i.attrs["chunks"]) + 1, xs
        if m > x.width or x.bound > m - 1:
            yield f"reads {m} bits of width {x.width}, bound 2^{x.bound}"
        if not all(1 <= c <= MAX_CHUNK for c in i.attrs["chunks"]):
            yield f"chunks {i.attrs['chunks']} outside 1..{MAX_CHUNK}"
        if sum(i.attrs["groups"]) != len(i.attrs["chunks"]) or min(i.attrs["groups"]) < 1:
            yield f"groups {i.attrs['groups']} do not partition {len(i.attrs['chunks'])} chunks"
    elif i.op == "rectify":
        yield from _rectify(i, v, xs[0])
    elif i.op in ("select", "extend"):
        yield from _select(i, v, xs)
    elif OPS[i.op].local:
        spare = i.attrs["bits"] if i.op == "shift" else 0
        if any(v.width > x.width - spare for x in xs):
            yield f"width {v.width} from operands of {[x.width for x in xs]} less {spare}"
        if i.op == "wrap" and v.width > i.attrs["bits"]:
            yield f"width {v.width} of a number mod 2^{i.attrs['bits']}"
        keeps = i.op not in ("scale", "shift", "odd")
        if keeps and any(v.frac_bits != x.frac_bits for x in xs):
            yield f"frac_bits {v.frac_bits} from {[x.frac_bits for x in xs]}"


def _rectify(i: Instruction, v: Value, x: Value) -> Iterator[str]:
    chunks = i.attrs["chunks"]
    m = sum(chunks) + 1
    if m > x.width or x.bound > m - 1:
        yield f"reads {m} bits of width {x.width}, bound 2^{x.bound}"
    if m > v.width:
        yield f"reads {m} bits to write {v.width}"
    if v.frac_bits != x.frac_bits:
        yield f"frac_bits {v.frac_bits}, expected {x.frac_bits}"
    if not (2 <= len(chunks) <= MAX_RECTIFIED and all(1 <= c <= MAX_CHUNK for c in chunks)):
        yield f"chunks {chunks}: expected 2..{MAX_RECTIFIED} of 1..{MAX_CHUNK}"


def _select(i: Instruction, v: Value, xs: list[Value]) -> Iterator[str]:
    spare = 1 if i.op == "select" and i.attrs["nonnegative"] else 2
    several = i.op == "select"
    read, widths = (xs[1::2], i.attrs["widths"]) if several else (xs, [i.attrs["width"]])
    for x, m in zip(read, widths, strict=True):
        if m > x.width or x.bound > m - spare:
            yield f"reads {m} bits of width {x.width}, bound 2^{x.bound}"
        if v.frac_bits != x.frac_bits:
            yield f"frac_bits {v.frac_bits}, expected {x.frac_bits}"
        if i.op == "extend" and v.width <= m:
            yield f"extends width {m} to {v.width}"
        if i.op == "select" and m > v.width:
            yield f"reads {m} bits to write {v.width}"


def _spectral(i: Instruction, v: Value, x: Value) -> Iterator[str]:
    at = i.attrs
    if not MIN_PERIOD <= at["width"] <= min(x.width, MAX_PERIOD):
        yield f"a period of {at['width']} bits, of an operand of {x.width}"
    count = len(at["waves"])
    if not 1 <= count <= MAX_HARMONICS or not 1 <= at["sums"] <= MAX_SUMS:
        yield f"{at['sums']} sums of {count} harmonics"
    if {len(at["sine"]), len(at["cosine"])} != {count * at["sums"]}:
        yield f"{len(at['sine'])} sines and {len(at['cosine'])} cosines"
    if not all(1 <= bits <= MAX_WAVE_BITS for bits in (at["bits"], *at["waves"])):
        yield f"waves of {at['waves']} bits, coefficients of {at['bits']}"
    if any(abs(c) >> (at["bits"] + 8) for c in (*at["sine"], *at["cosine"])):
        yield "a coefficient of 256 or more"
    t, ring = at["truncate"], at["ring"]
    if not 0 <= t < ring <= RING_BITS or v.width > ring - t or v.bound + t > ring - 1:
        yield f"width {v.width}, bound 2^{v.bound} from ring {ring} - truncate {t}"
    scale = at["bits"] + max(at["waves"], default=0)
    if v.frac_bits != scale - t:
        yield f"frac_bits {v.frac_bits}, expected {scale - t}"
    if ring - max(at["waves"], default=0) + min(at["waves"], default=0) < 1:
        yield f"waves of {at['waves']} bits in a ring of {ring}"


def _product(i: Instruction, v: Value, xs: list[Value]) -> Iterator[str]:
    ring, t = i.attrs["ring"], i.attrs["truncate"]
    if not (0 <= t < ring <= RING_BITS):
        yield f"truncates {t} bits of ring {ring}"
    if any(x.width < ring for x in xs):
        yield f"ring {ring} wider than an operand: {[x.width for x in xs]}"
    if v.width > ring - t:
        yield f"width {v.width} > ring {ring} - truncate {t}"
    if v.bound + t > ring - 1:
        yield f"product bound 2^{v.bound + t} does not fit ring {ring}"
    scale = xs[0].frac_bits + xs[1].frac_bits
    if v.frac_bits != scale - t:
        yield f"frac_bits {v.frac_bits}, expected {scale - t}"
    if len(xs) == 3 and xs[2].frac_bits != scale:
        yield f"addend has frac_bits {xs[2].frac_bits}, expected {scale}"
