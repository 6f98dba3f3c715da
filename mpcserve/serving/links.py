"""The links to the other servers, as they come and go.

bob connects to alice, carol to both; whoever connects tries again for ever, with growing pauses, so
a restarted server is picked up by all. A new link from a peer takes the place of the old one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from mpcserve.config import Config
from mpcserve.errors import ConfigError, MpcError, PeerLost
from mpcserve.serving.keys import key_files
from mpcserve.serving.log import log
from mpcserve.transport import (
    LOOPBACK,
    Hooks,
    Link,
    LinkOptions,
    Listener,
    NetworkProfile,
    TlsFiles,
    connect,
)

PAUSES = (0.05, 3.0)
"""Seconds between attempts to connect: first, and at most."""

DEALT_WINDOW = 64 << 20
"""Bytes that carol may be ahead of whoever prepares a bundle of them. Two servers that send each
other a round at once need room for all of it; she only sends."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """How one party reaches the others: its keys, its deadlines, an emulated network if any."""

    config: Config
    role: str
    network: NetworkProfile = LOOPBACK
    insecure_plaintext: bool = False

    def listen(
        self, hooks: Hooks, on_link: Callable[[Link], None], accept: Collection[str]
    ) -> Listener:
        """Listen on this role's address. Raises: ConfigError."""
        return Listener(
            str(self.config.servers.address(self.role)),
            self._tls(),
            on_link,
            role=self.role,
            accept_roles=accept,
            on_stream=hooks.on_stream,
            on_error=hooks.on_error,
            on_closed=hooks.on_closed,
            attends=hooks.attends,
            insecure_plaintext=self.insecure_plaintext,
            options=self._options(),
        )

    def connect(self, peer: str, hooks: Hooks) -> Link:
        """Connect to alice or bob. Raises: ConfigError, PeerError, Refused."""
        return connect(
            str(self.config.servers.address(peer)),
            self._tls(),
            peer,
            self.config.deadlines.connect,
            role=self.role,
            on_stream=hooks.on_stream,
            on_error=hooks.on_error,
            on_closed=hooks.on_closed,
            attends=hooks.attends,
            insecure_plaintext=self.insecure_plaintext,
            options=self._options(),
        )

    def _tls(self) -> TlsFiles | None:
        if self.insecure_plaintext:
            return None
        files = key_files(self.config.keys, self.role)
        return TlsFiles(files.ca, files.certificate, files.key)

    def _options(self) -> LinkOptions:
        deadlines, limits = self.config.deadlines, self.config.limits
        return LinkOptions(
            network=self.network,
            handshake_timeout=deadlines.handshake,
            send_timeout=deadlines.round,
            windows={"carol": DEALT_WINDOW},
            max_streams=256 + 2 * (limits.requests + limits.queue),
        )


class Links:
    """The current link to each other server."""

    def __init__(self, wiring: Wiring, peers: Collection[str]) -> None:
        self._wiring = wiring
        self._peers = tuple(peers)
        self._links: dict[str, Link] = {}
        self._wrong: ConfigError | None = None
        self._changed = threading.Condition()
        self._closed = threading.Event()

    def get(self, peer: str) -> Link:
        """The link to `peer`. Raises: PeerLost when there is none."""
        with self._changed:
            link = self._links.get(peer)
        if link is None or link.reason is not None:
            raise PeerLost(
                f"{self._where(peer)} is not connected to {self._wiring.role}",
                f"start it, or see its log: `mpcserve party --role {peer}`",
            )
        return link

    def up(self) -> dict[str, bool]:
        """Whether each peer is connected."""
        with self._changed:
            return {p: p in self._links for p in self._peers}

    def put(self, link: Link) -> None:
        """`link` is the one to its peer from now on."""
        with self._changed:
            old = self._links.get(link.peer)
            self._links[link.peer] = link
            self._changed.notify_all()
        log.info("connected to %s", link.name)
        if old is not None:
            old.refuse(PeerLost(f"a new link from {link.peer} took the place of this one"))
        if link.reason is not None:
            self.drop(link)

    def drop(self, link: Link) -> None:
        """`link` has ended."""
        with self._changed:
            if self._links.get(link.peer) is link:
                del self._links[link.peer]
                self._changed.notify_all()

    def keep(self, peer: str, hooks: Hooks) -> None:
        """Connect to `peer`, and again whenever the link ends, in a thread of its own."""
        threading.Thread(
            target=self._keep, args=(peer, hooks), name=f"mpcserve-keep-{peer}", daemon=True
        ).start()

    def wait_up(self, stop: threading.Event) -> bool:
        """Wait until all peers are connected; False if told to stop before. Raises: ConfigError."""
        said_at = time.monotonic()
        while not stop.is_set():
            with self._changed:
                if self._wrong is not None:
                    raise self._wrong
                missing = [p for p in self._peers if p not in self._links]
                if not missing:
                    return True
                self._changed.wait(0.2)
            if time.monotonic() - said_at > 10:
                said_at = time.monotonic()
                log.info("waiting for %s", " and ".join(map(self._where, missing)))
        return False

    def close(self) -> None:
        """Close all links and connect no more."""
        self._closed.set()
        with self._changed:
            links = list(self._links.values())
            self._changed.notify_all()
        for link in links:
            link.close()

    def _keep(self, peer: str, hooks: Hooks) -> None:
        pause, said = PAUSES[0], ""
        while not self._closed.is_set():
            try:
                link = self._wiring.connect(peer, hooks)
            except MpcError as error:
                if error.message != said:
                    said = error.message
                    log.info("cannot reach %s yet: %s", peer, said)
                if isinstance(error, ConfigError):
                    self._give_up(error)
                self._closed.wait(pause)
                pause = min(2 * pause, PAUSES[1])
                continue
            pause, said = PAUSES[0], ""
            self.put(link)
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed.is_set() or self._links.get(peer) is not link  # noqa: B023
                )

    def _give_up(self, error: ConfigError) -> None:
        """Who waits for the first links is told; a server that runs goes on trying."""
        with self._changed:
            self._wrong = error
            self._changed.notify_all()

    def _where(self, peer: str) -> str:
        return peer if peer == "carol" else f"{peer} at {self._wiring.config.servers.address(peer)}"
