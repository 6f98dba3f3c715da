"""Results of an inference: as tables for people, as files and JSON for machines."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mpcserve.arrays import Array
from mpcserve.cli.output import table
from mpcserve.cli.plaintext import predictions
from mpcserve.errors import ConfigError
from mpcserve.units import human_bytes, human_seconds

SHOWN_VALUES = 10
SHOWN_ROWS = 50


Columns = Mapping[str, Sequence[str | int]]
"""Name of an output → the classes whose shares are its columns."""


def print_outputs(outputs: Mapping[str, Array], columns: Columns = MappingProxyType({})) -> None:
    """One table an output: a row per sample, its prediction where there are classes, its values."""
    for name, values in outputs.items():
        rows = values.reshape(len(values), -1) if values.ndim else values.reshape(1, 1)
        classes = predictions(values) if values.ndim and values.dtype.kind == "f" else None
        shown = min(rows.shape[1], SHOWN_VALUES)
        named = columns.get(name) or [f"[{k}]" for k in range(rows.shape[1])]
        head = ["row", *(["prediction"] if classes is not None else [])]
        more = rows.shape[1] > shown
        table(
            [*head, *map(str, named[:shown]), *(["…"] if more else [])],
            (
                [
                    k,
                    *([_class(columns.get(name), classes[k])] if classes is not None else []),
                    *(_value(v) for v in rows[k, :shown]),
                    *([""] if more else []),
                ]
                for k in range(min(len(rows), SHOWN_ROWS))
            ),
            title=f"{name} {values.dtype}{list(values.shape)}",
            left=0,
        )
        if len(rows) > SHOWN_ROWS:
            print(f"… and {len(rows) - SHOWN_ROWS} more rows; -o FILE writes them all")


def outputs_json(
    outputs: Mapping[str, Array], columns: Columns = MappingProxyType({})
) -> dict[str, Any]:
    """Name → dtype, shape and values: of a ZipMap a {class: share} for each row."""
    return {
        name: {
            "dtype": str(v.dtype),
            "shape": list(v.shape),
            "data": [dict(zip(columns[name], row, strict=True)) for row in v.tolist()]
            if name in columns
            else v.tolist(),
        }
        for name, v in outputs.items()
    }


def save_outputs(path: Path, outputs: Mapping[str, Array]) -> None:
    """.npz when the name says so or there are several outputs, else .npy. Raises: ConfigError."""
    several = len(outputs) > 1
    if several and path.suffix != ".npz":
        raise ConfigError(
            f"{path}: the model has {len(outputs)} outputs ({', '.join(outputs)})",
            "give a name that ends in .npz",
        )
    try:
        with path.open("wb") as file:
            if path.suffix == ".npz":
                np.savez(file, **outputs)  # type: ignore[arg-type]
            else:
                np.save(file, next(iter(outputs.values())))
    except OSError as e:
        raise unwritten(path, e, "path") from None


def save_json(path: Path, value: Mapping[str, Any]) -> None:
    """A report file. Raises: ConfigError."""
    try:
        path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    except OSError as e:
        raise unwritten(path, e, "path") from None


def unwritten(path: Path, e: OSError, option: str) -> ConfigError:
    """What to say of a file that could not be written, where `option` names it."""
    ways = {
        errno.ENOENT: f"make the directory {path.parent}",
        errno.ENOTDIR: f"{path.parent} is no directory",
        errno.EISDIR: "a directory has that name",
        errno.EACCES: "ask for the right to write there",
        errno.EROFS: "the file system is read-only",
        errno.ENOSPC: "make room on the disk",
    }
    way = ways.get(e.errno or 0, "check the directory")
    return ConfigError(f"{path}: cannot write: {e.strerror}", f"{way}, or give another {option}")


def print_traffic(links: Mapping[str, int], overhead: Mapping[str, int] | None = None) -> None:
    """Payload of every link that carried any, and what frames and TLS added."""
    rows: list[Sequence[object]] = []
    for link, count in links.items():
        if count:
            extra = (overhead or {}).get(link)
            framing = "" if extra is None else f"+ {human_bytes(extra)}"
            rows.append((link.replace("->", " → "), human_bytes(count), f"{count:,}", framing))
    table(("link", "payload", "bytes", "frames, TLS"), rows)


def seconds_line(seconds: Mapping[str, float]) -> str:
    """`online 12 ms, preprocessing 3 ms, total 20 ms`."""
    return ", ".join(f"{name} {human_seconds(value)}" for name, value in seconds.items())


def _class(names: Sequence[str | int] | None, index: int) -> object:
    return names[index] if names else index


def _value(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float | np.floating) else str(value)
