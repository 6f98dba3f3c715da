"""The registry of lowering functions: one function per ONNX operator.

    @lowers("HardSigmoid", since=6)
    def hard_sigmoid(b: Builder, x: Ref, /, *, alpha: float = 0.2, beta: float = 0.5) -> Ref: ...

    @lowers("TreeEnsemble", domain="ai.onnx.ml", since=5)

Positional parameters are the node's inputs in order (None where an optional one is missing),
keyword parameters are the schema's attributes with the schema's defaults. `since`: the oldest opset
whose form the function understands; of several functions for one operator the newest that is not
newer than the model serves. In other domains than ONNX's own one function serves all versions:
there, new versions only add attributes.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from mpcserve.compiler.graph import FUSED

F = TypeVar("F", bound=Callable[..., Any])

_MARK, _FUSED_MARK = "__lowers__", "__lowers_fused__"


@dataclass(frozen=True, slots=True)
class Lowering:
    """One entry: `attributes` are the keyword parameters, `summary` the docstring's first line.

    `domain`: empty for ONNX's own operators.
    """

    op: str
    since: int
    function: Callable[..., Any]
    attributes: Mapping[str, Any]
    summary: str
    family: str
    domain: str = ""


def lowers(*ops: str, since: int = 7, domain: str = "") -> Callable[[F], F]:
    """Mark a function as the lowering of the operators `ops` from opset `since` on."""

    def mark(function: F) -> F:
        marks = [*getattr(function, _MARK, ()), *((op, since, domain) for op in ops)]
        setattr(function, _MARK, tuple(marks))
        return function

    return mark


def lowers_fused(op: str) -> Callable[[F], F]:
    """Mark a function as the lowering of nodes `op` that a pass made of several."""

    def mark(function: F) -> F:
        setattr(function, _FUSED_MARK, op)
        return function

    return mark


class Registry:
    """All lowering functions found in `mpcserve.compiler.ops`."""

    def __init__(self, entries: tuple[Lowering, ...], fused: tuple[Lowering, ...] = ()) -> None:
        self.entries = entries
        self._fused = {entry.op: entry for entry in fused}
        self._by_op: dict[tuple[str, str], list[Lowering]] = {}
        for entry in sorted(entries, key=lambda e: e.since):
            self._by_op.setdefault((entry.domain, entry.op), []).append(entry)

    def find(self, op: str, opset: int, domain: str = "") -> Lowering | None:
        """The function that serves `op` in a model of `opset`."""
        if domain == FUSED:
            return self._fused.get(op) or self._by_op["", op][-1]
        if domain not in ("", "ai.onnx"):
            return next(iter(self._by_op.get((domain, op), ())), None)
        fitting = [e for e in self._by_op.get(("", op), ()) if e.since <= opset]
        return fitting[-1] if fitting else None

    def knows(self, op: str, opset: int) -> bool:
        """Whether some domain has a function that serves `op`."""
        return any(self.find(op, opset, domain) for domain in {e.domain for e in self.entries})

    def names(self) -> list[str]:
        """Operators, sorted."""
        return sorted({op for _, op in self._by_op})


def registry() -> Registry:
    """Every marked function of every module in the package `ops`."""
    from mpcserve.compiler import ops

    entries, fused = [], []
    for info in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"{ops.__name__}.{info.name}")
        for function in vars(module).values():
            if getattr(function, "__module__", "") == module.__name__:
                for op, since, domain in getattr(function, _MARK, ()):
                    entries.append(_entry(op, since, function, info.name, domain))
                if (op := getattr(function, _FUSED_MARK, None)) is not None:
                    fused.append(_entry(op, 0, function, info.name, FUSED))
    return Registry(tuple(entries), tuple(fused))


def _entry(op: str, since: int, function: Callable[..., Any], family: str, domain: str) -> Lowering:
    parameters = inspect.signature(function).parameters.values()
    attributes = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    summary = (inspect.getdoc(function) or "").partition("\n")[0]
    return Lowering(op, since, function, MappingProxyType(attributes), summary, family, domain)
