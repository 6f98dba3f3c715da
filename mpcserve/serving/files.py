"""Files that hold secrets: directories 0700, files 0600, written durably."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def private_directory(path: Path) -> None:
    """Create `path` and its parents, readable by the owner alone."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def write_private(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write `pieces` one after another; on disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
