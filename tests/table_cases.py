"""A model of a table with text, as pipelines export it: an input for each column."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from mpcserve.compiler.ml.rewrite import ML

Array = Any
OPSET = 18

AGE, FARE = 37.25, 31.75
"""What missing ages and fares are replaced by."""

OFFSETS, SCALES = [38.5, 29.125], [0.0625, 0.03125]
SEXES, PORTS, CLASSES = ["female", "male"], ["C", "Q", "S"], [1, 2, 3]
COMPLETE = ("text-categories",)
EVERYTHING = ("text-categories", "number-categories", "imputed-values")


def ml(op: str, inputs: list[str], output: str, name: str, **attrs: Any) -> onnx.NodeProto:
    """A node of ai.onnx.ml."""
    return helper.make_node(op, inputs, [output], name=name, domain=ML, **attrs)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, int]],
    outputs: dict[str, int | None],
    **constants: Array,
) -> onnx.ModelProto:
    """`inputs`: name → (element type, columns); a type of None is a map."""
    ins = [helper.make_tensor_value_info(n, t, ["N", k]) for n, (t, k) in inputs.items()]
    outs = [
        onnx.ValueInfoProto(name=n) if t is None else helper.make_tensor_value_info(n, t, None)
        for n, t in outputs.items()
    ]
    for out in outs:
        if not out.HasField("type"):
            values = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
            maps = helper.make_map_type_proto(TensorProto.STRING, values)
            out.type.CopyFrom(helper.make_sequence_type_proto(maps))
    tensors = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "table", ins, outs, tensors)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(ML, 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def passengers(zeros: int = 1) -> onnx.ModelProto:
    """Missing numbers filled in and scaled, text and whole numbers one-hot, then two classes."""
    weights = np.round(np.random.default_rng(5).normal(size=20), 3).tolist()
    nodes = [
        helper.make_node("Concat", ["age", "fare"], ["numbers"], "join", axis=1),
        ml(
            "Imputer",
            ["numbers"],
            "filled",
            "fill",
            imputed_value_floats=[AGE, FARE],
            replaced_value_float=float("nan"),
        ),
        ml("Scaler", ["filled"], "scaled", "scale", offset=OFFSETS, scale=SCALES),
        ml("OneHotEncoder", ["sex"], "sexes", "enc_sex", cats_strings=SEXES, zeros=zeros),
        ml("OneHotEncoder", ["port"], "ports", "enc_port", cats_strings=PORTS, zeros=zeros),
        ml("OneHotEncoder", ["pclass"], "classes", "enc_class", cats_int64s=CLASSES, zeros=zeros),
        helper.make_node("Concat", ["sexes", "ports", "classes"], ["cats"], "join_cats", axis=-1),
        helper.make_node("Reshape", ["cats", "eight"], ["flat"], "flatten"),
        helper.make_node("Concat", ["scaled", "flat"], ["features"], "join_all", axis=1),
        helper.make_node(
            "LinearClassifier",
            ["features"],
            ["label", "shares"],
            "classify",
            domain=ML,
            coefficients=weights,
            intercepts=[0.25, -0.25],
            classlabels_strings=["died", "survived"],
            post_transform="SOFTMAX",
        ),
        ml("ZipMap", ["shares"], "chances", "zip", classlabels_strings=["died", "survived"]),
    ]
    inputs = {
        **dict.fromkeys(("age", "fare"), (TensorProto.FLOAT, 1)),
        **dict.fromkeys(("sex", "port"), (TensorProto.STRING, 1)),
        "pclass": (TensorProto.INT64, 1),
    }
    outputs = {"label": TensorProto.STRING, "chances": None}
    return model_of(nodes, inputs, outputs, eight=np.array([-1, 8]))


def some_passengers(count: int, missing: bool = True) -> dict[str, Array]:
    """Rows of every category, an unknown one and, if wanted, missing numbers among them."""
    rng = np.random.default_rng(7)
    print("seed 7")
    rows: dict[str, Array] = {
        "age": rng.uniform(1, 80, (count, 1)).astype(np.float32),
        "fare": rng.uniform(5, 90, (count, 1)).astype(np.float32),
        "sex": rng.choice(SEXES, (count, 1)),
        "port": rng.choice([*PORTS, "Z"], (count, 1)),
        "pclass": rng.choice([*CLASSES, 7], (count, 1)),
    }
    if missing:
        rows["age"][::3] = np.nan
        rows["fare"][1::4] = np.nan
    return rows


def as_csv(rows: dict[str, Array]) -> str:
    """The same as a file's text; what is missing is empty."""
    lines = [",".join(rows)]
    for row in zip(*(a.ravel().tolist() for a in rows.values()), strict=True):
        lines.append(",".join("" if x != x else str(x) for x in row))
    return "\n".join(lines) + "\n"
