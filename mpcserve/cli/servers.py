"""`mpcserve party | up`: one server of a deployment, or all three on this machine."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import click

from mpcserve.cli.options import CONFIG, INSECURE

COLOURS = {"alice": "cyan", "bob": "green", "carol": "magenta"}


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
    from mpcserve.serving import run_party

    config = load_config(config_path)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if while_stdin:
        threading.Thread(target=_stop_at_end_of_input, args=(stop,), daemon=True).start()
    run_party(
        config,
        role,
        stop=stop,
        on_ready=lambda: click.echo("ready"),
        plaintext=insecure_plaintext,
        network=network,
    )


def _stop_at_end_of_input(stop: threading.Event) -> None:
    """Whoever started us holds the other end of our stdin; when that process is gone, so are we."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stop.set()


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
    from mpcserve.cli.launch import sigterm_interrupts, three_servers
    from mpcserve.cli.output import note
    from mpcserve.config import load_config
    from mpcserve.errors import PeerLost

    config = load_config(config_path)
    assert config.path is not None
    arguments = ["--insecure-plaintext"] if insecure_plaintext else []
    with sigterm_interrupts():
        try:
            with three_servers(
                config.path, arguments=arguments, listen=_print_line, drain=config.deadlines.drain
            ) as servers:
                click.echo("ready")
                note(f"alice {config.servers.alice}, bob {config.servers.bob}; Ctrl-C stops all")
                while not any(s.ended.wait(0.2) for s in servers.values()):
                    pass
                gone = next(s for s in servers.values() if s.ended.is_set())
        except KeyboardInterrupt:
            note("stopped")
            return
    raise PeerLost(
        f"{gone.role} ended with status {gone.process.returncode}; the others were stopped",
        "its last lines above say why",
    )


def _print_line(role: str, line: str) -> None:
    text = line.removeprefix(f"mpcserve {role}: ")
    click.echo(f"{click.style(f'{role:>5} │', fg=COLOURS[role])} {text}", err=True)
