"""Reports: what one request cost, measured by each party on its own side and added up by the client.

Bytes are payload, per directed link. Overhead (frame headers, messages, TLS) is what the link
carried beside payload while the request ran: exact when it ran alone.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpcserve.plan.plan import RING_BITS, Plan
from mpcserve.transport import Channel, Link

DIRECTIONS = (
    "alice->bob",
    "bob->alice",
    "carol->alice",
    "carol->bob",
    "client->alice",
    "client->bob",
    "alice->client",
    "bob->client",
)
_COUNTED = ("rounds", "bytes", "overhead_bytes", "dealt_bytes", "seconds", "cpu_seconds")


class Meter:
    """What a link carried beside payload since the meter was made, each way."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._start = self._overhead()

    def sent(self, direction: str, channel: Channel) -> dict[str, Any]:
        """The payload this side sent on `channel`, and the link's overhead that way."""
        overhead = self._overhead()[0] - self._start[0]
        return _way(direction, channel.payload_sent, overhead)

    def received(self, direction: str, channel: Channel) -> dict[str, Any]:
        """The same of what came."""
        overhead = self._overhead()[1] - self._start[1]
        return _way(direction, channel.payload_received, overhead)

    def _overhead(self) -> tuple[int, int]:
        c = self._link.counters
        return c.wire_sent - c.payload_sent, c.wire_received - c.payload_received


def _way(direction: str, payload: int, overhead: int) -> dict[str, Any]:
    return {"bytes": {direction: payload}, "overhead_bytes": {direction: max(overhead, 0)}}


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """One report of several: numbers by the same name are added, mappings merged likewise."""
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, Mapping):
                total[key] = merged(total.get(key, {}), value)
            elif isinstance(value, str):
                total[key] = value
            else:
                total[key] = total.get(key, 0) + value
    return total


def server_report(role: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What alice or bob tells the client of its side of an evaluation."""
    return {"type": "report", "role": role, "peak_rss_bytes": peak_rss_bytes(), **facts}


def peak_rss_bytes() -> int:
    """The most memory this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
