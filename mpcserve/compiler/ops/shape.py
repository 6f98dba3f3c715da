"""Operators that only move elements: no rounds, no bytes, no error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpcserve.compiler.booleans import certain
from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import aligned, axis_of, fine_enough, ints_of, values_of
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers


@lowers("Reshape", since=5)
def reshape(b: Builder, x: Ref, shape: Operand, /, *, allowzero: int = 0) -> Ref:
    """Another shape; 0 copies an axis, −1 takes what is left."""
    new = ints_of(shape, "shape")
    if not allowzero:
        new = [x.shape[i] if d == 0 else d for i, d in enumerate(new)]
    if -1 in new:
        known = int(np.prod([d for d in new if d != -1]))
        new[new.index(-1)] = int(np.prod(x.shape)) // known
    if int(np.prod(new)) != int(np.prod(x.shape)):
        raise Unsupported(
            f"reshapes {list(x.shape)} to {new}", "export the model with the batch it runs with"
        )
    return b.reshape(x, new)


@lowers("Flatten", since=1)
def flatten(b: Builder, x: Ref, /, *, axis: int = 1) -> Ref:
    """Two axes: the product of those before `axis` and of the rest."""
    axis = axis_of(axis, len(x.shape))
    head = int(np.prod(x.shape[:axis]))
    return b.reshape(x, (head, int(np.prod(x.shape[axis:]))))


@lowers("Transpose", since=1)
def transpose(b: Builder, x: Ref, /, *, perm: Sequence[int] | None = None) -> Ref:
    """Axes permuted; reversed by default."""
    rank = len(x.shape)
    order = [axis_of(p, rank) for p in perm] if perm else list(reversed(range(rank)))
    return b.transpose(x, order)


@lowers("Squeeze", since=1)
def squeeze(
    b: Builder, x: Ref, axes_input: Operand | None = None, /, *, axes: Sequence[int] | None = None
) -> Ref:
    """Axes of length one dropped: the given ones, or all."""
    given = list(axes or ()) if axes_input is None else ints_of(axes_input, "axes")
    drop = {axis_of(a, len(x.shape)) for a in given} or {i for i, d in enumerate(x.shape) if d == 1}
    return b.reshape(x, [d for i, d in enumerate(x.shape) if i not in drop])


@lowers("Unsqueeze", since=1)
def unsqueeze(
    b: Builder, x: Ref, axes_input: Operand | None = None, /, *, axes: Sequence[int] = ()
) -> Ref:
    """Axes of length one put in."""
    given = list(axes) if axes_input is None else ints_of(axes_input, "axes")
    rank = len(x.shape) + len(given)
    new = {axis_of(a, rank) for a in given}
    rest = iter(x.shape)
    return b.reshape(x, [1 if i in new else next(rest) for i in range(rank)])


@lowers("Concat", since=4)
def concat(b: Builder, *xs: Operand, axis: int) -> Ref:
    """Joined along an axis."""
    refs = aligned(b, *(x for x in xs if isinstance(x, Ref) or x.size))
    return b.concat(refs, axis_of(axis, len(refs[0].shape)))


@lowers("Split", since=2)
def split(
    b: Builder,
    x: Ref,
    sizes_input: Operand | None = None,
    /,
    *,
    axis: int = 0,
    split: Sequence[int] | None = None,
    num_outputs: int | None = None,
) -> tuple[Ref | None, ...]:
    """Cut along an axis: into given sizes, or evenly with a smaller last part."""
    axis = axis_of(axis, len(x.shape))
    sizes = list(split or ()) if sizes_input is None else ints_of(sizes_input, "split")
    if not sizes:
        parts = num_outputs or b.n_outputs
        each = -(-x.shape[axis] // parts)
        sizes = [min(each, x.shape[axis] - i * each) for i in range(parts)]
    stops = np.cumsum(sizes)
    return tuple(
        b.slice(x, axis, int(stop) - size, int(stop)) if size else None  # a constant by now
        for size, stop in zip(sizes, stops, strict=True)
    )


@lowers("Slice", since=1)
def slice_attributes(
    b: Builder,
    x: Ref,
    /,
    *,
    axes: Sequence[int] | None = None,
    ends: Sequence[int] = (),
    starts: Sequence[int] = (),
) -> Ref:
    """x[start:end] along some axes."""
    return _sliced(b, x, list(starts), list(ends), list(axes or range(len(starts))), None)


@lowers("Slice", since=10)
def slice_(
    b: Builder,
    x: Ref,
    starts: Operand,
    ends: Operand,
    axes: Operand | None = None,
    steps: Operand | None = None,
    /,
) -> Ref:
    """x[start:end:step] along some axes; a negative step turns the axis round."""
    first = ints_of(starts, "starts")
    over = list(range(len(first))) if axes is None else ints_of(axes, "axes")
    by = None if steps is None else ints_of(steps, "steps")
    return _sliced(b, x, first, ints_of(ends, "ends"), over, by)


def _sliced(
    b: Builder, x: Ref, starts: list[int], ends: list[int], axes: list[int], steps: list[int] | None
) -> Ref:
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts), strict=True):
        axis = axis_of(axis, len(x.shape))
        indices = range(x.shape[axis])[_clamped(start) : _clamped(end) : step]
        if not indices:
            raise Unsupported("slices to no elements", "remove the empty branch")
        if step > 0:
            x = b.slice(x, axis, indices.start, indices[-1] + 1, step)
        else:
            x = b.gather(x, axis, list(indices))
    return x


def _clamped(index: int) -> int:
    """ONNX's INT_MAX and INT_MIN are just far ends; Python's range wants to index by less."""
    return max(min(index, 1 << 60), -(1 << 60))


@lowers("Pad", since=2)
def pad_attributes(
    b: Builder, x: Ref, /, *, mode: str = "constant", pads: Sequence[int] = (), value: float = 0.0
) -> Ref:
    """Surrounded by a public value, or by the tensor's own edge."""
    return _padded(b, x, mode, list(pads), value)


@lowers("Pad", since=11)
def pad(
    b: Builder,
    x: Ref,
    pads: Operand,
    value: Operand | None = None,
    axes: Operand | None = None,
    /,
    *,
    mode: str = "constant",
) -> Ref:
    """Surrounded by a public value, or by the tensor's own edge."""
    given = ints_of(pads, "pads")
    rank = len(x.shape)
    over = [axis_of(a, rank) for a in ints_of(axes, "axes")] if axes is not None else range(rank)
    whole = [0] * (2 * rank)
    for i, axis in enumerate(over):
        whole[axis], whole[rank + axis] = given[i], given[len(given) // 2 + i]
    fill = 0.0 if value is None else float(np.asarray(values_of(value, "value")).ravel()[0])
    return _padded(b, x, mode, whole, fill)


_NUMPY_MODES = {"edge": "edge", "reflect": "reflect", "wrap": "wrap"}


def _padded(b: Builder, x: Ref, mode: str, pads: list[int], value: float) -> Ref:
    rank = len(x.shape)
    before, after = pads[:rank], pads[rank:]
    if mode == "constant":
        for axis in range(rank):
            head, tail = max(-before[axis], 0), max(-after[axis], 0)
            x = b.slice(x, axis, head, x.shape[axis] - tail)
        x = fine_enough(b, x, value) if any(p > 0 for p in pads) else x
        return b.pad(x, [max(p, 0) for p in before], [max(p, 0) for p in after], value)
    if mode not in _NUMPY_MODES:
        raise Unsupported(f"pad mode {mode!r} is unknown")
    for axis in range(rank):
        head, tail = before[axis], after[axis]
        cut = np.arange(x.shape[axis])[max(-head, 0) : x.shape[axis] - max(-tail, 0)]
        around: Any = (max(head, 0), max(tail, 0))
        indices = np.pad(cut, around, mode=_NUMPY_MODES[mode])  # type: ignore[call-overload]
        x = b.gather(x, axis, indices.tolist())
    return x


@lowers("Expand", since=8)
def expand(b: Builder, x: Ref, shape: Operand, /) -> Ref:
    """Broadcast."""
    return b.expand(x, np.broadcast_shapes(x.shape, tuple(ints_of(shape, "shape"))))


@lowers("Tile", since=6)
def tile(b: Builder, x: Ref, repeats: Operand, /) -> Ref:
    """Repeated along each axis."""
    for axis, count in enumerate(ints_of(repeats, "repeats")):
        x = b.gather(x, axis, list(range(x.shape[axis])) * count)
    return x


@lowers("Dropout", since=7)
def dropout(
    b: Builder,
    x: Ref,
    ratio_input: Operand | None = None,
    training: Operand | None = None,
    /,
    *,
    ratio: float = 0.5,
    seed: int | None = None,
) -> Ref | tuple[Ref, Ref]:
    """x and, where asked for, a mask of all true: nothing is dropped at inference."""
    if training is not None and bool(np.asarray(values_of(training, "training_mode")).any()):
        share = 0.5 if ratio_input is None else float(np.ravel(values_of(ratio_input, "ratio"))[0])
        if share:
            raise Unsupported("drops in training mode", "export the model in inference mode")
    return (x, certain(b, True, x.shape)) if b.n_outputs > 1 else x
