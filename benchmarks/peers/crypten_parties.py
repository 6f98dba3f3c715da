"""CrypTen on two processes over loopback: one program of `program.py`.

    python crypten_parties.py PROGRAM.npz RUNS        (in CrypTen's environment)

Input and weights are secret; what is timed goes from shared input to shared output. Triples come
from CrypTen's default provider, the first party. The bytes are those of CrypTen's own counters;
each party counts what it sends and what it receives, so half their sum was sent. They count the
first run, which is not timed.
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import types

import numpy as np
import torch
import torch.onnx

# CrypTen imports this part of older versions of torch for its ONNX converter, which is not used.
sys.modules["torch.onnx._internal.registration"] = types.ModuleType("registration")
sys.modules["torch.onnx._internal.registration"].registry = None

import crypten  # noqa: E402
import crypten.communicator  # noqa: E402

PARTIES = 2


def main():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        parties = [
            context.Process(
                target=party, args=(rank, meeting, sys.argv[1], int(sys.argv[2]), queue)
            )
            for rank in range(PARTIES)
        ]
        for process in parties:
            process.start()
        reports = sorted((queue.get() for _ in parties), key=lambda r: r["rank"])
        for process in parties:
            process.join()
    seconds = [max(pair) for pair in zip(*(r["seconds"] for r in reports), strict=True)]
    result = {
        "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "cpu_seconds": [r["cpu"] for r in reports],
        "sent_bytes": sum(r["bytes"] for r in reports) // 2,
        "sends": reports[0]["rounds"],
        "max_abs_error": reports[0]["error"],
    }
    print(json.dumps(result))


def party(rank, meeting, path, runs, queue):
    """One process of the protocol."""
    os.environ |= {
        "WORLD_SIZE": str(PARTIES),
        "RANK": str(rank),
        "RENDEZVOUS": meeting,
        "DISTRIBUTED_BACKEND": "gloo",
    }
    torch.set_num_threads(1)
    crypten.init()
    archive = np.load(path, allow_pickle=False)
    program = json.loads(str(archive["program"]))
    shared = {n: share(archive[f"input/{n}"]) for n in program["inputs"]}
    weights = {n: share(archive[f"weight/{n}"]) for s in program["steps"] for n in s["weights"]}
    communicator = crypten.communicator.get()
    seconds, cpu = [], []
    crypten.cfg.communicator.verbose = True
    communicator.reset_communication_stats()
    result = evaluate(program, {**shared, **weights})
    stats = communicator.get_communication_stats()
    crypten.cfg.communicator.verbose = False  # counting costs time
    for _ in range(runs):
        communicator.barrier()
        began, busy = time.perf_counter(), time.process_time()
        evaluate(program, {**shared, **weights})
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - busy)
    plain = result.get_plain_text().numpy()
    queue.put(
        {
            "rank": rank,
            "seconds": seconds,
            "cpu": statistics.median(cpu),
            "bytes": int(stats["bytes"]),
            "rounds": int(stats["rounds"]),
            "error": float(np.abs(plain - archive["expected"]).max()),
        }
    )


def share(array):
    return crypten.cryptensor(torch.from_numpy(array), src=0)


def evaluate(program, known):
    known = dict(known)
    with crypten.no_grad():
        for step in program["steps"]:
            operands = [known[n] for n in (*step["inputs"], *step["weights"])]
            known[step["output"]] = OPS[step["op"]](step, *operands)
    return known[program["output"]]


def conv(step, x, w, bias=None):
    y = x.conv2d(w, stride=tuple(step["stride"]), padding=step["pad"])
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def reshape(step, x):
    return x.reshape([x.shape[k] if d == 0 else d for k, d in enumerate(step["shape"])])


def gelu(step, x):
    return x * ((x * (0.5**0.5)).erf() + 1) * 0.5


def layer_norm(step, x, gain, bias):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred * (variance + step["epsilon"]).inv_sqrt() * gain + bias


OPS = {
    "Reshape": reshape,
    "Transpose": lambda step, x: x.permute(*step["perm"]),
    "Mul": lambda step, x: x * step["factor"],
    "Softmax": lambda step, x: x.softmax(-1),
    "Gelu": gelu,
    "LayerNormalization": layer_norm,
    "Conv": conv,
    "Gemm": lambda step, x, w, b: x.matmul(w) + b,
    "MatMul": lambda step, x, w: x.matmul(w),
    "Relu": lambda step, x: x.relu(),
    "Add": lambda step, a, b: a + b,
    "MaxPool": lambda step, x: x.max_pool2d(
        tuple(step["kernel"]), padding=step["pad"], stride=tuple(step["stride"])
    ),
    "GlobalAveragePool": lambda step, x: x.mean((2, 3), keepdim=True),
    "Flatten": lambda step, x: x.flatten(start_dim=1),
}


if __name__ == "__main__":
    main()
