"""Export, compile, verify and measure the networks of `nets.py` or of `huggingface.py`.

    python models/zoo.py --tiny                       # the small ones of the tests: minutes
    python models/zoo.py --only resnet50 vgg16        # full size
    python models/zoo.py --json docs/models/zoo.json  # and keep what was measured
    python models/zoo.py --of huggingface --served    # transformers, on three real servers

A network of full size is exported by torch in one process (`--torch` names a Python that has it);
small ones lie in `tests/data/zoo`. In another process it is compiled with calibration samples and
evaluated on others by the real protocol, all three roles side by side; onnxruntime on the exported
file is what it is compared with. Seconds are of processor time: dealing, preparing and evaluating
one input by all three roles. Memory is the largest of that process, which holds the compiler, the
model owner and all three parties; `--served` these are processes of their own, joined by TLS, with
the randomness of each input dealt before it comes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
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

ROLES = ("alice", "bob", "carol")


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the results. `agreement`: of the largest logits, ties aside; `spread`: standard
    deviation of the outputs; `online_mb`: both ways between the servers; `reason`: of a failure.

    On real servers, `online_seconds`: median from sending an input to its result; `servers_gb`:
    largest resident memory of alice, bob and carol.
    """

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
    inputs: int = 0
    online_seconds: float = 0.0
    servers_gb: Sequence[float] = ()

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


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Outputs of each row, what one costs, and what was seen of real servers, if they were."""

    outputs: Sequence[Array]
    rounds: int
    online: int
    dealt: int
    seconds: float
    online_seconds: float = 0.0
    servers_gb: Sequence[float] = ()


def together(compiled: Any, rows: Sequence[Mapping[str, Array]]) -> Evaluated:
    """All three roles in this process."""
    from mpcserve.protocol import Together

    parties = Together(compiled.plan, compiled.weights)
    outputs, taken = [], []
    for row in rows:
        begin = time.process_time()
        found, bill = parties.infer([row[i.name] for i in compiled.plan.inputs])
        taken.append(time.process_time() - begin)
        outputs.append(found[0])
    return Evaluated(outputs, bill.rounds, _online(bill.bytes), bill.dealt_bytes, min(taken))


def served(compiled: Any, rows: Sequence[Mapping[str, Array]]) -> Evaluated:
    """Three processes, joined by TLS over loopback; the pool is full before each row."""
    from mpcserve.cli.measure import measure

    inputs = {k: np.concatenate([row[k] for row in rows]) for k in rows[0]}
    found = measure(compiled, inputs, len(rows), "loopback", pool_depth=1)
    first = found[0].report
    return Evaluated(
        # The first row is also the one to warm up with, so that measuring begins at the second.
        [next(iter(s.outputs.values())) for s in [found[-1], *found[:-1]]],
        first["rounds"],
        _online(first["bytes"]),
        first["dealt_bytes"],
        min(sum(s.report["cpu_seconds"].values()) for s in found),
        statistics.median(s.report["seconds"]["online"] for s in found),
        [max(s.report["peak_rss_bytes"][r] for s in found) / 1e9 for r in ROLES],
    )


def _online(bytes_: Mapping[str, int]) -> int:
    return bytes_["alice->bob"] + bytes_["bob->alice"]


def measured(path: Path, card: Mapping[str, Any], inputs: int, on_servers: bool) -> Result:
    """Compile, evaluate, compare one exported file, in this process."""
    import onnxruntime as ort

    from mpcserve import compile as compile_model
    from mpcserve.errors import MpcError

    about = {k: card[k] for k in ("family", "model", "exporter", "size", "input", "parameters")}
    calibration = dict(np.load(path.with_suffix(".calibration.npz")))
    samples = dict(np.load(path.with_suffix(".samples.npz")))
    begin = time.process_time()
    try:
        compiled = compile_model(path, calibrate=calibration)
    except MpcError as e:
        return Result(**about, reason="; ".join([e.message, *getattr(e, "problems", ())[:3]]))
    compiling = time.process_time() - begin
    rows = [{k: v[r : r + 1] for k, v in samples.items()} for r in range(inputs)]
    found = (served if on_servers else together)(compiled, rows)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    begin = time.process_time()
    exact = [np.asarray(session.run(None, row)[0]) for row in rows]
    plain = (time.process_time() - begin) / len(rows)
    errors = [float(np.abs(g - e).max()) for g, e in zip(found.outputs, exact, strict=True)]
    agreed = agreement(np.stack(found.outputs), np.stack(exact), card["axis"] + 1)
    return Result(
        **about,
        max_abs_error=max(errors),
        spread=float(np.std(exact)),
        agreement=agreed,
        rounds=found.rounds,
        online_mb=found.online / 1e6,
        dealt_mb=found.dealt / 1e6,
        compile_seconds=compiling,
        seconds=found.seconds,
        onnxruntime_seconds=plain,
        memory_gb=memory,
        inputs=inputs,
        online_seconds=found.online_seconds,
        servers_gb=found.servers_gb,
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
        yield _in_process(path, card, given)


def _in_process(path: Path, card: Mapping[str, Any], given: argparse.Namespace) -> Result:
    """Measured in a process of its own: its memory is what it took."""
    command = [sys.executable, __file__, "--measure", str(path), "--inputs", str(given.inputs)]
    found = _run([*command, *["--served"] * given.served], json.dumps(card))
    if isinstance(found, str):
        keys = ("family", "model", "exporter", "size", "input", "parameters")
        return Result(**{k: card[k] for k in keys}, reason=found)
    return Result(**found)


def each(given: argparse.Namespace, folder: Path) -> Iterator[Result]:
    """Export and measure, every step in a process of its own."""
    export = [given.torch, "-m", f"models.{given.of}"]
    listed = _run([*export, "--list"])
    if isinstance(listed, str):
        raise SystemExit(f"{given.torch} cannot list the networks: {listed}")
    for name in listed["names"]:
        if given.only and name not in given.only:
            continue
        for exporter in given.exporter:
            path = folder / f"{name}.{exporter}.onnx"
            card = _run([*export, name, str(path), "--exporter", exporter])
            if isinstance(card, str):
                yield Result("", name, exporter, "full", "", reason=f"export: {card}")
                continue
            yield _in_process(path, card, given)
            path.unlink()


def _run(command: Sequence[str], given: str = "") -> dict[str, Any] | str:
    """What the process prints last, a JSON object; else its last words."""
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, check=False, cwd=ROOT
    )
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
        + (f"; online {r.online_seconds:.2f} s, {r.servers_gb} GB" if r.servers_gb else "")
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these networks")
    parser.add_argument("--of", choices=["nets", "huggingface"], default="nets", help="whose")
    parser.add_argument("--tiny", action="store_true", help="small variants of all families")
    parser.add_argument("--served", action="store_true", help="on three real servers")
    parser.add_argument("--exporter", nargs="+", default=["dynamo", "legacy"])
    parser.add_argument("--inputs", type=int, default=INPUTS, help="samples to evaluate")
    parser.add_argument("--torch", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results there")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        card = json.loads(sys.stdin.read())
        found = measured(given.measure, card, given.inputs, given.served)
        print(json.dumps(asdict(found)))
        return
    with TemporaryDirectory(prefix="zoo-") as folder:
        for result in (small if given.tiny else each)(given, Path(folder)):
            print(printed(result), flush=True)
            if given.json:
                kept(given.json, [result])


if __name__ == "__main__":
    main()
