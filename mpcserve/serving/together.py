"""One evaluation for several requests of one model, each in a slot of its own (`plan.stack`).

Alice and bob tell each other which inputs they have, by tags, before anything is computed. Whose
input is missing on either side, or is not the same on both, leaves: its slot is computed on
zeros, under its masks, and nobody is told what came of it. The others do not notice, but for the
wait: PATIENCE_S at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mpcserve.errors import MpcError, PeerTimeout, Refused
from mpcserve.plan.stack import can_stack
from mpcserve.serving.evaluation import (
    Live,
    drive,
    evaluate,
    patience,
    receive_inputs,
    say_ready,
    standby_of,
)
from mpcserve.serving.log import log, named_error
from mpcserve.serving.preparing import Preparation, Timer
from mpcserve.serving.report import merged, portion
from mpcserve.serving.request import Deadline, Request, receive_message
from mpcserve.transport import Channel

PATIENCE_S = 2.0
"""How long requests that are evaluated together wait for the slowest of them to send its input."""

MOST_BYTES = 32_000_000
"""Dealt for one evaluation of several requests: beyond, sharing it saves time no more."""


@dataclass(slots=True, eq=False)
class Member:
    """One request, and what came of it: facts for its report, or an error of its own.

    Without a request it is one that has not come, and has an error.
    """

    request: Request | None
    error: MpcError | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether it asks for something that the others do not want: a profile."""
        return self.here.message.optional_flag("profile")

    @property
    def here(self) -> Request:
        """The request of one that has come. Raises: its error."""
        self.check()
        assert self.request is not None
        return self.request

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """What goes wrong in the block is this member's own affair."""
        try:
            yield
        except Exception as e:
            if self.error is None:
                self.error = named_error(e)
                log.info("a request leaves its evaluation: %s", self.error)

    def check(self) -> None:
        """Raises: its error, if it has one."""
        if self.error is not None:
            raise type(self.error)(self.error.message, self.error.hint)


def most_together(live: Live, limit: int) -> int:
    """How many requests of this model may share an evaluation."""
    if not can_stack(live.plan):
        return 1
    return max(1, min(limit, MOST_BYTES // max(live.dealt_bytes(1), 1)))


def evaluate_members(
    live: Live,
    prepared: Preparation,
    members: Sequence[Member],
    peer: Channel,
    round_timeout: float,
) -> None:
    """Serve all members with one bundle; see `evaluation.evaluate` for what happens to one.

    Raises: what ends the evaluation of all.
    """
    first = members[0]
    if len(members) == 1:
        asked, deadline = first.here.channel, first.here.deadline
        first.facts = evaluate(live, prepared, asked, peer, deadline, round_timeout, first.alone)
        return
    deadline = max((m.request.deadline for m in members if m.request), key=Deadline.left)
    prepared.until(deadline)
    prepared.admit()
    for member, seeds in zip(members, prepared.bundle.seeds, strict=True):
        with member.leaving():
            say_ready(member.here.channel, live.plan, seeds)
    prepared.start()
    inputs = _inputs(live, members, round_timeout)
    timer = Timer.start()
    tag = prepared.bundle.input_tag
    live_slots = _agree(members, inputs, tag, peer, deadline.left(round_timeout))
    with peer.attended(standby_of(prepared), brisk=True):
        results, rounds = drive(
            live.program.evaluate_all(
                prepared.bundle,
                [i if s else None for i, s in zip(inputs, live_slots, strict=True)],
            ),
            peer,
            lambda r: live.rounds[r],
            patience(prepared, deadline, round_timeout),
        )
    for member, result in zip(members, results, strict=True):
        if result is not None:
            with member.leaving(), member.here.channel.attended():
                member.here.channel.send(result)
    wall, cpu = timer.seconds()
    took = {"rounds": rounds, "online_seconds": wall, "online_cpu_seconds": cpu}
    took["together"] = len(members)
    share(members, merged(prepared.facts(), took))


def share(members: Sequence[Member], facts: Mapping[str, Any]) -> None:
    """Add to each member's facts its part of what all took."""
    part = portion(facts, len(members))
    for member in members:
        member.facts = merged(member.facts, part)


def _inputs(
    live: Live, members: Sequence[Member], round_timeout: float
) -> list[list[memoryview] | None]:
    """What each member sent in time."""
    end = time.monotonic() + min(PATIENCE_S, round_timeout)
    inputs: list[list[memoryview] | None] = []
    for member in members:
        given = None
        with member.leaving():
            channel = member.here.channel
            with channel.attended():
                given = receive_inputs(live.plan, channel, lambda: max(0.0, end - time.monotonic()))
        inputs.append(given)
    return inputs


def _agree(
    members: Sequence[Member],
    inputs: Sequence[list[memoryview] | None],
    tag: Callable[[int, Sequence[memoryview]], str],
    peer: Channel,
    timeout: float,
) -> list[bool]:
    """Which slots both servers have the same inputs of."""
    mine = [tag(slot, given) if given is not None else None for slot, given in enumerate(inputs)]
    peer.send_message({"type": "inputs", "tags": mine})
    answer = receive_message(peer, "inputs", "the tags of its inputs", timeout)
    theirs = answer.optional_texts("tags", len(members))
    agreed = []
    for member, my, its in zip(members, mine, theirs, strict=True):
        with member.leaving():
            member.check()
            if its is None:
                raise PeerTimeout(
                    f"{peer.peer} did not have this request's input in {PATIENCE_S:g} s",
                    "send both servers the same input at once: others wait for it",
                )
            if my != its:
                raise Refused(
                    "the data owner sent alice and bob different inputs",
                    "send the same masked inputs to both servers: they evaluate nothing else",
                )
        agreed.append(member.error is None)
    return agreed
