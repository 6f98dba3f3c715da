"""The command line: parse, call, print, exit.

stdout carries results, stderr `mpcserve: …`, `mpcserve: error: …` and `mpcserve: hint: …`. A module
of commands is imported when that command is named, and imports numpy, onnx or numba when it runs.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import click

from mpcserve.errors import MpcError
from mpcserve.version import PLAN_FORMAT, __version__

COMMANDS: Mapping[str, str] = {
    "demo": "demo",
    "init": "setup",
    "keys": "keys",
    "check": "model",
    "compile": "model",
    "inspect": "model",
    "verify": "verify",
    "party": "servers",
    "up": "servers",
    "deploy": "owners",
    "models": "owners",
    "infer": "owners",
    "bench": "bench",
}
"""Command → module of this package, in the order in which a newcomer meets them."""

TRACEBACK = "--traceback"
"""Taken anywhere on the command line, so that an old line can be run again with it at its end."""

INTERRUPTED = 130
"""128 + SIGINT, as shells do."""


class LazyGroup(click.Group):
    """Finds a command in its module, where the function is called `<command>_command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"mpcserve.cli.{COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as e:
            close = difflib.get_close_matches(args[0], COMMANDS, 1)
            advice = f" Did you mean {close[0]}?" if close else ""
            raise click.UsageError(f"no command {args[0]!r}.{advice}", ctx) from e


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    __version__, message=f"mpcserve %(version)s, plan format {PLAN_FORMAT}", prog_name="mpcserve"
)
@click.option(TRACEBACK, is_flag=True, help="Show where an error arose.")
def cli(traceback: bool) -> None:
    """Serve ONNX models to clients whose inputs no server sees.

    \b
    Example:
      mpcserve demo
    """


def main() -> None:
    """Console entry point."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status: 0 ok, else the error's own.

    Every exception ends here, as one line of error and one of hint.
    """
    try:
        words = [a for a in arguments if a != TRACEBACK]
        status: Any = cli.main(words, prog_name="mpcserve", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except MpcError as e:
        _report(*e.message.splitlines(), hint=e.hint)
        problems = getattr(e, "problems", ())
        for problem in problems if len(problems) > 1 else ():
            click.echo(f"  {problem}", err=True)
        _trace(arguments)
        return e.exit_code
    except click.ClickException as e:
        context = getattr(e, "ctx", None)
        path = context.command_path if context else "mpcserve"
        _report(" ".join(e.format_message().split()), hint=f"see `{path} --help`")
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("mpcserve: interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our stdout went away (`mpcserve models | head`): nobody is left to tell.
        sys.stdout = None
        return 0
    except Exception as e:
        what = (str(e).splitlines() or ["(no message)"])[0]
        _report(
            f"unexpected {type(e).__name__}: {what}",
            hint=f"this is a defect; run it again with {TRACEBACK} and report what it shows",
        )
        _trace(arguments)
        return 1


def _report(*lines: str, hint: str) -> None:
    for line in lines:
        click.echo(f"mpcserve: error: {line}", err=True)
    if hint:
        click.echo(f"mpcserve: hint: {hint}", err=True)


def _trace(arguments: Sequence[str]) -> None:
    if TRACEBACK in arguments:
        import traceback

        traceback.print_exc()
