"""Ids of bundles that are in the ledgers of alice and bob already, before anything is dealt.

A bundle under such an id need not wait for the two disks. Alice draws them, some at once, and both
write them down; what is left of them when the link between the two ends is never used.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Hashable, Iterable

FULL = 16
"""So many are drawn for a deployment when at most half of that is left."""

MOST = 4096
"""So many are held at once, in all."""


class Reserve:
    """By deployment, and by the link over which they were agreed on. Safe to call from any thread.

    An id comes out once.
    """

    def __init__(self) -> None:
        self._ids: defaultdict[tuple[bytes, Hashable], dict[bytes, None]] = defaultdict(dict)
        self._lock = threading.Lock()

    def wanted(self, deployment: bytes, link: Hashable) -> int:
        """How many are to be drawn now."""
        with self._lock:
            left = len(self._ids.get((deployment, link), ()))
        return FULL - left if left <= FULL // 2 else 0

    def put(self, deployment: bytes, link: Hashable, ids: Iterable[bytes]) -> None:
        """They are in both ledgers."""
        with self._lock:
            self._ids[deployment, link].update(dict.fromkeys(ids))

    def take(self, deployment: bytes, link: Hashable) -> bytes | None:
        """The oldest; None if there is none."""
        with self._lock:
            ids = self._ids.get((deployment, link))
            if not ids:
                return None
            id = next(iter(ids))
            del ids[id]
            return id

    def redeem(self, deployment: bytes, link: Hashable, id: bytes) -> bool:
        """Whether this one was here. It is not any more."""
        with self._lock:
            ids = self._ids.get((deployment, link), {})
            return ids.pop(id, b"") is None

    def drop(self, link: Hashable) -> None:
        """Forget what was agreed on over this link."""
        with self._lock:
            for key in [k for k in self._ids if k[1] == link]:
                del self._ids[key]

    def remove(self, deployment: bytes) -> None:
        """Forget those of a retired deployment."""
        with self._lock:
            for key in [k for k in self._ids if k[0] == deployment]:
                del self._ids[key]

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._ids.values()))
