"""Options that several commands share, each defined once."""

from __future__ import annotations

from pathlib import Path

import click

CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Config file; else $MPCSERVE_CONFIG, else ./mpcserve.yaml, else configs/local.yaml.",
)

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")

INSECURE = click.option(
    "--insecure-plaintext",
    is_flag=True,
    help="No TLS; only between processes of one machine, for debugging.",
)

FILE = click.Path(path_type=Path)
"""A path that need not exist: the command says what is wrong with it and what to do."""
