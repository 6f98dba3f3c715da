"""`mpcserve keys`: the authority and the certificate of each role."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mpcserve.cli.options import CONFIG, FILE, JSON

if TYPE_CHECKING:
    from mpcserve.config import Config

ROLE_NAMES = ("alice", "bob", "carol", "model-owner", "data-owner")

KEYS = click.option("--keys", "directory", type=FILE, help="Directory of keys; else the config's.")
FORCE = click.option("--force", is_flag=True, help="Replace existing files.")


@click.group("keys")
def keys_command() -> None:
    """Make and check the certificates that say who is who.

    \b
    Example:
      mpcserve keys init
      mpcserve keys issue alice --host alice.example.org
      mpcserve keys check
    """


@keys_command.command("init")
@KEYS
@CONFIG
@FORCE
def init(directory: Path | None, config_path: Path | None, force: bool) -> None:
    """Create the authority, ca.crt and ca.key. Keep ca.key where certificates are issued.

    \b
    Example:
      mpcserve keys init --keys keys
    """
    from mpcserve.serving.keys import init_keys

    click.echo(init_keys(_directory(directory, config_path), force=force))


@keys_command.command("issue")
@click.argument("role", type=click.Choice(ROLE_NAMES))
@click.option("--host", "hosts", multiple=True, metavar="NAME", help="Host name or IP; repeatable.")
@KEYS
@CONFIG
@FORCE
def issue(
    role: str,
    hosts: tuple[str, ...],
    directory: Path | None,
    config_path: Path | None,
    force: bool,
) -> None:
    """Issue the certificate of ROLE, valid for two years and bound to that role.

    Without --host, a server's certificate is for the host that the config gives it.

    \b
    Example:
      mpcserve keys issue bob --host bob.example.org --host 192.0.2.7
    """
    from mpcserve.serving import keys

    if not hosts and directory is None:
        hosts = _hosts(role, _config(config_path))
    click.echo(keys.issue(_directory(directory, config_path), role, hosts, force=force))


@keys_command.command("show")
@KEYS
@CONFIG
@JSON
def show(directory: Path | None, config_path: Path | None, as_json: bool) -> None:
    """List the certificates: role, hosts, end, fingerprint.

    \b
    Example:
      mpcserve keys show --json
    """
    from mpcserve.cli.output import print_json, table
    from mpcserve.serving.keys import show_keys

    found = show_keys(_directory(directory, config_path))
    if as_json:
        print_json(
            [
                {
                    "role": c.role,
                    "path": str(c.path),
                    "hosts": c.hosts,
                    "not_after": c.not_after.isoformat(),
                    "sha256": c.fingerprint,
                }
                for c in found
            ]
        )
        return
    table(
        ("role", "hosts", "until", "sha256"),
        ((c.role, ", ".join(c.hosts), f"{c.not_after:%Y-%m-%d}", c.fingerprint) for c in found),
        left=4,
    )


@keys_command.command("check")
@KEYS
@CONFIG
@click.pass_context
def check(ctx: click.Context, directory: Path | None, config_path: Path | None) -> None:
    """Report everything wrong with the keys at once; exit 2 if anything is.

    \b
    Example:
      mpcserve keys check --keys keys
    """
    from mpcserve.serving.keys import check_keys

    where = _directory(directory, config_path)
    findings = check_keys(where)
    for finding in findings:
        click.echo(f"{finding.level}: {finding.message}; {finding.hint}")
    if any(f.level == "error" for f in findings):
        ctx.exit(2)
    if not findings:
        click.echo(f"{where}: all is well")


def _config(config_path: Path | None) -> Config:
    # Not load_config: keys that it would refuse are what these commands mend.
    from mpcserve.config import read_config

    return read_config(config_path)


def _directory(directory: Path | None, config_path: Path | None) -> Path:
    return directory if directory is not None else _config(config_path).keys


def _hosts(role: str, config: Config) -> tuple[str, ...]:
    if role not in ("alice", "bob", "carol"):
        return ()
    host = config.servers.carol if role == "carol" else config.servers.address(role).host
    return ("localhost", "127.0.0.1") if host in ("localhost", "127.0.0.1") else (host,)
