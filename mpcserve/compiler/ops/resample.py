"""Resize, Upsample, GridSample, AffineGrid, RoiAlign, MaxRoiPool: sums with public weights, local.

Where and how a picture is sampled is structure that the plan shows: scales, sizes, grids and
regions must be constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, isclose, prod

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import axis_of, fine_enough, ints_of, reduce_max, values_of
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.rearrange import NOWHERE, combined, mapped, positions_of, taken
from mpcserve.compiler.registry import lowers
from mpcserve.compiler.sampling import Resampling, Taps, outside, resized, sampled, together

Floats = NDArray[np.float64]
_WHOLE = (0.0, 1.0)


@lowers("Upsample", since=7)
def upsample_attributes(
    b: Builder, x: Ref, /, *, scales: Sequence[float] = (), mode: str = "nearest"
) -> Ref:
    """Enlarged: copies or linear interpolation. Error: 2 ulp per interpolated axis."""
    sizes = [floor(d * s) for d, s in zip(x.shape, scales, strict=True)]
    return _resized(b, x, sizes, list(scales), Resampling(mode, "asymmetric", "floor"))


@lowers("Upsample", since=9)
def upsample(b: Builder, x: Ref, scales: Operand, /, *, mode: str = "nearest") -> Ref:
    """Enlarged: copies or linear interpolation. Error: 2 ulp per interpolated axis."""
    given = np.asarray(values_of(scales, "scales"), np.float64).tolist()
    return upsample_attributes(b, x, scales=given, mode=mode)


@lowers("Resize", since=10)
def resize_by_scales(b: Builder, x: Ref, scales: Operand, /, *, mode: str = "nearest") -> Ref:
    """Another size: copies or linear interpolation. Error: 2 ulp per interpolated axis."""
    given = np.asarray(values_of(scales, "scales"), np.float64).tolist()
    return upsample_attributes(b, x, scales=given, mode=mode)


@lowers("Resize", since=11)
def resize(
    b: Builder,
    x: Ref,
    roi: Operand | None = None,
    scales: Operand | None = None,
    sizes: Operand | None = None,
    /,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Ref:
    """Another size, one axis after the other: local. Error: none of copies, else 2 ulp per axis."""
    how = Resampling(
        mode,
        coordinate_transformation_mode,
        nearest_mode,
        cubic_coeff_a,
        bool(antialias),
        bool(exclude_outside),
    )
    rank = len(x.shape)
    over = [axis_of(a, rank) for a in axes] if axes is not None else list(range(rank))
    if scales is not None and np.size(values_of(scales, "scales")):
        given = np.asarray(scales, np.float64).tolist()
        lengths = [floor(x.shape[a] * s) for a, s in zip(over, given, strict=True)]
    else:
        lengths, given = _by_sizes(x, over, ints_of(sizes, "sizes"), keep_aspect_ratio_policy)
    regions = [_WHOLE] * len(over)
    if how.transform == "tf_crop_and_resize":
        ends = np.asarray(values_of(roi, "roi"), np.float64).reshape(2, -1).T
        regions = [(float(start), float(end)) for start, end in ends]
    whole: list[int] = list(x.shape)
    factors, cut = [1.0] * rank, [_WHOLE] * rank
    for a, length, factor, region in zip(over, lengths, given, regions, strict=True):
        whole[a], factors[a], cut[a] = length, factor, region
    return _resized(b, x, whole, factors, how, cut, extrapolation_value)


def _by_sizes(
    x: Ref, over: list[int], sizes: list[int], policy: str
) -> tuple[list[int], list[float]]:
    """(lengths, scales) of the resized axes."""
    factors = [n / x.shape[a] for a, n in zip(over, sizes, strict=True)]
    if policy == "stretch":
        return sizes, factors
    if policy not in ("not_larger", "not_smaller"):
        raise Unsupported(f"keep_aspect_ratio_policy {policy!r} is unknown")
    one = min(factors) if policy == "not_larger" else max(factors)
    return [int(one * x.shape[a] + 0.5) for a in over], [one] * len(over)


def _resized(
    b: Builder,
    x: Ref,
    sizes: Sequence[int],
    scales: Sequence[float],
    how: Resampling,
    cut: Sequence[tuple[float, float]] | None = None,
    beyond: float = 0.0,
) -> Ref:
    """Axes that shrink first: fewer elements for the others."""
    cut = cut or [_WHOLE] * len(sizes)
    empty = np.zeros(tuple(sizes), bool)
    for axis in sorted(range(len(sizes)), key=lambda a: sizes[a] / x.shape[a]):
        size, length, scale, region = x.shape[axis], sizes[axis], scales[axis], cut[axis]
        if isclose(scale, 1.0) and size == length and region == _WHOLE:
            continue
        if length < 1:
            raise Unsupported("is resized to no elements", "remove the empty branch")
        taps = resized(size, length, scale, how, region)
        x = mapped(b, x, axis, taps.matrix(size))
        gone = outside(size, length, scale, how.transform, region)
        empty[(slice(None),) * axis + (gone,)] = True
    if beyond == 0.0 or not empty.any():
        return x
    x = fine_enough(b, x, beyond)
    return b.add(x, b.constant(np.where(empty, beyond, 0.0), x.frac_bits))


@lowers("GridSample", since=16)
def grid_sample_16(
    b: Builder,
    x: Ref,
    grid: Operand,
    /,
    *,
    align_corners: int = 0,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
) -> Ref:
    """Sampled at the points of a public grid: local. Error: none of copies, else 2 ulp."""
    return grid_sample(
        b, x, grid, align_corners=align_corners, mode=mode, padding_mode=padding_mode
    )


@lowers("GridSample", since=20)
def grid_sample(
    b: Builder,
    x: Ref,
    grid: Operand,
    /,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> Ref:
    """Sampled at the points of a public grid: local. Error: none of copies, else 2 ulp."""
    points = np.asarray(values_of(grid, "grid"), np.float64)
    space = x.shape[2:]
    pictures = []
    for n in range(x.shape[0]):
        where = points[n].reshape(-1, len(space))[:, ::-1]
        axes = [
            sampled(where[:, a], size, mode, padding_mode, bool(align_corners))
            for a, size in enumerate(space)
        ]
        picture = b.reshape(b.slice(x, 0, n, n + 1), (1, x.shape[1], prod(space)))
        pictures.append(_weighted(b, picture, together(axes, space)))
    return b.reshape(b.concat(pictures, 0), (*x.shape[:2], *points.shape[1:-1]))


def _weighted(b: Builder, x: Ref, taps: Taps) -> Ref:
    """Samples of the last axis; taps without weight are dropped."""
    used = (taps.weights != 0).sum(axis=0).max(initial=1)
    order = np.argsort(taps.weights == 0, axis=0, kind="stable")[:used]
    indices, weights = (np.take_along_axis(t, order, axis=0) for t in (taps.indices, taps.weights))
    return combined(b, x, len(x.shape) - 1, indices, weights.astype(np.float64))


@lowers("AffineGrid", since=20)
def affine_grid(b: Builder, theta: Ref, size: Operand, /, *, align_corners: int = 0) -> Ref:
    """The points of a public grid, moved by a secret affine map: local. Error: 2 ulp."""
    lengths = ints_of(size, "size")[2:]
    axes = [_regular(n, bool(align_corners)) for n in lengths]
    points = np.stack([*np.meshgrid(*axes, indexing="ij")[::-1], np.ones(lengths)], axis=-1)
    moved = mapped(b, theta, 2, points.reshape(-1, len(lengths) + 1))
    back = b.transpose(moved, (0, 2, 1))
    return b.reshape(back, (theta.shape[0], *lengths, len(lengths)))


def _regular(count: int, corners: bool) -> Floats:
    """Points of [−1, 1] an equal step apart: both ends, or the centres of equal parts."""
    k = np.arange(count, dtype=np.float64)
    return -1 + 2 * k / max(count - 1, 1) if corners else -1 + (2 * k + 1) / count


@lowers("RoiAlign", since=10)
def roi_align_10(
    b: Builder,
    x: Ref,
    rois: Operand,
    batch_indices: Operand,
    /,
    *,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Ref:
    """Public regions, each averaged over bilinear samples, or the largest weighted tap."""
    return roi_align(
        b,
        x,
        rois,
        batch_indices,
        coordinate_transformation_mode="output_half_pixel",
        mode=mode,
        output_height=output_height,
        output_width=output_width,
        sampling_ratio=sampling_ratio,
        spatial_scale=spatial_scale,
    )


@lowers("RoiAlign", since=16)
def roi_align(
    b: Builder,
    x: Ref,
    rois: Operand,
    batch_indices: Operand,
    /,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Ref:
    """Public regions, each averaged over a grid of bilinear samples, or the largest weighted tap.

    The average is local, Error: 2 ulp; the maximum a tournament over a bin's samples.
    """
    half = coordinate_transformation_mode == "half_pixel"
    corners = np.asarray(values_of(rois, "rois"), np.float64) * spatial_scale - (0.5 if half else 0)
    flat = b.reshape(x, (*x.shape[:2], prod(x.shape[2:])))
    regions = []
    for batch, corner in zip(ints_of(batch_indices, "batch_indices"), corners, strict=True):
        axes = []
        for axis, count in enumerate((output_height, output_width)):
            start, end = corner[1 - axis], corner[3 - axis]
            length = end - start if half else max(end - start, 1.0)
            samples = sampling_ratio or ceil(length / count)
            axes.append(
                (_bin_taps(start, length / count, count, samples, x.shape[axis + 2]), samples)
            )
        source = b.slice(flat, 0, batch, batch + 1)
        regions.append(_pooled_bins(b, source, axes, (output_height, output_width), x.shape, mode))
    return b.concat(regions, 0)


def _bin_taps(start: float, bin: float, count: int, samples: int, size: int) -> Taps:
    """Bilinear samples, `samples` to each of `count` bins; those beyond the picture are zero."""
    steps = np.arange(count)[:, None] * bin + (np.arange(samples) + 0.5) * bin / max(samples, 1)
    position = (start + steps).ravel()
    inside = (position >= -1.0) & (position <= size)
    position = np.clip(position, 0, size - 1)
    below = np.minimum(position.astype(np.int64), size - 1)
    above = np.minimum(below + 1, size - 1)
    weights = np.stack([1 - (position - below), position - below])
    return Taps(np.stack([below, above]), np.where(inside, weights, 0.0))


def _pooled_bins(
    b: Builder,
    x: Ref,
    axes: list[tuple[Taps, int]],
    bins: tuple[int, int],
    shape: tuple[int, ...],
    mode: str,
) -> Ref:
    """One region of one picture: 1 × C × bins."""
    (rows, down), (columns, across) = axes
    if mode == "avg":
        by_rows, by_columns = (
            taps.matrix(size).reshape(count, samples, size).mean(axis=1)
            for taps, samples, size, count in zip(
                (rows, columns), (down, across), shape[2:], bins, strict=True
            )
        )
        picture = b.reshape(x, (1, *shape[1:]))
        return mapped(b, mapped(b, picture, 2, by_rows), 3, by_columns)
    if mode != "max":
        raise Unsupported(f"mode {mode!r} is unknown")
    crossing = [rows.repeated(bins[1] * across), columns.tiled(bins[0] * down)]
    taps = together(crossing, (shape[2], shape[3]))
    each = (len(taps.indices), bins[0], down, bins[1], across)
    order = np.arange(taps.indices.size).reshape(each).transpose(0, 2, 4, 1, 3).ravel()
    single = Taps(taps.indices.ravel()[order][None], taps.weights.ravel()[order][None])
    each_tap = combined(b, x, 2, single.indices, single.weights)
    per_bin = len(order) // prod(bins)
    largest = reduce_max(b, b.reshape(each_tap, (1, shape[1], per_bin, prod(bins))), 2)
    return b.reshape(largest, (1, shape[1], *bins))


@lowers("MaxRoiPool", since=1)
def max_roi_pool(
    b: Builder, x: Ref, rois: Operand, /, *, pooled_shape: Sequence[int], spatial_scale: float = 1.0
) -> Ref:
    """Largest element of each bin of public regions: a tournament over a bin's elements."""
    where = positions_of(x.shape[2:])
    regions = []
    for batch, *corner in np.asarray(values_of(rois, "rois"), np.float64):
        left, top, right, bottom = (floor(c * spatial_scale + 0.5) for c in corner)
        rows, columns = (
            _bins(start, max(end - start + 1, 1), count, size)
            for start, end, count, size in zip(
                (top, left), (bottom, right), pooled_shape, x.shape[2:], strict=True
            )
        )
        bins = [where[r][:, c].ravel() for r in rows for c in columns]
        regions.append(_largest(b, b.slice(x, 0, int(batch), int(batch) + 1), bins, pooled_shape))
    return b.concat(regions, 0)


def _bins(start: int, length: int, count: int, size: int) -> list[slice]:
    each = length / count
    ends = [(floor(k * each), ceil((k + 1) * each)) for k in range(count)]
    return [slice(*(min(max(e + start, 0), size) for e in pair)) for pair in ends]


def _largest(b: Builder, x: Ref, bins: list[NDArray[np.int64]], shape: Sequence[int]) -> Ref:
    """An empty bin is zero; a short one repeats its first element."""
    longest = max(1, *(len(positions) for positions in bins))
    table = np.full((longest, len(bins)), NOWHERE)
    for k, positions in enumerate(bins):
        if len(positions):
            table[:, k] = positions[0]
            table[: len(positions), k] = positions
    largest = reduce_max(b, taken(b, x, table, keep=2), 2)
    return b.reshape(largest, (1, x.shape[1], *shape))
