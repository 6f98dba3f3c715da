"""The law of the plan, its file and its text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from mpcserve.errors import PlanError
from mpcserve.plan import load_plan, plan_text, save_plan, verify_plan
from mpcserve.plan.plan import Plan
from tests.plans import PlanWriter, even_chunks


def small_plan() -> Plan:
    p = PlanWriter()
    x = p.input((2, 3), 40, frac_bits=8, bound=20)
    w = p.weight((3, 4), 40, frac_bits=8, bound=12)
    z = p.emit("matmul", [x, w], width=30, frac_bits=8, bound=29, ring=40, truncate=8)
    bit = p.sign(z, 30, even_chunks(30, 5), [6])
    y = p.emit(
        "select", [bit, z], width=40, frac_bits=8, bound=29, reads=30, when=0, nonnegative=True
    )
    return p.done(y)


def broken(id: int, **change: Any) -> Plan:
    """The small plan with one instruction's value, attributes or operands changed."""
    plan = small_plan()
    i = plan[id]
    attrs = {**i.attrs, **change.pop("attrs", {})}
    value = replace(i.value, **{k: v for k, v in change.items() if k != "inputs"})
    new = replace(
        i, value=value, attrs=MappingProxyType(attrs), inputs=change.get("inputs", i.inputs)
    )
    return replace(plan, instructions=(*plan.instructions[:id], new, *plan.instructions[id + 1 :]))


def test_a_sound_plan_passes() -> None:
    verify_plan(small_plan())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: broken(0, bound=40), "bound 2^40 does not fit width 40"),
        (lambda: broken(0, width=65), "width 65 outside 2..64"),
        (lambda: broken(2, bound=30, width=33), "width 33 > ring 40 - truncate 8"),
        (lambda: broken(2, bound=31, width=32), "reads 30 bits of width 32, bound 2^31"),
        (lambda: broken(2, attrs={"ring": 37}), "product bound 2^37 does not fit ring 37"),
        (lambda: broken(2, attrs={"ring": 41}), "ring 41 wider than an operand"),
        (lambda: broken(2, frac_bits=9), "frac_bits 9, expected 8"),
        (lambda: broken(2, shape=(2, 5)), "shape (2, 5), expected (2, 4)"),
        (lambda: broken(1, shape=(4, 4)), "matmul of (2, 3) and (4, 4)"),
        (lambda: broken(3, attrs={"chunks": [5, 5]}), "reads 11 bits of width 30, bound 2^29"),
        (lambda: broken(3, attrs={"chunks": [9, 20]}), "outside 1..8"),
        (lambda: broken(3, attrs={"groups": [3]}), "do not partition"),
        (lambda: broken(3, width=2), "a bit has width 1"),
        (lambda: broken(4, attrs={"nonnegative": False}), "reads 30 bits of width 30, bound"),
        (lambda: broken(4, inputs=(2, 2)), "takes something for a bit"),
        (lambda: broken(4, inputs=(3, 3)), "takes a bit for a number"),
        (lambda: broken(4, inputs=(3, 4)), "operand not defined before it"),
        (lambda: broken(4, known="guessed"), "bound known by 'guessed'"),
        (lambda: replace(small_plan(), outputs=()), "no output"),
        (lambda: replace(small_plan(), inputs=()), "declared inputs"),
    ],
)
def test_each_breach_of_the_law_is_named(make: Callable[[], Plan], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        verify_plan(make())
    assert any(says in p for p in caught.value.problems), caught.value.problems
    assert caught.value.hint


def test_unknown_ops_and_missing_attributes_are_named() -> None:
    plan = small_plan()
    strange = replace(plan[2], op="launch", attrs=MappingProxyType({}))
    bare = replace(plan[2], attrs=MappingProxyType({}))
    for i, says in ((strange, "unknown op 'launch'"), (bare, "missing attributes ring, truncate")):
        with pytest.raises(PlanError, match=says):
            verify_plan(
                replace(plan, instructions=(*plan.instructions[:2], i, *plan.instructions[3:]))
            )


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = small_plan()
    save_plan(plan, tmp_path / "m.plan")
    again = load_plan(tmp_path / "m.plan")
    assert again == plan
    assert again.digest == plan.digest
    assert [p.name for p in tmp_path.iterdir()] == ["m.plan"]


def test_the_digest_depends_on_every_part() -> None:
    plan = small_plan()
    others = [replace(plan, name="other"), replace(plan, batch=2), broken(2, bound=28)]
    assert len({p.digest for p in (plan, *others)}) == 4


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff\x00", b'{"format": 99}', b'{"format": 1, "name": 3}']
)
def test_files_that_are_no_plans_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.plan").write_bytes(content)
    with pytest.raises(PlanError, match=r"bad\.plan"):
        load_plan(tmp_path / "bad.plan")


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.plan"):
        load_plan(tmp_path / "none.plan")


def test_the_text_names_every_instruction_and_its_cost() -> None:
    text = plan_text(small_plan())
    assert "%2 = matmul(%0, %1) ring=40 truncate=8 : 2x4 30b.8 <2^29 proved" in text
    assert "; 1 round, 30 B, dealt 40 B" in text
    assert text.endswith("return unopened %4 as y0 float64[2, 4]")
