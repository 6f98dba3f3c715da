"""ONNX → plan: which integers are computed, how wide they are, and why that is safe."""

from mpcserve.compiler.artifact import CompiledModel, load_compiled
from mpcserve.compiler.check import NodeReport, check_model
from mpcserve.compiler.client_steps import Disclosure
from mpcserve.compiler.layer_errors import LayerError, layer_errors
from mpcserve.compiler.pipeline import compile_model
from mpcserve.compiler.planning import Ring

__all__ = [
    "CompiledModel",
    "Disclosure",
    "LayerError",
    "NodeReport",
    "Ring",
    "check_model",
    "compile_model",
    "layer_errors",
    "load_compiled",
]
