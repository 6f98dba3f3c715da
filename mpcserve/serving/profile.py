"""A profile of one evaluation: whose work began when. Times are public: they depend on the plan."""

from __future__ import annotations

import time

MOST_SWITCHES = 20_000
"""Of a profile that is sent: what comes after is left out, so that it fits a message."""


class Profile:
    """A watch for `ServerProgram.evaluate`: seconds since it was made, per switch."""

    __slots__ = ("_began", "_switches")

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._switches: list[tuple[float, int]] = []

    def __call__(self, id: int) -> None:
        self._switches.append((time.perf_counter() - self._began, id))

    def switches(self) -> list[list[float | int]]:
        """[seconds, instruction id or WAITING or OUTPUTS], and the end under the id of OUTPUTS."""
        end = (time.perf_counter() - self._began, -1)
        return [[round(s, 7), id] for s, id in [*self._switches[:MOST_SWITCHES], end]]
