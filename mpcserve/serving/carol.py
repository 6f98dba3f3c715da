"""Carol deals correlated randomness, before any input exists, and never sees a masked value.

She only connects, to alice and to bob; nobody connects to her.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from mpcserve.errors import PeerTimeout, Refused
from mpcserve.plan.store import plan_from_bytes
from mpcserve.protocol import Dealer
from mpcserve.randomness import KEY_BYTES
from mpcserve.serving import halves
from mpcserve.serving.deployment import Deployment
from mpcserve.serving.evaluation import in_blocks
from mpcserve.serving.links import Wiring
from mpcserve.serving.log import log
from mpcserve.serving.meeting import Meeting
from mpcserve.serving.preparing import Timer
from mpcserve.serving.report import peak_rss_bytes
from mpcserve.serving.request import (
    MAX_PLAN_BYTES,
    Request,
    check_digest,
    receive_message,
    slots_of,
)
from mpcserve.serving.server import DECISION_S, Route, Server

DEALING_AT_ONCE = max(1, (os.cpu_count() or 1) // 2)
"""Dealing is computing: one bundle after another is ready sooner than two on the same core."""


@dataclass(frozen=True, slots=True)
class _Dealing:
    """A deployment in memory."""

    deployment: Deployment
    dealer: Dealer


def _dealing(deployment: Deployment) -> _Dealing:
    keys = deployment.keys
    return _Dealing(deployment, Dealer(deployment.plan, keys["alice"], keys["bob"]))


class Carol(Server):
    """The helper."""

    peers = ("alice", "bob")
    connects_to = ("alice", "bob")

    def __init__(self, wiring: Wiring) -> None:
        super().__init__(wiring)
        self._keys: Meeting[bytes] = Meeting(wiring.config.limits.requests)
        self._turn = threading.BoundedSemaphore(DEALING_AT_ONCE)
        self._dealers: dict[bytes, _Dealing] = {d.id: _dealing(d) for d in self.store}

    def routes(self) -> Mapping[str, Route]:
        """Requests of alice and bob."""
        return {
            "deal": Route(("bob",), self._deal),
            "stage": Route(("alice",), self._stage),
            "key": Route(("bob",), self._key),
            "settle": Route(("alice",), self._settle),
        }

    def _deal(self, request: Request) -> None:
        """Bob's corrections of the bundle that the request is named after."""
        id, bob = request.message.id("deployment"), request.channel
        found = self._dealers.get(id)
        if found is None:
            raise Refused(f"carol has no deployment {id.hex()}", "deploy the model again")
        check_digest(found.deployment.plan, request.message.text("digest"), "bob", self.role)
        slots = slots_of(request.message, found.deployment.plan)
        self._wait_for_turn(request)
        try:
            timer, rest = Timer.start(), memoryview(b"")
            for corrections in in_blocks(found.dealer.deal(request.id, slots), halves.BLOCK_BYTES):
                if len(corrections) < halves.BLOCK_BYTES:  # nothing comes after it
                    rest = memoryview(corrections)
                else:
                    bob.send(corrections, fresh=True)
            wall, cpu = timer.seconds()
        finally:
            self._turn.release()
        dealt = {"type": "dealt", "cpu_seconds": cpu, "peak_rss_bytes": peak_rss_bytes()}
        bob.finish(dealt, rest)
        log.debug("dealt %s: %d bytes, %.3f s", request.name, bob.payload_sent, wall)

    def _wait_for_turn(self, request: Request) -> None:
        """Whom she keeps waiting she tells so."""
        if self._turn.acquire(blocking=False):
            return
        request.channel.send_message({"type": "waiting"})
        if not self._turn.acquire(timeout=request.deadline.left()):
            raise PeerTimeout("carol had no turn to deal in time", "raise `deadlines.request`")
        request.channel.send_message({"type": "dealing"})

    def _stage(self, request: Request) -> None:
        alice, deployment = request.channel, self._order(request)
        with self.one_change(request.deadline.left()):
            with self.up_to_alice(alice, deployment.id):
                self.store.stage(deployment)
                dealing = _dealing(deployment)
                alice.send_message({"type": "staged"})
                receive_message(alice, "commit", "alice to commit", DECISION_S)
            self.store.commit(deployment.id)
            self._put(dealing)
        alice.send_message({"type": "committed"})

    def _order(self, request: Request) -> Deployment:
        """A deployment: the plan and a pair key from alice, the other pair key from bob."""
        alice, timeout = request.channel, self.deadlines.round
        order = receive_message(alice, "order", "the deployment", request.deadline.left())
        size = order.size("plan_bytes", MAX_PLAN_BYTES)
        plan = plan_from_bytes(bytes(alice.receive(size, "the plan", timeout)), "alice's plan")
        check_digest(plan, order.text("digest"), "alice's order", self.role)
        alice_key = bytes(alice.receive(KEY_BYTES, "a pair key", timeout))
        with self._keys.claim(request.id, "bob", timeout) as bob_key:
            keys = {"alice": alice_key, "bob": bob_key}
        return Deployment(
            order.id("deployment"), order.text("name"), plan, keys, order.optional_id("replaces")
        )

    def _key(self, request: Request) -> None:
        """Bob's pair key for the deployment that alice stages under the same request id."""
        key = bytes(request.channel.receive(KEY_BYTES, "a pair key", self.deadlines.round))
        self._keys.offer(request.id, key, "alice", self.deadlines.round)

    def _settle(self, request: Request) -> None:
        with self.one_change(request.deadline.left()):
            for deployment in self.store.settle(request.message.ids("deployments")):
                self._put(_dealing(deployment))
        request.channel.send_message({"type": "settled"})

    def _put(self, dealing: _Dealing) -> None:
        deployment = dealing.deployment
        self._dealers[deployment.id] = dealing
        if deployment.replaces is not None:
            self._dealers.pop(deployment.replaces, None)
