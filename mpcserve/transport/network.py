"""Emulated networks: a line with a round-trip time and a bandwidth.

A batch of bytes handed to the line at `now` has left it at

    free = max(now, free of the batch before) + 8·bytes / bits_per_s     (one at a time)

and arrives at free + rtt/2. Batches in flight overlap, so a long line delays without costing
throughput. Applied where bytes are received, below TLS: a sender's socket is taken from no faster
than the line allows, no thread is added, and what is counted is what the wire would carry.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from types import MappingProxyType

from mpcserve.errors import ConfigError

# The line takes the next batch this long before it is free, so that a late wake-up leaves no gap.
_AHEAD_S = 0.001
# A thread that sleeps wakes up about this late: timers are coarse, and threads change over.
_LATE_S = 0.0001
_MAX_RTT_S = 10.0


@dataclass(frozen=True, slots=True)
class NetworkProfile:
    """Round-trip time in seconds and bandwidth in bits per second, each way."""

    rtt_s: float = 0.0
    bits_per_s: float = math.inf

    @property
    def is_real(self) -> bool:
        """True if nothing is emulated."""
        return self.rtt_s == 0 and math.isinf(self.bits_per_s)

    @classmethod
    def parse(cls, text: str) -> NetworkProfile:
        """`loopback` (nothing emulated), `lan`, `wan`, or `RTT_MS,MBIT`.

        Raises: ConfigError.
        """
        if text in _NAMED:
            return _NAMED[text]
        try:
            rtt_ms, mbit = (float(part) for part in text.split(","))
        except ValueError:
            rtt_ms = mbit = math.nan
        if not (0 <= rtt_ms <= 1000 * _MAX_RTT_S and mbit > 0):
            raise ConfigError(
                f"network profile: expected loopback, lan, wan or RTT_MS,MBIT, got {text[:60]!r}",
                "for example 40,100 is 40 ms round trip and 100 Mbit/s each way",
            )
        return cls(rtt_ms / 1000, mbit * 1e6)

    def __str__(self) -> str:
        if self.is_real:
            return "loopback"
        return f"{self.rtt_s * 1000:g} ms round trip, {self.bits_per_s / 1e6:g} Mbit/s"


LOOPBACK = NetworkProfile()
LAN = NetworkProfile(rtt_s=0.5e-3, bits_per_s=1e9)
WAN = NetworkProfile(rtt_s=40e-3, bits_per_s=100e6)
_NAMED = MappingProxyType({"loopback": LOOPBACK, "lan": LAN, "wan": WAN})


@dataclass(slots=True)
class Line:
    """One direction of an emulated line. It is told the time; it owns no clock."""

    profile: NetworkProfile
    _free_at: float = -math.inf
    _flying: deque[tuple[float, bytes]] = field(default_factory=deque)

    def push(self, now: float, batch: bytes) -> None:
        """Put a batch on the line."""
        self._free_at = max(now, self._free_at) + 8 * len(batch) / self.profile.bits_per_s
        self._flying.append((self._free_at + self.profile.rtt_s / 2, batch))

    def pop(self, now: float) -> bytes | None:
        """The next batch that has arrived by `now`."""
        if self._flying and self._flying[0][0] <= now + _LATE_S:
            return self._flying.popleft()[1]
        return None

    def takes(self, now: float) -> bool:
        """True if another batch may be pushed."""
        return self._free_at - _AHEAD_S <= now

    @property
    def empty(self) -> bool:
        """True if nothing is in flight."""
        return not self._flying

    def wait(self, now: float, more: bool) -> float | None:
        """Seconds until a batch arrives or, if there is `more` to send, the line takes it."""
        times = [self._flying[0][0] - _LATE_S] if self._flying else []
        if more:
            times.append(self._free_at - _AHEAD_S)
        return max(0.0, min(times) - now) if times else None


SPIN_S = 40e-6
"""Falling asleep and being woken takes about half as long."""


class Intake:
    """What a socket brings, at the time at which it would come over such a network.

    One thread reads at a time; any may interrupt it: a socket pair is its bell.
    """

    def __init__(self, sock: socket.socket, profile: NetworkProfile, size: int):
        """`size`: bytes taken at once."""
        self._sock = sock
        self._sock.settimeout(0)
        self._view = memoryview(bytearray(size))
        self._line = None if profile.is_real else Line(profile)
        self.is_real = profile.is_real  # `wait` for bytes and take them; or `read_late`
        self._ended = False
        self._bell, self._ring = socket.socketpair()
        for end in (self._bell, self._ring):
            end.settimeout(0)
        self._rings = (self._bell.fileno(), select.POLLIN)
        self._comes = select.poll()
        for end in (sock, self._bell):
            self._comes.register(end, select.POLLIN)

    def close(self) -> None:
        """Close what `interrupt` needs; the socket is its owner's."""
        self._bell.close()
        self._ring.close()

    def interrupt(self) -> None:
        """`read` returns at once: the one in progress or the next."""
        with contextlib.suppress(OSError):  # it is ringing already; or closed
            self._ring.send(b"!")

    def wait(self, seconds: float, brisk: bool = False) -> bool:
        """Whether bytes came in `seconds`; False, sooner, when interrupted.

        `brisk`: ask again for SPIN_S before falling asleep.
        """
        came = self._comes.poll(0) if brisk else []
        if brisk and not came:
            until = time.perf_counter() + SPIN_S
            while not came and time.perf_counter() < until:
                came = self._comes.poll(0)
        came = came or self._comes.poll(math.ceil(seconds * 1e3))
        if self._rings in came:
            self._bell.recv(64)
            return False
        return bool(came)

    def read(self) -> memoryview | None:
        """Bytes, valid until the next call; none at the end; None if there are none.

        Raises: OSError.
        """
        try:
            return self._view[: self._sock.recv_into(self._view)]
        except BlockingIOError:
            return None

    def read_late(self, seconds: float) -> memoryview | None:
        """The same of an emulated line: None if none came in `seconds`, or when interrupted."""
        line = self._line
        assert line is not None
        give_up = time.monotonic() + seconds
        while (now := time.monotonic()) < give_up:
            batch = line.pop(now)
            if batch is not None:
                return memoryview(batch)
            if self._ended and line.empty:
                return self._view[:0]
            takes = line.takes(now) and not self._ended
            pause = line.wait(now, not takes)
            pause = give_up - now if pause is None else min(pause, give_up - now)
            files = [self._bell, self._sock] if takes else [self._bell]
            ready = select.select(files, [], [], pause)[0]
            if self._bell in ready:
                self._bell.recv(64)
                return None
            if ready:
                got = self._sock.recv_into(self._view)
                self._ended = got == 0
                if got:
                    line.push(time.monotonic(), bytes(self._view[:got]))
        return None
