"""A plan as text: one line an instruction, for people and for pass tests."""

from __future__ import annotations

from mpcserve.plan.bill import cost_of
from mpcserve.plan.client import Step
from mpcserve.plan.plan import Instruction, OutputSpec, Plan

FEW = 8
"""Categories of a client's step that are shown."""

_HIDDEN = frozenset({"shape", "values", "indices", "factors"})
"""Attributes that repeat the value's shape or may be long."""


def plan_text(plan: Plan) -> str:
    """`%id = op(operands) attrs : shape width.frac_bits <2^bound known` and what it costs."""
    lines = [f"plan {plan.name} batch {plan.batch} opset {plan.opset}"]
    lines += [_step(s) for s in plan.client.steps]
    layer = None
    for i in plan.instructions:
        if i.layer != layer:
            layer = i.layer
            lines.append(f"# {layer or '(no layer)'}")
        lines.append(_line(plan, i))
    unopened = plan.unopened.values()
    for k, o in enumerate(plan.outputs):
        how = " unopened" if k in unopened else ""
        lines.append(f"return{how} %{o.id} as {o.name} {o.dtype}{list(o.shape)}{_named(o)}")
    return "\n".join(lines)


def _step(step: Step) -> str:
    attrs = "".join(f" {k}={_few(v)}" for k, v in step.attrs.items() if k != "indices")
    return f"client {step.output} = {step.op}({', '.join(step.inputs)}){attrs}  ; {step.node}"


def _named(o: OutputSpec) -> str:
    if o.labels:
        return f" names {_short(o.labels)}"
    return f" columns {_short(o.columns)}" if o.columns else ""


def _line(plan: Plan, i: Instruction) -> str:
    attrs = " ".join(f"{k}={_short(v)}" for k, v in sorted(i.attrs.items()) if k not in _HIDDEN)
    v, cost = i.value, cost_of(plan, i.id)
    paid = f"  ; {len(cost.rounds)} round, {sum(cost.rounds)} B, dealt {cost.dealt} B"
    operands = ", ".join(f"%{j}" for j in i.inputs)
    text = f"%{i.id} = {i.op}({operands})" + (f" {attrs}" if attrs else "")
    shape = "x".join(map(str, v.shape)) or "scalar"
    text += f" : {shape} {v.width}b.{v.frac_bits} <2^{v.bound} {v.known}"
    return text + (paid if cost.rounds else "")


def _few(value: object) -> str:
    if not isinstance(value, list | tuple) or len(value) <= FEW:
        return _short(value)
    return f"{_short(value[:FEW])}… ({len(value)})"


def _short(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
