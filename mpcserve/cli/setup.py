"""`mpcserve init`: a directory from which three local servers start."""

from __future__ import annotations

from pathlib import Path

import click

from mpcserve.cli.options import FILE

LOCAL_HOSTS = ("localhost", "127.0.0.1")


@click.command("init")
@click.argument("directory", type=FILE, default=Path())
def init_command(directory: Path) -> None:
    """Write a commented mpcserve.yaml and keys for three local servers into DIRECTORY (default: .).

    \b
    Example:
      mpcserve init serving && cd serving && mpcserve up
    """
    from mpcserve.bundled import bundled
    from mpcserve.errors import ConfigError
    from mpcserve.serving.keys import ROLES, init_keys, issue

    config, keys = directory / "mpcserve.yaml", directory / "keys"
    for path in (config, keys):
        if path.exists():
            raise ConfigError(f"{path}: exists already", "remove it, or give another directory")
    init_keys(keys)
    for role in ROLES:
        issue(keys, role, LOCAL_HOSTS)
    config.write_bytes(bundled("configs", "local.yaml").read_bytes())
    click.echo(f"{config}: three servers on this machine")
    click.echo(f"{keys}: an authority and certificates for {', '.join(ROLES)}")
