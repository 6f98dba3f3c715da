"""Export, compile, verify and measure the networks of `nets.py`.

    python models/zoo.py --tiny                       # the small ones of the tests: minutes
    python models/zoo.py --only resnet50 vgg16        # full size
    python models/zoo.py --json docs/models/zoo.json  # and keep what was measured

A network of full size is exported by torch in one process (`--torch` names a Python that has it);
small ones lie in `tests/data/zoo`. In another process it is compiled with calibration samples and
evaluated on others by the real protocol, all three roles side by side; onnxruntime on the exported
file is what it is compared with. Seconds are of processor time: dealing, preparing and evaluating
one input by all three roles. Memory is the largest of that process, which holds the compiler, the
model owner and all three parties.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ROOT = Path(__file__).resolve().parent.parent
TIE = 1e-2
"""Of the logits' spread: two that are nearer are a tie, and either is right."""

SMALL = ROOT / "tests" / "data" / "zoo"
SEED, CALIBRATION = 7, 16
INPUTS = 2
"""Samples that are evaluated."""


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the results. `agreement`: of the largest logits, ties aside; `spread`: standard
    deviation of the outputs; `online_mb`: both ways between the servers; `reason`: of a failure."""

    family: str
    model: str
    exporter: str
    size: str
    input: str
    parameters: int = 0
    max_abs_error: float = 0.0
    spread: float = 0.0
    agreement: float | None = None
    rounds: int = 0
    online_mb: float = 0.0
    dealt_mb: float = 0.0
    compile_seconds: float = 0.0
    seconds: float = 0.0
    onnxruntime_seconds: float = 0.0
    memory_gb: float = 0.0
    reason: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What a new measurement of the same replaces."""
        return self.model, self.exporter, self.size


def agreement(got: Array, expected: Array, axis: int) -> float | None:
    """Share of positions with the same largest logit; None where there is one value each."""
    if got.ndim <= axis or got.shape[axis] < 2:
        return None
    mine, exact = np.moveaxis(got, axis, -1), np.moveaxis(expected, axis, -1)
    chosen = np.take_along_axis(exact, mine.argmax(-1)[..., None], -1)[..., 0]
    return float(np.mean(chosen >= exact.max(-1) - TIE * exact.std()))


def measured(path: Path, card: Mapping[str, Any], inputs: int) -> Result:
    """Compile, evaluate, compare one exported file, in this process."""
    import onnxruntime as ort

    from mpcserve import compile as compile_model
    from mpcserve.errors import MpcError
    from mpcserve.protocol import Together

    about = {k: card[k] for k in ("family", "model", "exporter", "size", "input", "parameters")}
    calibration = dict(np.load(path.with_suffix(".calibration.npz")))
    samples = dict(np.load(path.with_suffix(".samples.npz")))
    begin = time.process_time()
    try:
        compiled = compile_model(path, calibrate=calibration)
    except MpcError as e:
        return Result(**about, reason="; ".join([e.message, *getattr(e, "problems", ())[:3]]))
    compiling = time.process_time() - begin
    plan = compiled.plan
    together = Together(plan, compiled.weights)
    rows = [{k: v[r : r + 1] for k, v in samples.items()} for r in range(inputs)]
    got, taken = [], []
    for row in rows:
        begin = time.process_time()
        outputs, bill = together.infer([row[i.name] for i in plan.inputs])
        taken.append(time.process_time() - begin)
        got.append(outputs[0])
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    begin = time.process_time()
    exact = [np.asarray(session.run(None, row)[0]) for row in rows]
    plain = (time.process_time() - begin) / len(rows)
    errors = [float(np.abs(g - e).max()) for g, e in zip(got, exact, strict=True)]
    agreed = agreement(np.stack(got), np.stack(exact), card["axis"] + 1)
    return Result(
        **about,
        max_abs_error=max(errors),
        spread=float(np.std(exact)),
        agreement=agreed,
        rounds=bill.rounds,
        online_mb=(bill.bytes["alice->bob"] + bill.bytes["bob->alice"]) / 1e6,
        dealt_mb=bill.dealt_bytes / 1e6,
        compile_seconds=compiling,
        seconds=min(taken),
        onnxruntime_seconds=plain,
        memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    )


def small(given: argparse.Namespace, folder: Path) -> Iterator[Result]:
    """Measure the small ones that the tests run."""
    for line in (SMALL / "cards.json").read_text().splitlines():
        card = json.loads(line)
        if (given.only and card["model"] not in given.only) or card[
            "exporter"
        ] not in given.exporter:
            continue
        path = folder / f"{card['model']}.{card['exporter']}.onnx"
        path.write_bytes((SMALL / path.name).read_bytes())
        shape = tuple(map(int, card["input"].split("×")))
        rows = np.random.default_rng(SEED).standard_normal((CALIBRATION + given.inputs, *shape))
        rows = rows.astype(np.float32)
        np.savez(path.with_suffix(".calibration.npz"), input=rows[:CALIBRATION])
        np.savez(path.with_suffix(".samples.npz"), input=rows[CALIBRATION:])
        yield _in_process(path, card, given.inputs)


def _in_process(path: Path, card: Mapping[str, Any], inputs: int) -> Result:
    """Measured in a process of its own: its memory is what it took."""
    found = _run(
        [sys.executable, __file__, "--measure", str(path), "--inputs", str(inputs)],
        json.dumps(card),
    )
    if isinstance(found, str):
        keys = ("family", "model", "exporter", "size", "input", "parameters")
        return Result(**{k: card[k] for k in keys}, reason=found)
    return Result(**found)


def each(given: argparse.Namespace, folder: Path) -> Iterator[Result]:
    """Export and measure, every step in a process of its own."""
    listed = _run([given.torch, str(ROOT / "models" / "nets.py"), "--list"])
    if isinstance(listed, str):
        raise SystemExit(f"{given.torch} cannot list the networks: {listed}")
    for name in listed["names"]:
        if given.only and name not in given.only:
            continue
        for exporter in given.exporter:
            path = folder / f"{name}.{exporter}.onnx"
            card = _run([given.torch, str(ROOT / "models" / "nets.py"), name, str(path),
                         "--exporter", exporter])  # fmt: skip
            if isinstance(card, str):
                yield Result("", name, exporter, "full", "", reason=f"export: {card}")
                continue
            yield _in_process(path, card, given.inputs)
            path.unlink()


def _run(command: Sequence[str], given: str = "") -> dict[str, Any] | str:
    """What the process prints last, a JSON object; else its last words."""
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        return words[-1] if words else f"ended with status {done.returncode}"
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def kept(path: Path, new: Sequence[Result]) -> None:
    """Write results beside older ones of other networks."""
    lines = path.read_text().splitlines() if path.exists() else []
    old = [Result(**json.loads(line)) for line in lines]
    found = {r.key: r for r in (*old, *new)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(found[k])) + "\n" for k in sorted(found)))


def printed(r: Result) -> str:
    """One line for a terminal."""
    head = f"{r.model:18} {r.exporter:7} {r.size:5}"
    if r.reason:
        return f"{head} {r.reason}"
    agreed = "" if r.agreement is None else f"{100 * r.agreement:.2f}%"
    return (
        f"{head} {r.parameters:11,} error {r.max_abs_error:.2g} of {r.spread:.2g} {agreed:8} "
        f"{r.rounds} rounds {r.online_mb:.2f} MB, dealt {r.dealt_mb:.2f} MB; seconds: compile "
        f"{r.compile_seconds:.1f} run {r.seconds:.2f} onnxruntime {r.onnxruntime_seconds:.3f}; "
        f"{r.memory_gb:.2f} GB"
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these networks")
    parser.add_argument("--tiny", action="store_true", help="small variants of all families")
    parser.add_argument("--exporter", nargs="+", default=["dynamo", "legacy"])
    parser.add_argument("--inputs", type=int, default=INPUTS, help="samples to evaluate")
    parser.add_argument("--torch", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results there")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        card = json.loads(sys.stdin.read())
        print(json.dumps(asdict(measured(given.measure, card, given.inputs))))
        return
    with TemporaryDirectory(prefix="zoo-") as folder:
        for result in (small if given.tiny else each)(given, Path(folder)):
            print(printed(result), flush=True)
            if given.json:
                kept(given.json, [result])


if __name__ == "__main__":
    main()
