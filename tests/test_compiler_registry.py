"""The registry against ONNX's own schemas: one keyword per attribute, with the schema's default."""

from __future__ import annotations

import inspect

import pytest
from onnx import defs, helper

from mpcserve.compiler.registry import Lowering, registry

ENTRIES = registry().entries

REQUIRED = """
Gemm MatMul Conv Add Sub Mul Neg Sum Relu LeakyRelu PRelu Clip Abs Max Min MaxPool AveragePool
GlobalAveragePool GlobalMaxPool ReduceSum ReduceMean BatchNormalization Flatten Reshape Transpose
Squeeze Unsqueeze Concat Split Slice Pad Expand Tile Identity Dropout Cast ArgMax
""".split()  # noqa: SIM905

OLDEST, NEWEST = 7, defs.onnx_opset_version()

EVERY = defs.get_all_schemas_with_history()
SCHEMAS = [s for s in EVERY if s.domain == ""]
FIRST = {n: min(s.since_version for s in SCHEMAS if s.name == n) for n in {s.name for s in SCHEMAS}}
"""Operator → the opset that it came with."""


def served(entry: Lowering) -> list[defs.OpSchema]:
    """Every schema version of the operator that the entry lowers."""
    found = registry()
    if entry.domain:
        schemas = [s for s in EVERY if (s.domain, s.name) == (entry.domain, entry.op)]
        return [s for s in schemas if not s.deprecated]
    versions = {
        defs.get_schema(entry.op, opset).since_version: defs.get_schema(entry.op, opset)
        for opset in range(max(OLDEST, entry.since), NEWEST + 1)
        if found.find(entry.op, opset) == entry
    }
    return list(versions.values())


@pytest.mark.parametrize("op", REQUIRED)
def test_every_promised_operator_is_lowered_in_every_opset(op: str) -> None:
    found = registry()
    for opset in range(max(OLDEST, FIRST[op]), NEWEST + 1):
        assert found.find(op, opset) is not None, f"{op} in opset {opset}"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.op}-{e.since}")
def test_keywords_are_the_schemas_attributes(entry: Lowering) -> None:
    for schema in served(entry):
        missing = set(schema.attributes) - set(entry.attributes) - {"consumed_inputs"}
        assert not missing, f"{entry.op} of opset {schema.since_version} has {missing}"
    known = {a for schema in served(entry) for a in schema.attributes}
    assert set(entry.attributes) <= known


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.op}-{e.since}")
def test_defaults_are_the_schemas_defaults(entry: Lowering) -> None:
    for schema in served(entry):
        for name, attribute in schema.attributes.items():
            value = attribute.default_value
            if not value.name or name not in entry.attributes:
                continue
            default = helper.get_attribute_value(value)
            default = default.decode() if isinstance(default, bytes) else default
            ours = entry.attributes[name]
            if ours is None or ours is inspect.Parameter.empty:
                assert default in (None, []), f"{entry.op}.{name}"
            elif isinstance(ours, tuple):
                assert list(ours) == default, f"{entry.op}.{name}"
            else:
                assert (
                    ours == pytest.approx(default) if isinstance(ours, float) else ours == default
                )


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.op}-{e.since}")
def test_positions_are_the_schemas_inputs(entry: Lowering) -> None:
    parameters = list(inspect.signature(entry.function).parameters.values())[1:]
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    many = any(p.kind is p.VAR_POSITIONAL for p in positional)
    for schema in served(entry):
        variadic = schema.inputs[-1].option == defs.OpSchema.FormalParameterOption.Variadic
        assert many == variadic, entry.op
        if not many:
            assert len(positional) >= len(schema.inputs), entry.op


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.op}-{e.since}")
def test_every_lowering_says_what_it_does(entry: Lowering) -> None:
    assert entry.summary.endswith(".") and entry.family


def test_of_two_forms_the_newest_that_the_opset_has_serves() -> None:
    found = registry()
    assert found.find("Clip", 10) != found.find("Clip", 11) == found.find("Clip", NEWEST)


def test_operators_of_other_domains_are_not_served() -> None:
    assert registry().find("Relu", NEWEST, "com.microsoft") is None
