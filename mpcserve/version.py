"""The one place that states versions; it imports nothing, so that `--version` is instant."""

__version__ = "0.1.0"

PLAN_FORMAT = 3
"""Version of the plan file and of what its instructions mean: `mpcserve.plan.plan.FORMAT`."""
