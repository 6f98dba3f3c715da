"""Presentation: tables on stdout, notes on stderr, units that people read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 160
"""Columns of a table that goes to a file or a pipe: wide enough that no cell is folded."""


def console() -> Console:
    """Rich on stdout; without colours and of a fixed width where stdout is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    left: int = 1,
    footer: Sequence[object] | None = None,
) -> None:
    """Print a table: the first `left` columns are text, the others are aligned right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    view = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for position, name in enumerate(columns):
        text = position < left
        justify: Literal["left", "right"] = "left" if text else "right"
        view.add_column(name, justify=justify, overflow="fold", no_wrap=not text)
    for row in rows:
        view.add_row(*(c if isinstance(c, Text) else Text(str(c)) for c in row))
    if footer is not None:
        view.add_section()
        view.add_row(*(Text(str(c), style="bold") for c in footer))
    screen = console()
    with screen.capture() as capture:
        screen.print(view)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    click.echo("\n".join([*([title] if title else []), *lines[1:]]))


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2, sort_keys=False, allow_nan=False))


def note(text: str) -> None:
    """A line for people, on stderr."""
    click.echo(f"mpcserve: {text}", err=True)


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Show that something is under way: a spinner on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def shape_text(shape: Sequence[int]) -> str:
    """(1, 8, 28) → "1x8x28"."""
    return "x".join(map(str, shape)) or "scalar"
