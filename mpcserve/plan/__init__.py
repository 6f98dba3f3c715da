"""The plan: public, immutable data; all that the compiler and the servers both know."""

from mpcserve.plan.bill import Bill, bill_of, cost_of
from mpcserve.plan.ops import Cost
from mpcserve.plan.plan import Alternative, InputSpec, Instruction, OutputSpec, Plan, Value
from mpcserve.plan.schedule import Schedule, schedule_of
from mpcserve.plan.store import load_plan, save_plan
from mpcserve.plan.text import plan_text
from mpcserve.plan.verify import verify_plan

__all__ = [
    "Alternative",
    "Bill",
    "Cost",
    "InputSpec",
    "Instruction",
    "OutputSpec",
    "Plan",
    "Schedule",
    "Value",
    "bill_of",
    "cost_of",
    "load_plan",
    "plan_text",
    "save_plan",
    "schedule_of",
    "verify_plan",
]
