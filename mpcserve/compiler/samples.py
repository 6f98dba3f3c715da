"""Samples: what a model's inputs typically are, read from files or drawn at random."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import shake_256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.arrays import Columns, Wanted, read_arrays
from mpcserve.compiler.dtypes import held
from mpcserve.compiler.graph import Tensor
from mpcserve.errors import InputError
from mpcserve.plan.client import RawInput

Array = NDArray[Any]
Given = str | Path | Array | Mapping[str, Array]
"""A file, arrays by name or the only input's, or "random:N"."""

Reaches = Mapping[str, tuple[float, float]]
"""(low, high) of the inputs that have a declared range."""

_RANDOM = re.compile(r"random:([1-9]\d{0,5})")

FARTHEST = 4.0
"""Random inputs without a declared range have unit variance, and none lies beyond."""


@dataclass(frozen=True, slots=True)
class Samples:
    """`arrays`: rows per input. `drawn`: at random, so that real ones may reach further."""

    arrays: Mapping[str, Array]
    drawn: bool = False

    @property
    def count(self) -> int:
        """Rows."""
        return min(len(a) for a in self.arrays.values())

    def feeds(self, inputs: tuple[Tensor, ...]) -> Iterator[dict[str, Array]]:
        """Batches of the graph's size; the last one repeats its final sample."""
        batch = inputs[0].shape[0] if inputs[0].shape else 1
        for start in range(0, self.count, batch):
            rows = np.minimum(np.arange(start, start + batch), self.count - 1)
            taken = {i.name: self.arrays[i.name][rows].astype(i.dtype) for i in inputs}
            yield {i.name: held(taken[i.name]).reshape(i.shape) for i in inputs}


def lengths_of(given: Given | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the samples of each input, "" where there is one array; none of random ones or of
    a table, whose columns say nothing of an input's axes.

    Raises: InputError on a file that cannot be read.
    """
    if given is None or _is_random(given):
        return {}
    arrays = read_arrays(Path(given)) if isinstance(given, str | Path) else given
    if isinstance(arrays, Columns):
        return {}
    arrays = {"": arrays} if isinstance(arrays, np.ndarray) else arrays
    return {name: np.shape(array) for name, array in arrays.items()}


def _is_random(given: Given) -> bool:
    return isinstance(given, str | Path) and str(given).startswith("random:")


def samples_of(given: Given, inputs: tuple[Tensor, ...], reaches: Reaches) -> Samples:
    """Raises: InputError on samples that do not fit the inputs."""
    if _is_random(given):
        found = _RANDOM.fullmatch(str(given))
        if found is None:
            raise InputError(f"samples {str(given)!r}: no number of rows", "give random:16, say")
        return Samples({i.name: _drawn(i, int(found[1]), reaches) for i in inputs}, drawn=True)
    return Samples(_fitting(given, inputs))


def raw_samples(given: Given, inputs: tuple[RawInput, ...]) -> dict[str, Array] | None:
    """What a client's program reads, values missing or not; None for random samples.

    Raises: InputError on samples that do not fit the inputs.
    """
    if _is_random(given):
        return None
    return _fitting(given, inputs, raw=True)


def _fitting(given: Given, inputs: Sequence[Wanted], raw: bool = False) -> dict[str, Array]:
    if isinstance(given, str | Path):
        loaded = read_arrays(Path(given))
        given = loaded.fitted(inputs) if isinstance(loaded, Columns) else loaded
    if isinstance(given, np.ndarray):
        if len(inputs) != 1:
            names = ", ".join(repr(i.name) for i in inputs)
            raise InputError(
                f"one array of samples for {len(inputs)} inputs", f"give an .npz with {names}"
            )
        given = {inputs[0].name: given}
    missing = [i.name for i in inputs if i.name not in given]
    if missing:
        raise InputError(f"no samples for input {missing[0]!r}", "name the arrays as the inputs")
    for i in inputs:
        array = given[i.name]
        if array.shape[1:] != tuple(i.shape[1:]) or not len(array):
            raise InputError(
                f"samples of input {i.name!r} have shape {list(array.shape)}, "
                f"expected N x {list(i.shape[1:])}",
                "stack the samples along a first axis",
            )
        if not raw and not np.isfinite(array).all():
            raise InputError(
                f"samples of input {i.name!r} are not all finite", "remove NaN and inf"
            )
    return {i.name: np.asarray(given[i.name]) for i in inputs}


def _drawn(i: Tensor, count: int, reaches: Reaches) -> Array:
    """Uniform over the declared range, the same for the same name; else normal."""
    shape = (count, *i.shape[1:])
    kind = np.dtype(i.dtype)
    if i.name not in reaches:
        if kind.kind != "f":
            raise InputError(
                f"random samples of input {i.name!r}, whose elements are {i.dtype}",
                "declare its range (--input-range), or calibrate with real samples",
            )
        angle, radius = _uniform(f"{i.name} 0", shape), _uniform(f"{i.name} 1", shape)
        normal = np.cos(2 * np.pi * angle) * np.sqrt(-2 * np.log(radius))
        drawn = np.clip(normal, -FARTHEST, FARTHEST)
    else:
        low, high = reaches[i.name]
        drawn = low + (high - low) * _uniform(i.name, shape)
    result: Array = (drawn if kind.kind == "f" else np.rint(drawn)).astype(kind)
    return result


def _uniform(name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """In (0, 1)."""
    words = np.frombuffer(shake_256(name.encode()).digest(4 * prod(shape)), np.uint32)
    return ((words.astype(np.float64) + 0.5) * 2.0**-32).reshape(shape)
