"""The sending half of a link: streams take turns, small frames go at once, large ones overlap.

A small frame, and any of an attended stream (see reading.py), is sent in its caller's thread if
nothing is queued and the socket takes it: no thread is woken. Otherwise it is queued and the link's
one writer thread encrypts and sends it. Two locks:

    _turn  the right to encrypt and write to the socket: bytes leave in the order they are encrypted
    _lock  the queues; never held while encrypting, writing or waiting for `_turn`

Queued streams take turns frame by frame, so a small message waits for one frame of each other
stream, not for a whole tensor. A stream's queue is bounded: its sender waits for room, and for the
peer's credit, as long as either moves.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from mpcserve.errors import MpcError
from mpcserve.transport.codec import Codec
from mpcserve.transport.options import Counters, LinkOptions
from mpcserve.wire import HEADER_BYTES, MAX_DATA, Buffer

Frame: TypeAlias = tuple[bytes, Buffer]  # header (or a whole frame), DATA payload (or nothing)

SMALL_BYTES = 64 << 10  # up to here encrypting takes less than waking the writer
LARGEST_BYTES = HEADER_BYTES + MAX_DATA
_BATCH_BYTES = MAX_DATA  # encrypted and written at once
JOIN_BYTES = 16 << 10  # a shorter piece shares a TLS record with its neighbours
_TICK_S = 0.5  # how often a blocked write looks whether the link has ended


class Outbox:
    """What a stream has queued, and how much it may send. Guarded by its sender's `_lock`.

    `inline`: frames up to so many bytes are sent by the thread that made them.
    """

    __slots__ = ("credited", "error", "frames", "inline", "queued", "room", "sent", "taken")

    def __init__(self, lock: threading.Lock) -> None:
        self.frames: deque[Frame] = deque()
        self.room = threading.Condition(lock)
        self.inline = SMALL_BYTES
        self.queued = 0  # bytes in `frames`
        self.sent = 0  # DATA bytes accepted since the stream began
        self.taken = 0  # of these, taken by the writer
        self.credited = 0  # of these, consumed by the peer
        self.error: Callable[[], MpcError] | None = None  # why nothing more is accepted

    def drop(self) -> None:
        """Forget what is queued."""
        self.frames.clear()
        self.queued = 0


class Sender:
    """Encrypts and writes frames; owns the writer thread and the sending side of the counters."""

    def __init__(
        self,
        sock: socket.socket,
        codec: Codec,
        options: LinkOptions,
        counters: Counters,
        on_lost: Callable[[OSError], None],
    ) -> None:
        self._codec = codec
        self._options = options
        self._counters = counters
        self._on_lost = on_lost
        # One file, two timeouts: a socket object's timeout is its own, not the descriptor's.
        self._patient = sock.dup()
        self._patient.settimeout(_TICK_S)
        sock.settimeout(0)
        self._file = sock.fileno()
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._ring: deque[Outbox] = deque()  # the streams that have frames, in turn
        self._urgent: deque[bytes] = deque()  # frames of the link itself: answers, credit, the end
        self._rest = memoryview(b"")  # encrypted, not yet taken by the socket
        self._answer = False  # the codec has something to say
        self._parting = b""  # the very last frame
        self._held = True  # until HELLO, which must be the first frame
        self._window = 0  # of the peer, per stream
        self.frame_bytes = 0  # the payload of a DATA frame: half a window always fits
        self._stopping: float | None = None  # when to give up sending what is queued
        self.finished_at: float | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, name: str) -> None:
        """Start the writer thread."""
        self._thread.name = name
        self._thread.start()

    def greet(self, hello: bytes) -> None:
        """Send HELLO, and from now on what is queued."""
        with self._lock:
            self._urgent.appendleft(hello)
            self._held = False
            self._work.notify()

    def open(self, window: int) -> None:
        """The peer's HELLO has come: a stream may have `window` DATA bytes in flight."""
        self._window = window
        self.frame_bytes = min(MAX_DATA, window // 2)

    def outbox(self) -> Outbox:
        """The queue of a new stream."""
        return Outbox(self._lock)

    # ── called by any thread ──

    def send_now(self, out: Outbox, header: bytes, payload: Buffer, after: bytes = b"") -> bool:
        """Send one frame in this thread, and what comes after it; False if it is large, or has to
        be queued.

        `payload` must not change afterwards.
        """
        size = len(payload)
        if len(header) + size + len(after) > out.inline or not self._turn.acquire(blocking=False):
            return False
        try:
            if out.error is not None or self._held or self._more or self._rest:
                return False
            if self._stopping is not None:
                return False
            if out.sent + size > out.credited + self._window:
                return False
            out.sent += size
            out.taken += size
            self._counters.payload_sent += size
            self._counters.overhead_sent += len(header) + len(after)
            if size < JOIN_BYTES:
                header, payload, after = header + payload + after, b"", b""
            elif after:
                payload = b"".join((payload, after))
            made, rest = self._codec.send(self._file, header, payload)
            self._counters.wire_sent += made
            if rest:
                self._rest = memoryview(rest)
                with self._lock:
                    self._work.notify()
            return True
        except OSError as error:
            self._on_lost(error)
            return True  # the next call raises the reason
        finally:
            self._turn.release()

    def queue(self, out: Outbox, header: bytes, payload: Buffer) -> bool:
        """Queue one frame; waits for room and credit, one thread per stream at a time.

        `payload` must not change afterwards. False after `send_timeout` without progress. Raises:
        the outbox's error.
        """
        with self._lock:
            if not self._wait_for_room(out, len(header) + len(payload), len(payload)):
                return False
            self._put(out, (header, payload))
            out.sent += len(payload)
        return True

    def end_stream(
        self, out: Outbox, last: bytes, error: Callable[[], MpcError], flush: bool
    ) -> None:
        """Send the last frame of a stream, behind what is queued or (`flush` False) instead."""
        with self._lock:
            if not flush and out.frames:
                self._ring.remove(out)
                out.drop()
        if last and self.send_now(out, last, b""):
            last = b""
        with self._lock:
            if last:
                self._put(out, (last, b""))
            self._stop_stream(out, error)

    def stop_stream(self, out: Outbox, error: Callable[[], MpcError]) -> None:
        """Accept no more on this stream; what is queued still goes."""
        with self._lock:
            self._stop_stream(out, error)

    def credit(self, out: Outbox, total: int) -> bool:
        """The peer has consumed `total` bytes. False if that many were never sent."""
        with self._lock:
            if total > out.taken:
                return False
            out.credited = max(out.credited, total)
            out.room.notify_all()
            return True

    def urge(self, frame: bytes) -> int:
        """Queue a frame of the link itself, before all streams; how many wait now."""
        with self._lock:
            self._urgent.append(frame)
            self._work.notify()
            return len(self._urgent)

    def let_codec_answer(self) -> None:
        """The codec has something to say."""
        with self._lock:
            self._answer = True
            self._work.notify()

    def finish(self, parting: bytes, flush: float) -> None:
        """Send what is queued within `flush` seconds (0: drop it), then `parting`; then end."""
        with self._lock:
            if self._stopping is not None:
                return
            self._stopping = time.monotonic() + max(flush, _TICK_S)
            if not flush:
                for out in self._ring:
                    out.drop()
                self._ring.clear()
                self._urgent.clear()
            self._parting = parting
            self._held = False
            self._work.notify()

    def join(self, timeout: float) -> None:
        """Wait for the writer thread."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def close(self) -> None:
        """Nobody sends any more, or will: the number of a closed file may soon be another's."""
        assert self._stopping is not None
        with self._turn:
            self._patient.close()

    # ── helpers, `_lock` held ──

    def _put(self, out: Outbox, frame: Frame) -> None:
        if not out.frames:
            self._ring.append(out)
        out.frames.append(frame)
        out.queued += len(frame[0]) + len(frame[1])
        self._work.notify()

    def _stop_stream(self, out: Outbox, error: Callable[[], MpcError]) -> None:
        if out.error is None:
            out.error = error
        out.room.notify_all()

    def _wait_for_room(self, out: Outbox, size: int, data: int) -> bool:
        while out.error is None and not self._has_room(out, size, data):
            before = (out.queued, out.taken, out.credited)
            moved = out.room.wait(self._options.send_timeout)
            if not moved and before == (out.queued, out.taken, out.credited):
                return False
        if out.error is not None:
            raise out.error()
        return True

    def _has_room(self, out: Outbox, size: int, data: int) -> bool:
        fits_queue = out.queued == 0 or out.queued + size <= self._options.send_queue
        return fits_queue and out.sent + data <= out.credited + self._window

    @property
    def _more(self) -> bool:
        if self._held:
            return False
        return bool(self._ring or self._urgent or self._answer or self._parting)

    def _pick(self) -> list[Frame]:
        """The next frames: the link's own, then one of each stream in turn, up to a batch."""
        batch: list[Frame] = [(frame, b"") for frame in self._urgent]
        self._urgent.clear()
        size = 0
        while self._ring and size < _BATCH_BYTES:
            out = self._ring.popleft()
            header, payload = out.frames.popleft()
            if out.frames:
                self._ring.append(out)
            out.queued -= len(header) + len(payload)
            out.taken += len(payload)
            out.room.notify_all()
            batch.append((header, payload))
            size += len(header) + len(payload)
        if self._parting and not self._ring:
            batch.append((self._parting, b""))
            self._parting = b""
        return batch

    # ── helpers, `_turn` held ──

    def _encode(self, frames: list[Frame]) -> Buffer:
        """Encrypt and count."""
        pieces: list[Buffer] = []
        small: list[Buffer] = []
        for header, payload in frames:
            small.append(header)
            self._counters.payload_sent += len(payload)
            self._counters.overhead_sent += len(header)
            if len(payload) < JOIN_BYTES:
                small.append(payload)
            else:
                pieces += (b"".join(small), payload)
                small.clear()
        if small:
            pieces.append(b"".join(small))
        batch = self._codec.encrypt(pieces)
        self._counters.wire_sent += len(batch)
        return batch

    # ── the writer thread ──

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                with self._turn:
                    self._step()
            self._patient.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._on_lost(error)
        finally:
            self.finished_at = time.monotonic()

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when all is done."""
        with self._lock:
            while True:
                if self._rest or self._more:
                    return True
                if self._stopping is not None:
                    return False
                self._work.wait()

    def _step(self) -> None:
        if self._rest:
            self._write(self._rest)
            self._rest = memoryview(b"")
            return
        with self._lock:
            self._answer = False
            frames = self._pick()
        self._write(memoryview(self._encode(frames)))

    def _write(self, batch: memoryview) -> None:
        """Write all of it. Raises: OSError, also when the link was told to end and it stalls."""
        while batch:
            try:
                batch = batch[self._patient.send(batch) :]
            except TimeoutError:
                if self._stopping is not None and time.monotonic() > self._stopping:
                    raise
