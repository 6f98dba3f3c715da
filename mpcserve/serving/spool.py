"""Dealt corrections on disk: what bob keeps of a bundle that is not to take up memory yet.

A file that is unlinked as soon as it is open, readable by the owner alone: nothing of it outlives
the process, however it ends. What bob prepares from it is what he would have prepared from carol's
stream.
"""

from __future__ import annotations

import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from mpcserve.errors import MpcError, Refused
from mpcserve.serving.files import private_directory

_STEP = 1 << 20


class Spool:
    """The directory of the files of one server."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        private_directory(directory)

    def write(self, size: int, take: Callable[[int], memoryview]) -> Spooled:
        """`size` bytes of `take` in a new file. Raises: Refused when the disk does not take it."""
        spooled = Spooled(self._directory)
        try:
            spooled.fill(size, take)
        except OSError as e:
            spooled.close()
            raise _unusable(self._directory, e) from None
        except MpcError:
            spooled.close()
            raise
        return spooled


class Spooled:
    """One file, written once, then read once from its beginning."""

    def __init__(self, directory: Path) -> None:
        try:
            # Mode 0600, and without a name from the start where the system knows how.
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  outlives this call
        except OSError as e:
            raise _unusable(directory, e) from None
        # A bundle may be dropped with its link, its shelf or its server: the file goes with it.
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()

    def fill(self, size: int, take: Callable[[int], memoryview]) -> None:
        """Write what `take` gives."""
        for at in range(0, size, _STEP):
            self._file.write(take(min(_STEP, size - at)))
        self._file.flush()
        self._file.seek(0)

    def take(self, n: int) -> memoryview:
        """The next n bytes. Raises: Refused when it was closed meanwhile."""
        data = bytearray(n)
        with self._lock:
            if self._file.closed or self._file.readinto(data) != n:
                raise Refused("a spooled bundle was given up", "take another one")
        return memoryview(data)

    def close(self) -> None:
        """Free it."""
        with self._lock:
            self._file.close()


def _unusable(directory: Path, error: OSError) -> Refused:
    return Refused(
        f"{directory}: cannot keep a bundle on disk: {error.strerror}",
        "make room, or lower `pool.depth`",
    )
