"""Conv, ConvTranspose, DeformConv over any number of axes: one product each, whatever is secret.

The one convolution of a plan has two axes. More are folded: a window of a leading axis becomes
channels, its positions become pictures, so that sums stay within the product and only results are
opened. A transposed convolution computes the elements between two strides as channels of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from mpcserve.compiler.builder import Array, Builder, Operand, Ref
from mpcserve.compiler.functions import aligned, secret, values_of
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.rearrange import (
    NOWHERE,
    combined,
    picked,
    positions_of,
    shaped,
    windows,
)
from mpcserve.compiler.registry import lowers
from mpcserve.compiler.sampling import bilinear, together
from mpcserve.compiler.windows import pads_of
from mpcserve.plan.ops import conv_output_size


@dataclass(frozen=True, slots=True)
class Geometry:
    """Per axis: stride, dilation and padding on both sides; negative padding cuts."""

    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]
    groups: int = 1


@lowers("Conv", since=1)
def conv(
    b: Builder,
    x: Operand,
    w: Operand,
    c: Operand | None = None,
    /,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Ref:
    """Convolution over any number of axes, grouped, strided, dilated, padded: one product."""
    axes = len(w.shape) - 2
    steps, spread = list(strides or [1] * axes), list(dilations or [1] * axes)
    before, after = pads_of(auto_pad, pads, x.shape[2:], w.shape[2:], steps, spread)
    return convolved(b, secret(b, x), w, c, Geometry(steps, spread, before, after, group))


def convolved(b: Builder, x: Ref, w: Operand, c: Operand | None, g: Geometry) -> Ref:
    """x: N×C×…, w: O×C/groups×…, c: O → N×O×…; one product."""
    x = _cropped(b, x, g)
    before, after = ([max(p, 0) for p in pads] for pads in (g.before, g.after))
    steps, spread = g.strides, g.dilations
    if len(steps) == 1:
        x = b.reshape(x, (*x.shape[:2], 1, x.shape[2]))
        w = shaped(b, w, (*w.shape[:2], 1, w.shape[2]))
        steps, spread, before, after = [1, *steps], [1, *spread], [0, *before], [0, *after]
    lead, folded = [x.shape[0]], len(g.strides) - 2
    for i in range(folded):
        window = (w.shape[2], steps[i], spread[i])
        count = conv_output_size(x.shape[2], *window, before[i] + after[i])
        x = _folded(b, x, count, window, before[i])
        w = shaped(b, w, (w.shape[0], w.shape[1] * w.shape[2], *w.shape[3:]))
        lead.append(count)
    wr = secret(b, w)
    y = b.conv(
        x,
        wr,
        None if c is None or isinstance(c, Ref) else _bias(b, x, wr, c),
        strides=steps[-2:],
        pads=[*before[-2:], *after[-2:]],
        dilations=spread[-2:],
        groups=g.groups,
    )
    if isinstance(c, Ref):
        y = b.add(*aligned(b, y, b.reshape(c, (c.shape[0], 1, 1))))
    if len(g.strides) == 1:
        return b.reshape(y, (*y.shape[:2], y.shape[3]))
    if len(lead) == 1:
        return y
    y = b.reshape(y, (*lead, *y.shape[1:]))
    last = len(lead)
    return b.transpose(y, [0, last, *range(1, last), last + 1, last + 2])


def _folded(b: Builder, x: Ref, count: int, window: tuple[int, int, int], before: int) -> Ref:
    """N×C×D×… → N·count × C·kernel × …: windows of the first axis as channels."""
    y = windows(b, x, 2, count, window, before, 0.0)
    y = b.transpose(y, [0, 3, 1, 2, *range(4, len(y.shape))])
    return b.reshape(y, (x.shape[0] * count, x.shape[1] * window[0], *x.shape[3:]))


def _bias(b: Builder, x: Ref, w: Ref, values: Array) -> Ref:
    """The addend of a product, at the scale of its accumulator."""
    return b.weight(values[:, None, None], x.frac_bits + w.frac_bits)


def _cropped(b: Builder, x: Ref, g: Geometry) -> Ref:
    """Negative pads cut the picture."""
    for axis, (head, tail) in enumerate(zip(g.before, g.after, strict=True), 2):
        size = x.shape[axis]
        x = b.slice(x, axis, max(-head, 0), size - max(-tail, 0))
    return x


@lowers("ConvTranspose", since=1)
def conv_transpose(
    b: Builder,
    x: Operand,
    w: Operand,
    c: Operand | None = None,
    /,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Ref:
    """Transposed convolution over any number of axes: one product without a zero in it.

    Output s·m + r of an axis of stride s depends on r through its weights alone: r becomes a
    channel, the kernel is cut into s short ones.
    """
    axes = len(w.shape) - 2
    steps, spread = list(strides or [1] * axes), list(dilations or [1] * axes)
    extra = list(output_padding or [0] * axes)
    whole = [
        (n - 1) * s + (k - 1) * d + 1 + e
        for n, s, k, d, e in zip(x.shape[2:], steps, w.shape[2:], spread, extra, strict=True)
    ]
    sizes = list(output_shape or [])[-axes:]
    if not sizes and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        sizes = [n * s for n, s in zip(x.shape[2:], steps, strict=True)]
    if sizes:
        cut = [max(n - size, 0) for n, size in zip(whole, sizes, strict=True)]
        upper = auto_pad == "SAME_UPPER"
        before = [total // 2 if upper else total - total // 2 for total in cut]
    else:
        flat = list(pads) if pads and auto_pad in ("NOTSET", "") else [0] * (2 * axes)
        before = flat[:axes]
        sizes = [n - p - q for n, p, q in zip(whole, before, flat[axes:], strict=True)]
    phases = [_phases(*one) for one in zip(w.shape[2:], steps, spread, strict=True)]
    first = [p // s for p, s in zip(before, steps, strict=True)]
    last = [-(-(p + n) // s) for p, n, s in zip(before, sizes, steps, strict=True)]
    geometry = Geometry(
        [1] * axes,
        [d if s == 1 else 1 for s, d in zip(steps, spread, strict=True)],
        [_reach(w, phases, spread, steps, i) - m for i, m in enumerate(first)],
        [m - n for m, n in zip(last, x.shape[2:], strict=True)],
        group,
    )
    kernel = _short_kernels(b, w, phases, group)
    bias = None if c is None else _spread(b, c, prod(steps))
    y = convolved(b, secret(b, x), kernel, bias, geometry)
    y = _interleaved(b, y, steps)
    for i, (p, n) in enumerate(zip(before, sizes, strict=True)):
        start = p - first[i] * steps[i]
        y = b.slice(y, i + 2, start, start + n)
    return y


def _phases(kernel: int, stride: int, dilation: int) -> Array:
    """stride × taps: which tap of the kernel stands where in each short kernel; NOWHERE: none.

    With stride 1 the kernel is only turned round and keeps its dilation.
    """
    if stride == 1:
        return np.arange(kernel)[::-1][None]
    spread = np.full((kernel - 1) * dilation + 1, NOWHERE)
    spread[::dilation] = np.arange(kernel)
    short = -(-len(spread) // stride)
    padded = np.append(spread, np.full(short * stride - len(spread), NOWHERE))
    return padded.reshape(short, stride)[::-1].T


def _reach(w: Operand, phases: list[Array], spread: list[int], steps: list[int], axis: int) -> int:
    """By how many elements the short kernels of an axis reach back."""
    taps = int(phases[axis].shape[1]) - 1
    return taps * spread[axis] if steps[axis] == 1 else taps


def _short_kernels(b: Builder, w: Operand, phases: list[Array], groups: int) -> Operand:
    """C×O/groups×… → O·phases × C/groups × short kernels."""
    axes = len(phases)
    place, known = np.zeros((), np.int64), np.ones((), bool)
    for size, taps in zip(w.shape[2:], phases, strict=True):
        place = np.multiply.outer(place, np.ones_like(taps)) * size + np.maximum(taps, 0)
        known = np.multiply.outer(known, taps != NOWHERE)
    order = [*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)]
    place, known = place.transpose(order), known.transpose(order)
    # groups × inputs × outputs × kernel, then the kernel's elements by phase and tap
    inputs, outputs = w.shape[0] // groups, w.shape[1]
    whole = positions_of((groups, inputs, outputs, prod(w.shape[2:])))[..., place]
    whole = np.where(known, whole, NOWHERE)
    turned = np.moveaxis(whole, 1, 3 + axes - 1)
    rows = groups * outputs * prod(len(p) for p in phases)
    return picked(b, w, turned.reshape((rows, inputs, *[p.shape[1] for p in phases])))


def _spread(b: Builder, c: Operand, phases: int) -> Operand:
    """A bias for every phase of an output channel."""
    return picked(b, c, np.repeat(np.arange(c.shape[0]), phases))


def _interleaved(b: Builder, y: Ref, steps: list[int]) -> Ref:
    """N × O·phases × counts → N × O × counts·strides."""
    axes, (n, channels), counts = len(steps), y.shape[:2], y.shape[2:]
    y = b.reshape(y, (n, channels // prod(steps), *steps, *counts))
    order = [0, 1, *(k for i in range(axes) for k in (2 + axes + i, 2 + i))]
    sizes = [m * s for m, s in zip(counts, steps, strict=True)]
    return b.reshape(b.transpose(y, order), (n, channels // prod(steps), *sizes))


@lowers("DeformConv", since=19)
def deform_conv(
    b: Builder,
    x: Ref,
    w: Operand,
    offset: Operand,
    c: Operand | None = None,
    mask: Operand | None = None,
    /,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Ref:
    """Convolution of elements sampled at public offsets: local but for one product.

    A mask, secret as an input or as a weight, takes a product more.
    """
    if len(w.shape) != 4:
        raise Unsupported(f"convolves {len(w.shape) - 2} axes, supported are two")
    moved = np.asarray(values_of(offset, "offset"), np.float64)
    size, out, kernel = x.shape[2:], moved.shape[2:], w.shape[2:]
    moved = moved.reshape((x.shape[0], offset_group, *kernel, 2, *out))
    steps, spread = list(strides or [1, 1]), list(dilations or [1, 1])
    start = [0, 0] if pads is None else [-p for p in pads[:2]]
    grid = np.indices((*kernel, *out))
    pixels = [
        moved[:, :, :, :, i] + start[i] + grid[2 + i] * steps[i] + grid[i] * spread[i]
        for i in range(2)
    ]
    per = x.shape[1] // offset_group
    parts = []
    for n, k in np.ndindex(x.shape[0], offset_group):
        picture = b.slice(b.slice(x, 0, n, n + 1), 1, k * per, (k + 1) * per)
        taps = together(
            [bilinear(p[n, k].ravel(), d) for p, d in zip(pixels, size, strict=True)], size
        )
        flat = b.reshape(picture, (per, prod(size)))
        parts.append(combined(b, flat, 1, taps.indices, taps.weights))
    columns = b.reshape(b.concat(parts, 0), (x.shape[0], offset_group, per, prod(kernel), *out))
    if mask is not None:
        weights = shaped(b, mask, (x.shape[0], offset_group, 1, prod(kernel), *out))
        columns = b.mul(columns, secret(b, weights))
    columns = b.reshape(columns, (x.shape[0], x.shape[1] * prod(kernel), *out))
    flat_w = shaped(b, w, (w.shape[0], w.shape[1] * prod(kernel), 1, 1))
    plain = Geometry([1, 1], [1, 1], [0, 0], [0, 0], group)
    return convolved(b, columns, flat_w, c, plain)
