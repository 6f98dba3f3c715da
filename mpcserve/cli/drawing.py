"""Small images in a terminal: two pixels to a character, one above the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

BLOCKS = " ▄▀█"
"""Indexed by 2·(upper pixel is set) + (lower pixel is set)."""

INK = 0.35
"""A pixel is drawn from this brightness on: strokes stay whole at half size."""


def draw(image: NDArray[Any]) -> list[str]:
    """Lines of an image [height, width] with values in [0, 1], at half its size."""
    height, width = (d // 4 * 4 for d in image.shape)
    halved = image[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
    ink = (halved >= INK).astype(int)
    pairs = 2 * ink[0::2] + ink[1::2]
    return ["".join(BLOCKS[k] for k in row) for row in pairs]


def side_by_side(images: Sequence[NDArray[Any]], gap: str = "  ") -> list[str]:
    """Lines of several images of one size in a row."""
    return [gap.join(parts) for parts in zip(*map(draw, images), strict=True)]
