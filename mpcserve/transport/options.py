"""What a link is made with: its limits, its callbacks, its addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mpcserve.config import Address, parse_address
from mpcserve.errors import ConfigError, MpcError
from mpcserve.transport.network import LOOPBACK, NetworkProfile

if TYPE_CHECKING:
    from mpcserve.transport.channel import Channel
    from mpcserve.transport.link import Link


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """Limits and deadlines of a link; seconds and bytes.

    A dead peer is noticed after `dead_after` of silence: an idle link is asked for a sign of life
    every `ping_every`. Memory is bounded by `send_queue` per stream on the sending side, and on the
    receiving side by `window` per stream (the sender waits: it is flow control, not loss), for some
    peers by another one in `windows`, and by `receive_queue` per link (a stream that would exceed
    it fails).
    """

    network: NetworkProfile = LOOPBACK
    handshake_timeout: float = 10.0  # of a peer that has connected to a listener
    send_timeout: float = 60.0  # of a send that makes no progress
    close_timeout: float = 5.0  # of what is still queued when the link is closed
    ping_every: float = 5.0
    dead_after: float = 15.0
    send_queue: int = 32 << 20
    window: int = 1 << 30
    windows: Mapping[str, int] = field(default_factory=dict)
    receive_queue: int = 4 << 30
    max_streams: int = 256  # open at once on a link
    unclaimed_after: float = 60.0  # a stream that starts with DATA waits for its `channel()`


@dataclass(frozen=True, slots=True)
class Hooks:
    """Callbacks of a link, run in its threads.

    on_stream: a stream that the peer opened with a message, in a fresh thread; the stream is closed
        when it returns and failed when it raises.
    on_error: every error of the peer or of a callback that nobody is waiting for; for the log.
    on_closed: once, with the reason, when an established link has ended.
    attends: seconds within which `on_stream` attends this stream, which begins with that message,
        or another of its link; 0: it may not. Quick: the thread that reads asks.
    """

    on_stream: Callable[[Channel], None] | None = None
    on_error: Callable[[Exception], None] | None = None
    on_closed: Callable[[Link, MpcError], None] | None = None
    attends: Callable[[Mapping[str, object]], float] = lambda message: 0.0

    def report(self, error: Exception) -> None:
        """Hand an error to `on_error`."""
        if self.on_error is not None:
            self.on_error(error)


@dataclass(slots=True)
class Counters:
    """Bytes of one link since it was made, counted as they are handed to the socket.

    payload: DATA. overhead: frame headers and all other frames. wire: what TCP carries, TLS and its
    handshake included.
    """

    payload_sent: int = 0
    payload_received: int = 0
    overhead_sent: int = 0
    overhead_received: int = 0
    wire_sent: int = 0
    wire_received: int = 0


def address_of(text: str) -> Address:
    """`host:port` or `[ipv6]:port`. Raises: ConfigError."""
    try:
        return parse_address(text)
    except ValueError:
        raise ConfigError(
            f"address: expected host:port, got {text[:80]!r}", "for example 127.0.0.1:9701"
        ) from None


def check_plaintext(address: Address) -> None:
    """Plain TCP never leaves the machine. Raises: ConfigError."""
    if not address.is_loopback:
        raise ConfigError(
            f"plain TCP is for loopback addresses only, got {address}",
            "use TLS (`mpcserve keys init`), or listen on 127.0.0.1",
        )
