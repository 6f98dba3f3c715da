"""DFT and STFT: products by public matrices, local. Lengths, axes and windows are public."""

from __future__ import annotations

from math import pi

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import axis_of, ints_of, values_of
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.rearrange import mapped, windows
from mpcserve.compiler.registry import lowers

Floats = NDArray[np.float64]


@lowers("DFT", since=17)
def dft_attributes(
    b: Builder,
    x: Ref,
    dft_length: Operand | None = None,
    /,
    *,
    axis: int = 1,
    inverse: int = 0,
    onesided: int = 0,
) -> Ref:
    """Discrete Fourier transform along an axis. Error: 2 ulp and 2^-21 of the sum of |x|."""
    length = None if dft_length is None else ints_of(dft_length, "dft_length")[0]
    axis = axis_of(axis, len(x.shape))
    count, parts = x.shape[axis], x.shape[-1]
    if axis == len(x.shape) - 1 or parts > 2:
        raise Unsupported(f"transforms axis {axis} of {list(x.shape)}; the last holds re and im")
    if inverse and onesided:
        return _transformed(b, x, axis, _real_inverse(count, parts, length or 2 * (count - 1)), 1)
    matrix = _fourier(count, parts, length or count, bool(inverse), bool(onesided))
    return _transformed(b, x, axis, matrix)


@lowers("DFT", since=20)
def dft(
    b: Builder,
    x: Ref,
    dft_length: Operand | None = None,
    axis: Operand | None = None,
    /,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Ref:
    """Discrete Fourier transform along an axis. Error: 2 ulp and 2^-21 of the sum of |x|."""
    along = -2 if axis is None else ints_of(axis, "axis")[0]
    return dft_attributes(b, x, dft_length, axis=along, inverse=inverse, onesided=onesided)


@lowers("STFT", since=17)
def stft(
    b: Builder,
    x: Ref,
    frame_step: Operand,
    window: Operand | None = None,
    frame_length: Operand | None = None,
    /,
    *,
    onesided: int = 1,
) -> Ref:
    """Fourier transforms of overlapping frames times a public window. Error: as DFT."""
    if len(x.shape) == 2:  # as torch exports it
        x = b.reshape(x, (*x.shape, 1))
    step = ints_of(frame_step, "frame_step")[0]
    weights = None if window is None else np.asarray(values_of(window, "window"), np.float64)
    if frame_length is not None:
        length = ints_of(frame_length, "frame_length")[0]
    else:
        length = x.shape[1] if weights is None else len(weights)
    frames = 1 + (x.shape[1] - length) // step
    cut = windows(b, x, 1, frames, (length, step, 1), 0, 0.0)
    matrix = _fourier(length, x.shape[2], length, False, bool(onesided))
    if weights is not None:
        matrix *= np.repeat(np.append(weights, np.zeros(length - len(weights))), x.shape[2])
    return _transformed(b, b.transpose(cut, (0, 2, 1, 3)), 2, matrix)


def _transformed(b: Builder, x: Ref, axis: int, matrix: Floats, out: int = 2) -> Ref:
    """`matrix`: from (elements, parts) along an axis to (frequencies, `out` parts)."""
    rank, parts = len(x.shape), x.shape[-1]
    order = [*(k for k in range(rank - 1) if k != axis), axis, rank - 1]
    moved = b.transpose(x, order)
    lead = moved.shape[:-2]
    y = mapped(b, b.reshape(moved, (*lead, x.shape[axis] * parts)), rank - 2, matrix)
    y = b.reshape(y, (*lead, len(matrix) // out, out))
    return b.transpose(y, np.argsort(order).tolist())


def _fourier(count: int, parts: int, length: int, inverse: bool, onesided: bool) -> Floats:
    """`count` complex or real elements, cut or filled up to `length`, to their frequencies."""
    frequencies = length // 2 + 1 if onesided else length
    angle = 2 * pi / length * np.outer(np.arange(frequencies), np.arange(count))
    scale = (np.arange(count) < length) / (length if inverse else 1.0)
    cosine, sine = np.cos(angle) * scale, np.sin(angle) * scale * (1 if inverse else -1)
    # (re, im) of the result by (re, im) of the operand
    whole = np.array([[cosine, -sine], [sine, cosine]])[:, :parts]
    return whole.transpose(2, 0, 3, 1).reshape(2 * frequencies, count * parts)


def _real_inverse(count: int, parts: int, length: int) -> Floats:
    """One half of the frequencies of a real signal to its `length` elements."""
    used = np.arange(count) < length // 2 + 1
    middle = (np.arange(count) == 0) | (2 * np.arange(count) == length)
    scale = used * np.where(middle, 1.0, 2.0) / length
    angle = 2 * pi / length * np.outer(np.arange(length), np.arange(count))
    whole = np.array([np.cos(angle) * scale, -np.sin(angle) * scale])[:parts]
    return whole.transpose(1, 2, 0).reshape(length, count * parts)
