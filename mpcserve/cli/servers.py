"""`mpcserve party | up`: one server of a deployment, or all three on this machine."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mpcserve.cli.options import CONFIG, INSECURE

if TYPE_CHECKING:
    from mpcserve.config import Config

COLOURS: Mapping[str, str] = {"alice": "cyan", "bob": "green", "carol": "magenta"}

POLL = 0.1
"""Seconds between two looks at whether a server has ended."""


@click.command("party")
@click.option("--role", type=click.Choice(tuple(COLOURS)), required=True, help="Which server.")
@CONFIG
@INSECURE
@click.option("--network", default="loopback", hidden=True)
@click.option("--while-stdin", is_flag=True, hidden=True)
def party_command(
    role: str,
    config_path: Path | None,
    insecure_plaintext: bool,
    network: str,
    while_stdin: bool,
) -> None:
    """Run one server until SIGTERM or Ctrl-C; it finishes what runs, then exits.

    Prints `ready` on stdout when its kernels are compiled and its peers are connected.

    \b
    Example:
      mpcserve party --role alice --config mpcserve.yaml
    """
    from mpcserve.config import load_config

    config = load_config(config_path)
    if while_stdin:
        threading.Thread(target=_end_with_input, daemon=True).start()
    # Compiles the kernels. Nothing is under way before that, so until then signals end us at once.
    from mpcserve.serving.party import run_party

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    run_party(
        config,
        role,
        stop=stop,
        on_ready=lambda: click.echo("ready"),
        plaintext=insecure_plaintext,
        network=network,
    )


def _end_with_input() -> None:
    """Whoever started us holds the other end of our stdin; when that process is gone, so are we."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


@click.command("up")
@CONFIG
@INSECURE
def up_command(config_path: Path | None, insecure_plaintext: bool) -> None:
    """Run alice, bob and carol on this machine, in one terminal, until Ctrl-C.

    For trying things out: whoever controls all three servers can see everything.

    \b
    Example:
      mpcserve init && mpcserve up
    """
    from mpcserve.cli.output import note
    from mpcserve.cli.signals import sigterm_interrupts
    from mpcserve.config import load_config

    config = load_config(config_path)
    arguments = ["--insecure-plaintext"] if insecure_plaintext else []
    with sigterm_interrupts():
        try:
            _run_all(config, arguments)
        except KeyboardInterrupt:
            note("stopped")


def _run_all(config: Config, arguments: Sequence[str]) -> None:
    """Run three processes until one ends. Raises: PeerLost naming it."""
    from mpcserve.cli.output import note, progress
    from mpcserve.config import SERVER_ROLES
    from mpcserve.errors import PeerLost
    from mpcserve.serving.processes import ServerProcess, stop_all

    assert config.path is not None
    with progress("compiling the kernels (some seconds, the first time on this machine)"):
        # Here first, so that the three servers find them in the cache.
        from mpcserve.protocol import warm_up

        warm_up()
    servers: list[ServerProcess] = []
    try:
        for role in SERVER_ROLES:
            servers.append(ServerProcess(role, config.path, arguments, _print_line))
        while waiting := [s for s in servers if not s.ready.is_set()]:
            waiting[0].ready.wait(POLL)
            for server in servers:
                if server.ended.is_set():
                    server.await_ready(time.monotonic())
        click.echo("ready")
        note(f"alice {config.servers.alice}, bob {config.servers.bob}; Ctrl-C stops all")
        while not any(s.ended.wait(POLL) for s in servers):
            pass
        gone = next(s for s in servers if s.ended.is_set())
        status = gone.process.wait()
    finally:
        stop_all(servers, config.deadlines.drain)
    raise PeerLost(
        f"{gone.role} ended with status {status}; the others were stopped",
        "its last lines above say why",
    )


def _print_line(role: str, line: str) -> None:
    text = line.removeprefix(f"mpcserve {role}: ").removeprefix("mpcserve: ")
    click.echo(f"{click.style(f'{role:>5} │', fg=COLOURS[role])} {text}", err=True)
