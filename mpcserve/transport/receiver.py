"""The receiving half of a link: what the socket brings, decrypted, in frames, to the inboxes.

One thread at a time (see reading.py). DATA that somebody waits for on a real network goes from the
socket straight to its place, in compiled code; all else by way of the session, frame by frame.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from mpcserve.transport.channel import Channel
from mpcserve.transport.codec import READ_BYTES, Codec
from mpcserve.transport.network import Intake
from mpcserve.transport.options import Counters, LinkOptions
from mpcserve.transport.streams import Streams
from mpcserve.wire import HEADER_BYTES, Data, Event, Session


class Receiver:
    """Reads a socket and hands on what has come.

    `dispatch` is given every event but DATA, and the answers that it says the codec has.
    """

    def __init__(
        self,
        sock: socket.socket,
        codec: Codec,
        session: Session,
        streams: Streams,
        counters: Counters,
        options: LinkOptions,
        dispatch: Callable[[Event], None],
        incoming: Callable[[bytes], Channel | None],
        overrun: Callable[[Channel, str], None],
        answer: Callable[[], None],
    ) -> None:
        self.heard_at = time.monotonic()
        self.deaf = False  # the link has ended: reading only keeps its closing from resetting it
        self._file = sock.fileno()
        self._intake = Intake(sock, options.network, READ_BYTES)
        self._codec, self._session, self._streams = codec, session, streams
        self._counters, self._options = counters, options
        self._dispatch, self._incoming = dispatch, incoming
        self._overrun, self._answer = overrun, answer

    def read(self, seconds: float, brisk: bool = False) -> int | None:
        """How many wire bytes came, 0 at the end; None if none came in `seconds`, or sooner when
        interrupted. `brisk`: they are due any moment.

        Raises: OSError, WireError.
        """
        intake = self._intake
        if not intake.is_real:
            return self._take(intake.read_late(seconds))
        # A bell that rings is for who waits.
        if seconds and not intake.wait(seconds, brisk):
            return None
        if not self.deaf:
            come = self._receive()
            if come > 0 or (come < 0 and not seconds):
                return come if come > 0 else None
        return self._take(intake.read())

    def interrupt(self) -> None:
        """The `read` in progress, or the next, waits no longer."""
        self._intake.interrupt()

    def close(self) -> None:
        """Nobody reads any more."""
        self._intake.close()

    def hand_on(self, received: memoryview = memoryview(b"")) -> None:  # noqa: B008  immutable
        """What has come, and what came with the handshake."""
        for plain in self._codec.decrypt(received):
            self._counters.overhead_received += len(plain)
            for event in self._session.receive(plain):
                if isinstance(event, Data):
                    self._on_data(event)
                else:
                    self._dispatch(event)
                if self.deaf:
                    return
        if self._codec.answers:
            self._answer()

    def _take(self, received: memoryview | None) -> int | None:
        if received is None:
            return None
        self._count(len(received))
        if received and not self.deaf:
            self.hand_on(received)
        return len(received)

    def _count(self, come: int) -> None:
        self.heard_at = time.monotonic()
        self._counters.wire_received += come

    def _receive(self) -> int:
        """Take what the socket has, DATA to where it is waited for: how many wire bytes came.

        0: read in another way, nothing was done; −1: there is nothing, or an error.
        """
        stream, left = self._session.under_way
        channel = self._streams.live(stream)
        if channel is None:
            return 0
        got = channel.inbox.fill(self._codec, self._file, left, channel.start)
        if got is None or got.come <= 0:
            return 0 if got is None or got.come == 0 else -1
        self._count(got.come)
        self._counters.payload_received += got.filled
        self._counters.overhead_received += HEADER_BYTES * got.headers
        self._session.went_by(got.left)
        channel.grant_credit()
        if got.more:
            self.hand_on()
        elif self._codec.answers:
            self._answer()
        return got.come

    def _on_data(self, event: Data) -> None:
        size = len(event.chunk)
        self._counters.payload_received += size
        self._counters.overhead_received -= size
        channel = self._incoming(event.stream)
        if channel is None:
            return
        inbox = channel.inbox
        if inbox.received - inbox.consumed + size > self._session.window:
            limit = f"its window of {self._session.window} bytes"
        elif inbox.queued and self._streams.queued + size > self._options.receive_queue:
            limit = f"the link's receive queue of {self._options.receive_queue} bytes"
        else:
            inbox.put(event.chunk)
            channel.grant_credit()
            return
        self._overrun(channel, f"exceeded {limit}")
