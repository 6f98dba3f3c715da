"""The servers and the client in one process, over plain TCP: what they promise each other."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpcserve.errors import MpcError, Refused, WireError
from mpcserve.plan import Plan, bill_of
from mpcserve.protocol import Bundle
from mpcserve.serving.alice import Alice
from mpcserve.serving.bob import Bob
from mpcserve.serving.client import Client
from mpcserve.serving.links import Wiring
from mpcserve.serving.together import Member
from mpcserve.transport import Hooks
from tests.serving_support import (
    Trio,
    as_model,
    dense_relu,
    dense_relu_plan,
    dense_weights,
    some_rows,
    until,
)

PLAN = dense_relu_plan()
WEIGHTS = dense_weights(PLAN)
MODEL = as_model(PLAN, WEIGHTS)
ULP = 2.0**-8
NOBODY = Member(None)
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    trio = Trio(tmp_path_factory.mktemp("state"))
    trio.client().deploy(MODEL)
    yield trio
    trio.close()


@pytest.fixture(scope="module")
def client(trio: Trio) -> Client:
    return trio.client()


def ask(trio: Trio, role: str, server: str, message: dict[str, Any]) -> dict[str, Any]:
    """Say one thing to a server as `role`, and return its answer."""
    wiring = Wiring(trio.config, role, insecure_plaintext=True)
    with wiring.connect(server, Hooks()) as link:
        channel = link.channel(secrets.token_bytes(16))
        channel.send_message(message)
        return channel.receive_message("an answer", 20.0)


def test_an_inference_is_right_and_costs_its_bill(client: Client) -> None:
    x = some_rows(PLAN, PLAN.batch)
    outputs, report = client.infer_report(x)
    assert np.abs(outputs["y"] - dense_relu(x, WEIGHTS)).max() < ULP
    bill = bill_of(PLAN)
    assert report["bytes"] == bill.bytes
    assert (report["rounds"], report["dealt_bytes"]) == (bill.rounds, bill.dealt_bytes)


def test_a_report_says_what_is_promised(client: Client) -> None:
    _, report = client.infer_report(some_rows(PLAN, PLAN.batch))
    assert report["model"] == "dense" and report["plan_digest"] == PLAN.digest
    assert (report["ring_bits"], report["batch"], report["evaluations"]) == (40, 2, 1)
    seconds = report["seconds"]
    assert 0 < seconds["evaluation"] < seconds["online"] <= seconds["total"]
    assert report["seconds"]["preprocessing"] > 0
    for role in ("alice", "bob", "carol"):
        assert report["cpu_seconds"][role] > 0 and report["peak_rss_bytes"][role] > 1 << 20
    assert report["overhead_bytes"].keys() == report["bytes"].keys()


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_any_number_of_rows_is_split_into_batches(client: Client, rows: int) -> None:
    x = some_rows(PLAN, rows)
    outputs, report = client.infer_report(x)
    assert outputs["y"].shape == (rows, 4) and outputs["y"].dtype == np.float32
    assert np.abs(outputs["y"] - dense_relu(x, WEIGHTS)).max() < ULP
    evaluations = -(-rows // PLAN.batch)
    assert report["evaluations"] == evaluations
    assert report["rounds"] == evaluations * bill_of(PLAN).rounds


def test_one_output_comes_as_an_array_and_an_input_may_be_named(client: Client) -> None:
    x = some_rows(PLAN, 2)
    assert isinstance(client.infer(x), np.ndarray)
    assert isinstance(client.infer({"x": x}), np.ndarray)


def test_models_lists_what_is_deployed(client: Client) -> None:
    (model,) = client.models()
    assert model["name"] == "dense" and model["digest"] == PLAN.digest
    assert model["inputs"] == [["x", "float32", [2, 6]]]


def test_an_unknown_model_is_refused_with_those_deployed(client: Client) -> None:
    with pytest.raises(Refused, match=r"alice at .*no model 'cat' is deployed; deployed: dense"):
        client.infer(some_rows(PLAN, 2), model="cat")


def test_what_alice_refuses_does_not_wait_at_bob(trio: Trio, client: Client) -> None:
    plan = client.plan()
    client._plans["cat"] = ("cat", plan)  # so that only the servers know better
    for _ in range(20):  # more than may wait
        with pytest.raises(Refused, match=r"alice at .*no model 'cat' is deployed"):
            client.infer(some_rows(PLAN, 2), model="cat")
        client._plans["cat"] = ("cat", plan)
    bob = trio.servers["bob"]
    until(lambda: len(bob.meeting) == 0, trio.config.deadlines.round / 2)


def test_a_name_is_deployed_once(client: Client) -> None:
    with pytest.raises(Refused, match=r"'dense' is deployed already") as caught:
        client.deploy(MODEL)
    assert "--replace" in caught.value.hint
    assert len(client.models()) == 1


@pytest.mark.parametrize(
    ("role", "server", "kind", "expected"),
    [
        ("data-owner", "alice", "deploy", "model-owner"),
        ("data-owner", "bob", "deploy", "model-owner"),
        ("model-owner", "alice", "infer", "data-owner"),
        ("model-owner", "bob", "infer", "data-owner"),
        ("data-owner", "bob", "prepare", "alice"),
        ("data-owner", "bob", "evaluate", "alice"),
        ("carol", "bob", "stage", "alice"),
        ("carol", "bob", "prepare", "alice"),
        ("bob", "alice", "infer", "data-owner"),
    ],
)
def test_a_request_of_the_wrong_role_is_refused(
    trio: Trio, role: str, server: str, kind: str, expected: str
) -> None:
    if role in ("carol", "bob"):
        link = trio.servers[role].links.get(server)
        channel = link.channel(secrets.token_bytes(16))
        channel.send_message({"type": kind})
        with pytest.raises(Refused, match=rf"{kind} is for {expected}, .*{role}'s"):
            channel.receive_message("an answer", 20.0)
    else:
        with pytest.raises(Refused, match=rf"{kind} is for {expected}, .*{role}'s"):
            ask(trio, role, server, {"type": kind})


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"type": 3},
        {"type": "infer"},
        {"type": "infer", "model": 5, "digest": []},
        {"type": "await-bundles", "seconds": "soon"},
        {"type": "plan", "model": {"a": 1}},
    ],
)
def test_a_malformed_request_is_told_what_is_wrong(
    trio: Trio, client: Client, message: dict[str, Any]
) -> None:
    with pytest.raises(WireError, match=r"expected|knows no request"):
        ask(trio, "data-owner", "alice", message)
    client.infer(some_rows(PLAN, 2))


def test_a_stale_plan_is_refused_with_both_digests_and_fetched_anew(trio: Trio) -> None:
    client = trio.client()
    x = some_rows(PLAN, 2)
    client.deploy(MODEL, name="changing")
    client.infer(x, model="changing")
    wider = dense_relu_plan("dense", batch=3)
    trio.client().deploy(as_model(wider, WEIGHTS), name="changing", replace=True)
    with pytest.raises(Refused, match=PLAN.digest) as caught:
        client.infer(x, model="changing")
    assert wider.digest in caught.value.message
    assert np.abs(client.infer(x, model="changing") - dense_relu(x, WEIGHTS)).max() < ULP


def test_redeploying_draws_new_masks_and_retires_the_old_ones(trio: Trio) -> None:
    client, alice, bob = trio.client(), trio.servers["alice"], trio.servers["bob"]
    assert isinstance(alice, Alice) and isinstance(bob, Bob)

    def masked() -> tuple[bytes, bytes]:
        deployment = alice.store.find("again")
        return deployment.id, dict(alice.store.weights(deployment))["w"]

    client.deploy(MODEL, name="again")
    old_id, old = masked()
    other = dense_weights(PLAN, seed=5)
    client.deploy(as_model(PLAN, other), name="again", replace=True)
    new_id, new = masked()
    assert old_id != new_id and old != new
    for server in (alice, bob):
        with pytest.raises(Refused):
            server.live(old_id)
        assert old_id not in {d.id for d in server.store}
    x = some_rows(PLAN, 2)
    assert np.abs(client.infer(x, model="again") - dense_relu(x, other)).max() < ULP


def test_requests_run_side_by_side(trio: Trio) -> None:
    inputs = [some_rows(PLAN, 2, seed=s) for s in range(12)]
    clients = [trio.client() for _ in range(3)]

    def infer(k: int) -> np.ndarray[Any, Any]:
        y = clients[k % 3].infer(inputs[k], model="dense")
        assert isinstance(y, np.ndarray)
        return y

    with ThreadPoolExecutor(3) as threads:
        outputs = list(threads.map(infer, range(12)))
    for x, y in zip(inputs, outputs, strict=True):
        assert np.abs(y - dense_relu(x, WEIGHTS)).max() < ULP


def test_servers_tell_how_they_are(client: Client) -> None:
    stats = client.stats()
    assert stats["alice"]["peers"] == {"bob": True, "carol": True}
    assert stats["bob"]["peers"] == {"alice": True, "carol": True}
    assert stats["alice"]["requests"]["served"] > 0
    assert stats["alice"]["bundles"]["dealt"] >= stats["alice"]["bundles"]["spent"] > 0


def test_the_pool_can_be_waited_for(trio: Trio, client: Client) -> None:
    assert client.wait_for_bundles(20.0)
    assert client.stats()["alice"]["pool"]["dense"] == trio.config.pool.depth


def test_every_bundle_is_spent_on_both_sides_or_still_in_stock(trio: Trio, client: Client) -> None:
    client.infer(some_rows(PLAN, 3), model="dense")
    assert client.wait_for_bundles(20.0)
    alice, bob = trio.servers["alice"], trio.servers["bob"]
    assert isinstance(alice, Alice) and isinstance(bob, Bob)
    stock = sum(alice.pool.ready(d.id) for d in alice.store)
    assert len(bob.shelf) == stock
    until(lambda: not bob.meeting)


def test_deployments_survive_a_restart(tmp_path: Path) -> None:
    first = Trio(tmp_path)
    first.client().deploy(MODEL)
    first.close()
    second = Trio(tmp_path)
    try:
        x = some_rows(PLAN, 2)
        y = second.client().infer(x)
        assert np.abs(y - dense_relu(x, WEIGHTS)).max() < ULP
    finally:
        second.close()


def test_too_many_requests_are_refused(tmp_path: Path) -> None:
    trio = Trio(tmp_path, depth=0)
    try:
        client = trio.client()
        client.deploy(MODEL)
        alice = trio.servers["alice"]
        assert isinstance(alice, Alice)
        with (
            ThreadPoolExecutor(4) as threads,
            alice.gate.enter(NOBODY, 1.0),
            alice.gate.enter(NOBODY, 1.0),
        ):
            waiting = [threads.submit(client.infer, some_rows(PLAN, 2)) for _ in range(2)]
            until(lambda: alice.gate.counts == (2, 2))
            with pytest.raises(Refused, match="busy: 2 evaluations run and 2 requests wait"):
                client.infer(some_rows(PLAN, 2))
            assert not any(w.done() for w in waiting)
        for w in waiting:
            w.result(20.0)
    finally:
        trio.close()


def test_draining_lets_a_request_finish_and_takes_no_other(tmp_path: Path) -> None:
    trio = Trio(tmp_path, depth=0)
    try:
        client = trio.client()
        client.deploy(MODEL)
        alice = trio.servers["alice"]
        assert isinstance(alice, Alice)
        with ThreadPoolExecutor(1) as threads:
            with alice.gate.enter(NOBODY, 1.0), alice.gate.enter(NOBODY, 1.0):
                running = threads.submit(client.infer, some_rows(PLAN, 2))
                until(lambda: alice.gate.counts[1] > 0)
                assert not alice.drain(0.05)
            assert alice.drain(20.0)
            running.result(20.0)
        with pytest.raises(Refused, match="alice is shutting down"):
            client.infer(some_rows(PLAN, 2))
    finally:
        trio.close()


def test_no_log_line_holds_a_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trio = Trio(tmp_path)
    try:
        client = trio.client()
        with caplog.at_level("DEBUG", "mpcserve"):
            client.deploy(MODEL)
            client.infer(some_rows(PLAN, 2))
            with pytest.raises(MpcError):
                client.infer(some_rows(PLAN, 2), model="other")
        deployed = trio.servers["alice"].store.find("dense")
        text = caplog.text
        assert text
        for key in deployed.keys.values():
            assert key.hex() not in text and repr(key) not in text
    finally:
        trio.close()


def test_a_plan_without_rows_in_common_is_served_whole(tmp_path: Path) -> None:
    plan = _summing_plan()
    trio = Trio(tmp_path)
    try:
        client = trio.client()
        client.deploy(as_model(plan, {}))
        x = some_rows(plan, 2)
        y = client.infer(x)
        assert np.abs(y - x.sum(axis=0)).max() < ULP
        with pytest.raises(MpcError, match=r"expected shape \[2, 6\], got \[3, 6\]"):
            client.infer(some_rows(plan, 3))
        with pytest.MonkeyPatch.context() as patch:  # there is no first round to wait for
            patch.setattr(Bundle, "input_tag", lambda *_: str(threading.get_ident()))
            with pytest.raises(Refused, match="different inputs"):
                client.infer(x)
    finally:
        trio.close()


def _summing_plan() -> Plan:
    from dataclasses import replace
    from types import MappingProxyType

    from mpcserve.plan import Instruction, OutputSpec, Value

    x = PLAN[0]
    total = Value((6,), x.value.width, x.value.frac_bits, x.value.bound + 1)
    instructions = (x, Instruction(1, "sum", (0,), total, MappingProxyType({"axes": [0]}), "sum"))
    outputs = (OutputSpec("total", 1, "float32", (6,)),)
    return replace(PLAN, name="sum", instructions=instructions, outputs=outputs)


def test_threads_end_with_their_servers(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    trio = Trio(tmp_path)
    client = trio.client()
    client.deploy(MODEL)
    client.infer(some_rows(PLAN, 2))
    trio.close()
    # Not by joining: one that was about to connect again may just be starting.
    until(lambda: set(threading.enumerate()) <= before)


@pytest.mark.parametrize("name", ["two\nlines", "x" * 201])
def test_a_name_that_would_spoil_a_log_is_refused(client: Client, name: str) -> None:
    with pytest.raises(Refused, match="printable characters"):
        client.deploy(MODEL, name=name)
