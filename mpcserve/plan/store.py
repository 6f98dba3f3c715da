"""Plan files: canonical JSON. Public: a plan may be sent to anyone."""

from __future__ import annotations

import json
from pathlib import Path

from mpcserve.errors import PlanError
from mpcserve.plan.plan import FORMAT, Plan, plan_from_json
from mpcserve.plan.verify import verify_plan


def plan_bytes(plan: Plan) -> bytes:
    """The content of a plan file: one line of JSON."""
    return json.dumps(plan.to_json(), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def plan_from_bytes(data: bytes, source: str = "plan") -> Plan:
    """Parse and verify. Raises: PlanError naming `source`."""
    try:
        plan = plan_from_json(json.loads(data))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise PlanError(
            f"{source}: not a plan of format {FORMAT}: {type(e).__name__} {e}",
            "write it with `mpcserve compile model.onnx`",
        ) from None
    verify_plan(plan)
    return plan


def save_plan(plan: Plan, path: Path | str) -> None:
    """Write a plan file, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(plan_bytes(plan))
    temporary.replace(path)


def load_plan(path: Path | str) -> Plan:
    """Read and verify a plan file. Raises: PlanError naming the file."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise PlanError(
            f"{path}: cannot read the plan: {e.strerror}", "compile a model first"
        ) from None
    return plan_from_bytes(data, str(path))
