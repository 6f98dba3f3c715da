"""Operators that onnxruntime's own optimiser and exporters write, by standard ones.

Without the parts that hold state: a node with a past, a mask of its own or cached keys is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mpcserve.compiler.expand import Body

DOMAIN = "com.microsoft"


class _Writer:
    """Nodes of a definition; a missing optional input is an empty name."""

    def __init__(self, node: onnx.NodeProto) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.given = [f"input_{k}" if name else "" for k, name in enumerate(node.input)]
        self.attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def input(self, position: int) -> str:
        """The name of an input; empty if it is left out."""
        return self.given[position] if position < len(self.given) else ""

    def op(self, op: str, *inputs: str, outputs: int = 1, **attrs: Any) -> Any:
        """A node; the name of its output, or names of several."""
        names = [f"{op}_{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, f"{op}_{len(self.nodes)}", **attrs))
        return names[0] if outputs == 1 else names

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """A constant of one node."""
        value = numpy_helper.from_array(np.array(values, dtype))
        return str(self.op("Constant", value=value))

    def plus(self, x: str, position: int) -> str:
        """x and an optional input."""
        other = self.input(position)
        return str(self.op("Add", x, other)) if other else x

    def attr(self, name: str, default: Any) -> Any:
        """An attribute or its default."""
        return self.attrs.get(name, default)


Rule = Callable[[_Writer], "Sequence[str] | None"]


def contrib_body(node: onnx.NodeProto) -> Body | None:
    """The definition of a node of onnxruntime's own domain; None if there is none."""
    rules = RULES if node.domain == DOMAIN else STANDARD if not node.domain else {}
    rule = rules.get(node.op_type)
    if rule is None:
        return None
    w = _Writer(node)
    results = rule(w)
    if results is None or len(results) < sum(map(bool, node.output)):
        return None
    return Body(tuple(w.given), tuple(results), tuple(w.nodes))


def _gelu(approximate: str, biased: bool) -> Rule:
    def rule(w: _Writer) -> Sequence[str]:
        x = w.plus(w.input(0), 1) if biased else w.input(0)
        return [w.op("Gelu", x, approximate=approximate)]

    return rule


def _quick_gelu(w: _Writer) -> Sequence[str]:
    x = w.input(0)
    scaled = w.op("Mul", x, w.constant(w.attr("alpha", 1.702)))
    return [w.op("Mul", x, w.op("Sigmoid", scaled))]


def _fused_matmul(w: _Writer) -> Sequence[str] | None:
    if w.attr("transBatchA", 0) or w.attr("transBatchB", 0):
        return None
    sides = [
        _turned(w, w.input(k)) if w.attr(name, 0) else w.input(k)
        for k, name in enumerate(("transA", "transB"))
    ]
    product = w.op("MatMul", *sides)
    alpha = w.attr("alpha", 1.0)
    return [product if alpha == 1.0 else w.op("Mul", product, w.constant(alpha))]


def _turned(w: _Writer, x: str) -> str:
    """The last two axes exchanged, at any rank."""
    return str(w.op("Einsum", x, equation="...ij->...ji"))


def _layer_norm(simplified: bool, skip: bool) -> Rule:
    """x (+ skip + bias) normalised over its last axis; the sum is the fourth output."""

    def rule(w: _Writer) -> Sequence[str]:
        x = w.input(0)
        gamma = 2 if skip else 1
        if skip:
            x = w.op("Add", x, w.input(1))
            x = w.plus(x, 3 if simplified else 4)
        attrs = {"epsilon": w.attr("epsilon", 1e-12 if skip else 1e-5), "axis": w.attr("axis", -1)}
        scale = w.input(gamma)
        if simplified:
            return [w.op("RMSNormalization", x, scale, **attrs), "", "", x]
        beta = w.input(gamma + 1)
        given = [x, scale, beta] if beta else [x, scale]
        return [w.op("LayerNormalization", *given, **attrs), "", "", x]

    return rule


def _bias_add(w: _Writer) -> Sequence[str]:
    return [w.plus(w.op("Add", w.input(0), w.input(1)), 2)]


def _activated(op: str) -> Rule:
    """Conv or Gemm with an activation behind it; a Conv may add an input before that."""

    def rule(w: _Writer) -> Sequence[str] | None:
        kind = w.attr("activation", b"").decode()
        params = list(w.attr("activation_params", ()))
        own = {k: v for k, v in w.attrs.items() if not k.startswith("activation")}
        y = w.op(op, *w.given[:3], **own)
        if op == "Conv":
            y = w.plus(y, 3)
        if kind == "Clip":
            return [w.op("Clip", y, *(w.constant(p) for p in params))]
        names = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta")}.get(kind, ())
        if kind not in ("Relu", "Sigmoid", "Tanh", *_WITH_PARAMETERS):
            return None
        return [w.op(kind, y, **dict(zip(names, params, strict=False)))]

    return rule


_WITH_PARAMETERS = ("LeakyRelu", "HardSigmoid")


def _attention(w: _Writer) -> Sequence[str] | None:
    """Queries, keys and values by one product, then attention over heads."""
    if any(w.given[3:]) or w.attr("qkv_hidden_sizes", None) or w.attr("do_rotary", 0):
        return None
    product = w.plus(w.op("MatMul", w.input(0), w.input(1)), 2)
    parts = w.op("Split", product, outputs=3, axis=-1, num_outputs=3)
    return [_heads(w, parts, w.attr("unidirectional", 0))]


def _multi_head(w: _Writer) -> Sequence[str] | None:
    """Queries, keys and values of their own, with one bias for the three."""
    if any(w.given[4:]) or not w.input(1) or not w.input(2):
        return None
    parts = list(w.given[:3])
    if w.input(3):
        biases = w.op("Split", w.input(3), outputs=3, axis=0, num_outputs=3)
        parts = [w.op("Add", p, b) for p, b in zip(parts, biases, strict=True)]
    return [_heads(w, parts, w.attr("unidirectional", 0))]


def _heads(w: _Writer, parts: Sequence[str], causal: int) -> str:
    heads = w.attrs["num_heads"]
    attrs = {"q_num_heads": heads, "kv_num_heads": heads, "is_causal": causal}
    if "scale" in w.attrs:
        attrs["scale"] = w.attrs["scale"]
    return str(w.op("Attention", *parts, **attrs))


RULES: Mapping[str, Rule] = {
    "Attention": _attention,
    "BiasAdd": _bias_add,
    "BiasGelu": _gelu("none", biased=True),
    "FastGelu": _gelu("tanh", biased=True),
    "FusedConv": _activated("Conv"),
    "FusedGemm": _activated("Gemm"),
    "FusedMatMul": _fused_matmul,
    "Gelu": _gelu("none", biased=False),
    "MultiHeadAttention": _multi_head,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _layer_norm(simplified=False, skip=True),
    "SkipSimplifiedLayerNormalization": _layer_norm(simplified=True, skip=True),
    "TransposeMatMul": _fused_matmul,
}
"""Operators of com.microsoft."""

STANDARD: Mapping[str, Rule] = {
    "SimplifiedLayerNormalization": _layer_norm(simplified=True, skip=False)
}
"""What onnxruntime writes into the standard domain, though ONNX has it under another name."""
