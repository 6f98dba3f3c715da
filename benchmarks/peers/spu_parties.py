"""SPU on three processes over loopback, ABY3, 64-bit ring: one program of `program.py`.

    python spu_parties.py PROGRAM.npz RUNS        (in SPU's environment)

Input and weights are secret; what is timed goes from shared input to shared output. Images are
laid out channels last, as SPU prefers. The bytes are those of SPU's own profile of a first run,
which is not timed.
"""

import json
import multiprocessing
import os
import re
import socket
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import spu.utils.frontend as frontend
from jax import lax
from spu import Io, Runtime, libspu

PARTIES = 3
TIMEOUT_MS = 3_600_000
PROFILE = re.compile(r"total send bytes (\d+).*?send actions (\d+)", re.S)


def main():
    archive = np.load(sys.argv[1], allow_pickle=False)
    program, runs = json.loads(str(archive["program"])), int(sys.argv[2])
    names, values = arguments(program, archive)
    executable = compiled(program, names, values)
    io = Io(PARTIES, config())
    shares = [io.make_shares(v, libspu.Visibility.VIS_SECRET) for v in values]
    addresses = free_addresses()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    parties = [
        context.Process(
            target=party,
            args=(rank, addresses, executable.SerializeToString(), runs, queue),
            kwargs={"names": names, "shares": [s[rank] for s in shares]},
        )
        for rank in range(PARTIES)
    ]
    for process in parties:
        process.start()
    reports = sorted((queue.get() for _ in parties), key=lambda r: r["rank"])
    for process in parties:
        process.join()
    result = io.reconstruct([r["output"] for r in reports])
    seconds = [max(r["seconds"][k] for r in reports) for k in range(runs)]
    print(json.dumps(summary(seconds, reports, result, archive["expected"])))


def arguments(program, archive):
    """Names and arrays of input and weights; images and kernels with their channels last."""
    found = {}
    for name in program["inputs"]:
        x = archive[f"input/{name}"]
        found[name] = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
    for step in program["steps"]:
        for name in step["weights"]:
            w = archive[f"weight/{name}"]
            found[name] = w.transpose(2, 3, 1, 0) if w.ndim == 4 else w
    return list(found), [np.ascontiguousarray(v) for v in found.values()]


def compiled(program, names, values):
    def evaluate(*args):
        known = dict(zip(names, args, strict=True))
        for step in program["steps"]:
            operands = [known[n] for n in step["inputs"]]
            known[step["output"]] = OPS[step["op"]](
                step, *operands, *(known[n] for n in step["weights"])
            )
        return known[program["output"]]

    executable, _ = frontend.compile(
        frontend.Kind.JAX,
        evaluate,
        values,
        {},
        names,
        [libspu.Visibility.VIS_SECRET] * len(names),
        lambda outputs: [f"out{k}" for k in range(len(outputs))],
    )
    return executable


def conv(step, x, w, bias=None):
    y = lax.conv_general_dilated(
        x, w, step["stride"], [(step["pad"],) * 2] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y if bias is None else y + bias


def max_pool(step, x):
    # The values are behind a Relu: 0 is as good as −∞ beyond the edge.
    pad = (step["pad"],) * 2
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0))) if step["pad"] else x
    window, stride = (1, *step["kernel"], 1), (1, *step["stride"], 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, stride, "VALID")


def flatten(step, x):
    x = x.transpose(0, 3, 1, 2) if x.ndim == 4 else x
    return x.reshape(x.shape[0], -1)


def reshape(step, x):
    shape = [x.shape[k] if d == 0 else d for k, d in enumerate(step["shape"])]
    return x.reshape(shape)


def layer_norm(step, x, gain, bias):
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * lax.rsqrt(variance + step["epsilon"]) * gain + bias


OPS = {
    "Reshape": reshape,
    "Transpose": lambda step, x: x.transpose(step["perm"]),
    "Mul": lambda step, x: x * step["factor"],
    "Softmax": lambda step, x: jax.nn.softmax(x, axis=-1),
    # The approximation by tanh, as SPU's own examples use it: erf costs it more.
    "Gelu": lambda step, x: jax.nn.gelu(x, approximate=True),
    "LayerNormalization": layer_norm,
    "Conv": conv,
    "Gemm": lambda step, x, w, b: x @ w + b,
    "MatMul": lambda step, a, b: a @ b,
    "Relu": lambda step, x: jnp.maximum(x, 0),
    "Add": lambda step, a, b: a + b,
    "MaxPool": max_pool,
    "GlobalAveragePool": lambda step, x: x.mean((1, 2), keepdims=True),
    "Flatten": flatten,
}


def config():
    return libspu.RuntimeConfig(protocol=libspu.ProtocolKind.ABY3, field=libspu.FieldType.FM64)


def party(rank, addresses, code, runs, queue, *, names, shares):
    """One process of the protocol."""
    desc = libspu.link.Desc()
    desc.recv_timeout_ms = TIMEOUT_MS
    for k, address in enumerate(addresses):
        desc.add_party(f"p{k}", address)
    link = libspu.link.create_brpc(desc, rank)
    executable = libspu.Executable()
    executable.ParseFromString(code)
    sent, sends = profiled(link, executable, names, shares)
    runtime = prepared(link, config(), names, shares)
    seconds, cpu = [], []
    for _ in range(runs):
        link.barrier()
        began, busy = time.perf_counter(), time.process_time()
        runtime.run(executable)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - busy)
    output = runtime.get_var(executable.output_names[0])
    link.barrier()
    queue.put(
        {
            "rank": rank,
            "seconds": seconds,
            "cpu": statistics.median(cpu),
            "sent": sent,
            "sends": sends,
            "output": output,
        }
    )


def prepared(link, settings, names, shares):
    """A runtime that holds this party's shares."""
    runtime = Runtime(link, settings)
    for name, share in zip(names, shares, strict=True):
        runtime.set_var(name, share)
    return runtime


def profiled(link, executable, names, shares):
    """Bytes and sends of a run that warms up, as SPU's profile says on its standard output."""
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(fd) for fd in (1, 2)]
        for fd in (1, 2):
            os.dup2(file.fileno(), fd)
        settings = config()
        settings.enable_pphlo_profile = True
        prepared(link, settings, names, shares).run(executable)
        for fd, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, fd)
        file.seek(0)
        found = PROFILE.search(file.read().decode(errors="replace"))
    return (int(found[1]), int(found[2])) if found else (None, None)


def free_addresses():
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(PARTIES)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def summary(seconds, reports, result, expected):
    sent = [r["sent"] for r in reports]
    return {
        "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "cpu_seconds": [r["cpu"] for r in reports],
        "sent_bytes": None if None in sent else sum(sent),
        "sends": reports[0]["sends"],
        "max_abs_error": float(np.abs(result - expected).max()),
    }


if __name__ == "__main__":
    main()
