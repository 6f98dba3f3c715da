"""The owners' side: share a model's weights, ask for an inference, add up the answer.

The model owner and the data owner are certificates, not programs: one client holds the links that
its directory of keys allows. All secrets are masked here, before they leave.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpcserve.config import Config, load_config
from mpcserve.errors import ConfigError, Refused, WireError
from mpcserve.plan.bill import SEED_BYTES, result_bytes
from mpcserve.plan.plan import Output, Plan
from mpcserve.plan.store import load_plan, plan_bytes, plan_from_bytes
from mpcserve.plan.weights import load_weights, weights_path
from mpcserve.protocol.owners import mask_input, reveal, share_weights
from mpcserve.randomness import KEY_BYTES, Stream
from mpcserve.serving.deployment import ID_BYTES
from mpcserve.serving.inputs import Array, OnRange, batches, check_inputs, join_outputs, presented
from mpcserve.serving.keys import key_files
from mpcserve.serving.links import Wiring
from mpcserve.serving.report import Meter, client_report, merged, sum_of
from mpcserve.serving.request import MAX_PLAN_BYTES, Deadline, Message, failing, receive_message
from mpcserve.transport import Channel, Hooks, Link, NetworkProfile
from mpcserve.wire import Buffer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpcserve.compiler import CompiledModel

SERVERS = ("alice", "bob")
T = TypeVar("T")


GRACE = 1.0
"""Seconds beyond a request's deadline: the server that waited in vain says for whom."""


class Client:
    """Talks to alice and bob as model owner and as data owner. A context manager.

    Safe to use from several threads.
    """

    def __init__(
        self,
        config: Config | Path | str | None = None,
        *,
        plaintext: bool = False,
        network: str = "loopback",
    ) -> None:
        """`config` is a Config or the path of one, found as the command line finds it."""
        self._config = config if isinstance(config, Config) else load_config(config)
        self._network = NetworkProfile.parse(network)
        self._plaintext = plaintext
        self._lock = threading.Lock()
        self._links: dict[tuple[str, str], Link] = {}
        self._plans: dict[str | None, tuple[str, Plan]] = {}

    def deploy(
        self,
        model: CompiledModel | Path | str,
        *,
        name: str | None = None,
        weights: Path | str | None = None,
        replace: bool = False,
    ) -> str:
        """Share a model's weights with the servers under `name` (the plan's by default).

        `model` is compiled, or the path of its plan with the weights beside it. Returns the name.
        Raises: Refused when the name is taken and `replace` is not given.
        """
        plan, values = _plan_and_weights(model, weights)
        name = name or plan.name
        data = plan_bytes(plan)
        with self._request("model-owner") as both:
            both.attend()
            both.send_message(
                {
                    "type": "deploy",
                    "deployment": secrets.token_bytes(ID_BYTES).hex(),
                    "name": name,
                    "digest": plan.digest,
                    "replace": replace,
                    "plan_bytes": len(data),
                }
            )
            both.send(data)
            timeout = self._config.deadlines.request
            seeds = both.ask(lambda c, s: _seeds(c, "masks", KEY_BYTES, "to accept", s), timeout)
            for _, masked in share_weights(plan, values, *seeds):
                both.send(bytes(masked))
            both.ask(lambda c, s: receive_message(c, "deployed", "to put it in use", s), timeout)
        with self._lock:
            self._plans.clear()
        return name

    def models(self) -> list[dict[str, Any]]:
        """What is deployed: name, deployment, digest, batch, inputs and outputs of each."""
        fields = self._ask_alice({"type": "models"}, "models")
        return list(fields.objects("models"))

    def plan(self, model: str | None = None) -> Plan:
        """The public plan of a deployed model."""
        return self._plan_of(model)[1]

    def infer(
        self,
        x: Array | Mapping[str, Array],
        *,
        model: str | None = None,
        on_range: OnRange = "error",
    ) -> Output | dict[str, Output]:
        """The model's output for `x`: an array, or name → array where there are several.

        Where the model ends in a ZipMap, a list with a {class: share} for each row. `x` may have
        more rows than the plan's batch. Raises: InputError when a value is outside the declared
        range, unless `on_range` is "clamp".
        """
        plan, outputs, _ = self._inferred(x, model, on_range, False)
        return presented(plan, outputs)

    def infer_report(
        self,
        x: Array | Mapping[str, Array],
        *,
        model: str | None = None,
        on_range: OnRange = "error",
        profile: bool = False,
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Name → output, and what it cost: rounds, bytes of every link, seconds, memory.

        Outputs are arrays; of a ZipMap a matrix, whose classes are the plan's `columns`.
        `profile`: and what alice and bob did when, of the last batch (see `serving.profile`).
        """
        _, outputs, report = self._inferred(x, model, on_range, profile)
        return outputs, report

    def _inferred(
        self, x: Array | Mapping[str, Array], model: str | None, on_range: OnRange, profile: bool
    ) -> tuple[Plan, dict[str, Array], dict[str, Any]]:
        name, plan = self._plan_of(model)
        parts, reports = [], []
        for count, rows in batches(plan, check_inputs(plan, x, on_range)):
            try:
                outputs, report = self._evaluate(name, plan, rows, profile)
            except Refused:
                self._forget(model)
                raise
            parts.append((count, outputs))
            reports.append(report)
        return plan, join_outputs(plan, parts), sum_of(reports)

    def stats(self) -> dict[str, dict[str, Any]]:
        """What alice and bob tell of themselves: uptime, deployments, pool, requests."""
        with self._request(self._any_owner()) as both:
            both.send_message({"type": "stats"})
            both.attend()
            timeout = self._config.deadlines.round
            replies = both.ask(lambda c, s: c.receive_message("its numbers", s), timeout)
        return dict(zip(SERVERS, replies, strict=True))

    def wait_for_bundles(self, timeout: float) -> bool:
        """Wait until the pool is full: all bundles dealt that it may hold. Whether it is."""
        question = {"type": "await-bundles", "seconds": timeout}
        extra = timeout + self._config.deadlines.round
        return self._ask_alice(question, "bundles", extra).flag("full")

    def close(self) -> None:
        """Close the links."""
        with self._lock:
            links, self._links = list(self._links.values()), {}
        for link in links:
            link.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _evaluate(
        self, name: str, plan: Plan, rows: Sequence[NDArray[np.floating[Any]]], profile: bool
    ) -> tuple[list[Array], dict[str, Any]]:
        began, timeout = time.perf_counter(), self._config.deadlines.request + GRACE
        size = result_bytes(plan)
        with self._request("data-owner") as both:
            meters = [Meter(c.link) for c in both.channels]
            request = {"type": "infer", "model": name, "digest": plan.digest, "profile": profile}
            both.send_message(request)
            both.attend()
            masks = both.ask(lambda c, s: _masks(c, len(plan.inputs), s), timeout)
            ready = time.perf_counter()
            for k, (x, *streams) in enumerate(zip(rows, *masks, strict=True)):
                for part in mask_input(plan, k, x, streams):
                    both.send(part, fresh=True)
            shares = both.ask(lambda c, s: c.receive(size, "the result", s), timeout)
            outputs = reveal(plan, *shares)
            ended = time.perf_counter()
            alice, bob = both.ask(lambda c, s: c.receive_message("the report", s), timeout)
        mine = merged(
            {"online_seconds": ended - ready, "total_seconds": ended - began},
            *(
                merged(m.sent(f"client->{s}", c), m.received(f"{s}->client", c))
                for s, m, c in zip(SERVERS, meters, both.channels, strict=True)
            ),
        )
        try:
            return outputs, client_report(plan, name, alice, bob, mine)
        except (KeyError, TypeError, ValueError) as e:
            raise WireError(
                f"a server's report is not as expected: {type(e).__name__}",
                "run the same version of mpcserve on every machine",
            ) from None

    def _plan_of(self, model: str | None) -> tuple[str, Plan]:
        model = model or self._config.model
        with self._lock:
            known = self._plans.get(model)
        if known is None:
            known = self._fetch_plan(model)
            with self._lock:
                self._plans[model] = known
        return known

    def _fetch_plan(self, model: str | None) -> tuple[str, Plan]:
        """Alice's word alone: bob refuses a request whose digest is not that of his plan."""
        timeout = self._config.deadlines.round
        with self._channel(self._any_owner(), "alice") as alice:
            alice.send_message({"type": "plan", "model": model})
            head = receive_message(alice, "plan", "the plan", timeout)
            data = alice.receive(head.size("plan_bytes", MAX_PLAN_BYTES), "the plan", timeout)
        plan = plan_from_bytes(bytes(data), "the plan of alice")
        if plan.digest != head.text("digest"):
            raise Refused(
                f"alice sent plan {plan.digest} as {head.text('digest')}", "see the log of alice"
            )
        return head.text("model"), plan

    def _forget(self, model: str | None) -> None:
        """The model may have been deployed anew: fetch its plan again next time."""
        with self._lock:
            self._plans.pop(model or self._config.model, None)

    def _ask_alice(
        self, question: dict[str, Any], answer: str, timeout: float | None = None
    ) -> Message:
        timeout = timeout or self._config.deadlines.round
        with self._channel(self._any_owner(), "alice") as alice:
            alice.send_message(question)
            return receive_message(alice, answer, "an answer", timeout)

    @contextmanager
    def _channel(self, role: str, server: str) -> Iterator[Channel]:
        channel = self._link(role, server).channel(secrets.token_bytes(ID_BYTES))
        with failing(channel):
            yield channel
        channel.close()

    @contextmanager
    def _request(self, role: str) -> Iterator[Both]:
        """One request id on both servers; an error here or on one of them ends it on both."""
        id = secrets.token_bytes(ID_BYTES)
        links = [self._link(role, server) for server in SERVERS]
        both = Both([link.channel(id) for link in links])
        with failing(*both.channels), both:
            yield both
        for channel in both.channels:
            channel.close()

    def _link(self, role: str, server: str) -> Link:
        with self._lock:
            link = self._links.get((role, server))
            if link is None or link.reason is not None:
                wiring = Wiring(self._config, role, self._network, self._plaintext)
                link = self._links[role, server] = wiring.connect(server, Hooks())
        return link

    def _any_owner(self) -> str:
        """A role this client has a certificate of, for requests that any owner may make."""
        if self._plaintext:
            return "data-owner"
        try:
            return key_files(self._config.keys, "data-owner").role
        except ConfigError:
            return key_files(self._config.keys, "model-owner").role


class Both:
    """One request's two channels, to alice and to bob: where one fails, so does the other."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self.channels = tuple(channels)
        alice, bob = self.channels
        alice.on_failure, bob.on_failure = bob.fail, alice.fail
        self._attending = ExitStack()

    def attend(self) -> None:
        """From now on the thread that asks reads and writes both sockets itself.

        What that costs is paid while the servers are at what was asked of them.
        """
        for channel in self.channels:
            self._attending.enter_context(channel.attended())

    def __enter__(self) -> Both:
        return self

    def __exit__(self, *_: object) -> None:
        self._attending.close()

    def send_message(self, message: dict[str, Any]) -> None:
        """The same message to both."""
        for channel in self.channels:
            channel.send_message(message)

    def send(self, data: Buffer, fresh: bool = False) -> None:
        """The same bytes to both: first to bob, who says last that he is ready, and is awake."""
        for channel in reversed(self.channels):
            channel.send(data, fresh)

    def ask(self, receive: Callable[[Channel, float], T], timeout: float) -> list[T]:
        """What `receive` returns for each, within so many seconds for both.

        The thread that asks reads from both: the first to fail ends the wait for the other.
        """
        deadline = Deadline(timeout)
        return [receive(channel, deadline.left()) for channel in self.channels]


def _seeds(channel: Channel, kind: str, length: int, what: str, timeout: float) -> bytes:
    receive_message(channel, kind, what, timeout)
    return bytes(channel.receive(length, "seeds of masks", timeout))


def _masks(channel: Channel, inputs: int, timeout: float) -> list[Stream]:
    """One server's masks of every input: begun while the other server's seeds are on their way."""
    seeds = _seeds(channel, "ready", SEED_BYTES * inputs, "a bundle", timeout)
    starts = range(0, len(seeds), SEED_BYTES)
    return [Stream(seeds[at : at + SEED_BYTES]).begun() for at in starts]


def _plan_and_weights(
    model: CompiledModel | Path | str, weights: Path | str | None
) -> tuple[Plan, Mapping[str, NDArray[np.int64]]]:
    if isinstance(model, str | Path):
        plan = load_plan(model)
        return plan, load_weights(weights or weights_path(model), plan)
    return model.plan, model.weights
