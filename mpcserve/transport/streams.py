"""The streams of a link: which are open, which wait for somebody here, which are over.

    new ── frame of the peer ──→ waiting ── on_stream, channel() ──→ open ── close, fail ──→ over
     └──────────── channel() ────────────────────────────────────────↑

Bounded: at most `max_streams` are waiting or open because of the peer; one that waits too long is
failed; of those that are over the last 16,384 ids are remembered, so that late frames are dropped
and an id is not used twice.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from mpcserve.transport.channel import Channel

_REMEMBERED = 1 << 14


class Streams:
    """The table from stream id to channel. Thread-safe."""

    def __init__(self, make: Callable[[bytes], Channel], most: int) -> None:
        self._make = make
        self._most = most
        self._lock = threading.Lock()
        self._live: dict[bytes, Channel] = {}
        self._over: OrderedDict[bytes, None] = OrderedDict()

    def live(self, stream: bytes) -> Channel | None:
        """The channel of a stream that is waiting or open."""
        return self._live.get(stream)

    def claim(self, stream: bytes) -> Channel | None:
        """The channel for somebody here, made if need be; None if the stream is over."""
        with self._lock:
            channel = self._live.get(stream)
            if channel is None:
                if stream in self._over:
                    return None
                channel = self._live[stream] = self._make(stream)
            channel.waiting_since = None
            return channel

    def admit(self, stream: bytes) -> tuple[Channel | None, bool]:
        """The channel for a frame of the peer, and whether there was room for it.

        None and True: the stream is over, drop the frame. None and False: too many are live; the
        stream is over now.
        """
        with self._lock:
            channel = self._live.get(stream)
            if channel is not None or stream in self._over:
                return channel, True
            if len(self._live) >= self._most:
                self._bury(stream)
                return None, False
            channel = self._live[stream] = self._make(stream)
            channel.waiting_since = time.monotonic()
            channel.known_to_peer = True
            return channel, True

    def take(self, channel: Channel) -> bool:
        """Claim a waiting channel. False if somebody else has."""
        with self._lock:
            was_waiting = channel.waiting_since is not None
            channel.waiting_since = None
            return was_waiting

    def remove(self, channel: Channel) -> bool:
        """The stream is over. False if it was already."""
        with self._lock:
            if self._live.pop(channel.stream, None) is None:
                return False
            self._bury(channel.stream)
            return True

    def all(self) -> list[Channel]:
        """The live channels."""
        with self._lock:
            return list(self._live.values())

    def waiting_since(self, moment: float) -> list[Channel]:
        """The channels that nobody here has claimed since before `moment`."""
        return [c for c in self.all() if c.waiting_since is not None and c.waiting_since < moment]

    @property
    def queued(self) -> int:
        """DATA bytes that have come and were not taken."""
        return sum(channel.inbox.queued for channel in self.all())

    def _bury(self, stream: bytes) -> None:
        self._over[stream] = None
        if len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)
