"""`demo` and `bench`: three processes on this machine, checked against onnxruntime and measured."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpcserve.bundled import bundled
from mpcserve.cli import run
from mpcserve.cli.demo import DemoRun, _judge
from mpcserve.errors import PeerError
from tests.cli_support import PATIENCE, await_gone, await_true, children_of, heed_ctrl_c, needs_proc

pytestmark = pytest.mark.slow

Capture = pytest.CaptureFixture[str]
MODEL = str(bundled("models", "breast_cancer_mlp.onnx"))
SAMPLES = str(bundled("models", "breast_cancer_samples.npy"))


def test_the_demo_classifies_every_digit_as_in_the_clear(capsys: Capture) -> None:
    assert run(["demo"]) == 0
    out = capsys.readouterr().out
    for name in ("encrypted", "plaintext"):
        rows = [line.split()[1:] for line in out.splitlines() if line.startswith(f"{name} ")]
        digits = [int(d) for row in rows for d in row if row[0].isdigit()]
        assert digits == list(range(10))
    assert "█" in out
    for link in ("alice → bob", "carol → bob", "client → alice"):
        assert re.search(rf"{link} +[\d.]+ [kM]?B", out)
    for text in ("rounds between alice and bob", "dealt by carol", "seconds", "largest error"):
        assert text in out
    assert out.endswith("Every prediction is that of the network in the clear.\n")


@pytest.mark.parametrize(("digit", "error"), [(1, 0.0), (0, 0.01)])
def test_the_demo_fails_on_a_wrong_answer(digit: int, error: float) -> None:
    expected = np.eye(10)[:1]
    got = np.eye(10)[digit : digit + 1] + error
    with pytest.raises(PeerError, match="the encrypted result differs"):
        _judge(DemoRun(np.zeros((1, 1, 28, 28)), np.array([0]), expected, got, {}))


@needs_proc
def test_ctrl_c_leaves_no_process_of_the_demo(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "mpcserve", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=heed_ctrl_c,
    ) as demo:
        await_true("three servers run", lambda: len(children_of(demo.pid)) == 3)
        servers = children_of(demo.pid)
        demo.send_signal(signal.SIGINT)
        out, err = demo.communicate(timeout=PATIENCE)
    assert (demo.returncode, out) == (130, "")
    assert err.endswith("mpcserve: interrupted\n")
    await_gone(servers)
    assert list(tmp_path.glob("mpcserve-*")) == [], "keys were left behind"


@pytest.mark.slow
def test_bench_reports_what_it_promises(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "bench.json"
    words = ["--input", SAMPLES, "--batch", "5", "--runs", "2", "--json", str(path)]
    assert run(["bench", MODEL, *words, "--network", "2,1000"]) == 0
    out = capsys.readouterr().out
    for text in ("online", "preprocessing", "total", "pool empty: online", "onnxruntime, 1 thread"):
        assert text in out
    report = json.loads(path.read_text())
    assert {"model", "plan_digest", "ring_bits", "plaintext_seconds"} <= set(report)
    assert (report["batch"], report["runs"], report["network"]) == (5, 2, "2,1000")
    assert report["bill_holds"]
    assert report["bytes"]["carol->bob"] == report["dealt_bytes"]
    phases = report["bytes_by_phase"]
    assert {**phases["online"], **phases["preprocessing"]} == report["bytes"]
    assert set(report["seconds"]) == {"online", "evaluation", "preprocessing", "total"}
    # Both servers send at once, so a round costs half the round-trip time: that cannot be hidden,
    # but for the tenth of a millisecond by which the emulated line may be early.
    assert report["seconds"]["online"] >= report["rounds"] * (0.001 - 0.0001)
    for key in ("cpu_seconds", "peak_rss_bytes"):
        assert set(report[key]) == {"alice", "bob", "carol"}
        assert min(report[key].values()) > 0
    assert report["max_abs_error"] <= 2**-8
    assert report["top1_agreement"] == 1.0


def test_bench_refuses_a_network_it_does_not_know(capsys: Capture) -> None:
    assert run(["bench", MODEL, "--network", "carrier pigeon"]) == 2
    assert "expected loopback, lan, wan or RTT_MS,MBIT" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_writes_a_trace_that_shows_every_layer(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    command = [
        *(sys.executable, "-m", "mpcserve", "bench", "models/breast_cancer_mlp.onnx"),
        *("--input", "models/breast_cancer_samples.npy", "--runs", "1", "--profile", str(trace)),
    ]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    events = json.loads(trace.read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"alice", "bob"}
    kinds = {e["cat"] for e in events if e["ph"] == "X"}
    assert {"matmul", "rectify", "wait", "result"} <= kinds
