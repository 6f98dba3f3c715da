"""A data owner's arrays: checked against the plan before anything is sent, cut into its batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpcserve.errors import InputError
from mpcserve.plan.plan import InputSpec, OutputSpec, Plan

Array = NDArray[Any]
OnRange = Literal["error", "clamp"]


def check_inputs(plan: Plan, x: Array | Mapping[str, Array], on_range: OnRange) -> list[Array]:
    """Arrays in the plan's order, of its dtypes, within the declared ranges.

    A value outside its range would wrap: a wrong result, never a leak. Raises: InputError.
    """
    if on_range not in ("error", "clamp"):
        raise InputError(f"on_range: expected error or clamp, got {on_range!r}")
    arrays = [_checked(s, a, on_range) for s, a in zip(plan.inputs, _named(plan, x), strict=True)]
    if len({len(a) for a in arrays if a.ndim}) > 1:
        counts = ", ".join(
            f"{s.name!r} {len(a)}" for s, a in zip(plan.inputs, arrays, strict=True) if a.ndim
        )
        raise InputError(f"inputs have different numbers of rows: {counts}", "give one row each")
    if arrays and not _splits(plan):
        for spec, a in zip(plan.inputs, arrays, strict=True):
            if a.shape != spec.shape:
                raise _shape_error(spec, a, spec.shape)
    return arrays


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
    specs: list[InputSpec | OutputSpec] = [*plan.inputs, *plan.outputs]
    return bool(plan.inputs) and all(s.shape and s.shape[0] == plan.batch for s in specs)


def _named(plan: Plan, x: Array | Mapping[str, Array]) -> list[Array]:
    names = [spec.name for spec in plan.inputs]
    if not isinstance(x, Mapping):
        x = {names[0]: x} if len(names) == 1 else {"(unnamed)": x}
    if set(x) != set(names):
        raise InputError(
            f"expected inputs named {', '.join(names)}, got {', '.join(x) or 'none'}",
            "give a mapping from each of these names to an array",
        )
    return [x[name] for name in names]


def _checked(spec: InputSpec, value: Array, on_range: OnRange) -> Array:
    array, dtype = np.asarray(value), np.dtype(spec.dtype)
    if array.dtype.kind != dtype.kind:
        raise InputError(
            f"input {spec.name!r}: expected {dtype}, got {array.dtype}",
            f"convert it with .astype('{dtype}')",
        )
    rows = (None, *spec.shape[1:]) if spec.shape else ()
    if array.ndim != len(rows) or any(
        e is not None and e != d for e, d in zip(rows, array.shape, strict=True)
    ):
        raise _shape_error(spec, array, tuple("rows" if e is None else e for e in rows))
    if array.size == 0:
        raise InputError(f"input {spec.name!r}: no rows", "give at least one")
    if not np.isfinite(array).all():
        where = tuple(map(int, np.argwhere(~np.isfinite(array))[0]))
        raise InputError(
            f"input {spec.name!r}: not a finite number at {where}", "replace NaN and infinity"
        )
    return _in_range(spec, array, on_range)


def _in_range(spec: InputSpec, array: Array, on_range: OnRange) -> Array:
    outside = (array < spec.low) | (array > spec.high)
    if not outside.any():
        return array
    if on_range == "clamp":
        return np.clip(array, spec.low, spec.high)
    where = tuple(map(int, np.argwhere(outside)[0]))
    raise InputError(
        f"input {spec.name!r}: {int(outside.sum())} values outside the range "
        f"[{spec.low:g}, {spec.high:g}] ({spec.known}) the model was compiled for, "
        f"the first at {where}",
        "clamp them (--on-range clamp), or compile with a wider --input-range",
    )


def _shape_error(spec: InputSpec, array: Array, expected: tuple[object, ...]) -> InputError:
    shape = ", ".join(map(str, expected))
    return InputError(
        f"input {spec.name!r}: expected shape [{shape}], got {list(array.shape)}",
        "reshape it; the first dimension counts the rows",
    )
