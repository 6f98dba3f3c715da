"""The quick start of the README, command by command, on servers of this machine."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mpcserve.serving.processes import reserved_ports
from tests.cli_support import PATIENCE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def quick_start() -> list[list[str]]:
    """Arguments of every command between the two headings, in order."""
    section = README.split("## Quick start")[1].split("\n## ")[0]
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
        for line in block.splitlines()
    ]
    commands = [shlex.split(line, comments=True) for line in lines if line]
    assert all(c[0] == "mpcserve" for c in commands)
    return [c[1:] for c in commands]


def run(arguments: list[str], place: Path) -> str:
    command = [sys.executable, "-m", "mpcserve", *arguments]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{shlex.join(arguments)}: {done.stderr}"
    return done.stdout


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory with the models in it; `init` there is given free ports."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    yield tmp_path


@pytest.mark.slow
def test_the_quick_start_works_word_for_word(place: Path) -> None:
    commands = quick_start()
    parties = [c for c in commands if c[0] == "party"]
    assert [c[-1] for c in parties] == ["alice", "bob", "carol"]
    assert run(commands[0], place) is not None
    config = place / "mpcserve.yaml"
    with reserved_ports(2) as ports, ExitStack() as stack:
        text = config.read_text()
        for standard, free in zip((7701, 7702), ports, strict=True):
            assert str(standard) in text
            text = text.replace(str(standard), str(free))
        config.write_text(text)
        servers = []
        for arguments in parties:
            server = subprocess.Popen(
                [sys.executable, "-m", "mpcserve", *arguments],
                cwd=place, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            stack.callback(server.wait, PATIENCE)
            stack.callback(server.terminate)
            assert server.stdout is not None
            stack.callback(server.stdout.close)
            servers.append(server)
        for server in servers:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
        said = {c[0]: run(c, place) for c in commands[1:] if c[0] != "party"}
    assert set(said) == {"check", "compile", "verify", "deploy", "models", "infer", "bench"}
    assert "mnist" in said["models"]
    assert all(server.returncode == 0 for server in servers)
