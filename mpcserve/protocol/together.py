"""All three roles in one process, over plain calls: the real protocol without a network.

Used by `mpcserve verify`, by tests and by researchers: it returns the outputs and the measured
bill, and can keep the transcript, every byte that each party received.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mpcserve.plan.bill import SEED_BYTES, Bill
from mpcserve.plan.plan import Plan
from mpcserve.protocol.dealer import Dealer
from mpcserve.protocol.owners import reveal, share_input, share_weights, unpack_weight
from mpcserve.protocol.parties import Buffer, Steps, T
from mpcserve.protocol.server import Bundle, ServerProgram
from mpcserve.randomness import KEY_BYTES


@dataclass(slots=True, repr=False)
class Transcript:
    """What crossed each link, in order: ("alice->bob", bytes) …; fills as the protocol runs."""

    messages: list[tuple[str, bytes]] = field(default_factory=list)

    def add(self, link: str, data: Buffer) -> None:
        """Record one message."""
        self.messages.append((link, bytes(data)))


class Together:
    """One deployment of a plan on three in-process roles, with fresh keys."""

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, NDArray[np.int64]],
        transcript: Transcript | None = None,
    ) -> None:
        self.plan, self.transcript = plan, transcript
        ac, bc, ab = (secrets.token_bytes(KEY_BYTES) for _ in range(3))
        self.dealer = Dealer(plan, ac, bc)
        seeds = (
            ServerProgram.weight_seed(plan, "alice", ac),
            ServerProgram.weight_seed(plan, "bob", bc),
        )
        packed = dict(share_weights(plan, weights, *seeds))
        if transcript is not None:
            for data in packed.values():
                transcript.add("owner->alice", data)
                transcript.add("owner->bob", data)
        masked = {name: unpack_weight(plan, name, data) for name, data in packed.items()}
        self.alice = ServerProgram(plan, "alice", ac, ab, masked.items())
        self.bob = ServerProgram(plan, "bob", bc, ab, masked.items())

    def prepare(self, slots: int = 1) -> tuple[Bundle, Bundle, int]:
        """Deal one bundle: alice's and bob's view of it, and the bytes dealt."""
        id, dealt = secrets.token_bytes(16), 0
        corrections = self.dealer.deal(id, slots)

        def take(n: int) -> memoryview:
            nonlocal dealt
            data = next(corrections)
            assert len(data) == n
            dealt += n
            if self.transcript is not None:
                self.transcript.add("carol->bob", data)
            return data

        alice = self.alice.prepare(id, None, slots)
        bob = self.bob.prepare(id, take, slots)
        assert next(corrections, None) is None
        return alice, bob, dealt

    def infer(
        self, inputs: Sequence[NDArray[np.floating]]
    ) -> tuple[list[NDArray[np.generic]], Bill]:
        """One evaluation: outputs and the bill as measured."""
        (outputs,), bill = self.infer_all([inputs])
        return outputs, bill

    def infer_all(
        self, requests: Sequence[Sequence[NDArray[np.floating]]]
    ) -> tuple[list[list[NDArray[np.generic]]], Bill]:
        """One evaluation for several requests: the outputs of each, and the bill of all."""
        alice, bob, dealt = self.prepare(len(requests))
        packed = [
            [
                b"".join(share_input(self.plan, k, x, a, b))
                for k, (x, a, b) in enumerate(zip(inputs, *seeds, strict=True))
            ]
            for inputs, *seeds in zip(requests, alice.seeds, bob.seeds, strict=True)
        ]
        rounds, sent, messages = drive(
            self.alice.evaluate_all(alice, packed),
            self.bob.evaluate_all(bob, packed),
            self.transcript,
        )
        upload = sum(len(data) for parts in packed for data in parts)
        seeds = SEED_BYTES * sum(map(len, packed))
        both = [[m for m in side if m is not None] for side in messages]
        bytes_ = {
            "alice->bob": sent[0],
            "bob->alice": sent[1],
            "carol->alice": 0,
            "carol->bob": dealt,
            "client->alice": upload,
            "client->bob": upload,
            "alice->client": seeds + sum(map(len, both[0])),
            "bob->client": seeds + sum(map(len, both[1])),
        }
        outputs = [reveal(self.plan, *pair) for pair in zip(*both, strict=True)]
        return outputs, Bill(rounds, bytes_, dealt)


def drive(
    alice: Steps[T], bob: Steps[T], transcript: Transcript | None = None
) -> tuple[int, tuple[int, int], tuple[T, T]]:
    """Run two evaluations against each other: rounds, bytes sent by each, their messages."""
    rounds, sent = 0, [0, 0]
    replies: list[bytes | None] = [None, None]
    while True:
        results: list[T] = []
        posted: list[bytes] = []
        for steps, reply in zip((alice, bob), replies, strict=True):
            try:
                r = next(steps) if reply is None else steps.send(reply)
                posted.append(b"".join(r.pieces))
                assert len(posted[-1]) == r.expect, "both ways of a round are equally long"
            except StopIteration as done:
                results.append(done.value)
        if results:
            assert len(results) == 2, "one server finished before the other"
            return rounds, (sent[0], sent[1]), (results[0], results[1])
        rounds += 1
        for k, link in enumerate(("alice->bob", "bob->alice")):
            sent[k] += len(posted[k])
            if transcript is not None:
                transcript.add(link, posted[k])
        replies = [posted[1], posted[0]]


def simulate(
    plan: Plan,
    weights: Mapping[str, NDArray[np.int64]],
    inputs: Sequence[NDArray[np.floating]],
) -> tuple[list[NDArray[np.generic]], Bill]:
    """The real protocol of all three roles in one process → (outputs, measured bill)."""
    return Together(plan, weights).infer(inputs)
