"""One stream of one link: DATA and messages, in the order they were sent.

The inbox is where the link's reader thread meets the thread that waits. DATA goes straight into the
buffer of a waiting `receive`; with nobody waiting it is collected in blocks, so that a peer which
sends single bytes costs no more memory than one which does not.

    the stream ended because            queued bytes and messages    then
    the peer closed it, or the link     are still delivered          PeerLost
    the peer sent an ERROR              are dropped                  the same class of error
    this side closed it                 are dropped                  PeerLost
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from mpcserve.errors import MpcError, PeerLost, PeerTimeout, WireError
from mpcserve.transport.codec import Codec, Received
from mpcserve.transport.reading import STANDBY_S
from mpcserve.transport.sender import JOIN_BYTES, LARGEST_BYTES, SMALL_BYTES, Outbox
from mpcserve.wire import Buffer

if TYPE_CHECKING:
    from mpcserve.transport.link import Link

_BLOCK = 256 << 10  # DATA that nobody waits for is collected in blocks of this size
_MAX_UNREAD_MESSAGES = 4 << 20  # bytes of JSON; DATA has its window, messages have this
_MESSAGE_COST = 256  # what an unread message costs beside its JSON
_LARGE = 16 << 10  # from here clearing memory costs more than making an array of it
_ALIVE = "check that it is alive and see its log, or raise the deadline"


class Inbox:
    """What has come and was not taken yet. Thread-safe; knows no link."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._came = threading.Condition(self._lock)
        self._items: deque[bytearray | tuple[dict[str, object], int]] = deque()
        self._start = 0  # bytes of the first block that were taken already
        self._target = memoryview(b"")  # of the waiting `receive`: what is still to be filled
        self._asleep = 0  # threads that wait for `_came`
        self._unread = 0  # cost of unread messages
        self._end: Callable[[], MpcError] | None = None
        self.told = False  # the peer said why the stream ended: it was not lost here
        self.queued = 0  # DATA bytes
        self.received = 0  # DATA bytes since the stream began
        self.consumed = 0  # of these, taken

    # ── the reader thread ──

    def put(self, chunk: memoryview) -> None:
        """DATA has come. The chunk is copied."""
        with self._lock:
            self.received += len(chunk)
            if self._target:
                taken = min(len(self._target), len(chunk))
                self._target[:taken] = chunk[:taken]
                self._target = self._target[taken:]
                self.consumed += taken
                chunk = chunk[taken:]
            if not self._target:  # filled; or nobody waits, or somebody for a message
                self._wake()
            while chunk:
                chunk = self._collect(chunk)

    def fill(self, codec: Codec, file: int, left: int, start: bytes) -> Received | None:
        """`Codec.receive` into the place that waits for DATA; None if none does."""
        with self._lock:
            if not self._target:
                return None
            got = codec.receive(file, self._target, left, start)
            if got is not None and got.filled:
                self.received += got.filled
                self.consumed += got.filled
                self._target = self._target[got.filled :]
                if not self._target:
                    self._wake()
            return got

    def put_message(self, message: dict[str, object], size: int) -> bool:
        """A message has come. False if too many are unread."""
        with self._lock:
            if self._unread > _MAX_UNREAD_MESSAGES:
                return False
            self._unread += size + _MESSAGE_COST
            self._items.append((message, size))
            self._wake()
            return True

    def end(self, error: Callable[[], MpcError], drop: bool, told: bool = False) -> None:
        """Nothing more comes; `error` makes what later receives raise. The first end counts.

        `told`: the error is the peer's own.
        """
        with self._lock:
            if drop:
                self._items.clear()
                self.queued = self._start = self._unread = 0
            if self._end is None:
                self._end, self.told = error, told
            self._wake()

    # ── the thread that waits ──

    def aim(self, target: memoryview) -> bool:
        """Fill `target` with what has come. Whether it is full; else what comes goes there too,
        until it is taken.
        """
        with self._lock:
            self._target = target
            self._fill()
            return not self._target

    def is_full(self) -> bool:
        """Whether nothing is missing of the target."""
        return not self._target

    def is_short(self) -> bool:
        """Whether the target is not full, and nothing but DATA has come."""
        return bool(self._target) and not self._items and self._end is None

    def is_bare(self) -> bool:
        """Whether nothing has come that was not taken, nor the end."""
        return not self._items and self._end is None

    def take(self, target: memoryview, deadline: float) -> int | dict[str, object]:
        """How much of `target` is full at the deadline, or sooner: all; a message if one is next.

        Raises: the error the stream ended with.
        """
        with self._lock:
            while self._target:
                if self._items or self._end is not None:
                    break
                if not self._sleep(deadline):
                    break
            count = len(target) - len(self._target)
            self._target = memoryview(b"")
            if count == len(target):
                return count
            first = self._items[0] if self._items else None
            if isinstance(first, tuple):
                return first[0]
            if self._end is not None:
                raise self._end()
            self._put_back(target, count)
            return count

    def is_message(self, deadline: float) -> bool | None:
        """Whether a message is next, and not DATA; None after the deadline.

        Raises: the error the stream ended with.
        """
        with self._lock:
            return isinstance(self._items[0], tuple) if self._comes(deadline) else None

    def take_message(self, deadline: float) -> dict[str, object] | int | None:
        """The next message; None after the deadline; a count of bytes if DATA is next.

        Raises: the error the stream ended with.
        """
        with self._lock:
            if not self._comes(deadline):
                return None
            first = self._items[0]
            if isinstance(first, bytearray):
                return len(first) - self._start
            self._items.popleft()
            self._unread -= first[1] + _MESSAGE_COST
            return first[0]

    # ── helpers, `_lock` held ──

    def _comes(self, deadline: float) -> bool:
        """Wait until something is there. Raises: the error the stream ended with."""
        while not self._items:
            if self._end is not None:
                raise self._end()
            if not self._sleep(deadline):
                return False
        return True

    def _sleep(self, deadline: float) -> bool:
        """Until something comes, or the end; False after the deadline."""
        self._asleep += 1
        try:
            return self._came.wait(deadline - time.monotonic())
        finally:
            self._asleep -= 1

    def _wake(self) -> None:
        if self._asleep:
            self._came.notify_all()

    def _collect(self, chunk: memoryview) -> memoryview:
        """Append to the last block; the part that did not fit."""
        last = self._items[-1] if self._items else None
        if not isinstance(last, bytearray) or len(last) >= _BLOCK:
            last = bytearray()
            self._items.append(last)
        taken = min(len(chunk), _BLOCK - len(last))
        last += chunk[:taken]
        self.queued += taken
        return chunk[taken:]

    def _fill(self) -> None:
        """Move queued DATA into the target."""
        while self._target and self._items and isinstance(self._items[0], bytearray):
            block = self._items[0]
            taken = min(len(self._target), len(block) - self._start)
            with memoryview(block) as view:
                self._target[:taken] = view[self._start : self._start + taken]
            self._target = self._target[taken:]
            self._start += taken
            self.queued -= taken
            self.consumed += taken
            if self._start == len(block):
                self._items.popleft()
                self._start = 0

    def _put_back(self, target: memoryview, count: int) -> None:
        """A receive that timed out takes nothing: a later one gets these bytes."""
        if count:
            block = bytearray(target[:count])
            self._items.appendleft(block)
            self.queued += count


class Channel:
    """One stream of a link: `Link.channel` or the `on_stream` callback gives one.

    `on_failure` is told when the peer failed the stream or the link ended, by any thread.
    One thread may send while another receives; messages and DATA arrive in the order in which they
    were sent, and must be taken in that order. A context manager: it closes the stream on leaving,
    and fails it when left by an MpcError.
    """

    def __init__(self, link: Link, stream: bytes, out: Outbox) -> None:
        self.link = link
        self.stream = stream
        self.start = link.session.data_header(stream, 1)  # like that of any frame of DATA
        self.payload_sent = 0
        self.inbox = Inbox()
        self.out = out
        self.waiting_since: float | None = None  # opened by the peer, claimed by nobody here yet
        self.known_to_peer = False
        self.over_there = False  # the peer has ended it
        self.on_failure: Callable[[MpcError], object] = lambda error: None
        self._ahead: memoryview | None = None  # of the next `receive`
        self._sending = threading.Lock()
        self._crediting = threading.Lock()
        self._credited = 0

    @property
    def peer(self) -> str:
        """The role at the other end."""
        return self.link.peer

    @property
    def payload_received(self) -> int:
        """DATA bytes that have come on this stream."""
        return self.inbox.received

    def send(self, data: Buffer, fresh: bool = False) -> None:
        """Send DATA: any C-contiguous buffer, copied unless it is `bytes` or `fresh`: yours alone.

        Returns when sent or queued; waits while more than `send_queue` is queued or the peer is a
        window behind. Raises: PeerTimeout, PeerLost, or what the peer ended the stream with.
        """
        view = memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")
        mine = fresh or isinstance(view.obj, bytes)
        step, size = self.link.sender.frame_bytes, len(view)
        with self._sending:
            for at in range(0, size, step):
                piece = view[at : at + step] if size > step else view
                header = self.link.session.data_header(self.stream, len(piece))
                self.payload_sent += len(piece)
                self._send(header, piece if mine else bytes(piece))

    def receive(self, n: int, what: str, timeout: float) -> memoryview:
        """Exactly n DATA bytes, in a buffer of their own; `what` names them in errors.

        Raises: PeerTimeout (the bytes that came stay), PeerLost, WireError if a message is next, or
        what the peer ended the stream with.
        """
        started = time.monotonic()
        target, self._ahead = self._ahead, None
        try:
            if target is None:
                target = _buffer(n)
                full = self.inbox.aim(target)
            else:
                assert len(target) == n
                full = self.inbox.is_full()
            self.grant_credit()
            if full:
                return target
            inbox, until = self.inbox, started + timeout
            self.link.reading.wait_for(self, inbox.is_short, until)
            if inbox.is_full():
                got = inbox.take(target, until)
            else:  # the link's reader reads
                with self.link.reading.relied_on():
                    got = inbox.take(target, until)
        except PeerLost as error:
            raise self._lost(error, what, started) from None
        if got == n:
            return target
        if isinstance(got, int):
            raise self._late(what, timeout, f": {got} of {n} bytes came")
        raise WireError(
            f"{self.link.name}: expected {n} bytes ({what}), got a message",
            "run the same version of mpcserve on every machine",
        )

    def expect(self, n: int) -> None:
        """Say that `receive` asks for n bytes next: what comes until then is put in its place."""
        self._ahead = _buffer(n)
        self.inbox.aim(self._ahead)

    @contextmanager
    def attended(self, standby: float = STANDBY_S, brisk: bool = False) -> Iterator[None]:
        """While this lasts this thread reads and writes the socket itself: none is woken for it.

        `standby`: seconds for which nobody may read, while this thread does other things. `brisk`:
        the peer does the same as this side, so what it sends is due about when it is waited for.
        """
        self.out.inline = LARGEST_BYTES
        try:
            with self.link.reading.attended(self, standby, brisk):
                yield
        finally:
            self.out.inline = SMALL_BYTES

    def expect_to_attend(self) -> None:
        """This thread is about to attend the stream, and has something else to wait for before."""
        self.link.reading.expected()

    def glance(self) -> None:
        """Of an attended stream: read what has come, between two pieces of other work."""
        self.link.reading.glance(self)

    def send_message(self, message: Mapping[str, object], data: Buffer = b"") -> None:
        """Send a JSON object, after all DATA sent before; `data`, yours alone, follows it in the
        same packet if it fits one. Raises: as `send`."""
        frames, room = self.link.session.message(self.stream, message), self.link.sender.frame_bytes
        along = data if len(data) <= room else b""
        with self._sending:
            if along:
                frames += self.link.session.data_header(self.stream, len(along))
                self.payload_sent += len(along)
            self._send(frames, along)
        if not along:
            self.send(data, fresh=True)

    def finish(self, message: Mapping[str, object], data: Buffer = b"") -> None:
        """The last words on a stream: `data`, yours alone, a JSON object, and the end; in one
        packet if they fit one. Raises: as `send`."""
        session = self.link.session
        frames = session.message(self.stream, message) + session.goodbye(self.stream)
        if len(data) >= JOIN_BYTES:
            self.send(data, fresh=True)
            data = b""
        with self._sending:
            if data:
                self.payload_sent += len(data)
                self._send(session.data_header(self.stream, len(data)), data, frames)
            else:
                self._send(frames, b"")
        self.over_there = True  # as soon as this has come
        self.close()

    def receive_message(self, what: str, timeout: float) -> dict[str, object]:
        """The next message. Raises: as `receive`; WireError if DATA is next."""
        started = time.monotonic()
        try:
            with self._reading(self.inbox.is_bare, started + timeout):
                got = self.inbox.take_message(started + timeout)
        except PeerLost as error:
            raise self._lost(error, what, started) from None
        if isinstance(got, dict):
            return got
        if got is None:
            raise self._late(what, timeout, "")
        raise WireError(
            f"{self.link.name}: expected a message ({what}), got {got} bytes of DATA or more",
            "run the same version of mpcserve on every machine",
        )

    def message_is_next(self, what: str, timeout: float) -> bool:
        """Whether what comes next, and stays, is a message, and not DATA. Raises: as `receive`."""
        started = time.monotonic()
        try:
            with self._reading(self.inbox.is_bare, started + timeout):
                got = self.inbox.is_message(started + timeout)
        except PeerLost as error:
            raise self._lost(error, what, started) from None
        if got is None:
            raise self._late(what, timeout, "")
        return got

    def fail(self, error: MpcError) -> None:
        """Tell the peer that this stream failed, and how; drop what is queued; close."""
        self.link.end_channel(self, error)

    def close(self) -> None:
        """End the stream: what is queued still goes, what has come is dropped.

        Whatever the peer sends from now on is dropped too, and raises PeerLost there once it knows.
        """
        self.link.end_channel(self, None)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, MpcError):
            self.fail(error)
        else:
            self.close()

    def __repr__(self) -> str:
        return f"<Channel {self.stream.hex()[:8]} with {self.link.name}>"

    def end(self, error: Callable[[], MpcError], drop: bool, told: bool = False) -> None:
        """Nothing more comes, see `Inbox.end`; whoever waits for it is woken, wherever it waits."""
        self.inbox.end(error, drop, told)
        self.link.reading.look_up(self)

    def grant_credit(self) -> None:
        """Tell the peer when a quarter of the window was consumed."""
        step = self.link.session.window // 4
        if self.inbox.consumed - self._credited < step:
            return  # `_credited` only grows: another thread may be about to, at worst
        with self._crediting:
            consumed = self.inbox.consumed
            if consumed - self._credited < step:
                return
            self._credited = consumed
        self.link.sender.urge(self.link.session.credit(self.stream, consumed))

    def _reading(
        self, wants: Callable[[], bool], deadline: float
    ) -> AbstractContextManager[object]:
        """Read while the inbox `wants` something; if it still does, the link's reader reads."""
        self.link.reading.wait_for(self, wants, deadline)
        return self.link.reading.relied_on() if wants() else nullcontext()

    def _send(self, header: bytes, payload: Buffer, after: bytes = b"") -> None:
        self.known_to_peer = True
        sender, out = self.link.sender, self.out
        if sender.send_now(out, header, payload, after):
            return
        with self.link.reading.relied_on():  # the peer may wait for room, too: for us to read
            queued = sender.queue(out, header, payload)
            if queued and after:
                queued = sender.queue(out, after, b"")
        if not queued:
            seconds = self.link.options.send_timeout
            raise PeerTimeout(
                f"{self.link.name} took nothing for {seconds:g} s while we were sending "
                f"({self.payload_sent} bytes on this stream, {self.out.credited} consumed)",
                _ALIVE,
            )

    def _late(self, what: str, timeout: float, came: str) -> PeerTimeout:
        return PeerTimeout(f"waited {timeout:g} s for {what} from {self.link.name}{came}", _ALIVE)

    def _lost(self, error: PeerLost, what: str, started: float) -> PeerLost:
        if self.inbox.told:
            return error
        waited = time.monotonic() - started
        return PeerLost(f"{error.message}, after {waited:.1f} s of waiting for {what}", error.hint)


def _buffer(n: int) -> memoryview:
    """Memory to receive into; numpy asks for huge pages, as faulting small ones in can take as long
    as decrypting."""
    return np.empty(n, np.uint8).data if n >= _LARGE else memoryview(bytearray(n))
