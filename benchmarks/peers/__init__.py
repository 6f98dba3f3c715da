"""Other systems on the same models: each in a virtual environment of its own, made when asked for.

A peer's script runs under the peer's Python, evaluates a `program` on as many processes as its
protocol has parties, and prints one JSON object. Nothing of mpcserve is imported there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.program import Unsupported, write_program
from benchmarks.rows import Row

HERE = Path(__file__).parent
INSTALL_SECONDS = 1200
SHOWN = 300
"""Characters of a peer's last words."""


@dataclass(frozen=True, slots=True)
class Peer:
    """`commands`: arguments of `pip install`, in order. `pythons`: versions it runs on."""

    name: str
    title: str
    script: str
    pythons: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return HERE / f".venv-{self.name}" / "bin" / "python"

    def install(self) -> str | None:
        """Make the environment unless it is complete; what went wrong, or None."""
        complete = self.python.parent.parent / "complete"
        if complete.exists():
            return None
        base = _find_python(self.pythons)
        if base is None:
            return f"needs Python {' or '.join(self.pythons)}, which is not on this machine"
        steps = [[base, "-m", "venv", "--clear", str(complete.parent)]]
        steps += [[str(self.python), "-m", "pip", "install", "-q", *c] for c in self.commands]
        for step in steps:
            try:
                done = subprocess.run(step, capture_output=True, text=True, timeout=INSTALL_SECONDS)
            except subprocess.TimeoutExpired:
                return f"`{' '.join(step)}` did not end in {INSTALL_SECONDS} s"
            if done.returncode:
                return f"`{' '.join(step)}` failed: {_last(done.stderr)}"
        complete.touch()
        return None

    def measure(self, row: Row, folder: Path, runs: int, seconds: float) -> dict[str, Any]:
        """Seconds, bytes and error of the row's model there, or a `problem` that says why not."""
        program = folder / f"{row.name}.npz"
        try:
            write_program(row, folder / f"{row.name}.onnx", program)
        except Unsupported as e:
            return {"problem": str(e)}
        command = [str(self.python), str(HERE / self.script), str(program), str(runs)]
        # A session of its own: its parties end with it, however it ends.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        )
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"problem": f"{runs + 1} runs took more than {seconds:.0f} s"}
        finally:
            _end(process)
        if process.returncode:
            return {"problem": f"failed: {_last(err)}"}
        measured: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return measured


def _find_python(versions: tuple[str, ...]) -> str | None:
    if f"{sys.version_info[0]}.{sys.version_info[1]}" in versions:
        return sys.executable
    for version in versions:
        found = shutil.which(f"python{version}") or next(
            map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))), None
        )
        if found:
            return found
    return None


def _end(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:SHOWN] if lines else "no output"


PEERS = {
    p.name: p
    for p in (
        Peer(
            "spu",
            "SPU 0.9.5, ABY3, 3 parties",
            "spu_parties.py",
            ("3.11", "3.10"),
            (("spu==0.9.5",),),
        ),
        Peer(
            "crypten",
            "CrypTen 0.4.1, 2 parties",
            "crypten_parties.py",
            ("3.11",),
            (
                ("torch==2.13.0",),
                # Its list of requirements names `sklearn`, which cannot be installed any more.
                ("--no-deps", "crypten==0.4.1"),
                ("numpy", "onnx", "pyyaml", "omegaconf", "pandas", "scipy", "setuptools"),
            ),
        ),
    )
}
