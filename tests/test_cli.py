"""The command line itself: help, versions, exit codes, one line of error and one of hint."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import mpcserve
from mpcserve.cli import COMMANDS, cli, run
from mpcserve.errors import ConfigError, ModelError, PeerLost, Refused
from mpcserve.plan.plan import FORMAT
from mpcserve.version import PLAN_FORMAT

HELP_SECONDS = 0.4
CI_FACTOR = 4
"""A shared, busy machine may be this much slower than the promise; the best of three counts."""


def mpcserve_process(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    """A real process, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "mpcserve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        **more,  # type: ignore[call-overload]
    )


def commands() -> Iterator[tuple[str, ...]]:
    """Every command, groups and their members included."""
    with click.Context(cli) as context:
        for name in COMMANDS:
            command = cli.get_command(context, name)
            assert command is not None
            yield (name,)
            if isinstance(command, click.Group):
                yield from ((name, member) for member in command.commands)


ALL_COMMANDS = list(commands())


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=" ".join)
def test_every_help_has_an_example(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example:" in out
    assert f"mpcserve {words[0]}" in out.split("Example:")[1]


def test_the_first_screen_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("words", [("--help",), ("infer", "--help"), ("--version",)], ids=" ".join)
def test_help_answers_at_once(words: tuple[str, ...]) -> None:
    def seconds() -> float:
        begin = time.perf_counter()
        assert mpcserve_process(*words).returncode == 0
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(3)) < HELP_SECONDS * CI_FACTOR


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=" ".join)
def test_help_loads_no_heavy_library(words: tuple[str, ...]) -> None:
    """What makes help slow is an import; this names it where a stop-watch cannot."""
    module = f"mpcserve.cli.{COMMANDS[words[0]]}"
    code = (
        f"import sys, {module}\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'numba', 'rich', 'yaml', 'cryptography'}\n"
        "print(*(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_version_names_the_plan_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert PLAN_FORMAT == FORMAT
    assert run(["--version"]) == 0
    expected = f"mpcserve {mpcserve.__version__}, plan format {FORMAT}\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["kyes"], "no command 'kyes'. Did you mean keys?", "see `mpcserve --help`"),
        (["keys", "issue"], "Missing argument", "see `mpcserve keys issue --help`"),
        (["keys", "issue", "dave"], "'dave' is not one of", "see `mpcserve keys issue --help`"),
        (["keys", "show", "--jsn"], "--jsn", "see `mpcserve keys show --help`"),
        (["keys", "show", "--config", "/no.yaml"], "/no.yaml: no such config file", "init"),
    ],
)
def test_usage_errors_are_one_line_and_a_hint(
    arguments: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("mpcserve: error: ")
    assert error in lines[0]
    assert lines[-1].startswith("mpcserve: hint: ")
    assert hint in lines[-1]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("m", "h"), 2),
        (ModelError("m", "h", ("first", "second")), 3),
        (PeerLost("m", "h"), 4),
        (Refused("m", "h"), 5),
        (ZeroDivisionError("m"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_kind_of_error_has_its_exit_status(
    error: BaseException,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(cli, "main", fail)
    assert run(["anything"]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    if status == 130:
        assert captured.err == "mpcserve: interrupted\n"
    else:
        assert captured.err.startswith("mpcserve: error: ")
        assert captured.err.count("mpcserve: hint: ") == 1
    if status == 3:
        assert captured.err.endswith("  first\n  second\n")


def test_a_traceback_is_shown_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **named: object) -> None:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(cli, "main", fail)
    assert run(["anything", "--traceback"]) == 1
    err = capsys.readouterr().err
    assert "unexpected ZeroDivisionError: by nought" in err
    assert "Traceback (most recent call last)" in err


def test_errors_of_a_real_process_go_to_stderr_alone() -> None:
    done = mpcserve_process("keys", "show", "--keys", "/nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "mpcserve: error: /nowhere: no certificates\nmpcserve: hint: run `mpcserve keys init`\n"
    )


# --- init and keys ------------------------------------------------------------------------------


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as `init` leaves it, and we are in it."""
    directory = tmp_path / "serving"
    assert run(["init", str(directory)]) == 0
    monkeypatch.chdir(directory)
    return directory


def test_init_makes_a_deployment_that_passes_its_checks(
    serving: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(["keys", "check"]) == 0
    assert capsys.readouterr().out == f"{serving / 'keys'}: all is well\n"
    assert "# " in (serving / "mpcserve.yaml").read_text()
    assert stat.S_IMODE((serving / "keys" / "alice.key").stat().st_mode) == 0o600


def test_init_overwrites_nothing(serving: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in serving.rglob("*") if p.is_file()}
    assert run(["init"]) == 2
    assert "mpcserve.yaml: exists already" in capsys.readouterr().err
    (serving / "mpcserve.yaml").rename(serving / "mine.yaml")
    assert run(["init"]) == 2
    assert "keys: exists already" in capsys.readouterr().err
    (serving / "mine.yaml").rename(serving / "mpcserve.yaml")
    assert {p: p.read_bytes() for p in serving.rglob("*") if p.is_file()} == before


def test_keys_are_issued_for_the_hosts_of_the_config(
    serving: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (serving / "mpcserve.yaml").write_text(
        "servers: {alice: 'alice.example.org:1', bob: '192.0.2.7:2', carol: localhost}\n"
    )
    for role in ("alice", "bob", "carol"):
        assert run(["keys", "issue", role, "--force"]) == 0
    capsys.readouterr()
    assert run(["keys", "show"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"alice +alice\.example\.org ", out)
    assert re.search(r"bob +192\.0\.2\.7 ", out)
    assert re.search(r"carol +localhost, 127\.0\.0\.1 ", out)


def test_keys_check_lists_every_problem_and_fails(
    serving: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.chmod(serving / "keys" / "alice.key", 0o644)
    (serving / "keys" / "bob.crt").write_bytes((serving / "keys" / "alice.crt").read_bytes())
    capsys.readouterr()
    assert run(["keys", "check"]) == 2
    out = capsys.readouterr().out
    assert "alice.key: mode 0644" in out
    assert "bob.crt: bound to role alice" in out
    assert "Traceback" not in out


def test_keys_can_be_made_step_by_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = str(tmp_path / "keys")
    assert run(["keys", "issue", "alice", "--keys", keys]) == 2
    assert run(["keys", "init", "--keys", keys]) == 0
    assert run(["keys", "issue", "alice", "--keys", keys, "--host", "a.example.org"]) == 0
    assert run(["keys", "issue", "alice", "--keys", keys]) == 2
    assert run(["keys", "check", "--keys", keys]) == 0
    assert run(["keys", "show", "--keys", keys, "--json"]) == 0
    assert '"a.example.org"' in capsys.readouterr().out
