"""Bob follows alice: what an owner asks of him waits until she leads the way.

He receives carol's corrections, so it is he who asks her to deal.
"""

from __future__ import annotations

import secrets

from mpcserve.errors import PeerLost
from mpcserve.plan.bill import bill_of
from mpcserve.protocol import ServerProgram
from mpcserve.randomness import KEY_BYTES
from mpcserve.serving.deployment import Deployment
from mpcserve.serving.evaluation import Prepared, Timer, bring_to_life, evaluate
from mpcserve.serving.links import Wiring
from mpcserve.serving.meeting import Meeting
from mpcserve.serving.online import OnlineServer, WeightsReceived
from mpcserve.serving.pool import Shelf
from mpcserve.serving.report import Meter, merged, server_report
from mpcserve.serving.request import Message, Request, check_digest, failing, receive_message
from mpcserve.serving.server import DECISION_S, OWNERS, Route
from mpcserve.transport import Link


class Bob(OnlineServer):
    """The server that follows."""

    side = "bob"
    peers = ("alice", "carol")
    connects_to = ("alice",)
    accepts = ("carol", *OWNERS)

    def __init__(self, wiring: Wiring) -> None:
        limits = wiring.config.limits
        self.meeting: Meeting[Request] = Meeting(limits.requests + limits.queue)
        self.shelf: Shelf[Prepared] = Shelf()
        super().__init__(wiring)

    def routes(self) -> dict[str, Route]:
        """Owners' requests wait for alice's half, which may come first."""
        return {
            **super().routes(),
            "infer": Route(("data-owner",), self._park),
            "deploy": Route(("model-owner",), self._park),
            "evaluate": Route(("alice",), self._evaluate),
            "prepare": Route(("alice",), self._prepare),
            "drop": Route(("alice",), self._drop),
            "stage": Route(("alice",), self._stage),
            "settle": Route(("alice",), self._settle),
        }

    def retired(self, id: bytes) -> None:
        """Drop its bundles."""
        self.shelf.remove(id)

    def on_lost(self, link: Link) -> None:
        """Without alice no request goes on; she has dropped her halves of the bundles too."""
        if link.peer == "alice":
            self.shelf.drop(link)
            reason = link.reason or PeerLost(f"the link to {link.name} ended")
            self.meeting.refuse_all(type(reason)(reason.message, reason.hint))

    def _park(self, request: Request) -> None:
        self.links.get("alice")
        timeout = request.deadline.left(self.deadlines.round)
        self.meeting.offer(request.id, request, "alice", timeout)

    # -- infer ------------------------------------------------------------------------------------

    def _evaluate(self, request: Request) -> None:
        alice, timeout = request.channel, self.deadlines.round
        with self.meeting.claim(request.id, "the data owner", timeout) as asked:
            run = receive_message(alice, "run", "the bundle to use", request.deadline.left())
            live = self.live(run.id("deployment"))
            check_digest(live.plan, run.text("digest"), "alice", self.role)
            check_digest(live.plan, asked.message.text("digest"), "the data owner", self.role)
            prepared = self.shelf.take(run.id("bundle"), live.deployment.id)
            meter = Meter(alice.link)
            try:
                took = evaluate(live, prepared, asked.channel, alice, request.deadline, timeout)
                facts = merged(prepared.facts, took, meter.sent("bob->alice", alice))
                asked.channel.send_message(server_report(self.role, facts))
            finally:
                self.ledger.spend(prepared.bundle.id)

    def _drop(self, request: Request) -> None:
        """Alice has given this bundle up."""
        self.shelf.discard(request.message.id("bundle"))

    # -- prepare ----------------------------------------------------------------------------------

    def _prepare(self, request: Request) -> None:
        live = self.live(request.message.id("deployment"))
        check_digest(live.plan, request.message.text("digest"), "alice", self.role)
        self.ledger.admit(request.id, live.deployment.id)
        carol = self.links.get("carol").channel(request.id)
        timer, meter = Timer.start(), Meter(carol.link)
        with failing(carol):
            carol.send_message(
                {
                    "type": "deal",
                    "deployment": live.deployment.id.hex(),
                    "digest": live.plan.digest,
                }
            )
            total = bill_of(live.plan).dealt_bytes
            receive_message(carol, "dealing", "her turn to deal", request.deadline.left())

            def take(n: int) -> memoryview:
                what = f"dealt bytes {carol.payload_received} … of {total}"
                return carol.receive(n, what, request.deadline.left(self.deadlines.round))

            bundle = live.program.prepare(request.id, take)
            dealt = receive_message(carol, "dealt", "the end of dealing", self.deadlines.round)
        carol.close()
        wall, cpu = timer.seconds()
        facts = merged(
            {
                "preprocessing_seconds": wall,
                "preprocessing_cpu_seconds": cpu,
                "dealt_bytes": carol.payload_received,
                "carol_cpu_seconds": dealt.number("cpu_seconds"),
                "carol_peak_rss_bytes": dealt.size("peak_rss_bytes", 1 << 62),
            },
            meter.received("carol->bob", carol),
        )
        prepared = Prepared(bundle, request.channel.link, bundle.nbytes, facts)
        self.shelf.put(request.id, live.deployment.id, prepared)
        request.channel.send_message({"type": "prepared", "nbytes": bundle.nbytes})

    # -- deploy -----------------------------------------------------------------------------------

    def _stage(self, request: Request) -> None:
        alice, timeout = request.channel, self.deadlines.round
        with (
            self.meeting.claim(request.id, "the model owner", timeout) as asked,
            self.one_change(request.deadline.left()),
        ):
            order = receive_message(alice, "order", "the deployment", request.deadline.left())
            deployment = self._order(request, asked, order)
            weights = WeightsReceived(asked.channel, deployment.plan, timeout)
            with self.up_to_alice(alice, deployment.id):
                self._store_under_new_key(request, asked, deployment, weights)
                live = bring_to_life("bob", deployment, self.store)
                alice.send_message({"type": "staged", "weights": weights.digest})
                receive_message(alice, "commit", "alice to commit", DECISION_S)
            self.enliven(self.store.commit(deployment.id), live)
            alice.send_message({"type": "committed"})
            asked.channel.send_message({"type": "deployed"})

    def _order(self, request: Request, asked: Request, order: Message) -> Deployment:
        """The deployment as alice orders it and the model owner wants it, with fresh keys."""
        alice_key = request.channel.receive(KEY_BYTES, "a pair key", self.deadlines.round)
        plan = self.receive_plan(asked)
        check_digest(plan, order.text("digest"), "alice", self.role)
        keys = {"alice": bytes(alice_key), "carol": secrets.token_bytes(KEY_BYTES)}
        return Deployment(
            order.id("deployment"), order.text("name"), plan, keys, order.optional_id("replaces")
        )

    def _store_under_new_key(
        self, request: Request, asked: Request, deployment: Deployment, weights: WeightsReceived
    ) -> None:
        """Give carol her key and the model owner his seed; write down the masked weights."""
        plan, carol_key = deployment.plan, deployment.keys["carol"]
        carol = self.links.get("carol").channel(request.id)
        with failing(carol):
            carol.send_message({"type": "key", "digest": plan.digest})
            carol.send(carol_key)
            asked.channel.send_message({"type": "masks"})
            asked.channel.send(ServerProgram.weight_seed(plan, "bob", carol_key))
            self.store.stage(deployment, weights)
        carol.close()

    def _settle(self, request: Request) -> None:
        with self.one_change(request.deadline.left()):
            for deployment in self.store.settle(request.message.ids("deployments")):
                self.enliven(deployment)
        request.channel.send_message({"type": "settled"})
