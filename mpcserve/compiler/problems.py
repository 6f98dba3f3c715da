"""What can be wrong with a model: one line per problem, all of them raised together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mpcserve.errors import ModelError


@dataclass(frozen=True, slots=True)
class Problem:
    """`node` and `op` may be empty when the problem is the whole model's or an input's.

    `of_range`: samples or a declared range of the inputs may solve it.
    """

    node: str
    op: str
    reason: str
    hint: str = ""
    of_range: bool = False

    def __str__(self) -> str:
        where = f"node {self.node!r} ({self.op})" if self.op else self.node
        text = f"{where}: {self.reason}" if where else self.reason
        return f"{text}; {self.hint}" if self.hint else text


class Unsupported(Exception):
    """Raised by a lowering function: this node, with these attributes, cannot be lowered."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class TooWide(Unsupported):
    """What cannot be lowered because of the range that is known of the node's input."""


def grouped(problems: Sequence[Problem]) -> list[str]:
    """A line for each problem; many that differ in numbers alone, as of an unrolled loop, share one
    that counts them."""
    found: dict[str, list[Problem]] = {}
    for p in problems:
        found.setdefault(_NUMBER.sub("#", f"{p.node}\n{p.op}\n{p.reason}"), []).append(p)
    lines = []
    for alike in found.values():
        if len(alike) <= FEW:
            lines += [str(p) for p in alike]
        else:
            lines.append(f"{alike[0]} ({len(alike) - 1} more like it)")
    return lines


_NUMBER = re.compile(r"\d+")

FEW = 4
"""So many problems are told one by one, however alike they are."""


def raise_all(model: str, problems: Sequence[Problem]) -> None:
    """Nothing to raise, no error. Raises: ModelError whose `problems` lists all, grouped."""
    if not problems:
        return
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    text = str(Problem(first.node, first.op, first.reason))
    raise ModelError(
        f"{model}: {text}{more}",
        first.hint or "run `mpcserve check` to list every node",
        tuple(grouped(problems)),
    )
