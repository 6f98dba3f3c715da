"""Long lists of public integers in a plan: held as one array, written compressed.

A gather of a picture has an index per pixel. As JSON numbers those would outgrow the rest of the
plan, and as Python integers they would take ten times their size in memory.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHORT = 32
"""Lists up to here stay lists, which people can read."""

LONGEST = 1 << 28
"""More integers than a plan of any use lists in one place."""

_KEY = "table"


@dataclass(frozen=True, slots=True, repr=False)
class Table:
    """An immutable list of 64-bit integers; `np.asarray(table)` is its array."""

    data: bytes

    def __len__(self) -> int:
        return len(self.data) // 8

    def __iter__(self) -> Iterator[int]:
        return iter(self.array.tolist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.array, dtype) if copy else self.array.astype(dtype or "i8", copy=False)

    def __repr__(self) -> str:
        return f"Table({len(self)} integers)"

    @property
    def array(self) -> NDArray[np.int64]:
        """The integers, read-only."""
        return np.frombuffer(self.data, "<i8")


def listed(values: Sequence[int] | NDArray[np.integer[Any]]) -> list[int] | Table:
    """What an instruction holds of a flat list of integers: a list, or a Table of a long one."""
    array = np.asarray(values, "<i8")
    return array.tolist() if array.size <= SHORT else Table(array.tobytes())


def written(value: Any) -> Any:
    """A table as JSON: {"table": [length, base64 of the compressed differences]}; else the value.

    Indices mostly go up in equal steps, so their differences are what compresses.
    """
    if not isinstance(value, Table):
        return value
    steps = np.diff(value.array, prepend=np.int64(0))
    packed = base64.b64encode(zlib.compress(steps.tobytes(), 9))
    return {_KEY: [len(value), packed.decode("ascii")]}


def read(value: Any) -> Any:
    """Inverse of `written`. Raises: ValueError on malformed data."""
    if not isinstance(value, dict):
        return value
    count, packed = value[_KEY]
    if not (isinstance(count, int) and 0 < count <= LONGEST):
        raise ValueError(f"a table of {count} integers")
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(packed, validate=True), 8 * count)
    except zlib.error as e:
        raise ValueError(f"a table that does not unpack: {e}") from None
    if len(data) != 8 * count or not inflate.eof:
        raise ValueError(f"a table of other than the {count} integers it announces")
    return Table(np.cumsum(np.frombuffer(data, "<i8"), dtype="<i8").tobytes())
