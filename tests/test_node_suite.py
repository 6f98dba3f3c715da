"""ONNX's own node tests through the real protocol: what once passed must pass."""

from __future__ import annotations

import pytest

from tests import node_suite
from tests.node_suite import cases, passing

pytestmark = pytest.mark.slow

SHARDS = 24


@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_case_that_is_listed_as_passing_passes(shard: int) -> None:
    known = {case.name: case for case in cases()}
    listed = [known[name] for name in passing() if name in known][shard::SHARDS]
    outcomes = [node_suite.run(case) for case in listed]
    assert [(o.name, o.reason) for o in outcomes if o.status != "passed"] == []
