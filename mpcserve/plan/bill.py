"""The bill: exact rounds, payload bytes per link and dealt bytes of one evaluation, before it runs.

Payload is what the protocol itself needs. Frame headers, control messages and TLS records are
overhead; they are measured and reported beside the payload, never mixed into it.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpcserve.plan.ops import Cost, packed_bytes
from mpcserve.plan.plan import Plan
from mpcserve.plan.schedule import cost_of_instruction, schedule_of

SEED_BYTES = 32
"""One seed per input, from alice and from bob: the client expands its input's mask from the two."""

TAG_BYTES = 16
"""GMAC of the masked outputs, from alice and bob: the client checks that they agree."""


def cost_of(plan: Plan, id: int) -> Cost:
    """Rounds, bytes each way and dealt bytes of instruction `id` alone."""
    return cost_of_instruction(plan, id)


@dataclass(frozen=True, slots=True)
class Bill:
    """Of one evaluation. `bytes`: payload per directed link, "alice->bob" … "client->alice" …"""

    rounds: int
    bytes: dict[str, int]
    dealt_bytes: int

    @property
    def online_bytes(self) -> int:
        """Payload between alice and bob, both ways."""
        return self.bytes["alice->bob"] + self.bytes["bob->alice"]


def result_bytes(plan: Plan) -> int:
    """A server's last message to the data owner: its share of the outputs, and their tag."""
    values = [plan.value(o.id) for o in plan.outputs]
    return TAG_BYTES + sum(packed_bytes(value.size, value.width) for value in values)


def bill_of(plan: Plan) -> Bill:
    """Sum the costs of all instructions, inputs and outputs."""
    costs = [cost_of(plan, i.id) for i in plan.instructions]
    online = sum(sum(c.rounds) for c in costs)
    dealt = sum(c.dealt for c in costs)
    upload = sum(packed_bytes(plan.value(i.id).size, plan.value(i.id).width) for i in plan.inputs)
    download = SEED_BYTES * len(plan.inputs) + result_bytes(plan)
    return Bill(
        rounds=schedule_of(plan).rounds,
        bytes={
            "alice->bob": online,
            "bob->alice": online,
            "carol->alice": 0,
            "carol->bob": dealt,
            "client->alice": upload,
            "client->bob": upload,
            "alice->client": download,
            "bob->client": download,
        },
        dealt_bytes=dealt,
    )
