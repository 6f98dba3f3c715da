"""The ledger: which bundles a server has ever admitted, on disk, so that none is used twice.

Two values opened under one mask leak their difference. So a bundle's id is recorded, durably,
before anything derived from it leaves the machine: when it is admitted to the pool, off the
critical path, or when it is reserved, before anything is dealt. A bundle itself lives in memory, or
in a file without a name; after a crash its id is known here and nothing of it remains, so it can
never come back. Each server has its own file.

That a reserved bundle was dealt, and that one was taken, is noted for audit alone, together with
the next one that is admitted.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mpcserve.errors import ConfigError, Refused
from mpcserve.serving.files import private_directory
from mpcserve.serving.log import log

_NOT_DEALT = 0.0

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
        self._dealt: list[tuple[float, bytes]] = []
        self._spent: list[tuple[float, bytes]] = []
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
        self._record([bundle], deployment, time.time())

    def reserve(self, bundles: Sequence[bytes], deployment: bytes) -> None:
        """Record ids that are not dealt yet; on disk when this returns. Raises: Refused if any was
        ever seen, and none is recorded then."""
        self._record(bundles, deployment, _NOT_DEALT)

    def deal(self, bundle: bytes) -> None:
        """Note that a reserved `bundle` is dealt."""
        with self._lock:
            self._dealt.append((time.time(), bundle))

    def spend(self, bundle: bytes) -> None:
        """Note that `bundle` was taken for an evaluation."""
        with self._lock:
            self._spent.append((time.time(), bundle))

    def counts(self) -> tuple[int, int]:
        """(dealt, spent): how many bundles were ever dealt, and how many of them were taken."""
        with self._lock:
            with self._transaction():
                pass
            dealt, spent = self._database.execute(
                "SELECT count(*), count(spent) FROM bundles WHERE dealt > ?", (_NOT_DEALT,)
            ).fetchone()
        return int(dealt), int(spent)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            try:
                with self._transaction():
                    pass
            except sqlite3.Error as e:
                log.warning("the ledger does not show all bundles as spent: %s", e)
            self._database.close()

    def _record(self, bundles: Sequence[bytes], deployment: bytes, dealt: float) -> None:
        called = " ".join(b.hex() for b in bundles)
        with self._lock:
            try:
                with self._transaction():
                    self._database.executemany(
                        "INSERT INTO bundles VALUES (?, ?, ?, NULL)",
                        [(bundle, deployment, dealt) for bundle in bundles],
                    )
            except sqlite3.IntegrityError:
                raise Refused(
                    f"bundle {called} has been dealt before", "a retry takes a new bundle"
                ) from None
            except sqlite3.Error as e:
                raise Refused(
                    f"bundle {called} cannot be recorded in the ledger: {e}",
                    "see to the disk of the server's state directory",
                ) from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All that the block writes, and what was noted since the last one; `_lock` held."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.executemany("UPDATE bundles SET dealt = ? WHERE id = ?", self._dealt)
            self._database.executemany("UPDATE bundles SET spent = ? WHERE id = ?", self._spent)
            self._database.execute("COMMIT")
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._dealt.clear()
        self._spent.clear()
