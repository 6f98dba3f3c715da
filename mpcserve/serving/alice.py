"""Alice leads: she picks the bundle of every request, and decides when a deployment is in use.

infer     data owner → alice, bob      alice takes a bundle and tells bob which; both evaluate
deploy    model owner → alice, bob     all three stage, alice commits, bob and carol follow
prepare   alice → bob                  both prepare a bundle; bob has carol deal to him (halves.py)
reserve   alice → bob                  both write down ids of bundles to come (reserve.py)
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from mpcserve.errors import MpcError, Refused, WireError
from mpcserve.plan.bill import bill_of
from mpcserve.plan.store import plan_bytes
from mpcserve.protocol import ServerProgram
from mpcserve.randomness import KEY_BYTES
from mpcserve.serving.deployment import ID_BYTES, Deployment
from mpcserve.serving.evaluation import ASIDE_S, Live, bring_to_life
from mpcserve.serving.gate import Gate
from mpcserve.serving.halves import AliceHalf, is_small
from mpcserve.serving.links import Wiring
from mpcserve.serving.log import log, named_error
from mpcserve.serving.online import OnlineServer, WeightsReceived
from mpcserve.serving.pool import Agreement, Pool
from mpcserve.serving.report import Meter, server_report
from mpcserve.serving.request import Request, check_digest, failing, receive_message
from mpcserve.serving.reserve import Reserve
from mpcserve.serving.server import OWNERS, Route
from mpcserve.serving.together import Member, evaluate_members, most_together, share
from mpcserve.transport import Channel, Link

FOLLOWERS = ("bob", "carol")
MAX_NAME = 200
EXPANSION = 2
"""Memory of a prepared bundle per dealt byte, about: used until one has been prepared."""


class Alice(OnlineServer):
    """The server that coordinates."""

    side = "alice"
    peers = FOLLOWERS
    accepts = (*FOLLOWERS, *OWNERS)

    def __init__(self, wiring: Wiring) -> None:
        config = wiring.config
        self.gate: Gate[Member] = Gate(config.limits.requests, config.limits.queue)
        self.pool: Pool[AliceHalf] = Pool(self._agree, config.pool.depth, config.pool.max_bytes)
        self.reserve = Reserve()
        self._drawing = threading.Lock()
        super().__init__(wiring)
        self.store.settle(())  # what she had not committed when she stopped was never deployed

    def routes(self) -> dict[str, Route]:
        """Requests that alice leads."""
        return {
            **super().routes(),
            "infer": Route(("data-owner",), self._infer, attends=ASIDE_S),
            "deploy": Route(("model-owner",), self._deploy),
            "await-bundles": Route(OWNERS, self._await_bundles),
        }

    def close(self) -> None:
        """Stop dealing ahead, end all links."""
        self.pool.close()
        super().close()

    def health(self) -> dict[str, Any]:
        """Adds the pool's depth and the queue."""
        running, waiting = self.gate.counts
        return super().health() | {
            "pool": {d.name: self.pool.ready(d.id) for d in self.store},
            "evaluations": {"running": running, "waiting": waiting},
        }

    def deployed(self, live: Live) -> None:
        """Begin to deal ahead for it."""
        self.pool.add(live.deployment.id, EXPANSION * bill_of(live.plan).dealt_bytes)

    def retired(self, id: bytes) -> None:
        """Drop its bundles."""
        self.pool.remove(id)
        self.reserve.remove(id)

    def on_linked(self, link: Link) -> None:
        """Tell the follower what is deployed before anything else is asked of it."""
        with self.one_change(self.deadlines.request):
            self._settle(link)
        super().on_linked(link)
        self.pool.retry()

    def on_lost(self, link: Link) -> None:
        """Bob has dropped his halves of these bundles too."""
        self.pool.drop(link)
        self.reserve.drop(link)

    def _await_bundles(self, request: Request) -> None:
        seconds = request.deadline.left(request.message.number("seconds"))
        full = self.pool.wait_filled(seconds)
        request.channel.send_message({"type": "bundles", "full": full})

    # -- infer ------------------------------------------------------------------------------------

    def _infer(self, request: Request) -> None:
        bob = self.links.get("bob").channel(request.id)
        with failing(bob), self._both_told(bob, request):
            me = Member(request)
            name = request.message.optional_text("model") or self.config.model
            live = self.live(self.store.find(name).id)
            check_digest(live.plan, request.message.text("digest"), "the data owner", self.role)
            with self.gate.enter(
                me,
                request.deadline.left(),
                None if me.alone else live.deployment.id,
                lambda: self._most_together(live),
                lambda: self._meet(bob, request),
            ) as members:
                if members:
                    self._evaluate(live, members, bob)
        bob.close()  # what went wrong with this one alone must not end what bob still reads
        me.check()
        # Last, so that whoever has his answer finds the gate open.
        request.channel.finish(server_report(self.role, me.facts))
        self._fill_reserve(live.deployment.id)

    @contextmanager
    def _both_told(self, bob: Channel, request: Request) -> Iterator[None]:
        """An error is bob's too: his half of the request waits to hear of hers."""
        try:
            yield
        except Exception as e:
            if not bob.known_to_peer:
                request.channel.fail(named_error(e))
                with suppress(MpcError):  # an error alone would not find its half
                    self._meet(bob, request)
            raise

    def _meet(self, bob: Channel, request: Request) -> None:
        """Whom bob has not heard of would keep others in line waiting."""
        bob.send_message({"type": "evaluate"})
        receive_message(bob, "met", "bob to hear of this request", request.deadline.left())

    def _most_together(self, live: Live) -> int:
        """One, as long as there is stock: what is dealt already is quicker than what is shared."""
        if self.pool.ready(live.deployment.id):
            return 1
        return most_together(live, self.config.limits.together)

    def _evaluate(self, live: Live, members: Sequence[Member], bob: Channel) -> None:
        """Lead all members through one evaluation; an error of all is each one's error."""
        try:
            with self.pool.bundle(live.deployment.id, len(members)) as prepared:
                self._run(live, members, bob, prepared)
        except Exception as e:
            for member in members:
                member.error = member.error or named_error(e)
            raise
        log.info(
            "infer %s: %s, %d rounds, %.3f s",
            " ".join(m.request.name for m in members if m.request),
            live.deployment.name,
            members[0].facts["rounds"],
            members[0].facts["online_seconds"],
        )

    def _run(
        self, live: Live, members: Sequence[Member], bob: Channel, prepared: AliceHalf
    ) -> None:
        meter, others = Meter(bob.link), [m.here.id for m in members[1:]]
        try:
            for member, id in zip(members[1:], others, strict=True):
                with member.leaving():
                    bob.link.channel(id).send_message({"type": "join"})
            bob.send_message(
                {
                    "type": "run",
                    "deployment": live.deployment.id.hex(),
                    "digest": live.plan.digest,
                    "bundle": prepared.id.hex(),
                    "fresh": prepared.fresh,
                    "with": [id.hex() for id in others],
                }
            )
            if not others:  # what bob fails with ends the wait for an input
                bob.on_failure = members[0].here.channel.fail
            evaluate_members(live, prepared, members, bob, self.deadlines.round)
        finally:
            bob.on_failure = lambda error: None
            self.ledger.spend(prepared.id)
            prepared.leave()
        share(members, meter.sent("alice->bob", bob))

    # -- prepare ----------------------------------------------------------------------------------

    def _agree(self, deployment: bytes, purpose: Agreement, slots: int) -> AliceHalf:
        """A new bundle: both have admitted it, or are about to where it is wanted now."""
        live, timeout, link = self.live(deployment), self.deadlines.request, self.links.get("bob")
        reserved = self.reserve.take(deployment, link)
        id = reserved or secrets.token_bytes(ID_BYTES)
        if reserved:
            self.ledger.deal(id)
        bob = link.channel(id)
        half = AliceHalf(live, id, bob, timeout, slots, self.ledger, reserved is not None)
        if purpose == "now":
            half.fresh, half.small = True, is_small(live, slots)
            return half
        with failing(bob):
            bob.send_message(
                {
                    "type": "prepare",
                    "deployment": deployment.hex(),
                    "digest": live.plan.digest,
                    "spool": purpose == "spool",
                }
            )
            half.admit()  # while he does the same
            half.hear_agreed()
        if purpose == "spool":
            half.leave_spooled()
        return half

    def _fill_reserve(self, deployment: bytes) -> None:
        """Draw ids for the next bundles, when most are used up."""
        with suppress(MpcError), self._drawing:
            link = self.links.get("bob")
            ids = [
                secrets.token_bytes(ID_BYTES) for _ in range(self.reserve.wanted(deployment, link))
            ]
            if not ids:
                return
            bob, named = link.channel(secrets.token_bytes(ID_BYTES)), [id.hex() for id in ids]
            with failing(bob):
                bob.send_message(
                    {"type": "reserve", "deployment": deployment.hex(), "bundles": named}
                )
                self.ledger.reserve(ids, deployment)
                receive_message(bob, "reserved", "ids in his ledger", self.deadlines.request)
            bob.close()
            self.reserve.put(deployment, link, ids)

    # -- deploy -----------------------------------------------------------------------------------

    def _deploy(self, request: Request) -> None:
        bob = self.links.get("bob").channel(request.id)
        with failing(bob):
            bob.send_message({"type": "stage"})
            with self.one_change(request.deadline.left()):
                live = self._deploy_on_all(request, bob)
        request.channel.send_message({"type": "deployed"})
        log.info("deploy %s: %s, plan %s", request.name, live.deployment.name, live.plan.digest)

    def _deploy_on_all(self, request: Request, bob: Channel) -> Live:
        """Stage on all three, then commit on all three. An error before alice commits is undone."""
        carol, id = self.links.get("carol").channel(request.id), request.message.id("deployment")
        with failing(bob, carol):
            carol.send_message({"type": "stage"})
            try:
                live = self._stage(request, bob, carol)
                self.store.commit(id)
            except Exception:
                self.store.discard(id)
                raise
        self._tell_committed(live, (bob, carol), request)
        return live

    def _stage(self, request: Request, bob: Channel, carol: Channel) -> Live:
        """All three hold the deployment on disk when this returns; none uses it yet."""
        message, client = request.message, request.channel
        name, replaced = message.text("name"), self._replaced(request)
        plan = self.receive_plan(request)
        keys = {peer: secrets.token_bytes(KEY_BYTES) for peer in FOLLOWERS}
        deployment = Deployment(message.id("deployment"), name, plan, keys, replaced)
        order = {
            "type": "order",
            "deployment": deployment.id.hex(),
            "name": name,
            "digest": plan.digest,
            "replaces": replaced.hex() if replaced else None,
        }
        bob.send_message(order)
        bob.send(keys["bob"])
        data = plan_bytes(plan)
        carol.send_message(order | {"plan_bytes": len(data)})
        carol.send(data)
        carol.send(keys["carol"])
        client.send_message({"type": "masks"})
        client.send(ServerProgram.weight_seed(plan, "alice", keys["carol"]))
        weights = WeightsReceived(client, plan, self.deadlines.round)
        self.store.stage(deployment, weights)
        live = bring_to_life("alice", deployment, self.store, self.workers.run)
        for follower in (bob, carol):
            what = f"{follower.peer} to store the deployment"
            theirs = receive_message(follower, "staged", what, request.deadline.left())
            if follower is bob and theirs.text("weights") != weights.digest:
                raise WireError(
                    "alice and bob were sent different masked weights", "deploy the model again"
                )
        return live

    def _tell_committed(self, live: Live, followers: Sequence[Channel], request: Request) -> None:
        """The deployment stands: a follower that is lost now is told when it is back."""
        try:
            for follower in followers:
                follower.send_message({"type": "commit"})
            for follower in followers:
                what = f"{follower.peer} to put the deployment in use"
                receive_message(follower, "committed", what, request.deadline.left())
        finally:
            for follower in followers:
                follower.close()  # whatever happened: an error would take the word back
            self.enliven(live.deployment, live)

    def _replaced(self, request: Request) -> bytes | None:
        """The deployment that this one retires. Raises: Refused unless it may."""
        name = request.message.text("name")
        if not (0 < len(name) <= MAX_NAME and name.isprintable()):
            raise Refused(
                f"a model's name has 1 … {MAX_NAME} printable characters, got {len(name)}",
                "choose another --name",
            )
        old = self.store.named(name)
        if old is None:
            return None
        if not request.message.flag("replace"):
            raise Refused(
                f"a model named {name!r} is deployed already (plan {old.plan.digest})",
                "choose another --name, or give --replace to retire it",
            )
        return old.id

    def _settle(self, link: Link) -> None:
        """Tell a follower which deployments stand; it commits and discards accordingly."""
        channel = link.channel(secrets.token_bytes(ID_BYTES))
        with failing(channel):
            ids = [d.id.hex() for d in self.store]
            channel.send_message({"type": "settle", "deployments": ids})
            what = f"{link.peer} to settle its deployments"
            receive_message(channel, "settled", what, self.deadlines.request)
        channel.close()
