"""Servers and owners: who says what to whom. Names are imported when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpcserve.serving.client import Client
    from mpcserve.serving.cluster import LocalCluster, local_cluster
    from mpcserve.serving.party import run_party

__all__ = ["Client", "LocalCluster", "local_cluster", "run_party"]

_HOMES = {
    "Client": "client",
    "LocalCluster": "cluster",
    "local_cluster": "cluster",
    "run_party": "party",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
