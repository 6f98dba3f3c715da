"""Reading a model: path, bytes or ModelProto → a ModelProto with all its data, or a ModelError."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx.external_data_helper import (
    ExternalDataInfo,
    load_external_data_for_model,
    uses_external_data,
)

from mpcserve.compiler.problems import Problem
from mpcserve.errors import ModelError

Source = str | Path | bytes | onnx.ModelProto

OLDEST_OPSET = 7


def load_model(source: Source) -> tuple[onnx.ModelProto, str, list[Problem]]:
    """(model, name, what is missing of its data). Raises: ModelError when it is not ONNX."""
    if isinstance(source, onnx.ModelProto):
        model, name, folder = onnx.ModelProto(), source.graph.name or "model", None
        model.CopyFrom(source)
    elif isinstance(source, bytes):
        model, name, folder = _parsed(source, "model"), "model", None
    else:
        path = Path(source)
        try:
            data = path.read_bytes()
        except OSError as e:
            raise ModelError(
                f"{path}: cannot read the model: {e.strerror}", "give the path of an .onnx file"
            ) from None
        model, name, folder = _parsed(data, str(path)), path.stem, path.parent
    return model, name, _load_external(model, folder)


def structure_digest(model: onnx.ModelProto) -> str:
    """SHA-256 (hex) of the model without the values of its tensors: the plan tells no weight."""
    digest = hashlib.sha256()
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for attribute in copy.attribute:
            _blank(attribute.t)
            if node.domain == "ai.onnx.ml" or node.op_type == "Constant":
                # There, lists are what was learned: thresholds, coefficients, the shape of trees.
                for field in ("floats", "ints", "strings"):
                    attribute.ClearField(field)
        digest.update(copy.SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        digest.update(f"{tensor.name}:{tensor.data_type}:{list(tensor.dims)};".encode())
    for info in (*model.graph.input, *model.graph.output):
        digest.update(info.SerializeToString(deterministic=True))
    return digest.hexdigest()


def tensors_of(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """(what holds it, tensor) for every initializer and tensor attribute, subgraphs included."""
    for tensor in graph.initializer:
        yield f"initializer {tensor.name!r}", tensor
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield f"attribute {attribute.name!r} of node {node.name!r}", attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from tensors_of(attribute.g)


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the standard operators."""
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    return int(versions[0]) if versions else 0


def _parsed(data: bytes, source: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
        valid = bool(model.graph.node or model.graph.output) and bool(model.opset_import)
    except Exception:  # protobuf's DecodeError differs between its implementations
        valid = False
    if not valid:
        raise ModelError(f"{source}: not an ONNX model", "export it with torch.onnx or skl2onnx")
    return model


def _load_external(model: onnx.ModelProto, folder: Path | None) -> list[Problem]:
    problems = []
    found = False
    for holder, tensor in tensors_of(model.graph):
        if not uses_external_data(tensor):
            continue
        found = True
        info = ExternalDataInfo(tensor)
        file = None if folder is None else folder / info.location
        end = (info.offset or 0) + (info.length or 0)
        if file is None:
            reason = f"{holder} is kept in the external file {info.location!r}"
            problems.append(Problem("", "", reason, "give the model's path instead of its bytes"))
        elif not file.is_file():
            reason = f"{holder} is kept in {str(file)!r}, which does not exist"
            problems.append(Problem("", "", reason, "copy the data file beside the model"))
        elif file.stat().st_size < end:
            size = file.stat().st_size
            reason = f"{holder} ends at byte {end} of {str(file)!r}, which has {size} bytes"
            problems.append(Problem("", "", reason, "copy the data file anew, it is cut short"))
    if found and not problems:
        assert folder is not None
        try:
            load_external_data_for_model(model, str(folder))
        except onnx.checker.ValidationError as e:  # it follows no path out of the folder
            hint = "keep the data file beside the model"
            problems.append(Problem("", "", str(e).splitlines()[0], hint))
    return problems


def _blank(tensor: onnx.TensorProto) -> None:
    for field in (
        "raw_data",
        "string_data",
        "float_data",
        "double_data",
        "int32_data",
        "int64_data",
    ):
        tensor.ClearField(field)
