"""A link: one authenticated connection to a peer that carries many streams.

    reader thread   socket → decrypt → Session → inboxes; asks an idle peer for a sign of life
                    (a thread that waits for an attended stream reads in its place: reading.py)
    writer thread   queues → encrypt → socket (see sender.py)
    a thread for each stream that the peer opens with a message (see crew.py)

A stream is opened by its first frame. One that starts with a message is a request: `on_stream` gets
it. One that starts with DATA (or for which there is no `on_stream`) is one that both sides know:
it waits, for a while, until this side calls `channel()` with its id; so it does not matter which
side is first. An id is used once: frames for a closed stream are dropped.

A link ends once, for one reason; all its streams end with it. Nothing that a peer sends raises in a
thread that did not ask: it ends the stream or the link and is told to `on_error`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from mpcserve.errors import MpcError, PeerLost, PeerTimeout, Refused, WireError
from mpcserve.transport.channel import Channel
from mpcserve.transport.codec import READ_BYTES, Codec
from mpcserve.transport.crew import Crew
from mpcserve.transport.options import Counters, Hooks, LinkOptions
from mpcserve.transport.reading import Reading
from mpcserve.transport.receiver import Receiver
from mpcserve.transport.sender import Sender
from mpcserve.transport.streams import Streams
from mpcserve.transport.tls import explain
from mpcserve.wire import (
    LINK_STREAM,
    STREAM_BYTES,
    Credit,
    Event,
    Failure,
    Goodbye,
    Hello,
    Message,
    Ping,
    Session,
    State,
)

_MAX_URGENT = 1 << 10  # answers that a peer may ask for without reading them
_LINGER_S = 1.0  # how long an ended link waits for the peer to close its half
_JOIN_S = 5.0  # how long callbacks have to notice that their link has ended
_SAME_VERSION = "run the same version of mpcserve on every machine"


@dataclass(frozen=True, slots=True)
class Connected:
    """What a link is made of: a connected socket, shaken hands on."""

    sock: socket.socket
    codec: Codec
    role: str  # of this side
    peer: str  # from its certificate; empty without one
    address: str
    greets: bool  # this side says HELLO first
    admit: Callable[[Link], None]  # sees the link when its peer is known; may raise to refuse it
    counters: Counters = field(default_factory=Counters)


class Link:
    """One connection; `connect`, `Listener` and `MemoryNetwork` make them. A context manager.

    peer: the role at the other end. address: its host:port. counters: bytes so far, see `Counters`.
    """

    def __init__(self, connected: Connected, hooks: Hooks, options: LinkOptions) -> None:
        self.peer = connected.peer
        self.address = connected.address
        self.counters = connected.counters
        self.options = options
        window = options.windows.get(connected.peer, options.window)
        self.session = Session(connected.role, window, self.name)
        self.sender = Sender(
            connected.sock, connected.codec, options, self.counters, self._cannot_write
        )
        self._made_of = connected
        self._hooks = hooks
        self._streams = Streams(
            lambda stream: Channel(self, stream, self.sender.outbox()), options.max_streams
        )
        self._crew = Crew()
        self._lock = threading.Lock()
        self._reason: MpcError | None = None
        self._give_up_at = 0.0  # when an ended link closes its socket, whatever the peer does
        self._write_error: tuple[float, OSError] | None = None
        self._pinged_at = time.monotonic()
        self._opened = threading.Event()
        self._established = False
        self._tick = min(0.5, options.ping_every / 2, options.dead_after / 4)
        self.receiver = Receiver(
            connected.sock,
            connected.codec,
            self.session,
            self._streams,
            self.counters,
            options,
            self._dispatch,
            lambda stream: self._incoming(stream)[0],
            self._overrun,
            self.sender.let_codec_answer,
        )
        self.reading = Reading(self.receiver, self._tick, asked=hooks.on_stream is None)
        self._reader = threading.Thread(target=self._run, daemon=True)

    # ── for everyone ──

    @property
    def name(self) -> str:
        """Role and address, as errors name the peer."""
        return f"{self.peer or 'the peer'} at {self.address}"

    @property
    def reason(self) -> MpcError | None:
        """Why the link has ended; None while it is alive."""
        return self._reason

    @property
    def has_threads(self) -> bool:
        """Whether one of the link's threads is still there."""
        return self._reader.is_alive() or self._crew.has_threads

    def uses(self, sock: socket.socket) -> bool:
        """Whether this is its socket."""
        return self._made_of.sock is sock

    def channel(self, stream: bytes) -> Channel:
        """The stream of this id (16 random bytes), opened by this call or by the peer's frames.

        Raises: why the link has ended; Refused if the id was used before.
        """
        if len(stream) != STREAM_BYTES or stream == LINK_STREAM:
            raise Refused(
                f"stream id: expected {STREAM_BYTES} bytes, not all zero, got {len(stream)}",
                "draw it with secrets.token_bytes(16)",
            )
        if self._reason is not None:
            raise _again(self._reason)
        channel = self._streams.claim(stream)
        if channel is None:
            raise Refused(
                f"stream {stream.hex()} was used before on the link to {self.name}",
                "draw a new id for every request",
            )
        if self._reason is not None:  # it ended meanwhile, and may not have seen this channel
            self._end_stream_for(channel, self._reason)
        return channel

    def answers(self, seconds: float) -> bool:
        """Ask for a sign of life: whether one comes in so many seconds."""
        asked = time.monotonic()
        self.sender.urge(self.session.ping(bytes(8)))
        while self.receiver.heard_at <= asked and time.monotonic() < asked + seconds:
            time.sleep(0.005)
        return self.receiver.heard_at > asked

    def close(self) -> None:
        """Send what is queued, say goodbye, end, and join the link's threads."""
        error = PeerLost(f"this side closed the link to {self.name}")
        self._end(error, self.session.goodbye(), flush=self.options.close_timeout, expected=True)
        self.join()

    def join(self) -> None:
        """Wait until the link has ended and its threads are done (but for the calling one)."""
        if threading.current_thread() is not self._reader:
            self._reader.join()
        self._crew.join(_JOIN_S)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Link to {self.name}>"

    # ── for the transport ──

    def start(self) -> None:
        """Start the threads."""
        self.sender.start(f"mpcserve-writer-{self.address}")
        if self._made_of.greets:
            self.sender.greet(self.session.hello())
        self._reader.name = f"mpcserve-reader-{self.address}"
        self._reader.start()

    def wait_open(self, timeout: float) -> None:
        """Wait for the peer's HELLO. Raises: why the link ended instead; PeerTimeout."""
        if not self._opened.wait(max(0.0, timeout)):
            mute = PeerTimeout(
                f"{self.name} did not say HELLO in time", "is it an mpcserve server?"
            )
            self._end(mute, self.session.error(LINK_STREAM, mute), flush=0, linger=0)
        if self._reason is not None and not self._established:
            self.join()
            raise _again(self._reason)

    def refuse(self, error: MpcError) -> None:
        """Tell the peer why, and end the link."""
        self._end(error, self.session.error(LINK_STREAM, error), flush=0)

    def end_channel(self, channel: Channel, error: MpcError | None) -> None:
        """Close a stream from this side, with an error or without."""
        if not self._streams.remove(channel):
            return
        if error is not None:
            why, last = error, self.session.error(channel.stream, error)
        else:  # a stream that the peer never heard of, or has ended, needs no end
            why = PeerLost(f"this side closed the stream with {self.name}")
            told = channel.known_to_peer and not channel.over_there
            last = self.session.goodbye(channel.stream) if told else b""
        self.sender.end_stream(channel.out, last, _maker(why), flush=error is None)
        channel.end(_maker(why), drop=True)

    # ── the end ──

    def _end(
        self,
        reason: MpcError,
        parting: bytes,
        *,
        flush: float,
        linger: float = _LINGER_S,
        expected: bool = False,
        told: bool = False,
    ) -> None:
        """End the link for this reason, unless it has ended already.

        `expected`: no error. `told`: the reason is the peer's.
        """
        with self._lock:
            if self._reason is not None:
                return
            self._give_up_at = time.monotonic() + flush + linger
            self._reason = reason
            self.receiver.deaf = True
        self.reading.resume()
        for channel in self._streams.all():
            self._end_stream_for(channel, reason, told)
            channel.on_failure(_again(reason))
        self.sender.finish(parting, flush)
        if self._established and not expected:
            self._hooks.report(_again(reason))

    def _end_stream_for(self, channel: Channel, reason: MpcError, told: bool = False) -> None:
        self.sender.stop_stream(channel.out, _maker(reason))
        channel.end(_maker(reason), drop=False, told=told)

    def _cannot_write(self, error: OSError) -> None:
        # The peer may have said why before it closed: the reader finds out, and ends the link.
        self._write_error = (time.monotonic(), error)

    def _failed(self, error: Exception) -> None:
        doing = "on the open link" if self._established else "in the handshake"
        lost = explain(error, self.name, doing)
        self._end(lost, b"", flush=0)

    # ── the reader thread ──

    def _run(self) -> None:
        try:
            self._read()
        except OSError as error:
            self._failed(error)
        except WireError as error:
            self.refuse(error)
        except Exception as error:  # a defect here or in a callback
            self._hooks.report(error)
            self.refuse(self._defect(error))
        finally:
            self._linger()
            self._wind_up()

    def _read(self) -> None:
        """Read until the link has ended and the peer has closed its half."""
        looked_at = time.monotonic()
        self.reading.begin()  # the handshake may have read more than its own bytes
        while True:
            ended = self.reading.read() is False
            now = time.monotonic()
            if self._reason is not None and (ended or self._is_over(now)):
                return
            if ended:
                raise ConnectionResetError("it closed the connection without a goodbye")
            if now - looked_at >= self._tick:
                looked_at = now
                self._look_after(now)

    def _linger(self) -> None:
        """Read what still comes, so that closing does not reset the connection too early."""
        with contextlib.suppress(OSError):
            view = memoryview(bytearray(READ_BYTES))
            self._made_of.sock.settimeout(self._tick)
            while not self._is_over(time.monotonic()):
                with contextlib.suppress(TimeoutError):
                    if not self._made_of.sock.recv_into(view):
                        return

    def _is_over(self, now: float) -> bool:
        finished_at = self.sender.finished_at
        return now > self._give_up_at or (finished_at is not None and now > finished_at + _LINGER_S)

    def _look_after(self, now: float) -> None:
        """Once a tick: is the peer alive, does a stream wait for nobody."""
        options = self.options
        if self._reason is not None or self.session.state is State.GREETING:
            return
        silent = now - self.receiver.heard_at
        if self._write_error is not None and now > self._write_error[0] + _LINGER_S:
            raise self._write_error[1]
        if silent > options.dead_after:
            raise ConnectionAbortedError(f"it sent nothing for {silent:.0f} s")
        if now - max(self.receiver.heard_at, self._pinged_at) >= options.ping_every:
            self._pinged_at = now
            self.sender.urge(self.session.ping(bytes(8)))
        for channel in self._streams.waiting_since(now - options.unclaimed_after):
            channel.fail(
                Refused(
                    f"nobody took up stream {channel.stream.hex()} of {self.name} "
                    f"within {options.unclaimed_after:g} s",
                    "it may have failed here: see the log of this party",
                )
            )

    def _wind_up(self) -> None:
        sock = self._made_of.sock
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # wakes a writer that waits for the peer
        self.sender.finish(b"", flush=0)  # the thread that ends the link may not have come so far
        self.sender.join(_JOIN_S)
        self.sender.close()
        self.reading.close()
        self._crew.close()
        sock.close()
        reason = self._reason
        assert reason is not None
        self._opened.set()
        if self._established and self._hooks.on_closed is not None:
            self._hooks.on_closed(self, _again(reason))

    # ── events, in the reader thread ──

    def _dispatch(self, event: Event) -> None:
        if isinstance(event, Message):
            self._on_message(event)
        elif isinstance(event, Credit):
            self._on_credit(event)
        elif isinstance(event, Ping):
            self._answer(self.session.pong(event.token))
        elif isinstance(event, Hello):
            self._on_hello(event)
        elif isinstance(event, Failure | Goodbye):
            if event.stream == LINK_STREAM:
                self._on_last(event)
            else:
                self._on_stream_end(event)

    def _on_message(self, event: Message) -> None:
        channel, is_new = self._incoming(event.stream)
        if channel is None:
            return
        if not channel.inbox.put_message(event.message, event.size):
            self._overrun(channel, "sent messages that nobody read")
        elif is_new and self._hooks.on_stream is not None and self._streams.take(channel):
            if seconds := self._hooks.attends(event.message):
                self.reading.give_way(seconds)
            self._handle(channel, self._hooks.on_stream)

    def _on_credit(self, event: Credit) -> None:
        channel = self._streams.live(event.stream)
        if channel is not None and not self.sender.credit(channel.out, event.total):
            self._overrun(channel, f"claims {event.total} bytes consumed, more than were sent")

    def _on_hello(self, event: Hello) -> None:
        if self.peer and event.role != self.peer:
            raise WireError(
                f"{self.name} says HELLO as {event.role}, its certificate says {self.peer}",
                "give each party the certificate of its own role",
            )
        self.peer = event.role
        self.session.peer = self.name
        self.sender.open(event.window)
        try:
            self._made_of.admit(self)
        except MpcError as error:
            self.refuse(error)
            return
        if not self._made_of.greets:
            self.sender.greet(self.session.hello())
        self._established = True
        self._opened.set()

    def _on_last(self, event: Failure | Goodbye) -> None:
        if isinstance(event, Failure):
            self._end(event.error(self.name), b"", flush=0, told=True)
        else:
            closed = PeerLost(f"{self.name} closed the link", "see the log of that party")
            self._end(closed, b"", flush=0, expected=True)

    def _on_stream_end(self, event: Failure | Goodbye) -> None:
        channel, _ = self._incoming(event.stream)
        if channel is None:
            return
        channel.over_there = True
        if isinstance(event, Failure):
            told = _maker(event.error(self.name))
            self.sender.end_stream(channel.out, b"", told, flush=False)
            channel.end(told, drop=True, told=True)
            channel.on_failure(told())
        else:
            closed = PeerLost(f"{self.name} closed the stream", "see the log of that party")
            self._end_stream_for(channel, closed)

    def _incoming(self, stream: bytes) -> tuple[Channel | None, bool]:
        """The channel for a frame, None if it is to be dropped; and whether it is new."""
        channel = self._streams.live(stream)
        if channel is not None:
            channel.known_to_peer = True
            return channel, False
        channel, has_room = self._streams.admit(stream)
        if not has_room:
            error = Refused(
                f"{self.options.max_streams} streams are open on the link from {self.name}",
                "send fewer requests at once",
            )
            self._answer(self.session.error(stream, error))
            self._hooks.report(error)
        return channel, channel is not None

    def _overrun(self, channel: Channel, what: str) -> None:
        error = WireError(f"{self.name} {what}, on stream {channel.stream.hex()}", _SAME_VERSION)
        channel.fail(error)
        self._hooks.report(error)

    def _answer(self, frame: bytes) -> None:
        if self.sender.urge(frame) > _MAX_URGENT:
            raise WireError(f"{self.name} asks without reading the answers", _SAME_VERSION)

    # ── the threads of streams that the peer opened ──

    def _handle(self, channel: Channel, on_stream: Callable[[Channel], None]) -> None:
        try:
            self._crew.call(partial(self._serve, channel, on_stream), "mpcserve-stream")
        except RuntimeError as error:  # out of threads
            channel.fail(Refused(f"{self.session.role} is too busy: {error}", "try again later"))
            self._hooks.report(error)

    def _serve(self, channel: Channel, on_stream: Callable[[Channel], None]) -> None:
        try:
            on_stream(channel)
            channel.close()
        except MpcError as error:
            channel.fail(error)
            self._hooks.report(error)
        except Exception as error:  # a defect here: the peer learns that, not what
            channel.fail(self._defect(error))
            self._hooks.report(error)

    def _defect(self, error: Exception) -> MpcError:
        """What the peer is told: the text of an unforeseen error might hold anything."""
        return MpcError(
            f"{self.session.role} failed inside: {type(error).__name__}",
            "see the log of that party",
        )


def _again(error: MpcError) -> MpcError:
    """A new exception like this one: one instance raised in many threads grows a traceback."""
    return type(error)(error.message, error.hint)


def _maker(error: MpcError) -> Callable[[], MpcError]:
    return lambda: _again(error)
