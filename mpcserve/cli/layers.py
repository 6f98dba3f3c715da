"""What a plan costs and how wide its values are, layer by layer: for compile and inspect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from mpcserve.cli.output import shape_text, table
from mpcserve.plan import Alternative, Instruction, Plan, bill_of, cost_of
from mpcserve.plan.estimate import LINES, Line, online_seconds
from mpcserve.units import human_bytes, human_seconds


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One ONNX node (or a few that became one). `bytes_each_way` between alice and bob."""

    layer: str
    ops: str
    shape: tuple[int, ...]
    width: int
    frac_bits: int
    bound: int
    known: str
    rounds: int
    bytes_each_way: int
    dealt_bytes: int

    @property
    def limit(self) -> float:
        """|x| is below this real number."""
        return float(2.0 ** (self.bound - self.frac_bits))


def layer_rows(plan: Plan) -> list[LayerRow]:
    """Layers in plan order; weights and constants belong to the layer that reads them."""
    groups: dict[str, list[Instruction]] = {}
    for i in plan.instructions:
        if i.op not in ("weight", "constant"):
            groups.setdefault(i.layer, []).append(i)
    return [_row(plan, layer, members) for layer, members in groups.items()]


def _row(plan: Plan, layer: str, members: Sequence[Instruction]) -> LayerRow:
    costs = {i.id: cost_of(plan, i.id) for i in members}
    finish: dict[int, int] = {}
    for i in members:
        begin = max((finish.get(j, 0) for j in i.inputs), default=0)
        finish[i.id] = begin + len(costs[i.id].rounds)
    value = members[-1].value
    paid = [i.op for i in members if costs[i.id].rounds]
    name = layer or ", ".join(i.attrs["name"] for i in members if i.op == "input")
    return LayerRow(
        layer=name or "(whole model)",
        ops=" ".join(dict.fromkeys(paid)) or "free",
        shape=value.shape,
        width=value.width,
        frac_bits=value.frac_bits,
        bound=value.bound,
        known=value.known,
        rounds=max(finish.values()),
        bytes_each_way=sum(sum(c.rounds) for c in costs.values()),
        dealt_bytes=sum(c.dealt for c in costs.values()),
    )


def print_layers(plan: Plan) -> None:
    """The table, with the totals of one evaluation below it."""
    bill = bill_of(plan)
    rows = layer_rows(plan)
    table(
        ("layer", "shape", "width", "|x| <", "known", "rounds", "each way", "dealt"),
        (
            (
                r.layer,
                shape_text(r.shape),
                f"{r.width}.{r.frac_bits}",
                f"{r.limit:.4g}",
                r.known,
                r.rounds or "",
                human_bytes(r.bytes_each_way) if r.rounds else "",
                human_bytes(r.dealt_bytes) if r.rounds else "",
            )
            for r in rows
        ),
        left=2,
        footer=(
            "total",
            "",
            "",
            "",
            "",
            bill.rounds,
            human_bytes(bill.bytes["alice->bob"]),
            human_bytes(bill.dealt_bytes),
        ),
    )


def bill_json(plan: Plan) -> dict[str, Any]:
    """Rounds, payload bytes per link and dealt bytes of one evaluation."""
    bill = bill_of(plan)
    return {"rounds": bill.rounds, "bytes": dict(bill.bytes), "dealt_bytes": bill.dealt_bytes}


def print_bill(plan: Plan) -> None:
    """Rounds, payload per link and dealt bytes of one evaluation, in one line each."""
    bill = bill_of(plan)
    table(
        ("link", "payload", "bytes"),
        ((link, human_bytes(n), f"{n:,}") for link, n in bill.bytes.items()),
        title=f"{bill.rounds} rounds, {human_bytes(bill.dealt_bytes)} dealt, per evaluation",
    )


def print_notes(plan: Plan) -> None:
    """Estimated seconds on every named network, what runs on the client, what else is to say."""
    times = (f"{line.name} {human_seconds(online_seconds(plan, line))}" for line in LINES)
    click.echo(f"estimated online: {', '.join(times)}")
    if len(plan.alternatives) > 1:
        _print_alternatives(plan.alternatives)
    for line in plan.on_client():
        click.echo(line)
    for note in plan.notes:
        click.echo(f"note: {note}")


def _print_alternatives(ways: Sequence[Alternative]) -> None:
    """What was compared, and what each would take on every named network."""
    lines = list(ways[0].seconds)
    click.echo()
    table(
        ("", "alternatives", "rounds", "online", "dealt", *lines),
        (
            (
                "→" if a.chosen else "",
                a.how,
                a.rounds,
                human_bytes(a.online_bytes),
                human_bytes(a.dealt_bytes),
                *(human_seconds(a.seconds[line]) for line in lines),
            )
            for a in ways
        ),
        left=2,
    )


def line_of(network: str) -> Line:
    """The network that an option names. Raises: ConfigError."""
    from mpcserve.transport.network import NetworkProfile

    profile = NetworkProfile.parse(network)
    return Line(network, profile.rtt_s, profile.bits_per_s)
