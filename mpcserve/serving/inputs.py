"""A data owner's arrays: checked against the plan before anything is sent, cut into its batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpcserve.errors import InputError
from mpcserve.plan.client import RawInput
from mpcserve.plan.plan import InputSpec, Output, OutputSpec, Plan

Array = NDArray[Any]
OnRange = Literal["error", "clamp"]


def check_inputs(plan: Plan, x: Array | Mapping[str, Array], on_range: OnRange) -> list[Array]:
    """Arrays in the plan's order, of its dtypes, within the declared ranges.

    A value outside its range would wrap: a wrong result, never a leak. Raises: InputError.
    """
    if on_range not in ("error", "clamp"):
        raise InputError(f"on_range: expected error or clamp, got {on_range!r}")
    raw = [_shaped(s, a) for s, a in zip(plan.raw_inputs, _named(plan, x), strict=True)]
    if len({len(a) for a in raw if a.ndim}) > 1:
        counts = ", ".join(
            f"{s.name!r} {len(a)}" for s, a in zip(plan.raw_inputs, raw, strict=True) if a.ndim
        )
        raise InputError(f"inputs have different numbers of rows: {counts}", "give one row each")
    if raw and not _splits(plan):
        for given, a in zip(plan.raw_inputs, raw, strict=True):
            if a.shape != given.shape:
                raise _shape_error(given, a, given.shape)
    return [
        _in_range(_finite(a, called), called, spec, on_range)
        for spec, (called, a) in zip(plan.inputs, _on_client(plan, raw), strict=True)
    ]


def _on_client(plan: Plan, raw: Sequence[Array]) -> Iterator[tuple[str, Array]]:
    """(what it is called in messages, array) of every input that is shared."""
    values = {s.name: a for s, a in zip(plan.raw_inputs, raw, strict=True)}
    if plan.client.steps:
        types = {s.name: s.dtype for s in plan.client.inputs}
        values = {k: a.astype(types[k], copy=False) for k, a in values.items()}
        values = plan.client.applied(values)
    for spec in plan.inputs:
        sources = plan.client.sources(spec.name)
        made_of = ", ".join(map(repr, sources))
        plain = sources == (spec.name,)
        yield f"input {spec.name!r}" + ("" if plain else f", made of {made_of}"), values[spec.name]


def raw_batches(plan: Plan, x: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """Rows as the data owner has them, in the plan's batches; the last is filled up."""
    arrays = [np.asarray(a) for a in _named(plan, x)]
    names = [s.name for s in plan.raw_inputs]
    for _, rows in batches(plan, arrays):
        yield dict(zip(names, rows, strict=True))


def presented(plan: Plan, outputs: Mapping[str, Array]) -> Output | dict[str, Output]:
    """What the model itself would return: maps for what a ZipMap makes; a single output as such."""
    named = {o.name: o.presented(outputs[o.name]) for o in plan.outputs}
    return next(iter(named.values())) if len(named) == 1 else named


def batches(plan: Plan, arrays: Sequence[Array]) -> Iterator[tuple[int, list[Array]]]:
    """(rows that count, arrays of the plan's shapes): the last batch repeats its last row."""
    if not _splits(plan):
        yield plan.batch, list(arrays)
        return
    for begin in range(0, len(arrays[0]), plan.batch):
        rows = [a[begin : begin + plan.batch] for a in arrays]
        count = len(rows[0])
        missing = plan.batch - count
        if missing:
            rows = [np.concatenate([r, np.repeat(r[-1:], missing, axis=0)]) for r in rows]
        yield count, rows


def join_outputs(plan: Plan, parts: Sequence[tuple[int, Sequence[Array]]]) -> dict[str, Array]:
    """Name → array, of the outputs of all batches without the repeated rows."""
    if not _splits(plan):
        return {o.name: a for o, a in zip(plan.outputs, parts[0][1], strict=True)}
    return {
        o.name: np.concatenate([outputs[k][:count] for count, outputs in parts])
        for k, o in enumerate(plan.outputs)
    }


def _splits(plan: Plan) -> bool:
    """Whether rows of the plan's batch stand for themselves: every input and output has them."""
    specs: list[InputSpec | OutputSpec | RawInput] = [
        *plan.raw_inputs,
        *plan.inputs,
        *plan.outputs,
    ]
    return bool(plan.inputs) and all(s.shape and s.shape[0] == plan.batch for s in specs)


def _named(plan: Plan, x: Array | Mapping[str, Array]) -> list[Array]:
    names = [spec.name for spec in plan.raw_inputs]
    if not isinstance(x, Mapping):
        x = {names[0]: x} if len(names) == 1 else {"(unnamed)": x}
    if set(x) != set(names):
        raise InputError(
            f"expected inputs named {', '.join(names)}, got {', '.join(x) or 'none'}",
            "give a mapping from each of these names to an array",
        )
    return [x[name] for name in names]


def _shaped(spec: RawInput, value: Array) -> Array:
    array, dtype = np.asarray(value), np.dtype(spec.dtype)
    if dtype.kind == "U" and array.dtype.kind == "O":
        array = _text(array, spec.name)
    if array.dtype.kind != dtype.kind:
        expected = "text" if dtype.kind == "U" else dtype
        raise InputError(
            f"input {spec.name!r}: expected {expected}, got {array.dtype}",
            f"convert it with .astype('{spec.dtype}')",
        )
    rows = (None, *spec.shape[1:]) if spec.shape else ()
    if array.ndim != len(rows) or any(
        e is not None and e != d for e, d in zip(rows, array.shape, strict=True)
    ):
        raise _shape_error(spec, array, tuple("rows" if e is None else e for e in rows))
    if array.size == 0:
        raise InputError(f"input {spec.name!r}: no rows", "give at least one")
    return array


def _text(array: Array, name: str) -> Array:
    """Text that is held as objects, as pandas does. Raises: InputError where one is none."""
    for place, x in enumerate(array.flat):
        if not isinstance(x, str):
            where = tuple(map(int, np.unravel_index(place, array.shape)))
            raise InputError(
                f"input {name!r}: expected text, got {type(x).__name__} at {where}",
                "write some text for what is missing",
            )
    return array.astype(np.str_)


def _finite(array: Array, called: str) -> Array:
    if not np.isfinite(array).all():
        where = tuple(map(int, np.argwhere(~np.isfinite(array))[0]))
        raise InputError(f"{called}: not a finite number at {where}", "replace NaN and infinity")
    return array


def _in_range(array: Array, called: str, spec: InputSpec, on_range: OnRange) -> Array:
    outside = (array < spec.low) | (array > spec.high)
    if not outside.any():
        return array
    if on_range == "clamp":
        return np.clip(array, spec.low, spec.high)
    where = tuple(map(int, np.argwhere(outside)[0]))
    raise InputError(
        f"{called}: {int(outside.sum())} values outside the range "
        f"[{spec.low:g}, {spec.high:g}] ({spec.known}) the model was compiled for, "
        f"the first at {where}",
        "compile with a wider --input-range, or let `mpcserve infer --on-range clamp` clamp them",
    )


def _shape_error(spec: RawInput, array: Array, expected: tuple[object, ...]) -> InputError:
    shape = ", ".join(map(str, expected))
    return InputError(
        f"input {spec.name!r}: expected shape [{shape}], got {list(array.shape)}",
        "reshape it; the first dimension counts the rows",
    )
