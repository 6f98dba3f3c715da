"""Arrays from files: .npy for one input, .npz for several; and their cutting into batches."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.errors import InputError

Array = NDArray[Any]


def load_arrays(path: Path) -> Array | dict[str, Array]:
    """One array of a .npy, or name → array of a .npz. Raises: InputError naming the file."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _numeric(path, loaded)
        with loaded as archive:
            return {name: _numeric(path, archive[name], name) for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        what = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise InputError(
            f"{path}: not a readable .npy or .npz file of numbers: {what}",
            "write it with numpy.save(path, array) or numpy.savez(path, name=array)",
        ) from None


def load_one(path: Path) -> Array:
    """The array of a .npy, or of a .npz that holds one. Raises: InputError."""
    loaded = load_arrays(path)
    if isinstance(loaded, np.ndarray):
        return loaded
    if len(loaded) != 1:
        raise InputError(f"{path}: expected one array, got {', '.join(loaded) or 'none'}", "")
    return next(iter(loaded.values()))


def by_name(
    arrays: Array | Mapping[str, Array], names: Sequence[str], source: Path
) -> dict[str, Array]:
    """Arrays in the order of the model's inputs. Raises: InputError listing both sides' names."""
    if not isinstance(arrays, Mapping):
        arrays = {names[0]: arrays} if len(names) == 1 else {"(unnamed)": arrays}
    elif len(names) == len(arrays) == 1:
        return {names[0]: next(iter(arrays.values()))}
    if set(arrays) != set(names):
        raise InputError(
            f"{source}: expected arrays named {', '.join(names)}, got {', '.join(arrays)}",
            f"write them with numpy.savez({str(source)!r}, {'=…, '.join(names)}=…)",
        )
    return {name: arrays[name] for name in names}


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


def _numeric(path: Path, array: Array, name: str = "") -> Array:
    if array.dtype.kind not in "fiub":
        where = f"{path}: array {name!r}" if name else str(path)
        raise InputError(f"{where}: expected numbers, got dtype {array.dtype}", "convert it first")
    return array
