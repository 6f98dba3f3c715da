"""Ids that are in both ledgers ahead: each is used once, over one link, for one deployment."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mpcserve.errors import MpcError, Refused
from mpcserve.serving.ledger import Ledger
from mpcserve.serving.reserve import FULL, MOST, Reserve
from tests.serving_support import (
    Trio,
    as_model,
    dense_relu,
    dense_relu_plan,
    dense_weights,
    some_rows,
    until,
)

A, B = b"a" * 16, b"b" * 16
PLAN = dense_relu_plan()
WEIGHTS = dense_weights(PLAN)
X = some_rows(PLAN, 2)


def test_an_id_comes_out_once_in_order_for_its_deployment_and_link() -> None:
    reserve = Reserve()
    reserve.put(A, "link", [b"1", b"2", b"3"])
    assert reserve.take(B, "link") is None and reserve.take(A, "other") is None
    assert reserve.take(A, "link") == b"1"
    assert not reserve.redeem(A, "link", b"1") and not reserve.redeem(B, "link", b"2")
    assert not reserve.redeem(A, "other", b"2")
    assert reserve.redeem(A, "link", b"2") and not reserve.redeem(A, "link", b"2")
    assert reserve.take(A, "link") == b"3" and reserve.take(A, "link") is None


def test_ids_go_with_their_link_and_their_deployment() -> None:
    reserve = Reserve()
    for deployment, link in ((A, "old"), (A, "new"), (B, "new")):
        reserve.put(deployment, link, [deployment + link.encode()])
    reserve.drop("old")
    reserve.remove(B)
    assert len(reserve) == 1 and reserve.take(A, "new") is not None


def test_more_are_wanted_when_half_is_used_up() -> None:
    reserve = Reserve()
    assert reserve.wanted(A, "link") == FULL
    reserve.put(A, "link", [bytes([k]) for k in range(FULL)])
    wanted = []
    while reserve.take(A, "link"):
        wanted.append(reserve.wanted(A, "link"))
    assert wanted == [0] * (FULL // 2 - 1) + [*range(FULL // 2, FULL + 1)]


def test_of_many_threads_each_has_its_own() -> None:
    reserve = Reserve()
    reserve.put(A, "link", [bytes([k]) for k in range(200)])
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda _: reserve.take(A, "link"), range(200)))
    assert len(set(taken)) == 200 and None not in taken


@pytest.fixture
def trio(tmp_path: Path) -> Trio:
    made = Trio(tmp_path, depth=0)
    made.client().deploy(as_model(PLAN, WEIGHTS))
    return made


@pytest.mark.slow
def test_requests_use_reserved_ids_and_more_are_drawn(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    admitted: list[bytes] = []
    admit = Ledger.admit

    def watched(self: Ledger, bundle: bytes, deployment: bytes) -> None:
        admitted.append(bundle)
        admit(self, bundle, deployment)

    monkeypatch.setattr(Ledger, "admit", watched)
    try:
        alice, bob = trio.servers["alice"], trio.servers["bob"]
        client = trio.client()
        client.infer(X)
        assert len(admitted) == 2 and len(set(admitted)) == 1  # there was none yet
        for _ in range(2 * FULL):
            until(lambda: len(alice.reserve) > 0)
            y = client.infer(X)
            assert np.abs(y - dense_relu(X, WEIGHTS)).max() < 2.0**-8
        assert len(admitted) == 2
        until(lambda: len(alice.reserve) == len(bob.reserve) > FULL // 2)
        assert alice.ledger.counts() == bob.ledger.counts() == (2 * FULL + 1, 2 * FULL + 1)
    finally:
        trio.close()


@pytest.mark.slow
@pytest.mark.parametrize("role", ["alice", "bob"])
def test_what_is_reserved_is_gone_with_the_link(trio: Trio, role: str) -> None:
    try:
        for _ in range(2):
            trio.client().infer(X)
            until(lambda: len(trio.servers["alice"].reserve) > 0)
        left = [
            id
            for server in ("alice", "bob")
            for ids in trio.servers[server].reserve._ids.values()
            for id in ids
        ]
        trio.sever(role)
        trio.restart(role)
        trio.wait_up()
        client = trio.client()
        y = client.infer(X)
        assert np.abs(y - dense_relu(X, WEIGHTS)).max() < 2.0**-8
        for server in ("alice", "bob"):
            for id in left:
                with pytest.raises(Refused, match="dealt before"):
                    trio.servers[server].ledger.admit(id, bytes(16))
    finally:
        trio.close()


@pytest.mark.slow
def test_bob_does_not_hold_any_number_of_ids(trio: Trio) -> None:
    try:
        bob = trio.servers["bob"]
        deployment = next(iter(bob.store)).id
        bob.reserve.put(deployment, "link", [k.to_bytes(16, "big") for k in range(MOST)])
        trio.servers["alice"]._fill_reserve(deployment)
        assert not len(trio.servers["alice"].reserve) and len(bob.reserve) == MOST
        y = trio.client().infer(X)  # without any
        assert np.abs(y - dense_relu(X, WEIGHTS)).max() < 2.0**-8
    except MpcError as error:
        pytest.fail(str(error))
    finally:
        trio.close()
