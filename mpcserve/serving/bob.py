"""Bob follows alice: what an owner asks of him waits until she leads the way.

He receives carol's corrections, so it is he who asks her to deal.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from mpcserve.errors import PeerLost, PeerTimeout, Refused
from mpcserve.protocol import ServerProgram
from mpcserve.randomness import KEY_BYTES
from mpcserve.serving.deployment import Deployment
from mpcserve.serving.evaluation import ASIDE_S, Live, bring_to_life
from mpcserve.serving.halves import BobHalf, Dealing, is_small
from mpcserve.serving.heap import give_back
from mpcserve.serving.links import Wiring
from mpcserve.serving.log import named_error
from mpcserve.serving.meeting import Meeting
from mpcserve.serving.online import OnlineServer, WeightsReceived
from mpcserve.serving.pool import Shelf
from mpcserve.serving.report import Meter, server_report
from mpcserve.serving.request import (
    Deadline,
    Message,
    Request,
    check_digest,
    check_slots,
    failing,
    receive_message,
)
from mpcserve.serving.reserve import MOST, Reserve
from mpcserve.serving.server import DECISION_S, OWNERS, Route
from mpcserve.serving.spool import Spool
from mpcserve.serving.together import PATIENCE_S, Member, evaluate_members, share
from mpcserve.transport import Channel, Link
from mpcserve.transport.reading import BRIEF_S

HALF_S = 5.0
"""For so long a request that alice runs already may be without its owner's half for bob: it has a
place that others wait for."""


class Bob(OnlineServer):
    """The server that follows."""

    side = "bob"
    peers = ("alice", "carol")
    connects_to = ("alice",)
    accepts = ("carol", *OWNERS)

    def __init__(self, wiring: Wiring) -> None:
        limits = wiring.config.limits
        self.meeting: Meeting[Member] = Meeting(limits.requests + limits.queue)
        self.joining: Meeting[Member] = Meeting(limits.requests + limits.queue)
        self.shelf: Shelf[BobHalf] = Shelf()
        self.reserve = Reserve()
        self.spool = Spool(wiring.config.state / wiring.role / "spool")
        super().__init__(wiring)

    def routes(self) -> dict[str, Route]:
        """Owners' requests wait for alice's half, which may come first."""
        return {
            **super().routes(),
            "infer": Route(("data-owner",), self._park, attends=ASIDE_S),
            "deploy": Route(("model-owner",), self._park),
            "evaluate": Route(("alice",), self._evaluate),
            "run": Route(("alice",), self._run, attends=BRIEF_S),
            "prepare": Route(("alice",), self._prepare),
            "reserve": Route(("alice",), self._reserve),
            "load": Route(("alice",), self._load),
            "drop": Route(("alice",), self._drop),
            "stage": Route(("alice",), self._stage),
            "settle": Route(("alice",), self._settle),
        }

    def retired(self, id: bytes) -> None:
        """Drop its bundles."""
        self.shelf.remove(id)
        self.reserve.remove(id)

    def on_lost(self, link: Link) -> None:
        """Without alice no request goes on; she has dropped her halves of the bundles too."""
        if link.peer == "alice":
            self.shelf.drop(link)
            self.reserve.drop(link)
            reason = link.reason or PeerLost(f"the link to {link.name} ended")
            for meeting in (self.meeting, self.joining):
                meeting.refuse_all(type(reason)(reason.message, reason.hint))

    def _park(self, request: Request) -> None:
        self.links.get("alice")
        timeout = request.deadline.left(self.deadlines.round)
        me = Member(request)
        self.meeting.offer(request.id, me, "alice", timeout)
        me.check()

    # -- infer ------------------------------------------------------------------------------------

    def _evaluate(self, request: Request) -> None:
        """Of a request that waits for its turn: alice says later what becomes of it."""
        alice = request.channel
        with self._claimed(request, self.deadlines.round) as me:
            alice.send_message({"type": "met"})
            what = "the bundle to use"
            run = Message(alice.receive_message(what, request.deadline.left()), alice.peer)
            if run.text("type") == "join":
                self.joining.offer(request.id, me, "alice", self.deadlines.round)
            else:
                ordered = Request(alice, run.expect("run"), request.deadline)
                with self._bundle_of(ordered) as prepared:
                    self._lead(ordered, me, prepared)

    def _run(self, request: Request) -> None:
        """Of a request whose turn it is at once."""
        with ExitStack() as stack:
            try:
                prepared = stack.enter_context(self._bundle_of(request))
            except Exception:
                with self._claimed(request, HALF_S):  # whose error it is, too
                    raise
            me = stack.enter_context(self._claimed(request, HALF_S))
            self._lead(request, me, prepared)

    @contextmanager
    def _claimed(self, request: Request, patience: float) -> Iterator[Member]:
        """What the data owner asked under this id; when the block ends he gets his report."""
        timeout = min(patience, self.deadlines.round)
        with self.meeting.claim(request.id, "the data owner", timeout) as me:
            yield me
            # An error of its own is told to its owner: it must not end what alice still reads.
            if me.error is None:
                me.here.channel.finish(server_report(self.role, me.facts))

    def _lead(self, request: Request, me: Member, prepared: BobHalf) -> None:
        """Evaluate for this member and those who join it."""
        run, alice = request.message, request.channel
        live = self.live(run.id("deployment"))
        with self._joined(run.ids("with")) as joined:
            members = [me, *joined]
            for member in members:
                if member.request is not None:
                    with member.leaving():
                        digest = member.request.message.text("digest")
                        check_digest(live.plan, digest, "the data owner", self.role)
            meter = Meter(alice.link)
            try:
                evaluate_members(live, prepared, members, alice, self.deadlines.round)
                share(members, meter.sent("bob->alice", alice))
            finally:
                self.ledger.spend(prepared.id)

    @contextmanager
    def _bundle_of(self, request: Request) -> Iterator[BobHalf]:
        """What alice wants used, until the block ends: a fresh one, or one from the shelf.

        Carol is asked for a fresh one before anything else is done.
        """
        run = request.message
        live, bundle = self.live(run.id("deployment")), run.id("bundle")
        check_digest(live.plan, run.text("digest"), "alice", self.role)
        if run.flag("fresh"):
            half = self._fresh_half(request, live, bundle)
        else:
            half = self.shelf.take(bundle, live.deployment.id)
        try:
            yield half
        except Exception:
            half.abandon()
            raise
        give_back(half.nbytes)

    def _fresh_half(self, request: Request, live: Live, bundle: bytes) -> BobHalf:
        slots = check_slots(1 + len(request.message.ids("with")), live.plan)
        small = is_small(live, slots)
        alice = [] if small else [request.channel.link.channel(bundle)]  # before carol is asked
        with failing(*alice):
            half = self._new_half(request, live, bundle, slots)
        half.small = small
        for channel in alice:
            half.tell(channel)
        return half

    @contextmanager
    def _joined(self, ids: Sequence[bytes]) -> Iterator[list[Member]]:
        """Those who join, until the block ends: who is not here in time has left already."""
        end = Deadline(PATIENCE_S)
        with ExitStack() as stack:
            yield [self._join(stack, id, end) for id in ids]

    def _join(self, stack: ExitStack, id: bytes, end: Deadline) -> Member:
        try:
            return stack.enter_context(self.joining.claim(id, "the data owner", end.left()))
        except PeerTimeout as error:
            return Member(None, error)

    def _drop(self, request: Request) -> None:
        """Alice has given this bundle up."""
        self.shelf.discard(request.message.id("bundle"))

    # -- prepare ----------------------------------------------------------------------------------

    def _prepare(self, request: Request) -> None:
        live = self.live(request.message.id("deployment"))
        check_digest(live.plan, request.message.text("digest"), "alice", self.role)
        half, spool = self._new_half(request, live, request.id, 1), request.message.flag("spool")
        if spool:
            half.keep(self.spool)
        self.shelf.put(request.id, live.deployment.id, half)
        request.channel.send_message({"type": "agreed"})
        if not spool:
            self._make_whole(half, request.channel)

    def _new_half(self, request: Request, live: Live, bundle: bytes, slots: int) -> BobHalf:
        """Of a bundle that carol is asked to deal, while it is written down."""
        carol = self.links.get("carol").channel(bundle)
        with failing(carol):
            dealing = Dealing(live, slots, carol, request.deadline, self.deadlines.round)
            half = BobHalf(live, bundle, request.channel.link, dealing)
            if self.reserve.redeem(live.deployment.id, request.channel.link, bundle):
                self.ledger.deal(bundle)
            else:
                self.ledger.admit(bundle, live.deployment.id)
        return half

    def _reserve(self, request: Request) -> None:
        """Ids of bundles that alice may have prepared later."""
        deployment, ids = request.message.id("deployment"), request.message.ids("bundles")
        if len(self.reserve) + len(ids) > MOST:
            raise Refused(f"{len(self.reserve)} ids of bundles are reserved", "see alice's log")
        self.ledger.reserve(ids, self.live(deployment).deployment.id)
        self.reserve.put(deployment, request.channel.link, ids)
        request.channel.send_message({"type": "reserved"})

    def _load(self, request: Request) -> None:
        """Prepare from the disk what alice has room for now."""
        message = request.message
        half = self.shelf.look(message.id("bundle"), message.id("deployment"))
        request.channel.send_message({"type": "loading"})
        self._make_whole(half, request.channel)

    def _make_whole(self, half: BobHalf, alice: Channel) -> None:
        try:
            half.finish()
        except Exception as e:
            self.shelf.fail(half.id, named_error(e))
            raise
        alice.finish({"type": "prepared", "nbytes": half.nbytes})

    # -- deploy -----------------------------------------------------------------------------------

    def _stage(self, request: Request) -> None:
        alice, timeout = request.channel, self.deadlines.round
        with (
            self.meeting.claim(request.id, "the model owner", timeout) as owner,
            self.one_change(request.deadline.left()),
        ):
            asked = owner.here
            order = receive_message(alice, "order", "the deployment", request.deadline.left())
            deployment = self._order(request, asked, order)
            weights = WeightsReceived(asked.channel, deployment.plan, timeout)
            with self.up_to_alice(alice, deployment.id):
                self._store_under_new_key(request, asked, deployment, weights)
                live = bring_to_life("bob", deployment, self.store, self.workers.run)
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
