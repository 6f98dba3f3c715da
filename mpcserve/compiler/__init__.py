"""ONNX → plan: which integers are computed, how wide they are, and why that is safe."""

from mpcserve.compiler.artifact import CompiledModel, load_compiled
from mpcserve.compiler.check import NodeReport, check_model
from mpcserve.compiler.pipeline import Ring, compile_model

__all__ = ["CompiledModel", "NodeReport", "Ring", "check_model", "compile_model", "load_compiled"]
