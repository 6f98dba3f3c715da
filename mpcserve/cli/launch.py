"""Three servers as processes of this machine, for `up`, `demo` and `bench`.

They end when told to (SIGTERM), and also when this process ends in any way whatever: each watches
its standard input, whose other end only this process holds.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import mpcserve
from mpcserve.config import SERVER_ROLES
from mpcserve.errors import ConfigError, PeerLost, PeerTimeout

Listen = Callable[[str, str], None]
"""Called with (role, line) for every line that a server writes to stderr."""

KEPT_LINES = 20
"""Of each server's stderr, to say why it ended."""


class Server:
    """One process in one role."""

    def __init__(self, role: str, config: Path, arguments: Sequence[str], listen: Listen) -> None:
        command = [sys.executable, "-m", "mpcserve", "party", "--role", role, "--while-stdin"]
        self.role = role
        self.ready = threading.Event()
        self.ended = threading.Event()
        self.last: deque[str] = deque(maxlen=KEPT_LINES)
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

    def _read_stdout(self, stream: IO[str]) -> None:
        for line in stream:
            if line.strip() == "ready":
                self.ready.set()
        self.ended.set()
        self.ready.set()

    def _read_stderr(self, stream: IO[str]) -> None:
        for line in stream:
            self.last.append(line.rstrip("\n"))
            self._listen(self.role, line.rstrip("\n"))

    def await_ready(self, deadline: float) -> None:
        """Raises: PeerLost with what the server said last, PeerTimeout."""
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

    def _said(self) -> str:
        self._threads[1].join(0.5 if self.ended.is_set() else 0)
        lines = [line for line in self.last if "error:" in line] or list(self.last)
        return lines[-1].strip() if lines else "(nothing)"


@contextmanager
def three_servers(
    config: Path,
    *,
    arguments: Sequence[str] = (),
    listen: Listen = lambda role, line: None,
    ready_within: float = 120.0,
    drain: float = 30.0,
) -> Iterator[Mapping[str, Server]]:
    """Start alice, bob and carol, yield when all are ready, and leave none behind."""
    servers: dict[str, Server] = {}
    with ExitStack() as stack:
        stack.callback(_stop_all, servers, drain)
        deadline = time.monotonic() + ready_within
        for role in SERVER_ROLES:
            servers[role] = Server(role, config, arguments, listen)
        for server in servers.values():
            server.await_ready(deadline)
        yield servers


def _stop_all(servers: Mapping[str, Server], drain: float) -> None:
    deadline = time.monotonic() + drain
    for server in servers.values():
        server.ask_to_stop()
    for server in servers.values():
        server.stop(deadline)


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different ports of `host` that nobody listens on at this moment. Raises: ConfigError."""
    with ExitStack() as stack:
        try:
            sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
            for s in sockets:
                s.bind((host, 0))
        except OSError as e:
            raise ConfigError(
                f"no free port on {host}: {e.strerror}", "is the loopback interface up?"
            ) from None
        return [s.getsockname()[1] for s in sockets]


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends us as Ctrl-C does, so that the servers are stopped on the way out."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
