"""Deployments on disk: what a server must remember of a model that was shared with it.

    deployments/<id>/plan               the public plan
                     deployment.json    name, digest, pair keys
                     weights            Δw of every weight, packed, in plan order (alice and bob)

A deployment is first staged on all three servers, durably, and then committed: alice decides,
bob and carol follow. One that was staged when a server stopped is settled when alice tells which
deployments are hers. So there is never half a deployment. Directories are 0700, files 0600.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mpcserve.errors import ConfigError, MpcError, Refused
from mpcserve.plan.ops import packed_bytes
from mpcserve.plan.plan import Plan
from mpcserve.plan.store import load_plan, plan_bytes
from mpcserve.serving.files import private_directory, sync_directory, write_private

ID_BYTES = 16
_STAGED = ".staged"


@dataclass(frozen=True, slots=True)
class Deployment:
    """`keys`: peer's role → the 32-byte pair key of this deployment. `replaces`: id it retires."""

    id: bytes
    name: str
    plan: Plan
    keys: Mapping[str, bytes]
    replaces: bytes | None = None

    def __repr__(self) -> str:
        return f"Deployment({self.name!r}, {self.id.hex()}, plan {self.plan.digest})"


def weight_sizes(plan: Plan) -> Iterator[tuple[str, int]]:
    """Name and packed bytes of Δw of every weight, in plan order."""
    for name, id in plan.weights.items():
        value = plan.value(id)
        yield name, packed_bytes(value.size, value.width)


class Store:
    """The deployments of one server. Safe to call from any thread."""

    def __init__(self, directory: Path) -> None:
        """Read what is there. Raises: ConfigError, PlanError naming the file that is damaged."""
        self._directory = directory
        self._lock = threading.RLock()
        self._committed: dict[bytes, Deployment] = {}
        self._staged: dict[bytes, Deployment] = {}
        try:
            private_directory(directory)
            for path in sorted(directory.iterdir()):
                self._load(path)
        except OSError as e:
            raise ConfigError(
                f"{e.filename or directory}: cannot use the stored deployments: {e.strerror}",
                "give the server a state directory it may read and write",
            ) from None
        for deployment in list(self._committed.values()):
            self._retire(deployment.replaces)

    def __iter__(self) -> Iterator[Deployment]:
        with self._lock:
            return iter(list(self._committed.values()))

    def __len__(self) -> int:
        return len(self._committed)

    def __getitem__(self, id: bytes) -> Deployment:
        """Raises: Refused when it is not deployed here."""
        with self._lock:
            if id in self._committed:
                return self._committed[id]
        raise Refused(f"deployment {id.hex()} is not here", "deploy the model again")

    def named(self, name: str) -> Deployment | None:
        """The deployment of that name."""
        return next((d for d in self if d.name == name), None)

    def find(self, name: str | None) -> Deployment:
        """The deployment of that name, or the only one. Raises: Refused, listing the others."""
        deployed = sorted(d.name for d in self)
        if name is None and len(deployed) == 1:
            name = deployed[0]
        found = self.named(name) if name is not None else None
        if found is None:
            asked = f"no model {name!r} is deployed" if name else "no model was named"
            raise Refused(
                f"{asked}; deployed: {', '.join(deployed) or 'none'}",
                "name one of them with --model" if deployed else "run `mpcserve deploy model.plan`",
            )
        return found

    def stage(self, deployment: Deployment, weights: Iterable[bytes | memoryview] = ()) -> None:
        """Write it down; it is on disk, and not yet in use, when this returns."""
        with self._lock:
            if deployment.id in self._committed or deployment.id in self._staged:
                raise Refused(
                    f"deployment {deployment.id.hex()} exists already", "deploy under a new id"
                )
            self._staged[deployment.id] = deployment
        path = self._path(deployment.id, staged=True)
        facts = {
            "name": deployment.name,
            "digest": deployment.plan.digest,
            "keys": {role: key.hex() for role, key in deployment.keys.items()},
            "replaces": deployment.replaces.hex() if deployment.replaces else None,
        }
        try:
            shutil.rmtree(path, ignore_errors=True)
            private_directory(path)
            write_private(path / "plan", [plan_bytes(deployment.plan)])
            write_private(path / "weights", weights)
            write_private(path / "deployment.json", [json.dumps(facts).encode()])
            sync_directory(path)
            sync_directory(self._directory)
        except OSError as e:
            self.discard(deployment.id)
            raise ConfigError(
                f"cannot store the deployment: {e.strerror}",
                "see to the disk of the server's state directory",
            ) from None
        except BaseException:
            self.discard(deployment.id)
            raise

    def commit(self, id: bytes) -> Deployment:
        """Put a staged deployment in use, and retire the one it replaces. Raises: Refused."""
        with self._lock:
            if id not in self._staged:
                raise Refused(f"deployment {id.hex()} is not staged here", "deploy it again")
            self._path(id, staged=True).rename(self._path(id))
            sync_directory(self._directory)
            deployment = self._committed[id] = self._staged.pop(id)
            self._retire(deployment.replaces)
        return deployment

    def discard(self, id: bytes) -> None:
        """Forget a staged deployment; nothing happens when there is none."""
        with self._lock:
            if self._staged.pop(id, None):
                shutil.rmtree(self._path(id, staged=True), ignore_errors=True)

    def settle(self, committed: Collection[bytes]) -> list[Deployment]:
        """Follow alice: commit what she committed, discard what else is staged."""
        with self._lock:
            staged = list(self._staged)
            for id in staged:
                if id not in committed:
                    self.discard(id)
            return [self.commit(id) for id in staged if id in committed]

    def weights(self, deployment: Deployment) -> Iterator[tuple[str, bytes]]:
        """Name and packed Δw of every weight, as they were stored. Raises: ConfigError."""
        staged = deployment.id in self._staged
        path = self._path(deployment.id, staged=staged) / "weights"
        with path.open("rb") as file:
            for name, size in weight_sizes(deployment.plan):
                data = file.read(size)
                if len(data) != size:
                    raise _damaged(path, f"weight {name!r} is cut short")
                yield name, data

    def _path(self, id: bytes, *, staged: bool = False) -> Path:
        return self._directory / (id.hex() + (_STAGED if staged else ""))

    def _retire(self, id: bytes | None) -> None:
        if id is not None and self._committed.pop(id, None) is not None:
            shutil.rmtree(self._path(id), ignore_errors=True)

    def _load(self, path: Path) -> None:
        staged = path.name.endswith(_STAGED)
        try:
            deployment = _read(path, bytes.fromhex(path.name.removesuffix(_STAGED)))
        except (MpcError, OSError, ValueError, KeyError, TypeError, AttributeError):
            if not staged:
                raise _damaged(path, "its files are missing or not as they were written") from None
            # The server stopped while writing it: nobody was told that it is staged.
            shutil.rmtree(path, ignore_errors=True)
            return
        (self._staged if staged else self._committed)[deployment.id] = deployment


def _read(path: Path, id: bytes) -> Deployment:
    facts = json.loads((path / "deployment.json").read_bytes())
    plan = load_plan(path / "plan")
    if plan.digest != facts["digest"]:
        raise ValueError("the plan is not the one that was deployed")
    return Deployment(
        id,
        str(facts["name"]),
        plan,
        {str(role): bytes.fromhex(key) for role, key in facts["keys"].items()},
        bytes.fromhex(facts["replaces"]) if facts["replaces"] else None,
    )


def _damaged(path: Path, how: str) -> ConfigError:
    return ConfigError(
        f"{path}: a stored deployment is damaged: {how}",
        "restore the directory from a backup, or delete it and deploy the model again",
    )
