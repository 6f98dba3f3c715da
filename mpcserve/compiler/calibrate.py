"""Ranges of inputs and of intermediate tensors: declared, seen in samples, or assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from math import frexp
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.draft import Seen
from mpcserve.compiler.dtypes import is_integer, natural_range
from mpcserve.compiler.graph import Graph, Tensor, large_constants, to_onnx
from mpcserve.compiler.lower import Ranges, Reach
from mpcserve.compiler.running import ran, runner
from mpcserve.compiler.samples import Given, Samples, samples_of
from mpcserve.compiler.signs import POLES
from mpcserve.errors import InputError
from mpcserve.units import counted

Array = NDArray[Any]
Declared = tuple[float, float] | Mapping[str, tuple[float, float]]
"""The range of every input, or of those that are named."""

TRIED = 16
"""Samples that later stages run: a few tell how errors spread."""

FEW = 16
"""With fewer samples than this, and with random ones, ranges get a bit more margin."""

LARGE = 1e12
"""Squares of larger numbers may add up to more than float32 holds."""

ASSUMED = 16.0
"""Inputs are taken to lie in [−16, 16] when nothing is declared and no samples are given."""


def ranges_of(
    graph: Graph,
    given: Given | None,
    declared: Declared | None,
    margin_bits: int | None,
) -> tuple[Ranges, list[str]]:
    """(ranges, notes that say what they rest on). Raises: InputError on samples that do not fit."""
    inputs, notes = _declared(graph, declared)
    inputs |= {i.name: (*i.reach, "proved") for i in graph.inputs if i.reach is not None}
    values: dict[str, Seen] = {}
    feeds: tuple[Mapping[str, Array], ...] = ()
    finest: dict[str, float] = {}
    if given is not None:
        samples = samples_of(given, graph.inputs, {k: (v[0], v[1]) for k, v in inputs.items()})
        feeds = tuple(islice(samples.feeds(graph.inputs), max(TRIED // _batch(graph), 1)))
        margin = _margin(samples) if margin_bits is None else margin_bits
        seen, strays = seen_in(graph, samples)
        values = {k: _with_margin(s, margin) for k, s in seen.items()}
        finest = {
            i.name: _least_reach(a)
            for i in graph.inputs
            if (a := samples.arrays[i.name]).ndim == 2 and a.any() and not is_integer(i.dtype)
        }
        notes += [_calibrated(samples, margin), *strays]
        for i in graph.inputs:
            if i.name not in inputs:
                # What an input may exceed it is refused for, so one bit is enough.
                least = 1 if margin_bits is None else margin_bits
                inputs[i.name] = _input_reach(samples.arrays[i.name], least)
            else:
                _refuse_outside(i, samples.arrays[i.name], inputs[i.name][:2])
    for i in graph.inputs:
        if natural := natural_range(i.dtype):
            inputs[i.name] = (*natural, "proved")
        elif i.name not in inputs:
            inputs[i.name] = (-ASSUMED, ASSUMED, "assumed")
            notes.append(f"range of input {i.name!r} assumed: {-ASSUMED:g} to {ASSUMED:g}")
    return Ranges(inputs, values, feeds, finest), notes


def _batch(graph: Graph) -> int:
    return graph.inputs[0].shape[0] if graph.inputs[0].shape else 1


def _margin(samples: Samples) -> int:
    return 2 if samples.drawn or samples.count < FEW else 1


def _calibrated(samples: Samples, margin_bits: int) -> str:
    seen, margin = counted(samples.count, "sample"), counted(margin_bits, "margin bit")
    text = f"calibrated on {seen} with {margin}"
    if samples.drawn:
        text += ", drawn at random: try real ones with `mpcserve verify` before relying on it"
    return text


def _declared(graph: Graph, declared: Declared | None) -> tuple[dict[str, Reach], list[str]]:
    """(range per input that has one, notes). Raises: InputError."""
    names = [i.name for i in graph.inputs]
    if declared is None:
        return {}, []
    if isinstance(declared, Mapping):
        unknown = sorted(set(declared) - set(names))
        if unknown:
            known = ", ".join(names)
            raise InputError(f"a range of {unknown[0]!r}, which is no input", f"inputs: {known}")
        each = dict(declared)
        notes = [f"range of input {k!r} declared: {v[0]:g} to {v[1]:g}" for k, v in each.items()]
    else:
        each = dict.fromkeys(names, declared)
        notes = [f"input range declared: {declared[0]:g} to {declared[1]:g}"]
    for low, high in each.values():
        if not (np.isfinite([low, high]).all() and low < high):
            raise InputError(f"input range {low}..{high} is not a range", "give LO < HI")
    return {k: (float(low), float(high), "proved") for k, (low, high) in each.items()}, notes


def seen_in(graph: Graph, samples: Samples) -> tuple[dict[str, Seen], list[str]]:
    """(what every numeric tensor of the graph holds over all samples, by onnxruntime; notes).

    NaN, of a logarithm that is masked behind, say, is left out, and so is what was chosen by it.
    """
    apart = large_constants(graph)
    model = to_onnx(graph, every_value=True, apart=apart)
    run, names = runner(model, apart), [o.name for o in model.graph.output]
    clipped = {node.outputs[0] for node in graph.nodes if node.op == "Clip"}
    found: dict[str, list[Seen]] = {}
    misled: set[str] = set()
    strays: dict[str, str] = {}
    for feed in samples.feeds(graph.inputs):
        values = {**feed, **dict(zip(names, ran(run, names, feed), strict=True))}
        misled |= _chosen_by_nan(graph, values)
        strays |= _strays(graph, values)
        for name, value in values.items():
            if not isinstance(value, np.ndarray):
                continue  # a list of tensors: lowering says that there are none
            if np.issubdtype(value.dtype, np.number) and not np.isnan(value).all():
                found.setdefault(name, []).append(_seen(value, name in clipped))
    seen = {name: _joined(parts) for name, parts in found.items() if name not in misled}
    return seen, [
        f"layer {name!r} ({op}) is NaN on some samples; fixed point gives some number there: "
        "harmless only where the model does not use it"
        for name, op in strays.items()
    ]


def _strays(graph: Graph, values: Mapping[str, Any]) -> dict[str, str]:
    """Name → operator of nodes that make NaN of numbers, as a logarithm of negative ones does."""
    return {
        node.name: node.op
        for node in graph.nodes
        if node.op in POLES
        and any(_has_nan(values.get(o)) for o in node.outputs)
        and not any(_has_nan(values.get(i)) for i in node.inputs)
    }


def _has_nan(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f" and bool(np.isnan(value).any())


def _chosen_by_nan(graph: Graph, values: Mapping[str, Any]) -> set[str]:
    """Whole numbers and bits made of NaN, of which fixed point has none, and what they make."""
    kinds = {k: v.dtype.kind for k, v in values.items() if isinstance(v, np.ndarray)}
    of_nan = {k for k, kind in kinds.items() if kind == "f" and np.isnan(values[k]).any()}
    chosen: set[str] = set()
    for node in graph.nodes if of_nan else ():
        if not chosen.isdisjoint(node.inputs):
            chosen.update(node.outputs)
        elif not of_nan.isdisjoint(node.inputs):
            chosen.update(o for o in node.outputs if kinds.get(o, "f") != "f")
    return chosen


def _seen(value: Array, clipped: bool) -> Seen:
    """Of an array that holds at least one number. `clipped`: what lies at an end stays there."""
    flat = value.ravel()
    if flat.dtype != np.float32:
        flat = flat.astype(np.float64)
    if np.isnan(flat.min()):
        flat = flat[~np.isnan(flat)]
    low, high = float(flat.min()), float(flat.max())
    if max(-low, high) > LARGE:
        flat = flat.astype(np.float64)
    idle = _idle(flat, *((low, high) if clipped else (0.0, 0.0)))
    return Seen(low, high, float(flat @ flat) / flat.size, 1 - idle / flat.size)


def _idle(flat: Array, low: float, high: float) -> int:
    """Elements that a change of what they are made of leaves as they are."""
    zeros = flat.size - int(np.count_nonzero(flat))
    return zeros + sum(int(np.count_nonzero(flat == end)) for end in {low, high} - {0.0})


def _joined(parts: list[Seen]) -> Seen:
    """Of several batches of equal size."""
    return Seen(
        min(p.low for p in parts),
        max(p.high for p in parts),
        fmean(p.power for p in parts),
        fmean(p.active for p in parts),
    )


def _refuse_outside(i: Tensor, array: Array, declared: tuple[float, float]) -> None:
    low, high = float(array.min()), float(array.max())
    if declared[0] <= low and high <= declared[1]:
        return
    reach = f"samples of input {i.name!r} reach from {low:g} to {high:g}"
    ends = f"{declared[0]:g} to {declared[1]:g}"
    if i.reach is None:
        raise InputError(f"{reach}, outside the declared {ends}", "widen --input-range")
    raise InputError(
        f"{reach}, but the model reads it as whole numbers from {ends}, as ids or a mask",
        "give ids of the model's table; one that is negative counts from its end: add the length",
    )


ONE_SIDE = 2.0**-8
"""Values of which none is nearer to zero than this part of the farthest have one sign."""


def _with_margin(seen: Seen, margin_bits: int) -> Seen:
    """A range 2^margin_bits times as far, and as near where all is well on one side of zero."""
    most, factor = max(abs(seen.low), abs(seen.high)), 2.0**margin_bits
    slack = (factor - 1) * most
    nearest = 0.0
    if seen.low > ONE_SIDE * most:
        nearest = seen.low / factor
    elif seen.high < -ONE_SIDE * most:
        nearest = seen.high / factor
    return replace(seen, low=seen.low - slack, high=seen.high + slack, nearest=nearest)


def _input_reach(array: Array, margin_bits: int) -> Reach:
    """Powers of two, so that the plan tells little of the samples; 0 where nothing is negative."""
    low, high = float(array.min()), float(array.max())
    reach = _power_of_two(2.0**margin_bits * max(-low, high, 2.0**-8))
    return (0.0 if low >= 0 else -reach), reach, "calibrated"


def _least_reach(array: Array) -> float:
    """Of the columns that are not all zero, the reach of the one that reaches least."""
    reach = np.abs(array).max(axis=0)
    return float(reach[reach > 0].min())


def _power_of_two(reach: float) -> float:
    mantissa, exponent = frexp(reach)
    return 2.0 ** (exponent - 1) if mantissa == 0.5 else 2.0**exponent
