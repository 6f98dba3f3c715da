"""Encrypted inference: ONNX models served by three parties, none of which sees input or weights.

    model = mpcserve.compile("model.onnx", calibrate=samples)
    with mpcserve.local_cluster() as cluster:
        cluster.deploy(model)
        y = cluster.infer(x)

Names are imported when they are used, so that `import mpcserve` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mpcserve.version import __version__

if TYPE_CHECKING:
    from mpcserve.compiler import CompiledModel
    from mpcserve.compiler import compile_model as compile
    from mpcserve.config import Config, load_config
    from mpcserve.plan import Plan, bill_of, load_plan
    from mpcserve.serving.client import Client
    from mpcserve.serving.cluster import LocalCluster, local_cluster
    from mpcserve.serving.inprocess import simulate

__all__ = [
    "Client",
    "CompiledModel",
    "Config",
    "LocalCluster",
    "Plan",
    "__version__",
    "bill_of",
    "compile",
    "load_config",
    "load_plan",
    "local_cluster",
    "simulate",
]

_HOMES = {
    "Client": ("mpcserve.serving.client", "Client"),
    "CompiledModel": ("mpcserve.compiler", "CompiledModel"),
    "Config": ("mpcserve.config", "Config"),
    "LocalCluster": ("mpcserve.serving.cluster", "LocalCluster"),
    "Plan": ("mpcserve.plan", "Plan"),
    "bill_of": ("mpcserve.plan", "bill_of"),
    "compile": ("mpcserve.compiler", "compile_model"),
    "load_config": ("mpcserve.config", "load_config"),
    "load_plan": ("mpcserve.plan", "load_plan"),
    "local_cluster": ("mpcserve.serving.cluster", "local_cluster"),
    "simulate": ("mpcserve.serving.inprocess", "simulate"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
