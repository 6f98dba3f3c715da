"""Estimated seconds of one online evaluation, from the plan alone.

The data owner masks its input and sends it to both servers; every round takes the time of its
arithmetic and of its bytes on the line (only tiles of large products overlap the two, which is left
out), then half a round trip: both servers send at once; and the shares of the result travel back.
All lines are alike. The rates are those of one core of a common server, rather slower than the one
that they were measured on by `benchmarks/estimates.py`; another machine scales them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, prod

from mpcserve.plan.bill import bill_of
from mpcserve.plan.ops import OPS, PRODUCTS, rectify_products
from mpcserve.plan.plan import Instruction, Plan
from mpcserve.plan.schedule import cost_of_instruction, schedule_of


@dataclass(frozen=True, slots=True)
class Line:
    """A network between alice and bob: round trip in seconds, bits per second each way."""

    name: str
    rtt: float = 0.0
    bits_per_second: float = inf


LINES = (Line("loopback"), Line("lan", 0.0005, 1e9), Line("wan", 0.04, 1e8))


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of one core: per ring multiply-add, per element, per byte, per step of Python.

    `borrowed`: per element and product of a `rectify`; `wave`: per element and harmonic; `turn`: of
    a round beside its arithmetic; `owned`: per element that the data owner masks or unmasks;
    `hello`: of the two exchanges between it and the servers.
    """

    product32: float = 1 / 125e9
    product64: float = 1 / 48e9
    opened: float = 1.0e-9
    compared: float = 1.4e-9
    selected: float = 1.0e-9
    borrowed: float = 0.6e-9
    moved: float = 0.4e-9
    wave: float = 1.7e-9
    byte: float = 0.4e-9
    step: float = 13e-6
    local_step: float = 4e-6
    turn: float = 45e-6
    owned: float = 7e-9
    hello: float = 0.5e-3


RATES = Rates()


def multiply_adds(plan: Plan, i: Instruction) -> int:
    """Ring multiply-adds of a product on one server, online, with one operand fixed."""
    if i.op == "matmul":
        inner = plan.value(i.inputs[0]).shape[-1]
    elif i.op == "conv":
        inner = prod(plan.value(i.inputs[1]).shape[1:])
    else:
        inner = 1
    secret = all(j not in plan.static for j in i.inputs[:2])
    return i.value.size * inner * (2 if secret else 1)


def compute_seconds(plan: Plan, i: Instruction, rates: Rates = RATES) -> float:
    """Seconds of arithmetic of instruction `i` on one server, online."""
    size = i.value.size
    if i.id in plan.static or i.op == "input":
        return 0.0
    if OPS[i.op].local:
        moves = 0 if i.op == "reshape" else size * i.attrs.get("taps", 1)
        return rates.local_step + rates.moved * moves
    sent = sum(cost_of_instruction(plan, i.id).rounds)
    seconds = rates.step + 2 * rates.byte * sent
    if i.op in PRODUCTS:
        narrow = i.attrs["ring"] <= 32
        each = rates.product32 if narrow else rates.product64
        return seconds + each * multiply_adds(plan, i) + rates.opened * size
    if i.op == "sign":
        return seconds + rates.compared * size
    if i.op == "rectify":
        chosen = rates.compared + rates.selected
        products = rectify_products(len(i.attrs["chunks"]))
        return seconds + rates.step + (chosen + rates.borrowed * products) * size
    if i.op == "tally":
        return seconds + rates.moved * size * len(i.attrs["values"])
    if i.op == "spectral":
        return seconds + (rates.opened + rates.wave * len(i.attrs["sine"])) * size
    if i.op == "select":
        return seconds + rates.selected * size * len(i.inputs) / 2
    return seconds + rates.opened * size


def online_seconds(plan: Plan, line: Line, rates: Rates = RATES) -> float:
    """Seconds that the data owner waits for a result, if all parties are joined by `line`."""
    schedule = schedule_of(plan)
    compute = sum(compute_seconds(plan, i, rates) for i in plan.instructions)
    sent = sum(sum(cost_of_instruction(plan, i.id).rounds) for i in plan.instructions)
    rounds = compute + 8 * sent / line.bits_per_second
    turns = schedule.rounds * (line.rtt / 2 + rates.turn)
    return rounds + turns + owner_seconds(plan, line, rates)


def owner_seconds(plan: Plan, line: Line, rates: Rates = RATES) -> float:
    """Of these the data owner's: masking, upload, download and unmasking."""
    sizes = bill_of(plan).bytes
    sent = 8 * (sizes["client->alice"] + sizes["alice->client"]) / line.bits_per_second
    ends = [spec.id for spec in plan.inputs] + [spec.id for spec in plan.outputs]
    elements = sum(plan.value(id).size for id in ends)
    return rates.hello + line.rtt + sent + rates.owned * elements
