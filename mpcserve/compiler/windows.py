"""Sliding windows as ONNX defines them: padding modes and output sizes, axis by axis."""

from __future__ import annotations

from collections.abc import Sequence

from mpcserve.compiler.problems import Unsupported


def pads_of(
    auto_pad: str,
    pads: Sequence[int] | None,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[list[int], list[int]]:
    """(before, after) per axis, whatever way the node states them."""
    axes = len(sizes)
    if auto_pad in ("NOTSET", ""):
        flat = list(pads) if pads else [0] * (2 * axes)
        return flat[:axes], flat[axes:]
    if auto_pad == "VALID":
        return [0] * axes, [0] * axes
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        raise Unsupported(f"auto_pad {auto_pad!r} is unknown")
    before, after = [], []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        whole = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        small, large = whole // 2, whole - whole // 2
        before.append(small if auto_pad == "SAME_UPPER" else large)
        after.append(large if auto_pad == "SAME_UPPER" else small)
    return before, after


def pooled_size(
    size: int, kernel: int, stride: int, dilation: int, pads: tuple[int, int], ceil_mode: int
) -> int:
    """Windows along one axis; in ceil mode a window that begins in the far padding is dropped."""
    room = size + sum(pads) - dilation * (kernel - 1) - 1
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + pads[0]:
        count -= 1
    return count
