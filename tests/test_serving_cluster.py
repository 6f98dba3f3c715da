"""Three real processes over mutual TLS: they serve, survive a killed peer, leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mpcserve
from mpcserve.errors import PeerError, PeerLost
from mpcserve.plan import bill_of
from mpcserve.serving.cluster import LocalCluster
from tests.cli_support import await_gone, needs_proc
from tests.serving_support import as_model, dense_relu, dense_relu_plan, dense_weights, some_rows

pytestmark = pytest.mark.slow

PLAN = dense_relu_plan()
WEIGHTS = dense_weights(PLAN)
MODEL = as_model(PLAN, WEIGHTS)
X = some_rows(PLAN, 3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(seconds=20.0) as cluster:
        cluster.deploy(MODEL)
        yield cluster


def check_serves(cluster: LocalCluster) -> None:
    assert np.abs(cluster.infer(X) - dense_relu(X, WEIGHTS)).max() < 2.0**-8


def test_a_cluster_deploys_and_infers(cluster: LocalCluster) -> None:
    check_serves(cluster)
    assert [m["name"] for m in cluster.models()] == ["dense"]


def test_payload_over_tls_is_the_bill_and_processes_are_measured(cluster: LocalCluster) -> None:
    _, report = cluster.client.infer_report(X[:2])
    assert report["bytes"] == bill_of(PLAN).bytes
    assert all(n > 50 << 20 for n in report["peak_rss_bytes"].values())


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="two cores"
)
def test_alice_and_bob_compute_on_cores_of_their_own(cluster: LocalCluster) -> None:
    """Every thread of them: those that were there before included."""
    processes = {role: server.process.pid for role, server in cluster._servers.items()}
    cores: dict[str, set[int]] = {}
    for role, pid in processes.items():
        threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        cores[role] = set().union(*(os.sched_getaffinity(t) for t in threads))
    assert cores["alice"] and cores["bob"] and not cores["alice"] & cores["bob"]
    assert cores["carol"] == os.sched_getaffinity(0)


@pytest.mark.parametrize("role", ["bob", "carol", "alice"])
def test_a_killed_server_is_named_and_picked_up_after_its_restart(
    cluster: LocalCluster, role: str
) -> None:
    cluster.kill(role)
    began = time.monotonic()
    with pytest.raises(PeerError, match=role):
        for _ in range(10):  # without carol, what was dealt before lasts a little
            cluster.infer(X)
    assert time.monotonic() - began < 15
    cluster.start(role)
    check_serves(cluster)


@pytest.mark.slow
def test_a_frozen_server_is_named_within_the_deadline() -> None:
    with LocalCluster(seconds=1.0) as cluster:
        cluster.deploy(MODEL)
        check_serves(cluster)
        assert cluster.client.wait_for_bundles(20.0)
        bob = cluster._servers["bob"].process
        bob.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        try:
            with pytest.raises(PeerError, match=r"bob at 127\.0\.0\.1:\d+"):
                cluster.infer(X)
            assert time.monotonic() - began < 10
        finally:
            bob.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_a_server_told_to_stop_exits_with_0(cluster: LocalCluster) -> None:
    assert cluster.stop("carol") == 0
    cluster.start("carol")
    check_serves(cluster)


def test_a_taken_port_is_said_at_once(cluster: LocalCluster) -> None:
    with pytest.raises(PeerLost, match=r"alice ended with status 2 .*cannot listen on .*in use"):
        running = cluster._servers["alice"]
        try:
            cluster.start("alice")
        finally:
            cluster._servers["alice"].stop(time.monotonic() + 5)
            cluster._servers["alice"] = running


@needs_proc
def test_no_server_outlives_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from mpcserve.serving.cluster import LocalCluster\n"
        "cluster = LocalCluster()\n"
        "print(*(s.process.pid for s in cluster._servers.values()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=Path(mpcserve.__file__).parent.parent,
    )
    pids = [int(word) for word in ended.stdout.split()]
    assert len(pids) == 3, ended.stderr
    await_gone(pids)


def test_a_server_imports_neither_onnx_nor_the_compiler() -> None:
    script = (
        "import sys, mpcserve.serving.party\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('onnx', 'onnxruntime')"
        " or m.startswith('mpcserve.compiler')]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, mpcserve\n"
        "assert set(dir(mpcserve)) >= {'compile', 'local_cluster', 'Client', 'simulate'}\n"
        "assert not {'numpy', 'numba', 'onnx', 'cryptography'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_every_public_name_can_be_had() -> None:
    for name in mpcserve.__all__:
        assert getattr(mpcserve, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mpcserve.nothing  # noqa: B018
