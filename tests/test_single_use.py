"""On live servers no key stream is opened twice, over retries, lost peers and restarts."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest

from mpcserve import randomness
from mpcserve.errors import MpcError
from mpcserve.plan.plan import Plan
from tests.serving_support import Trio, as_model, dense_relu_plan, dense_weights, some_rows

HOLDERS_OF_A_BUNDLE = 2
"""carol and one server expand every stream of a bundle; of an input's mask the owner is a third."""


def fixed_streams(plan: Plan) -> int:
    """Weight masks belong to the deployment and are expanded again by every restart."""
    return len(plan.weights)


@pytest.mark.slow
def test_no_stream_of_a_bundle_is_opened_twice_over_retries_crashes_and_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Counter[bytes] = Counter()
    lock = threading.Lock()
    original = randomness.Stream.__init__

    def watch(self: randomness.Stream, seed: bytes) -> None:
        with lock:
            opened[seed] += 1
        original(self, seed)

    monkeypatch.setattr(randomness.Stream, "__init__", watch)
    plan = dense_relu_plan()
    trio = Trio(tmp_path, depth=2)
    try:
        client = trio.client()
        client.deploy(as_model(plan, dense_weights(plan)), name="dense")
        for role in ("bob", "carol", "alice"):
            client.infer(some_rows(plan, 2), model="dense")
            trio.sever(role)
            with pytest.raises(MpcError):
                for _ in range(4):
                    client.infer(some_rows(plan, 2), model="dense")
            trio.restart(role)
            client.close()
            client = trio.client()
            client.infer(some_rows(plan, 2), model="dense")
    finally:
        trio.close()
    # an input's mask: carol, one server and the owner
    inputs_and_bundles = HOLDERS_OF_A_BUNDLE + len(plan.inputs)
    often = [n for n in opened.values() if n > inputs_and_bundles]
    # weight masks, one seed from carol and alice and one from carol and bob
    assert len(often) <= 2 * fixed_streams(plan)
    assert len(opened) > 20
