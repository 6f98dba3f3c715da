"""One evaluation on alice or bob: hand out seeds, take Δx, exchange rounds, hand out the result.

It is the same on both servers; who leads is settled before it begins. A data owner who sends the
two servers different inputs would have them open values that no mask hides, and learn from the
result: so each tells the other a tag of what it received, under a key that they alone have, and
nothing is handed out, nor is a second round begun, before the two are known to agree. The tag goes
with the first round, or ahead of all work where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from mpcserve.errors import PeerError, PeerTimeout, Refused
from mpcserve.plan.bill import bill_of, cost_of
from mpcserve.plan.ops import packed_bytes
from mpcserve.plan.plan import Plan
from mpcserve.plan.schedule import schedule_of
from mpcserve.protocol import Round, Run, ServerProgram, Steps, unpack_weight
from mpcserve.serving.deployment import Deployment, Store
from mpcserve.serving.preparing import Preparation, Timer
from mpcserve.serving.profile import Profile
from mpcserve.serving.report import merged
from mpcserve.serving.request import Deadline, receive_message
from mpcserve.transport import Channel
from mpcserve.transport.reading import BRIEF_S, STANDBY_S
from mpcserve.wire import Buffer

Side = Literal["alice", "bob"]
T = TypeVar("T")

BLOCK_BYTES = 32 << 10
"""Pieces of one round that are smaller than this are sent together."""

GLANCE_BYTES = 192 << 10
"""After so much of a round was sent, as much may have come: it is read before it leaves the caches,
but not in portions that cost more to ask for than to decrypt."""


@dataclass(frozen=True, slots=True)
class Live:
    """A deployment in memory, ready to evaluate.

    `rounds` names what each round waits for.
    """

    deployment: Deployment
    program: ServerProgram
    rounds: tuple[str, ...]
    _dealt: dict[int, int] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """The deployment's plan."""
        return self.deployment.plan

    def dealt_bytes(self, slots: int) -> int:
        """What carol deals for an evaluation of so many requests."""
        if slots not in self._dealt:
            self._dealt[slots] = bill_of(self.program.plan_of(slots)).dealt_bytes
        return self._dealt[slots]


def bring_to_life(role: Side, deployment: Deployment, store: Store, run: Run) -> Live:
    """Unpack Δw and pack it for the kernels."""
    plan = deployment.plan
    weights = ((n, unpack_weight(plan, n, data)) for n, data in store.weights(deployment))
    peer: Side = "bob" if role == "alice" else "alice"
    program = ServerProgram(
        plan, role, deployment.keys["carol"], deployment.keys[peer], weights, run
    )
    rounds = tuple(round_names(plan))
    return Live(deployment, program, rounds)


def round_names(plan: Plan) -> Iterator[str]:
    """For each round, the instructions whose messages it carries: what an error names."""
    schedule = schedule_of(plan)
    for r in range(schedule.rounds):
        # or the second or later round of something that began before
        begun = (plan[id] for level in schedule.levels[r::-1] for id in level)
        busy = next(i for i in begun if cost_of(plan, i.id).rounds)
        layer = f" ({busy.layer})" if busy.layer else ""
        yield f"round {r + 1} of {schedule.rounds}, instruction {busy.id} {busy.op}{layer}"


ASIDE_S = 0.01
"""For so long nobody may read what the data owner's link brings, while its request is evaluated."""

TELLING_S = 0.5
"""Seconds by which a server waits longer for its peer's tag than for an input: the peer may wait
for that input, and whoever waits for the data owner says so first."""


def evaluate(
    live: Live,
    prepared: Preparation,
    client: Channel,
    peer: Channel,
    deadline: Deadline,
    round_timeout: float,
    profiled: bool = False,
) -> dict[str, Any]:
    """Serve the data owner on `client`, exchanging rounds on `peer`; what it took.

    While a server still prepares its half, the other waits for a round as long as for the request:
    whoever is late for another reason is named by the server that waits for it.
    """
    plan, bundle = live.plan, prepared.bundle
    prepared.until(deadline)
    profile = Profile() if profiled else None
    with client.attended(ASIDE_S):
        peer.expect_to_attend()
        prepared.admit()
        if prepared.at_once:
            prepared.start()
        say_ready(client, plan, bundle.input_seeds)
        prepared.start()
        with blaming(peer):
            inputs = receive_inputs(plan, client, lambda: deadline.left(round_timeout))
        timer = Timer.start()
        mine = bundle.input_tag(0, inputs)
        greeting = {"type": "inputs", "tag": mine}
        timeout = patience(prepared, deadline, round_timeout)
        with peer.attended(standby_of(prepared), brisk=True):
            if not live.rounds:  # which it would go with
                peer.send_message(greeting)
            result, rounds = drive(
                live.program.evaluate(bundle, inputs, profile),
                peer,
                lambda r: live.rounds[r],
                timeout,
                greeting if live.rounds else None,
                lambda seconds: check_same_inputs(peer, mine, seconds),
            )
            wall, cpu = timer.seconds()
            client.send(result)
    took = {"rounds": rounds, "online_seconds": wall, "online_cpu_seconds": cpu}
    profiles = {"profile": profile.switches()} if profile else {}
    return merged(prepared.facts(), took, profiles)


def patience(
    prepared: Preparation, deadline: Deadline, round_timeout: float
) -> Callable[[], float]:
    """Seconds for which to wait for a round now: `round_timeout`, once both halves are whole."""
    whole = False

    def seconds() -> float:
        nonlocal whole
        whole = whole or prepared.whole
        return deadline.left(round_timeout if whole else math.inf)

    return seconds


def say_ready(client: Channel, plan: Plan, seeds: Sequence[bytes]) -> None:
    """To the data owner: this side's seeds of the inputs' masks."""
    client.send_message({"type": "ready", "digest": plan.digest}, b"".join(seeds))


def standby_of(prepared: Preparation) -> float:
    """How long an evaluation may leave its link unread: briefly if it may wait for randomness.

    What is dealt for another request comes by the same link.
    """
    return STANDBY_S if prepared.whole else BRIEF_S


@contextmanager
def blaming(peer: Channel) -> Iterator[None]:
    """The data owner sends an input when both servers are ready: if it does not come in time, that
    is the peer's fault if he is mute. Raises: PeerTimeout.
    """
    try:
        yield
    except PeerTimeout as error:
        if not peer.link.answers(TELLING_S):
            raise PeerTimeout(
                f"{peer.link.name} gives no sign of life; {error.message}",
                "check that it is alive and see its log",
            ) from None
        raise


def receive_inputs(plan: Plan, client: Channel, timeout: Callable[[], float]) -> list[memoryview]:
    """Packed Δx of every input of the plan."""
    inputs = []
    for spec in plan.inputs:
        value = plan.value(spec.id)
        size = packed_bytes(value.size, value.width)
        inputs.append(client.receive(size, f"input {spec.name!r} ({size} bytes)", timeout()))
    return inputs


def in_blocks(pieces: Iterable[Buffer], size: int) -> Iterator[Buffer]:
    """The same bytes in the same order; pieces are joined until there are `size` bytes."""
    waiting: list[Buffer] = []
    count = 0
    for piece in pieces:
        if not waiting and len(piece) >= size:
            yield piece
            continue
        waiting.append(piece)
        count += len(piece)
        if count >= size:
            yield piece if len(waiting) == 1 else b"".join(waiting)
            waiting, count = [], 0
    if waiting:
        yield waiting[0] if len(waiting) == 1 else b"".join(waiting)


def check_same_inputs(peer: Channel, mine: str, timeout: float) -> None:
    """What the peer says of the inputs it received. Raises: Refused when they are others."""
    theirs = receive_message(peer, "inputs", "the tag of its inputs, round 1", timeout)
    if theirs.text("tag") != mine:
        raise Refused(
            "the data owner sent alice and bob different inputs",
            "send the same masked inputs to both servers: they evaluate nothing else",
        )


def drive(
    steps: Steps[T],
    peer: Channel,
    name: Callable[[int], str],
    timeout: Callable[[], float],
    greeting: Mapping[str, object] | None = None,
    agree: Callable[[float], None] = lambda seconds: None,
) -> tuple[T, int]:
    """Run a generator of rounds over an attended channel: its result and how many rounds it took.

    `greeting` goes ahead of the first round. `agree(seconds)` is called once, when that is sent, to
    wait for the peer's; what it raises ends the evaluation.
    """
    reply: memoryview | None = None
    rounds = 0
    try:
        while True:
            step = next(steps) if reply is None else steps.send(reply)
            if rounds:  # the peer's greeting comes before its first round
                peer.expect(step.expect)
                _post(step, peer, name(rounds))
            else:
                _post(step, peer, name(rounds), greeting)
                agree(timeout() + TELLING_S)
            reply = peer.receive(step.expect, name(rounds), timeout())
            rounds += 1
    except StopIteration as end:
        result: T = end.value
    if not rounds:
        if greeting is not None:
            peer.send_message(greeting)
        agree(timeout() + TELLING_S)
    return result, rounds


def _post(
    step: Round, peer: Channel, name: str, greeting: Mapping[str, object] | None = None
) -> None:
    """Send pieces as they are produced. An error names the round, as one of receive does."""
    unread = 0  # about as much as was sent
    for piece in in_blocks(step.pieces, BLOCK_BYTES):
        try:
            if greeting is None:
                peer.send(piece, fresh=True)
            else:
                peer.send_message(greeting, piece)
                greeting = None
        except PeerError as e:
            raise type(e)(f"{e.message} ({name})", e.hint) from None
        unread += len(piece)
        if unread >= GLANCE_BYTES:
            unread = 0
            peer.glance()
    assert greeting is None  # every round has something to say
