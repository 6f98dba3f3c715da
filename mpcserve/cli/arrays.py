"""Arrays of labels, arrays cut into batches, and arrays for want of data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpcserve.arrays import Array, Columns, read_arrays
from mpcserve.errors import InputError


def load_one(path: Path) -> Array:
    """The array of a .npy, or of a .npz that holds one. Raises: InputError."""
    loaded = read_arrays(path)
    if isinstance(loaded, Columns):
        raise InputError(f"{path}: expected a .npy or .npz file", "write it with numpy.save")
    if isinstance(loaded, np.ndarray):
        return loaded
    if len(loaded) != 1:
        raise InputError(f"{path}: expected one array, got {', '.join(loaded) or 'none'}", "")
    return next(iter(loaded.values()))


def batches(arrays: Mapping[str, Array], size: int) -> Iterator[tuple[int, list[Array]]]:
    """(rows that count, arrays of exactly `size` rows): the last batch repeats its last row."""
    count = len(next(iter(arrays.values())))
    for begin in range(0, count, size):
        rows = [a[begin : begin + size] for a in arrays.values()]
        used = len(rows[0])
        if used < size:
            rows = [np.concatenate([r, np.repeat(r[-1:], size - used, axis=0)]) for r in rows]
        yield used, rows


def uniform(shape: Sequence[int], low: float, high: float) -> NDArray[np.float32]:
    """Fixed values that look random, for benchmarks without data: SplitMix64 of the index."""
    z = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    fraction = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    values: NDArray[np.float32] = (low + (high - low) * fraction).astype(np.float32)
    return values.reshape(tuple(shape))
