"""Interpolation as public weights: which elements of an axis make a sample, and how much of each.

Everything here is plain arithmetic on positions, as ONNX defines Resize, GridSample and RoiAlign;
the secret picture appears nowhere. `rearrange` applies the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import floor

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.problems import Unsupported

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Taps:
    """Sample k of an axis is Σ_t weights[t, k]·x[indices[t, k]]; both taps × samples."""

    indices: Ints
    weights: Floats

    def repeated(self, count: int) -> Taps:
        """Every sample `count` times."""
        return Taps(np.repeat(self.indices, count, axis=1), np.repeat(self.weights, count, axis=1))

    def tiled(self, count: int) -> Taps:
        """All samples, `count` times over."""
        return Taps(np.tile(self.indices, (1, count)), np.tile(self.weights, (1, count)))

    def matrix(self, size: int) -> Floats:
        """The same as samples × size."""
        matrix = np.zeros((self.indices.shape[1], size))
        for index, weight in zip(self.indices, self.weights, strict=True):
            np.add.at(matrix, (np.arange(len(index)), index), weight)
        return matrix


def together(axes: list[Taps], sizes: tuple[int, ...]) -> Taps:
    """Samples that have a position along each of several axes, over the flattened axes."""

    def pair(x: tuple[Taps, int], y: tuple[Taps, int]) -> tuple[Taps, int]:
        (a, _), (b, size) = x, y
        indices = a.indices[:, None] * size + b.indices[None]
        weights = a.weights[:, None] * b.weights[None]
        flat = (-1, indices.shape[-1])
        return Taps(indices.reshape(flat), weights.reshape(flat)), size

    return reduce(pair, zip(axes, sizes, strict=True))[0]


@dataclass(frozen=True, slots=True)
class Resampling:
    """The attributes of a Resize that say how an axis is sampled."""

    mode: str
    transform: str
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    antialias: bool = False
    exclude_outside: bool = False


def resized(size: int, out: int, scale: float, how: Resampling, roi: tuple[float, float]) -> Taps:
    """`out` samples of an axis of `size`. A sample beyond the roi of tf_crop_and_resize is zero."""
    position, beyond = _sources(size, out, scale, how.transform, roi)
    below = np.floor(position)
    ratio = np.where(position == below, 1.0, position - below)
    weights = np.stack([_kernel(float(r), scale, how) for r in ratio])
    count = weights.shape[1]
    # The `count` elements nearest to the position; of two as near the left one.
    first = (
        np.ceil(position - count / 2) if count % 2 == 0 else np.ceil(position - 0.5) - count // 2
    )
    indices = first.astype(np.int64)[:, None] + np.arange(count)
    if how.exclude_outside:
        weights = np.where((indices < 0) | (indices >= size), 0.0, weights)
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / np.where(total == 0, 1.0, total)
    weights[beyond] = 0.0
    return Taps(np.clip(indices, 0, size - 1).T, weights.T)


def outside(size: int, out: int, scale: float, transform: str, roi: tuple[float, float]) -> Ints:
    """Samples that tf_crop_and_resize takes from beyond the picture."""
    return np.flatnonzero(_sources(size, out, scale, transform, roi)[1])


def _sources(
    size: int, out: int, scale: float, transform: str, roi: tuple[float, float]
) -> tuple[Floats, NDArray[np.bool_]]:
    """(position of each sample on the axis, whether it is beyond)."""
    k, wide, last = np.arange(out, dtype=np.float64), scale * size, size - 1
    beyond = np.zeros(out, bool)
    if transform == "align_corners":
        return (k * 0 if wide == 1 else k * last / (wide - 1)), beyond
    if transform == "asymmetric":
        return k / scale, beyond
    if transform == "tf_crop_and_resize":
        start, end = roi
        step = (end - start) * last
        position = start * last + (k * 0 + step / 2 if wide == 1 else k * step / (wide - 1))
        return position, (position < 0) | (position > last)
    centred = (k + 0.5) / scale - 0.5
    if transform == "pytorch_half_pixel":
        return (k * 0 - 0.5 if wide == 1 else centred), beyond
    if transform == "half_pixel":
        return centred, beyond
    if transform == "half_pixel_symmetric":
        return size / 2 * (1 - out / wide) + centred, beyond
    raise Unsupported(f"coordinate_transformation_mode {transform!r} is unknown")


def _kernel(ratio: float, scale: float, how: Resampling) -> Floats:
    """Weights of the elements nearest to a position `ratio` behind one, 0 < ratio ≤ 1."""
    scale = min(scale, 1.0)
    if how.mode == "nearest":
        return _nearer(ratio, how.nearest)
    if how.mode not in ("linear", "cubic"):
        raise Unsupported(f"mode {how.mode!r} is unknown")
    reach = 1 if how.mode == "linear" else 2
    if not how.antialias:
        scale = 1.0
    first = floor(-reach / scale) + 1
    at = np.float64(scale) * (np.arange(first, 2 - first, dtype=np.float64) - ratio)
    weights = np.clip(1 - np.abs(at), 0, 1) if reach == 1 else cubic(at, how.cubic)
    return np.asarray(weights / weights.sum() if how.antialias else weights)


def _nearer(ratio: float, mode: str) -> Floats:
    left = {
        "round_prefer_floor": ratio <= 0.5,
        "round_prefer_ceil": ratio < 0.5,
        "floor": ratio < 1,
        "ceil": False,
    }
    if mode not in left:
        raise Unsupported(f"nearest_mode {mode!r} is unknown")
    return np.array([left[mode], not left[mode]], np.float64)


def cubic(at: Floats, a: float) -> Floats:
    """Keys' kernel at distances `at`."""
    x = np.abs(at)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bilinear(position: Floats, size: int) -> Taps:
    """Samples of an axis at positions in elements, which are zero outside of it."""
    below = np.floor(position)
    indices = (below + np.arange(2)[:, None]).astype(np.int64)
    weights = np.stack([1 - (position - below), position - below])
    weights = np.where((indices < 0) | (indices >= size), 0.0, weights)
    return Taps(np.clip(indices, 0, size - 1), weights)


def sampled(position: Floats, size: int, mode: str, padding: str, corners: bool) -> Taps:
    """Samples of an axis at normalised positions in [−1, 1], as GridSample takes them."""
    ends = (0.0, size - 1.0) if corners else (-0.5, size - 0.5)
    x = (position + 1) / 2 * (size - 1) if corners else ((position + 1) * size - 1) / 2
    x = x.astype(np.float32).astype(np.float64)
    if mode == "nearest":
        x = np.rint(x)
    if padding == "border" and mode not in ("cubic", "bicubic"):
        x = np.where((x < ends[0]) | (x > ends[1]), np.clip(x, 0, size - 1), x)
    elif padding == "reflection":
        x = _reflected(x, *ends)
    below = np.floor(x)
    if mode == "nearest":
        indices, weights = x[None], np.ones((1, len(x)))
    elif mode in ("linear", "bilinear"):
        indices = below + np.arange(2)[:, None]
        weights = np.stack([1 - (x - below), x - below])
    elif mode in ("cubic", "bicubic"):
        indices = below + np.arange(-1, 3)[:, None]
        weights = cubic(indices - x, -0.75)
    else:
        raise Unsupported(f"mode {mode!r} is unknown")
    return _padded(indices.astype(np.int64), weights, size, padding, ends)


def _padded(
    indices: Ints, weights: Floats, size: int, padding: str, ends: tuple[float, float]
) -> Taps:
    if padding == "zeros":
        weights = np.where((indices < 0) | (indices >= size), 0.0, weights)
    elif padding == "reflection":
        indices = _reflected(indices.astype(np.float64), *ends).astype(np.int64)
    elif padding != "border":
        raise Unsupported(f"padding_mode {padding!r} is unknown")
    return Taps(np.clip(indices, 0, size - 1), weights)


def _reflected(x: Floats, low: float, high: float) -> Floats:
    """Thrown back by both ends until within them."""
    span = high - low
    if span <= 0:
        return np.full_like(x, low)
    off = np.mod(x - low, 2 * span)
    back = low + np.where(off > span, 2 * span - off, off)
    return np.where((x >= low) & (x <= high), x, back)
