"""Three servers as processes of this machine.

They end when told to (SIGTERM), and also when this process ends in any way whatever: each watches
its standard input, whose other end only this process holds.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import mpcserve
from mpcserve.errors import ConfigError, PeerLost, PeerTimeout

Listen = Callable[[str, str], None]
"""Called with (role, line) for every line that a server writes to stderr."""

KEPT_LINES = 20
"""Of each server's stderr, to say why it ended."""


class ServerProcess:
    """One process in one role."""

    def __init__(
        self,
        role: str,
        config: Path,
        arguments: Sequence[str] = (),
        listen: Listen = lambda role, line: None,
        cores: Collection[int] = (),
    ) -> None:
        """Start it, on these cores; on any if none are given."""
        command = [sys.executable, "-m", "mpcserve", "party", "--role", role, "--while-stdin"]
        self.role = role
        self.ready = threading.Event()
        self.ended = threading.Event()
        self._last: deque[str] = deque(maxlen=KEPT_LINES)
        self._listen = listen
        # Its own session: Ctrl-C reaches only us, and we stop all three in order. `-m` looks in the
        # working directory first, so that is where this very package lies.
        self.process = subprocess.Popen(
            [*command, "--config", str(config.resolve()), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=Path(mpcserve.__file__).parent.parent,
            start_new_session=True,
        )
        streams = (self.process.stdout, self.process.stderr)
        readers = (self._read_stdout, self._read_stderr)
        self._threads = [
            threading.Thread(target=read, args=(stream,), daemon=True)
            for read, stream in zip(readers, streams, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        if cores:
            with suppress(ProcessLookupError):  # it has ended: `await_ready` says so
                os.sched_setaffinity(self.process.pid, cores)

    def await_ready(self, deadline: float) -> None:
        """Wait for `ready`. Raises: PeerLost with what the server said last, PeerTimeout."""
        if not self.ready.wait(max(deadline - time.monotonic(), 0)):
            raise PeerTimeout(
                f"{self.role} was not ready in time; it said: {self._said()}",
                "run `mpcserve party` by hand to see what it waits for",
            )
        if self.ended.is_set():
            status = self.process.wait()
            raise PeerLost(
                f"{self.role} ended with status {status} before it was ready: {self._said()}",
                "mend what it names and start again",
            )

    def ask_to_stop(self) -> None:
        """SIGTERM: it drains and exits."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def stop(self, deadline: float) -> int:
        """Wait until the deadline, then kill; the exit status."""
        try:
            status = self.process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        for thread in self._threads:
            thread.join()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return status

    def _read_stdout(self, stream: IO[str]) -> None:
        for line in stream:
            if line.strip() == "ready":
                self.ready.set()
        self.ended.set()
        self.ready.set()

    def _read_stderr(self, stream: IO[str]) -> None:
        for line in stream:
            self._last.append(line.rstrip("\n"))
            self._listen(self.role, line.rstrip("\n"))

    def _said(self) -> str:
        self._threads[1].join(0.5 if self.ended.is_set() else 0)
        lines = [line for line in self._last if "error:" in line] or list(self._last)
        return lines[-1].strip() if lines else "(nothing)"


def stop_all(servers: Sequence[ServerProcess], drain: float) -> list[int]:
    """Ask all to stop at once, then wait; exit statuses."""
    deadline = time.monotonic() + drain
    for server in servers:
        server.ask_to_stop()
    return [server.stop(deadline) for server in servers]


@contextmanager
def reserved_ports(count: int, host: str = "127.0.0.1") -> Iterator[list[int]]:
    """Different ports of `host` that nobody listens on. Raises: ConfigError.

    On Linux nobody else is given them while the block runs: a socket that is bound but never
    listens keeps a number, and lets a server that allows reuse, as ours do, listen beside it.
    """
    with ExitStack() as stack:
        try:
            sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
            for s in sockets:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                s.bind((host, 0))
        except OSError as e:
            raise ConfigError(
                f"no free port on {host}: {e.strerror}", "is the loopback interface up?"
            ) from None
        ports = [s.getsockname()[1] for s in sockets]
        if sys.platform != "linux":
            stack.close()
        yield ports
