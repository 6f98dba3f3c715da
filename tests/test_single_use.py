"""On live servers no key stream is opened twice, over retries, lost peers and restarts."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mpcserve import randomness
from mpcserve.errors import MpcError
from mpcserve.plan.plan import Plan
from mpcserve.protocol import Bundle, ServerProgram
from mpcserve.serving import evaluation
from mpcserve.serving.ledger import Ledger
from mpcserve.transport import Channel
from tests.serving_support import (
    Trio,
    as_model,
    dense_relu_plan,
    dense_weights,
    some_rows,
    until,
)

HOLDERS_OF_A_BUNDLE = 2
"""carol and one server expand every stream of a bundle; of an input's mask the owner is a third."""


def fixed_streams(plan: Plan) -> int:
    """Weight masks belong to the deployment and are expanded again by every restart."""
    return len(plan.weights)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_bundle_is_in_the_ledger_before_a_seed_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    admitted: list[tuple[str, bytes]] = []
    left: list[tuple[str, bytes]] = []
    record, program, ready = Ledger._record, ServerProgram.bundle, evaluation.say_ready

    def slowly(self: Ledger, bundles: Sequence[bytes], *rest: Any) -> None:
        time.sleep(0.1)
        record(self, bundles, *rest)
        (_, _, path), *_ = self._database.execute("PRAGMA database_list")
        admitted.extend((Path(path).parent.name, bundle) for bundle in bundles)

    seeds_of: dict[bytes, bytes] = {}

    def made(self: ServerProgram, id: bytes, *rest: Any) -> Bundle:
        bundle = program(self, id, *rest)
        seeds_of[b"".join(bundle.input_seeds)] = id
        return bundle

    def watched(client: Channel, plan: Plan, seeds: Sequence[bytes]) -> None:
        id, role = seeds_of[b"".join(seeds)], client.link.session.role
        assert (role, id) in admitted
        left.append((role, id))
        ready(client, plan, seeds)

    monkeypatch.setattr(Ledger, "_record", slowly)
    monkeypatch.setattr(ServerProgram, "bundle", made)
    monkeypatch.setattr(evaluation, "say_ready", watched)
    plan = dense_relu_plan()
    trio = Trio(tmp_path, depth=depth)
    try:
        client = trio.client()
        client.deploy(as_model(plan, dense_weights(plan)), name="dense")
        client.infer(some_rows(plan, 2), model="dense")
        until(lambda: len(trio.servers["alice"].reserve) > 0)  # the others have reserved ids
        for _ in range(2):
            client.infer(some_rows(plan, 2), model="dense")
    finally:
        trio.close()
    assert len(set(left)) == len(left) == 6
    assert {role for role, _ in left} == {"alice", "bob"}


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
