"""Arrays from files: .npy for one input, .npz for several, .csv with a column for each feature."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan, prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpcserve.errors import InputError

Array = NDArray[Any]


class Wanted(Protocol):
    """An input of a model. Its first dimension counts rows; text has the dtype "str"."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int | None]: ...


@dataclass(frozen=True, slots=True)
class Columns:
    """A table of text: what its cells stand for is known when the model's inputs are."""

    source: Path
    names: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def fitted(self, inputs: Sequence[Wanted]) -> dict[str, Array]:
        """By the header where it names every input, else all columns in order.

        Raises: InputError naming row and column of a cell that is no number.
        """
        places = self._places(inputs)
        return {i.name: self._array(i, p) for i, p in zip(inputs, places, strict=True)}

    def _places(self, inputs: Sequence[Wanted]) -> list[list[int]]:
        widths = [prod(d or 1 for d in i.shape[1:]) for i in inputs]
        if all(i.name in self.names and w == 1 for i, w in zip(inputs, widths, strict=True)):
            return [[self.names.index(i.name)] for i in inputs]
        if sum(widths) == len(self.names):
            begins = [sum(widths[:k]) for k in range(len(widths))]
            return [list(range(b, b + w)) for b, w in zip(begins, widths, strict=True)]
        wanted = ", ".join(f"{i.name} ({w})" for i, w in zip(inputs, widths, strict=True))
        raise InputError(
            f"{self.source}: columns {', '.join(self.names)} do not fit the inputs {wanted}",
            "name the columns as the inputs, or give as many columns as the inputs have together",
        )

    def _array(self, wanted: Wanted, places: Sequence[int]) -> Array:
        cells = [[row[p] for p in places] for row in self.rows]
        if wanted.dtype == "str":
            array: Array = np.array(cells, np.str_)
        else:
            read = _reader(np.dtype(wanted.dtype))
            numbers = [
                [self._number(read, cell, row, p) for cell, p in zip(given, places, strict=True)]
                for row, given in enumerate(cells)
            ]
            array = np.array(numbers, wanted.dtype)
        return array.reshape(len(self.rows), *(d or 1 for d in wanted.shape[1:]))

    def _number(self, read: Callable[[str], float], cell: str, row: int, place: int) -> float:
        try:
            return read(cell.strip())
        except ValueError:
            raise InputError(
                f"{self.source}: row {row}, column {self.names[place]!r}: {cell!r} is no number",
                "the first row below the header is row 0",
            ) from None


def _reader(dtype: np.dtype[Any]) -> Callable[[str], float]:
    """Text → number; an empty cell is a missing real number."""
    if dtype.kind == "f":
        return lambda cell: float(cell) if cell else nan
    if dtype.kind == "b":
        return lambda cell: ("false", "true").index(cell.lower())
    return int


def read_arrays(path: Path) -> Array | dict[str, Array] | Columns:
    """An array of a .npy, name → array of a .npz, or a .csv. Raises: InputError naming the file."""
    try:
        if path.suffix.lower() == ".csv":
            return _columns(path)
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _plain(path, loaded)
        with loaded as archive:
            return {name: _plain(path, archive[name], name) for name in archive.files}
    except (OSError, ValueError, EOFError, csv.Error, zipfile.BadZipFile) as e:
        what = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise InputError(
            f"{path}: not a readable .npy, .npz or .csv file: {what}",
            "write it with numpy.save(path, array) or numpy.savez(path, name=array); "
            "a .csv has commas and a header",
        ) from None


def fitted(
    given: Array | Mapping[str, Array] | Columns, inputs: Sequence[Wanted], source: Path
) -> dict[str, Array]:
    """Arrays in the order of the model's inputs. Raises: InputError listing both sides' names."""
    if isinstance(given, Columns):
        return given.fitted(inputs)
    names = [i.name for i in inputs]
    if not isinstance(given, Mapping):
        given = {names[0]: given} if len(names) == 1 else {"(unnamed)": given}
    elif len(names) == len(given) == 1:
        given = {names[0]: next(iter(given.values()))}
    if set(given) != set(names):
        raise InputError(
            f"{source}: expected arrays named {', '.join(names)}, got {', '.join(given)}",
            f"write them with numpy.savez({str(source)!r}, {'=…, '.join(names)}=…)",
        )
    for i in inputs:
        if (i.dtype == "str") != (given[i.name].dtype.kind == "U"):
            expected = "text" if i.dtype == "str" else "numbers"
            raise InputError(
                f"{source}: input {i.name!r}: expected {expected}, got {given[i.name].dtype}",
                f"convert it with .astype({i.dtype!r})",
            )
    return {name: given[name] for name in names}


def _columns(path: Path) -> Columns:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header, *rows = [tuple(row) for row in csv.reader(file) if row] or [()]
    names = tuple(name.strip() for name in header)
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} cells below {len(names)} names")
    if not rows:
        raise ValueError("no rows below the header")
    return Columns(path, names, tuple(rows))


def _plain(path: Path, array: Array, name: str = "") -> Array:
    if array.dtype.kind not in "fiubU":
        where = f"{path}: array {name!r}" if name else str(path)
        raise InputError(
            f"{where}: expected numbers or text, got dtype {array.dtype}", "convert it first"
        )
    return array
