"""Reports: what a request cost, measured by each party and added up by the client.

Bytes are payload, per directed link. Overhead (frame headers, messages, TLS) is what the link
carried beside payload while the request ran: exact when it ran alone.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mpcserve.plan.plan import Plan
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
_ADDED = (
    "evaluations",
    "rounds",
    "bytes",
    "overhead_bytes",
    "dealt_bytes",
    "seconds",
    "cpu_seconds",
)


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


def client_report(
    plan: Plan,
    model: str,
    alice: Mapping[str, Any],
    bob: Mapping[str, Any],
    client: Mapping[str, Any],
) -> dict[str, Any]:
    """One evaluation, from the reports of both servers and the client's own measurements."""
    measured = merged(
        {"bytes": dict.fromkeys(DIRECTIONS, 0), "overhead_bytes": dict.fromkeys(DIRECTIONS, 0)},
        *({k: r.get(k, {}) for k in ("bytes", "overhead_bytes")} for r in (alice, bob, client)),
    )
    profiles = {r["role"]: r["profile"] for r in (alice, bob) if "profile" in r}
    return {
        "model": model,
        "plan_digest": plan.digest,
        "ring_bits": plan.ring_bits,
        "batch": plan.batch,
        "evaluations": 1,
        "rounds": alice["rounds"],
        "together": alice.get("together", 1),
        **({"profile": profiles} if profiles else {}),
        **measured,
        "dealt_bytes": bob["dealt_bytes"],
        "seconds": {
            "online": client["online_seconds"],
            "evaluation": max(r["online_seconds"] for r in (alice, bob)),
            "preprocessing": max(r["preprocessing_seconds"] for r in (alice, bob)),
            "total": client["total_seconds"],
        },
        "cpu_seconds": {
            "alice": alice["preprocessing_cpu_seconds"] + alice["online_cpu_seconds"],
            "bob": bob["preprocessing_cpu_seconds"] + bob["online_cpu_seconds"],
            "carol": bob["carol_cpu_seconds"],
        },
        "peak_rss_bytes": {
            "alice": alice["peak_rss_bytes"],
            "bob": bob["peak_rss_bytes"],
            "carol": bob["carol_peak_rss_bytes"],
        },
    }


def sum_of(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several evaluations of one plan: counts and times add up, peaks do not."""
    total = dict(reports[-1])
    for key in _ADDED:
        total[key] = merged(*({key: r[key]} for r in reports))[key]
    return total


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """One report of several: numbers by the same name are added, mappings merged likewise."""
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict):
                total[key] = merged(total.get(key, {}), value)
            elif isinstance(value, (str, list)):
                total[key] = value
            else:
                total[key] = total.get(key, 0) + value
    return total


def portion(facts: Mapping[str, Any], members: int) -> dict[str, Any]:
    """One request's part of what an evaluation of several took: of bytes and CPU, not of time."""
    part: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, dict):
            part[key] = {name: -(-v // members) for name, v in value.items()}
        elif key.endswith("cpu_seconds"):
            part[key] = value / members
        else:
            part[key] = -(-value // members) if key == "dealt_bytes" else value
    return part


def server_report(role: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What alice or bob tells the client of its side of an evaluation."""
    return {"type": "report", "role": role, "peak_rss_bytes": peak_rss_bytes(), **facts}


PEAK_S = 0.1
"""For so long a peak that was read is told again: the system takes longer to say it than a small
layer takes."""


class _Peak:
    """The last one read, and when."""

    at, nbytes = -PEAK_S, 0


def peak_rss_bytes() -> int:
    """The most memory this process ever held, a tenth of a second ago or later."""
    now = time.monotonic()
    if now - _Peak.at >= PEAK_S:
        _Peak.nbytes, _Peak.at = _read_peak(), now
    return _Peak.nbytes


def _read_peak() -> int:
    # On Linux a process inherits ru_maxrss from whoever started it; VmHWM is its own.
    if sys.platform == "linux":
        with open("/proc/self/status", "rb", buffering=0) as status:
            _, found, rest = status.read().partition(b"VmHWM:")
        if found:
            return int(rest.split(None, 1)[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
