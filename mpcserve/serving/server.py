"""What every server does with a request: who may ask for it, in its own thread, until it ends.

alice, bob and carol each add their routes. A failure ends its request, on all sides, and nothing
else: the error goes back on the stream it came from, and the server goes on.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mpcserve.config import Config
from mpcserve.errors import MpcError, PeerLost, PeerTimeout, Refused, WireError
from mpcserve.serving.deployment import Store
from mpcserve.serving.links import Links, Wiring
from mpcserve.serving.log import log, named_error
from mpcserve.serving.request import Deadline, Message, Request
from mpcserve.transport import Channel, Hooks, Link, Listener
from mpcserve.version import __version__

OWNERS = ("model-owner", "data-owner")

DECISION_S = 86400.0
"""How long a follower waits for alice's word: until the link ends, for she says yes or no."""

_REPORTED = ("infer", "deploy")
"""Requests that the health numbers count."""


@dataclass(frozen=True, slots=True)
class Route:
    """Which certificates may make a request, and what is done.

    `attends`: within so many seconds its link is attended (see `transport.reading`).
    """

    roles: tuple[str, ...]
    handle: Callable[[Request], None]
    attends: float = 0.0


class Server(ABC):
    """One role, from start to close. `peers` are the other servers it needs to be ready."""

    peers: tuple[str, ...] = ()
    connects_to: tuple[str, ...] = ()
    accepts: tuple[str, ...] = ()

    def __init__(self, wiring: Wiring) -> None:
        self.config: Config = wiring.config
        self.deadlines = wiring.config.deadlines
        self.role = wiring.role
        self.links = Links(wiring, self.peers)
        self.store = Store(wiring.config.state / wiring.role / "deployments")
        self.listener: Listener | None = None
        self._wiring = wiring
        self._hooks = Hooks(self._on_stream, self._on_error, self._on_closed, self._attends)
        self._routes = {**self.routes(), "stats": Route(OWNERS, self._stats)}
        self._started = time.time()
        self._changing = threading.Lock()
        self._quiet = threading.Condition()
        self._running = self._served = self._failed = 0
        self._stopping = False

    @abstractmethod
    def routes(self) -> Mapping[str, Route]:
        """Type of request → who may make it and what is done."""

    def start(self) -> None:
        """Listen, and connect. Raises: ConfigError, such as a port in use."""
        if self.accepts:
            self.listener = self._wiring.listen(self._hooks, self._on_link, self.accepts)
        for peer in self.connects_to:
            self.links.keep(peer, self._hooks)

    def drain(self, seconds: float) -> bool:
        """Take no more requests of owners; wait for those that run. Whether all came to an end."""
        with self._quiet:
            self._stopping = True
            return self._quiet.wait_for(lambda: self._running == 0, seconds)

    def close(self) -> None:
        """End all links."""
        self._stopping = True
        self.links.close()
        if self.listener is not None:
            self.listener.close()

    def health(self) -> dict[str, Any]:
        """Plain numbers about this server, for whoever watches it."""
        with self._quiet:
            requests = {
                "running": self._running,
                "served": self._served,
                "failed": self._failed,
            }
        return {
            "role": self.role,
            "version": __version__,
            "uptime_seconds": time.time() - self._started,
            "peers": self.links.up(),
            "deployments": sorted(d.name for d in self.store),
            "requests": requests,
        }

    @contextmanager
    def one_change(self, timeout: float) -> Iterator[None]:
        """One deployment at a time is staged, committed or settled. Raises: PeerTimeout."""
        if not self._changing.acquire(timeout=timeout):
            raise PeerTimeout(
                f"another deployment has not ended in {timeout:.1f} s", "try again later"
            )
        try:
            yield
        finally:
            self._changing.release()

    @contextmanager
    def up_to_alice(self, alice: Channel, deployment: bytes) -> Iterator[None]:
        """Run the block, in which a staged deployment waits for her word, and discard it if she
        says no. If she is gone it stays: she says when she is connected again.
        """
        try:
            yield
        except Exception:
            if alice.link.reason is None:
                self.store.discard(deployment)
            raise

    def on_linked(self, link: Link) -> None:
        """A peer has connected to this server, in a thread of its own."""
        self.links.put(link)

    def on_lost(self, link: Link) -> None:  # noqa: B027  a server may have nothing to do then
        """A link has ended."""

    def _stats(self, request: Request) -> None:
        request.channel.send_message({"type": "stats", **self.health()})

    def _on_link(self, link: Link) -> None:
        if link.peer in self.peers:
            threading.Thread(target=self._greet, args=(link,), daemon=True).start()

    def _greet(self, link: Link) -> None:
        try:
            self.on_linked(link)
        except Exception as e:
            error = named_error(e)
            log.warning("%s: %s", link.name, error)
            link.refuse(error)

    def _on_closed(self, link: Link, reason: MpcError) -> None:
        if link.peer in self.peers:
            if not self._stopping:
                log.info("link to %s ended: %s", link.name, reason)
            self.links.drop(link)
            self.on_lost(link)

    def _on_error(self, error: Exception) -> None:
        if not self._stopping:
            log.warning("%s", named_error(error))

    def _on_stream(self, channel: Channel) -> None:
        """One request, from its first message to its end."""
        kind, began = "request", time.monotonic()
        try:
            fields = channel.receive_message("a request", self.deadlines.handshake)
            route = self._route(str(fields.get("type")), channel.peer)
            kind = str(fields["type"])
            request = Request(
                channel, Message(fields, channel.peer), Deadline(self.deadlines.request)
            )
            with self._counted(kind in _REPORTED):
                route.handle(request)
        except Exception as e:
            error = named_error(e)
            if not (self._stopping and isinstance(error, PeerLost)):
                log.warning("%s %s of %s: %s", kind, _short(channel), channel.peer, error)
            channel.fail(error)
            return
        log.debug(
            "%s %s of %s: done in %.3f s",
            kind,
            _short(channel),
            channel.peer,
            time.monotonic() - began,
        )

    def _attends(self, message: Mapping[str, object]) -> float:
        route = self._routes.get(str(message.get("type")))
        return route.attends if route else 0.0

    def _route(self, kind: str, peer: str) -> Route:
        route = self._routes.get(kind)
        if route is None:
            raise WireError(
                f"{self.role} knows no request {kind[:32]!r}",
                "run the same version of mpcserve on every machine",
            )
        if peer not in route.roles:
            raise Refused(
                f"{kind} is for {_either(route.roles)}, this certificate is {peer}'s",
                f"use the certificate of {_either(route.roles)}",
            )
        if self._stopping and peer in OWNERS:
            raise Refused(f"{self.role} is shutting down", "try again when it has been restarted")
        return route

    @contextmanager
    def _counted(self, reported: bool) -> Iterator[None]:
        """Count a request while it runs, and how it ended."""
        with self._quiet:
            self._running += 1
        served = False
        try:
            yield
            served = True
        finally:
            with self._quiet:
                self._running -= 1
                self._served += reported and served
                self._failed += reported and not served
                self._quiet.notify_all()


def _short(channel: Channel) -> str:
    return channel.stream.hex()[:8]


def _either(roles: Collection[str]) -> str:
    return " or ".join(roles)
