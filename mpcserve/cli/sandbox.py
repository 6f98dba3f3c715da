"""A whole deployment in a temporary directory: keys, config, state, free ports of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpcserve.cli.launch import free_ports
from mpcserve.config import Config, load_config
from mpcserve.serving.keys import ROLES, init_keys, issue

HOST = "127.0.0.1"

TEMPLATE = """\
servers: {{alice: {host}:{alice}, bob: {host}:{bob}, carol: localhost}}
pool: {{depth: {depth}, max_bytes: {max_bytes}}}
deadlines: {{round: {seconds}, request: {seconds}, drain: 10}}
log_level: {log_level}
"""


@contextmanager
def sandbox(
    *,
    pool_depth: int,
    pool_bytes: str = "8 GB",
    seconds: float = 600,
    log_level: str = "warning",
) -> Iterator[Config]:
    """The config of a fresh deployment; directory and keys are gone when the block ends."""
    with tempfile.TemporaryDirectory(prefix="mpcserve-") as name:
        directory = Path(name)
        init_keys(directory / "keys")
        for role in ROLES:
            issue(directory / "keys", role, ("localhost", HOST))
        alice, bob = free_ports(2, HOST)
        path = directory / "mpcserve.yaml"
        path.write_text(
            TEMPLATE.format(
                host=HOST,
                alice=alice,
                bob=bob,
                depth=pool_depth,
                max_bytes=pool_bytes,
                seconds=seconds,
                log_level=log_level,
            )
        )
        yield load_config(path)
