"""The ledger: which bundles a server has ever admitted, on disk, so that none is used twice.

Two values opened under one mask leak their difference. So a bundle's id is recorded, durably,
before anything derived from it leaves the machine: when it is admitted to the pool, off the
critical path. A bundle itself lives in memory only; after a crash its id is known here and nothing
of it remains, so it can never come back. Each server has its own file.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

from mpcserve.errors import ConfigError, Refused
from mpcserve.serving.files import private_directory

_SCHEMA = """
CREATE TABLE IF NOT EXISTS bundles (
    id BLOB PRIMARY KEY, deployment BLOB NOT NULL, dealt REAL NOT NULL, spent REAL
) WITHOUT ROWID
"""


class Ledger:
    """One SQLite file. Safe to call from any thread."""

    def __init__(self, path: Path) -> None:
        """Open or create `path`. Raises: ConfigError when it is not a usable ledger."""
        private_directory(path.parent)
        self._lock = threading.Lock()
        try:
            path.touch(mode=0o600)
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            # FULL: a commit has reached the disk when it returns, also through a power failure.
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as e:
            raise ConfigError(
                f"{path}: cannot open the ledger of spent bundles: {e}",
                "give the server a state directory it may write to; never copy one from elsewhere",
            ) from None

    def admit(self, bundle: bytes, deployment: bytes) -> None:
        """Record `bundle` as dealt; on disk when this returns. Raises: Refused if ever seen."""
        with self._lock:
            try:
                self._database.execute(
                    "INSERT INTO bundles VALUES (?, ?, ?, NULL)", (bundle, deployment, time.time())
                )
            except sqlite3.IntegrityError:
                raise Refused(
                    f"bundle {bundle.hex()} has been dealt before", "a retry takes a new bundle"
                ) from None
            except sqlite3.Error as e:
                raise Refused(
                    f"bundle {bundle.hex()} cannot be recorded in the ledger: {e}",
                    "see to the disk of the server's state directory",
                ) from None

    def spend(self, bundle: bytes) -> None:
        """Record that `bundle` was taken for an evaluation, for audit."""
        with self._lock:
            self._database.execute(
                "UPDATE bundles SET spent = ? WHERE id = ?", (time.time(), bundle)
            )

    def counts(self) -> tuple[int, int]:
        """(dealt, spent): how many bundles were ever admitted, and how many of them were taken."""
        with self._lock:
            dealt, spent = self._database.execute(
                "SELECT count(*), count(spent) FROM bundles"
            ).fetchone()
        return int(dealt), int(spent)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()
