"""Images per second: several clients at once, several images to a batch.

    python benchmarks/throughput.py [--batches 1 8 32] [--clients 1 4 16] [--json FILE]

Three processes over TLS on loopback, and one process of clients, each with links of its own, that
ask again as soon as they have an answer. Nothing is dealt ahead, so the rate is one that lasts. Of
each process the CPU seconds per image are given beside the rate: those do not change with what else
the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mpcserve.compiler import compile_model
from mpcserve.serving import Client, LocalCluster

MODELS = Path(__file__).resolve().parent.parent / "models"
SERVERS = ("alice", "bob", "carol")
SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Rate:
    """`cpu_ms`: per process and image. `busy`: cores in use. `latency_ms`: median and 95 %."""

    batch: int
    clients: int
    images: int
    seconds: float
    images_per_second: float
    latency_ms: tuple[float, float]
    cpu_ms: Mapping[str, float]
    busy: float


def main() -> None:
    """Measure, print, write."""
    options = _options()
    print(f"{options.model.name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print("batch  clients  images/s  median ms  95 % ms  cores  CPU ms per image")
    rates = []
    for batch in options.batches:
        for rate in measure(options, batch):
            rates.append(rate)
            cpu = ", ".join(f"{who} {ms:.1f}" for who, ms in rate.cpu_ms.items())
            print(
                f"{rate.batch:5d} {rate.clients:8d} {rate.images_per_second:9.1f} "
                f"{rate.latency_ms[0]:10.1f} {rate.latency_ms[1]:8.1f} {rate.busy:6.2f}  {cpu}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps([asdict(rate) for rate in rates], indent=1))


def measure(options: argparse.Namespace, batch: int) -> list[Rate]:
    """All numbers of clients, on servers of their own."""
    compiled = compile_model(options.model, calibrate=options.calibrate, batch=batch)
    samples = np.load(options.samples)
    rows = np.resize(samples, (batch, *compiled.plan.inputs[0].shape[1:]))
    with LocalCluster(
        pool_depth=options.depth, network=options.network, seconds=SECONDS
    ) as cluster:
        cluster.deploy(compiled)
        clients = [
            Client(cluster.config, network=options.network) for _ in range(max(options.clients))
        ]
        try:
            for client in clients:
                client.infer(rows)
            return [
                _rate(cluster, clients[:count], rows, options.seconds) for count in options.clients
            ]
        finally:
            for client in clients:
                client.close()


def _rate(
    cluster: LocalCluster, clients: Sequence[Client], rows: NDArray[Any], seconds: float
) -> Rate:
    pids = {role: cluster._servers[role].process.pid for role in SERVERS} | {"clients": os.getpid()}
    before = {who: _cpu_seconds(pid) for who, pid in pids.items()}
    latencies: list[float] = []
    began = time.perf_counter()

    def ask(client: Client) -> None:
        asked = time.perf_counter()
        while asked < began + seconds:
            client.infer(rows)
            now = time.perf_counter()
            latencies.append(now - asked)
            asked = now

    threads = [threading.Thread(target=ask, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - began
    cpu = {who: _cpu_seconds(pid) - before[who] for who, pid in pids.items()}
    images = len(latencies) * len(rows)
    median, late = np.quantile(latencies, [0.5, 0.95])
    return Rate(
        batch=len(rows),
        clients=len(clients),
        images=images,
        seconds=wall,
        images_per_second=images / wall,
        latency_ms=(1000 * median, 1000 * late),
        cpu_ms={who: 1000 * s / images for who, s in cpu.items()},
        busy=sum(cpu.values()) / wall,
    )


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Images per second of a model on three servers.")
    parser.add_argument("--model", type=Path, default=MODELS / "mnist_cnn.onnx")
    parser.add_argument("--calibrate", type=Path, default=MODELS / "mnist_calibration.npy")
    parser.add_argument("--samples", type=Path, default=MODELS / "mnist_samples.npy")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--depth", type=int, default=0, help="of the pool (default 0)")
    parser.add_argument("--network", default="loopback", help="as of `mpcserve bench`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
