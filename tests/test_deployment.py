"""Deployments on disk: whole or not at all, across restarts, and private."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpcserve.errors import ConfigError, PeerLost, Refused
from mpcserve.serving.deployment import Deployment, Store, weight_sizes
from tests.serving_support import dense_relu_plan

PLAN = dense_relu_plan()
KEYS = {"carol": bytes(range(32)), "bob": bytes(range(32, 64))}
SIZE = sum(size for _, size in weight_sizes(PLAN))


def deployment(id: int, name: str = "dense", replaces: int | None = None) -> Deployment:
    old = bytes([replaces]) * 16 if replaces is not None else None
    return Deployment(bytes([id]) * 16, name, PLAN, KEYS, old)


def deploy(store: Store, id: int, name: str = "dense", replaces: int | None = None) -> Deployment:
    store.stage(deployment(id, name, replaces), [bytes([id]) * SIZE])
    return store.commit(bytes([id]) * 16)


def test_a_deployment_survives_a_restart(tmp_path: Path) -> None:
    deploy(Store(tmp_path), 1)
    again = Store(tmp_path)
    found = again.find("dense")
    assert found == deployment(1)
    assert dict(again.weights(found)) == {"w": b"\x01" * SIZE}


def test_a_staged_deployment_is_not_in_use_and_survives_a_restart(tmp_path: Path) -> None:
    Store(tmp_path).stage(deployment(1), [bytes(SIZE)])
    again = Store(tmp_path)
    assert len(again) == 0
    assert [d.name for d in again.settle({b"\x01" * 16})] == ["dense"]
    assert again.find("dense").id == b"\x01" * 16


def test_what_alice_did_not_commit_is_discarded(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.stage(deployment(1), [bytes(SIZE)])
    assert store.settle({b"\x02" * 16}) == []
    with pytest.raises(Refused, match="not staged"):
        store.commit(b"\x01" * 16)
    assert list(tmp_path.iterdir()) == []


def test_a_deployment_replaces_the_one_it_names(tmp_path: Path) -> None:
    store = Store(tmp_path)
    deploy(store, 1)
    deploy(store, 2, replaces=1)
    assert [d.id for d in store] == [b"\x02" * 16]
    assert [d.id for d in Store(tmp_path)] == [b"\x02" * 16]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_crash_between_commit_and_retirement_leaves_the_new_one(tmp_path: Path) -> None:
    deploy(Store(tmp_path), 1)
    store = Store(tmp_path)
    store.stage(deployment(2, replaces=1), [bytes(SIZE)])
    (tmp_path / f"{'02' * 16}.staged").rename(tmp_path / ("02" * 16))
    assert [d.id for d in Store(tmp_path)] == [b"\x02" * 16]


def test_an_owner_who_leaves_halfway_leaves_nothing(tmp_path: Path) -> None:
    def weights() -> Iterator[bytes]:
        yield b"half"
        raise PeerLost("the owner left")

    store = Store(tmp_path)
    with pytest.raises(PeerLost):
        store.stage(deployment(1), weights())
    assert list(tmp_path.iterdir()) == []
    deploy(store, 1)


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)

    def full(path: Path, pieces: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mpcserve.serving.deployment.write_private", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            deploy(store, 1)
    assert list(tmp_path.iterdir()) == []
    deploy(store, 1)


def test_one_id_is_deployed_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    deploy(store, 1)
    with pytest.raises(Refused, match="exists already"):
        store.stage(deployment(1), [])


def test_an_unknown_model_lists_those_deployed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(Refused, match="deployed: none"):
        store.find("dense")
    deploy(store, 1, "one")
    assert store.find(None).name == "one"
    deploy(store, 2, "two")
    with pytest.raises(Refused, match="no model 'three' is deployed; deployed: one, two"):
        store.find("three")
    with pytest.raises(Refused, match="no model was named; deployed: one, two"):
        store.find(None)


def test_files_are_private(tmp_path: Path) -> None:
    root = tmp_path / "state"
    deploy(Store(root), 1)
    for folder, _, files in os.walk(root):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        assert all(stat.S_IMODE(os.stat(Path(folder, f)).st_mode) == 0o600 for f in files)


@pytest.mark.parametrize("file", ["plan", "deployment.json"])
def test_a_damaged_deployment_is_named(tmp_path: Path, file: str) -> None:
    deploy(Store(tmp_path), 1)
    (tmp_path / ("01" * 16) / file).write_text("{}")
    with pytest.raises(ConfigError, match=r"01010101.*damaged"):
        Store(tmp_path)


def test_a_plan_that_is_not_the_deployed_one_is_refused(tmp_path: Path) -> None:
    deploy(Store(tmp_path), 1)
    path = tmp_path / ("01" * 16) / "deployment.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"digest": "0" * 64}))
    with pytest.raises(ConfigError, match="damaged"):
        Store(tmp_path)


def test_weights_cut_short_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = deploy(store, 1)
    (tmp_path / ("01" * 16) / "weights").write_bytes(b"short")
    with pytest.raises(ConfigError, match="'w' is cut short"):
        list(store.weights(found))


def test_keys_are_never_shown() -> None:
    assert KEYS["bob"].hex() not in repr(deployment(1)) and repr(KEYS["bob"]) not in repr(
        deployment(1)
    )
