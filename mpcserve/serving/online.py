"""What alice and bob have in common: live deployments, a ledger, and the requests of owners."""

from __future__ import annotations

import gc
import hashlib
import threading
from collections.abc import Iterator
from typing import Any, Literal

from mpcserve.errors import Refused
from mpcserve.plan.plan import Plan
from mpcserve.plan.store import plan_bytes, plan_from_bytes
from mpcserve.serving.deployment import Deployment, weight_sizes
from mpcserve.serving.evaluation import Live, bring_to_life
from mpcserve.serving.ledger import Ledger
from mpcserve.serving.links import Wiring
from mpcserve.serving.request import MAX_PLAN_BYTES, Request, check_digest
from mpcserve.serving.server import OWNERS, Route, Server
from mpcserve.serving.workers import Workers, threads_of
from mpcserve.transport import Channel


class WeightsReceived:
    """Δw as it comes from the model owner, weight by weight; alice and bob compare its digest."""

    def __init__(self, client: Channel, plan: Plan, timeout: float) -> None:
        self._client, self._plan, self._timeout = client, plan, timeout
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[memoryview]:
        for name, size in weight_sizes(self._plan):
            data = self._client.receive(size, f"weight {name!r} ({size} bytes)", self._timeout)
            self._hash.update(data)
            yield data

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all that came."""
        return self._hash.hexdigest()


class OnlineServer(Server):
    """alice or bob. `side` is the role, as the protocol knows it."""

    side: Literal["alice", "bob"]

    def __init__(self, wiring: Wiring) -> None:
        super().__init__(wiring)
        self.ledger = Ledger(wiring.config.state / wiring.role / "ledger.sqlite")
        self._live: dict[bytes, Live] = {}
        self.workers = Workers(threads_of(wiring.config))
        self._live_lock = threading.Lock()

    def start(self) -> None:
        """Bring the stored deployments to life, then listen and connect."""
        for deployment in self.store:
            self.enliven(deployment)
        super().start()

    def routes(self) -> dict[str, Route]:
        """Requests of owners that alice and bob answer alike."""
        return {"models": Route(OWNERS, self._models), "plan": Route(OWNERS, self._plan)}

    def close(self) -> None:
        """End all links, close the ledger."""
        super().close()
        self.workers.close()
        self.ledger.close()

    def health(self) -> dict[str, Any]:
        """Adds the ledger's counts."""
        dealt, spent = self.ledger.counts()
        return super().health() | {"bundles": {"dealt": dealt, "spent": spent}}

    def live(self, id: bytes) -> Live:
        """The deployment in memory. Raises: Refused."""
        with self._live_lock:
            found = self._live.get(id)
        if found is None:
            raise Refused(
                f"{self.role} has no deployment {id.hex()}",
                "it was replaced or never completed: repeat the request, or deploy the model again",
            )
        return found

    def enliven(self, deployment: Deployment, ready: Live | None = None) -> None:
        """Put a committed deployment in use, and the one it replaces out of use."""
        live = ready or bring_to_life(self.side, deployment, self.store, self.workers.run)
        with self._live_lock:
            self._live[deployment.id] = live
            if deployment.replaces is not None:
                self._live.pop(deployment.replaces, None)
        if deployment.replaces is not None:
            self.retired(deployment.replaces)
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # plans have many objects, which every later collection would look through
        self.deployed(live)

    def deployed(self, live: Live) -> None:
        """Called when a deployment comes into use."""

    def retired(self, id: bytes) -> None:
        """Called when a deployment is no more in use."""

    def receive_plan(self, request: Request) -> Plan:
        """The plan that the model owner sends with a deploy request, checked."""
        size = request.message.size("plan_bytes", MAX_PLAN_BYTES)
        what = f"the plan ({size} bytes)"
        data = request.channel.receive(size, what, request.deadline.left(self.deadlines.round))
        plan = plan_from_bytes(bytes(data), "the plan received")
        check_digest(plan, request.message.text("digest"), "the request", "the plan received")
        return plan

    def _models(self, request: Request) -> None:
        models = [
            {
                "name": d.name,
                "deployment": d.id.hex(),
                "digest": d.plan.digest,
                "batch": d.plan.batch,
                "inputs": [[i.name, i.dtype, list(i.shape)] for i in d.plan.raw_inputs],
                "outputs": [[o.name, o.dtype, list(o.shape)] for o in d.plan.outputs],
                "default": d.name == self.config.model,
            }
            for d in sorted(self.store, key=lambda d: d.name)
        ]
        request.channel.send_message({"type": "models", "models": models})

    def _plan(self, request: Request) -> None:
        deployment = self.store.find(request.message.optional_text("model") or self.config.model)
        data = plan_bytes(deployment.plan)
        request.channel.send_message(
            {
                "type": "plan",
                "model": deployment.name,
                "digest": deployment.plan.digest,
                "plan_bytes": len(data),
            }
        )
        request.channel.send(data)
