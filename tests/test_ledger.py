"""The ledger: a bundle id is admitted once, ever."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpcserve.errors import ConfigError, MpcError, Refused
from mpcserve.serving.ledger import Ledger

DEPLOYMENT = bytes(16)


def test_a_bundle_is_admitted_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.admit(b"a" * 16, DEPLOYMENT)
    with pytest.raises(Refused, match="dealt before"):
        ledger.admit(b"a" * 16, DEPLOYMENT)
    ledger.close()


def test_another_deployment_does_not_free_an_id(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.admit(b"a" * 16, DEPLOYMENT)
    with pytest.raises(Refused):
        ledger.admit(b"a" * 16, bytes([1]) * 16)
    ledger.close()


def test_a_spent_bundle_is_counted_and_still_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.admit(b"a" * 16, DEPLOYMENT)
    ledger.admit(b"b" * 16, DEPLOYMENT)
    ledger.spend(b"a" * 16)
    assert ledger.counts() == (2, 1)
    with pytest.raises(Refused):
        ledger.admit(b"a" * 16, DEPLOYMENT)
    ledger.close()


def test_what_was_spent_is_written_with_the_next_bundle_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    for name in (b"a", b"b", b"c"):
        ledger.admit(name * 16, DEPLOYMENT)
    ledger.spend(b"a" * 16)
    with pytest.raises(Refused):
        ledger.admit(b"b" * 16, DEPLOYMENT)
    other = Ledger(path)
    assert other.counts() == (3, 0)
    ledger.admit(b"d" * 16, DEPLOYMENT)
    assert other.counts() == (4, 1)
    ledger.spend(b"c" * 16)
    ledger.close()
    assert other.counts() == (4, 2)
    other.close()


def test_reserved_ids_are_burned_at_once_and_counted_when_dealt(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    ledger.reserve([b"a" * 16, b"b" * 16], DEPLOYMENT)
    assert ledger.counts() == (0, 0)
    ledger.deal(b"a" * 16)
    ledger.spend(b"a" * 16)
    assert ledger.counts() == (1, 1)
    for ids in ([b"a" * 16], [b"c" * 16, b"b" * 16]):
        with pytest.raises(Refused, match="dealt before"):
            ledger.reserve(ids, DEPLOYMENT)
    ledger.admit(b"c" * 16, DEPLOYMENT)  # nothing of the refused lot was kept
    with pytest.raises(Refused):
        ledger.admit(b"b" * 16, DEPLOYMENT)
    assert ledger.counts() == (2, 1)
    ledger.close()


def test_a_process_killed_right_after_admitting_leaves_the_id_burned(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from mpcserve.serving.ledger import Ledger\n"
        "Ledger(Path(sys.argv[1])).admit(b'a' * 16, bytes(16))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(path)], timeout=60)
    assert ended.returncode == -9
    ledger = Ledger(path)
    with pytest.raises(Refused):
        ledger.admit(b"a" * 16, DEPLOYMENT)
    ledger.close()


def test_of_many_threads_one_is_admitted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")

    def admit(_: int) -> bool:
        try:
            ledger.admit(b"a" * 16, DEPLOYMENT)
        except Refused:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(admit, range(32))) == 1
    ledger.close()


def test_the_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "ledger"
    Ledger(path).close()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(b"not a database " * 100)
    with pytest.raises(ConfigError, match="ledger") as caught:
        Ledger(path)
    assert isinstance(caught.value, MpcError) and caught.value.hint
