"""A profile as a Chrome trace: open the file in chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mpcserve.plan import Plan

WAITING = -2
"""The id under which a server waits for its peer (see `protocol.server`)."""


def chrome_trace(plan: Plan, profiles: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Any]:
    """One row per server; a slice per stretch of work of one instruction, named by its layer."""
    events: list[dict[str, Any]] = []
    for row, (role, switches) in enumerate(profiles.items()):
        name = {"name": "process_name", "ph": "M", "pid": row, "args": {"name": role}}
        events.append(name)
        for (start, id), (end, _) in pairwise(switches):
            events.append(_slice(plan, int(id), row, start, end))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _slice(plan: Plan, id: int, row: int, start: float, end: float) -> dict[str, Any]:
    micros = {"ts": round(start * 1e6, 1), "dur": round((end - start) * 1e6, 1)}
    event: dict[str, Any] = {"ph": "X", "pid": row, "tid": 0, **micros}
    if id < 0:
        what = "waiting for the peer" if id == WAITING else "result"
        return {**event, "name": what, "cat": "wait" if id == WAITING else "result"}
    i = plan[id]
    shape = "x".join(map(str, i.value.shape))
    facts = {"instruction": id, "shape": shape, "width": i.value.width}
    return {**event, "name": f"{i.layer or 'input'}: {i.op}", "cat": i.op, "args": facts}
