"""`up` and `party` as processes: they become ready, stop in order, and leave nobody behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpcserve.config import Config, load_config
from mpcserve.serving.keys import ROLES, init_keys, issue
from mpcserve.serving.processes import reserved_ports
from tests.cli_support import PATIENCE, await_gone, children_of, heed_ctrl_c, needs_proc

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Config]:
    """A deployment of its own, on ports that nobody else takes."""
    init_keys(tmp_path / "keys")
    for role in ROLES:
        issue(tmp_path / "keys", role, ("localhost", "127.0.0.1"))
    with reserved_ports(2) as (alice, bob):
        path = tmp_path / "mpcserve.yaml"
        path.write_text(
            f"servers: {{alice: '127.0.0.1:{alice}', bob: '127.0.0.1:{bob}'}}\npool: {{depth: 1}}\n"
        )
        yield load_config(path)


def start(config: Config, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mpcserve", *words, "--config", str(config.path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 0), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_up_leaves_no_server_behind(number: signal.Signals, status: int, config: Config) -> None:
    with start(config, "up") as up:
        assert up.stdout is not None
        assert up.stdout.readline() == "ready\n"
        servers = children_of(up.pid)
        assert len(servers) == 3
        up.send_signal(number)
        _, err = up.communicate(timeout=PATIENCE)
        assert up.returncode == status
    await_gone(servers)
    for role in ("alice", "bob", "carol"):
        assert f"{role} │" in err
    assert "Traceback" not in err


@pytest.mark.slow
@needs_proc
def test_a_server_that_dies_takes_the_others_along(config: Config) -> None:
    with start(config, "up") as up:
        assert up.stdout is not None
        assert up.stdout.readline() == "ready\n"
        servers = children_of(up.pid)
        os.kill(servers[0], signal.SIGKILL)
        _, err = up.communicate(timeout=PATIENCE)
        assert up.returncode == 4
    await_gone(servers)
    assert "mpcserve: error: " in err
    assert "ended with status" in err


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(config: Config) -> None:
    (config.keys / "bob.key").unlink()
    with start(config, "up") as up:
        out, err = up.communicate(timeout=PATIENCE)
    assert (up.returncode, out) == (4, "")
    (line,) = [x for x in err.splitlines() if x.startswith("mpcserve: error: ")]
    assert "bob ended with status 2 before it was ready" in line
    assert "bob.key: missing" in line


def test_a_port_in_use_is_one_line_of_error(config: Config) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((config.servers.alice.host, config.servers.alice.port))
        taken.listen()
        with start(config, "party", "--role", "alice") as party:
            out, err = party.communicate(timeout=PATIENCE)
    assert (party.returncode, out) == (2, "")
    assert str(config.servers.alice) in err
    assert "mpcserve: hint: " in err
    assert "Traceback" not in err
