"""Circular and hyperbolic functions: 1e-3·max(1, |y|) on their whole domains, ends included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpcserve.compiler import trigonometry as of
from mpcserve.compiler.problems import Unsupported
from tests.smooth_support import compiled, points

COUNT = 1001


def worst(function: Any, exact: Any, low: float, high: float, known: str = "proved") -> float:
    """Largest error relative to max(1, |y|), through the real protocol; prints the rounds."""
    c = compiled(function, [(COUNT,)], [(low, high)], known=known)
    x = points(low, high, COUNT)
    y = exact(x)
    c.check_bounds(x)
    error = float((np.abs(c.run(x) - y) / np.maximum(1, np.abs(y))).max())
    print(f"{low}..{high}: error {error:.2g}, {c.bill.rounds} rounds")
    return error


@pytest.mark.parametrize(
    ("function", "exact", "low", "high"),
    [
        (of.tangent, np.tan, -1.25, 1.25),
        (of.tangent, np.tan, -1.5, 1.5),
        (of.arc_tangent, np.arctan, -4.0, 4.0),
        (of.arc_tangent, np.arctan, -1000.0, 1000.0),
        (of.arc_sine, np.arcsin, -0.75, 0.75),
        (of.arc_sine, np.arcsin, -1.0, 1.0),
        (of.arc_cosine, np.arccos, -1.0, 1.0),
        (of.hyperbolic_sine, np.sinh, -3.0, 3.0),
        (of.hyperbolic_sine, np.sinh, -9.0, 9.0),
        (of.hyperbolic_cosine, np.cosh, -9.0, 9.0),
        (of.hyperbolic_arc_sine, np.arcsinh, -4.0, 4.0),
        (of.hyperbolic_arc_sine, np.arcsinh, -500.0, 500.0),
        (of.hyperbolic_arc_cosine, np.arccosh, 1.0, 40.0),
        (of.hyperbolic_arc_tangent, np.arctanh, -0.5, 0.5),
        (of.hyperbolic_arc_tangent, np.arctanh, -0.99, 0.99),
    ],
)
def test_functions_are_right_on_their_domains(
    function: Any, exact: Any, low: float, high: float
) -> None:
    assert worst(function, exact, low, high) < 1e-3


def test_a_tangent_across_poles_is_right_away_from_them() -> None:
    c = compiled(of.tangent, [(COUNT,)], [(-8.0, 8.0)])
    x = points(-8.0, 8.0, COUNT)
    y = np.tan(x)
    error = np.abs(c.run(x) - y) / np.maximum(1, np.abs(y))
    assert error[np.abs(y) < 30].max() < 1e-3


def test_outside_of_a_domain_is_refused_where_it_is_known_else_the_end_counts() -> None:
    with pytest.raises(Unsupported, match=r"expected \[-1, 1\]"):
        compiled(of.arc_sine, [(4,)], [(-2.0, 2.0)])
    c = compiled(of.arc_sine, [(5,)], [(-2.0, 2.0)], known="calibrated")
    x = np.array([-2.0, -1.0, 0.25, 1.0, 1.5])
    assert np.abs(c.run(x) - np.arcsin(np.clip(x, -1, 1))).max() < 1e-3
