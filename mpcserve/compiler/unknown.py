"""What to say of an operator that has no lowering: why it has none, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping

from mpcserve.compiler.graph import Node
from mpcserve.compiler.problems import Problem
from mpcserve.compiler.registry import Registry

_SHAPE = (
    "the shape of its result would depend on secret data and so reveal it",
    "use a mask of fixed shape, or TopK",
)
_TEXT = ("text is not computed on", "prepare text before the model, give it numbers")
_LISTS = ("sequences and optionals are not supported", "export the model with tensors only")
_QUANTISED = (
    "quantised arithmetic is not supported",
    "export the float model: precision is chosen when compiling",
)
_BITS = (
    "works on the bits of numbers, which are not held as in floating point",
    "replace it by arithmetic",
)
_FILES = ("files are not decoded", "decode the image before the model")

_OPERATORS: Mapping[tuple[str, str], str] = {
    _SHAPE: "NonMaxSuppression NonZero Unique",
    _TEXT: "RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer",
    _LISTS: "ConcatFromSequence Optional OptionalHasElement SequenceAt"
    " SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap"
    " SplitToSequence",
    _QUANTISED: "ConvInteger DequantizeLinear DynamicQuantizeLinear MatMulInteger QLinearConv"
    " QLinearMatMul QuantizeLinear",
    _BITS: "BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor",
    _FILES: "ImageDecoder",
}

REASONS: Mapping[str, tuple[str, str]] = {
    op: why for why, ops in _OPERATORS.items() for op in ops.split()
}
"""Operator → (reason, workaround)."""


def unknown_op(node: Node, opset: int, registry: Registry) -> Problem:
    """The problem of a node that has no lowering."""
    if node.domain not in ("", "ai.onnx", "ai.onnx.ml"):
        reason = f"operator of domain {node.domain!r} is not supported"
        return Problem(node.name, node.op, reason, "export the model with standard operators")
    if node.op in REASONS:
        return Problem(node.name, node.op, *REASONS[node.op])
    later = [e.since for e in registry.entries if e.op == node.op]
    reason = "operator is not supported" + (f" in opset {opset}" if later else "")
    way = f"export with opset {min(later)} or newer" if later else "replace it by supported ones"
    return Problem(node.name, node.op, reason, way)
