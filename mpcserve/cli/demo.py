"""`mpcserve demo`: digits that no server sees, classified by a network that no server sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mpcserve.arrays import Array
    from mpcserve.cli.plaintext import Comparison

MODEL = "mnist_cnn"
PER_ROW = 5
DEADLINE = 300.0
"""Seconds for the randomness of one inference; two suffice."""

MAX_ERROR = 2.0**-8
"""Of a logit, absolute: sixteen fraction bits leave a few hundred ulp for all layers together."""


@dataclass(frozen=True, slots=True)
class DemoRun:
    """What the table shows."""

    images: Array
    labels: Array
    expected: Array
    got: Array
    report: Mapping[str, Any]


@click.command("demo")
def demo_command() -> None:
    """Classify real handwritten digits with three servers on this machine, and check every answer.

    Keys in a temporary directory, alice, bob and carol as three processes that speak mutual TLS on
    free loopback ports, the model owner's weights and the data owner's images shared among them.
    Exit 0 only if every prediction is that of onnxruntime and the error is within its bound.

    \b
    Example:
      mpcserve demo
    """
    from mpcserve.cli.signals import sigterm_interrupts

    with sigterm_interrupts():
        run = _run()
    _print(run)
    _judge(run)


def _run() -> DemoRun:
    from mpcserve.bundled import bundled
    from mpcserve.cli.arrays import load_one
    from mpcserve.cli.output import note, progress
    from mpcserve.cli.plaintext import Plaintext
    from mpcserve.compiler import compile_model

    path = bundled("models", f"{MODEL}.onnx")
    images = load_one(bundled("models", "mnist_samples.npy"))
    labels = load_one(bundled("models", "mnist_labels.npy"))
    calibrate = load_one(bundled("models", "mnist_calibration.npy"))
    plaintext = Plaintext(path)
    (expected,) = plaintext.run({plaintext.inputs[0].name: images})
    # Here first, so that the three servers find the compiled kernels in the cache.
    note("compiling the kernels (some seconds, the first time on this machine)")
    with progress("compiling the kernels"):
        from mpcserve.protocol import warm_up
        from mpcserve.serving import LocalCluster

        warm_up()
    note(f"compiling {path.name}")
    compiled = compile_model(path, calibrate=calibrate, batch=len(images))
    note("starting alice, bob and carol as three processes, with mutual TLS between them")
    with progress("starting alice, bob and carol"):
        cluster = LocalCluster(pool_depth=1)
    with cluster:
        note("the model owner shares the weights; carol deals the randomness of one inference")
        with progress("sharing the weights, dealing"):
            cluster.deploy(compiled)
            cluster.client.wait_for_bundles(DEADLINE)
        note(f"the data owner shares {len(images)} images; alice and bob classify them")
        outputs, report = cluster.client.infer_report(images)
    (got,) = outputs.values()
    return DemoRun(images, labels, expected, got, report)


def _print(run: DemoRun) -> None:
    from mpcserve.cli.output import table
    from mpcserve.cli.plaintext import predictions
    from mpcserve.cli.results import print_traffic, seconds_line
    from mpcserve.units import human_bytes

    mine, theirs = predictions(run.got), predictions(run.expected)
    assert mine is not None and theirs is not None
    for begin in range(0, len(run.images), PER_ROW):
        _print_row(run, slice(begin, begin + PER_ROW), mine, theirs)
    report = run.report
    print_traffic(report["bytes"], report.get("overhead_bytes"))
    comparison = _comparison(run)
    table(
        ("encrypted inference", ""),
        (
            ("rounds between alice and bob", report["rounds"]),
            ("dealt by carol before", human_bytes(report["dealt_bytes"])),
            ("seconds", seconds_line(report["seconds"])),
            ("largest error of a logit", f"{comparison.max_error:.2g} (allowed {MAX_ERROR:.2g})"),
            ("predictions as in the clear", f"{int((mine == theirs).sum())} of {len(mine)}"),
            ("predictions that are right", f"{int((mine == run.labels).sum())} of {len(mine)}"),
        ),
        left=2,
    )


def _print_row(run: DemoRun, rows: slice, mine: Array, theirs: Array) -> None:
    """A few images side by side, with what was predicted below each."""
    import numpy as np

    from mpcserve.cli.drawing import side_by_side

    images = [image.reshape(image.shape[-2:]) for image in run.images[rows]]
    width, label = images[0].shape[-1] // 4 * 2, 11
    errors = np.abs(run.got - run.expected)[rows].max(axis=1)
    for line in side_by_side(images):
        click.echo(" " * label + line)
    for name, cells in (
        ("encrypted", [str(k) for k in mine[rows]]),
        ("plaintext", [str(k) for k in theirs[rows]]),
        ("error", [f"{e:.1e}" for e in errors]),
    ):
        click.echo(f"{name:<{label}}" + "  ".join(f"{c:^{width}}" for c in cells).rstrip())
    click.echo()


def _comparison(run: DemoRun) -> Comparison:
    from mpcserve.cli.plaintext import compare

    return compare(run.got, run.expected)


def _judge(run: DemoRun) -> None:
    """Raises: PeerError when an answer is not the float model's."""
    from mpcserve.errors import PeerError

    comparison = _comparison(run)
    if comparison.top1 != 1.0 or not comparison.max_error <= MAX_ERROR:
        raise PeerError(
            f"the encrypted result differs: largest error {comparison.max_error:.3g}, "
            f"top-1 agreement {comparison.top1}",
            "this is a defect of mpcserve or of this installation; please report it",
        )
    click.echo("Every prediction is that of the network in the clear.")
