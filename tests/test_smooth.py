"""Smooth functions through the real protocol: error, rounds and bytes on their whole domains."""

from __future__ import annotations

from math import erf
from typing import Any, NamedTuple

import numpy as np
import pytest

from mpcserve.compiler import fourier, roots, smooth, softmax
from mpcserve.compiler.builder import Builder
from mpcserve.compiler.problems import Unsupported
from mpcserve.plan.ops import BITS
from tests.smooth_support import ULP, Array, compiled, on_grid, points

pytestmark = pytest.mark.slow

COUNT = 100_000


def phi(x: Array) -> Array:
    return 0.5 + 0.5 * np.array([erf(v) for v in x / np.sqrt(2)])


def sigmoid(x: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(x / 2)


class Case(NamedTuple):
    """`online`, `dealt`: most bytes per element."""

    name: str
    function: Any
    reference: Any
    low: float
    high: float
    error: float
    rounds: int
    online: float
    dealt: float


def gelu_by_tanh(x: Array) -> Array:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dip(x: Array) -> Array:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


SHAPES = [
    Case("sigmoid", smooth.sigmoid, sigmoid, -8, 8, 3e-5, 1, 4.5, 140),
    Case("sigmoid", smooth.sigmoid, sigmoid, -64, 64, 4.5e-5, 2, 10.5, 260),
    Case("sigmoid", smooth.sigmoid, sigmoid, -1000, 1000, 4.5e-5, 3, 12.5, 210),
    Case("tanh", smooth.tanh, np.tanh, -5, 5, 3e-5, 1, 5, 180),
    Case("tanh", smooth.tanh, np.tanh, -64, 64, 4.5e-5, 3, 12, 230),
    Case("erf", smooth.erf, lambda x: 2 * phi(x * np.sqrt(2)) - 1, -64, 64, 4.5e-5, 3, 12, 130),
    Case("gelu", smooth.gelu, lambda x: x * phi(x), -4, 4, 5e-5, 1, 5, 100),
    Case("gelu", smooth.gelu, lambda x: x * phi(x), -64, 64, 7e-5, 3, 14.5, 140),
    Case("gelu", smooth.gelu, lambda x: x * phi(x), -1000, 1000, 7e-5, 3, 17.5, 150),
    Case("gelu", lambda b, x: smooth.gelu(b, x, True), gelu_by_tanh, -64, 64, 7e-5, 3, 14.5, 140),
    Case("silu", smooth.swish, lambda x: x * sigmoid(x), -8, 8, 5e-5, 1, 5.5, 150),
    Case("silu", smooth.swish, lambda x: x * sigmoid(x), -64, 64, 7e-5, 2, 13.5, 400),
    Case(
        "swish",
        lambda b, x: smooth.swish(b, x, -1.7),
        lambda x: x * sigmoid(-1.7 * x),
        *(-20, 20, 7e-5, 2, 14, 400),
    ),
    Case("softplus", smooth.softplus, lambda x: np.logaddexp(0, x), -64, 64, 7e-5, 2, 13.5, 270),
    Case(
        "mish",
        smooth.mish,
        lambda x: x * np.tanh(np.logaddexp(0, x)),
        *(-64, 64, 7e-5, 3, 14, 350),
    ),
    Case("elu", smooth.elu, dip, -64, 64, 5e-5, 3, 15.5, 190),
    Case(
        "celu",
        lambda b, x: smooth.elu(b, x, 2.0, scale=2.0),
        lambda x: np.where(x > 0, x, 2 * np.expm1(np.minimum(x, 0) / 2)),
        *(-64, 64, 7e-5, 3, 16, 260),
    ),
    Case("sine", smooth.sine, np.sin, -1000, 1000, 3e-5, 1, 5, 11),
    Case("cosine", lambda b, x: smooth.sine(b, x, True), np.cos, -1000, 1000, 3e-5, 1, 5, 11),
    Case("exp", smooth.exp, np.exp, -16, 0, 2e-5, 1, 5.5, 210),
    Case("exp", smooth.exp, np.exp, -100, 0, 2.5e-5, 2, 12.5, 260),
    Case("exp", smooth.exp, np.exp, -5, 3, 5e-5, 1, 7, 130),
]
"""Functions of the whole line, or of a whole range."""


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: f"{c.name}{c.low}")
def test_smooth_functions_err_and_cost_no_more_than_stated(case: Case) -> None:
    x = points(case.low, case.high, COUNT)
    made = compiled(case.function, [x.shape], [(case.low, case.high)])
    assert np.abs(made.run(x) - case.reference(x)).max() <= case.error
    assert made.bill.rounds == case.rounds
    online, dealt = made.per_element(COUNT)
    assert online <= case.online and dealt <= case.dealt


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: f"{c.name}{c.low}")
def test_no_value_of_a_smooth_function_leaves_its_bound(case: Case) -> None:
    x = points(case.low, case.high, 200)
    compiled(case.function, [x.shape], [(case.low, case.high)]).check_bounds(x)


POLES = [
    Case("reciprocal", roots.reciprocal, lambda x: 1 / x, 1, 2, 1e-4, 1, 5.5, 45),
    Case("reciprocal", roots.reciprocal, lambda x: 1 / x, 0.01, 100, 1e-4, 6, 34, 290),
    Case("inverse root", roots.inverse_root, lambda x: x**-0.5, 0.01, 100, 1e-4, 6, 38, 320),
    Case("inverse root", roots.inverse_root, lambda x: x**-0.5, 2**-10, 1000, 1e-4, 6, 45, 440),
    Case("root", roots.root, np.sqrt, 2**-10, 1000, 1e-4, 6, 63, 560),
]


@pytest.mark.parametrize("case", POLES, ids=lambda c: f"{c.name}{c.low}")
def test_inverses_and_roots_are_right_relatively(case: Case) -> None:
    x = on_grid(np.geomspace(case.low, case.high, COUNT))
    x[0], x[-1] = case.low, case.high
    made = compiled(case.function, [x.shape], [(case.low, case.high)])
    y = case.reference(on_grid(x))
    assert np.all(np.abs(made.run(x) - y) <= case.error * y + 2 * ULP)
    assert made.bill.rounds == case.rounds
    online, dealt = made.per_element(COUNT)
    assert online <= case.online and dealt <= case.dealt
    some = on_grid(np.geomspace(case.low, case.high, 100))
    compiled(case.function, [some.shape], [(case.low, case.high)]).check_bounds(some)


@pytest.mark.parametrize(("low", "high", "rounds"), [(1, 2, 1), (0.5, 4, 4), (2**-10, 1000, 5)])
def test_a_logarithm_errs_by_a_few_ulp(low: float, high: float, rounds: int) -> None:
    x = on_grid(np.geomspace(low, high, COUNT))
    made = compiled(roots.logarithm, [x.shape], [(low, high)])
    assert np.abs(made.run(x) - np.log(x)).max() <= 6e-5
    assert made.bill.rounds == rounds


def test_a_quotient_is_right_relatively_though_its_divisor_is_large_or_small() -> None:
    rng = np.random.default_rng(5)
    x, y = on_grid(rng.uniform(-8, 8, COUNT)), on_grid(np.geomspace(0.1, 100, COUNT))
    made = compiled(roots.divide, [x.shape, y.shape], [(-8, 8), (0.1, 100)])
    error = np.abs(made.run(x, y) - x / y)
    assert np.all(error <= 1e-4 * np.abs(x / y) + 2 * ULP)
    assert made.bill.rounds <= 7
    assert np.all(np.abs(made.run(x, y)) <= 81)
    negative = compiled(roots.divide, [x.shape, y.shape], [(-8, 8), (-100, -0.1)])
    assert np.all(np.abs(negative.run(x, -y) + x / y) <= 1e-4 * np.abs(x / y) + 2 * ULP)


@pytest.mark.parametrize("function", [roots.reciprocal, roots.inverse_root, roots.root])
def test_what_may_be_zero_leaves_no_bound_there(function: Any) -> None:
    x = on_grid(np.concatenate([np.arange(16) * ULP, np.geomspace(1e-3, 100, 50)]))
    made = compiled(function, [x.shape], [(0, 100)])
    made.check_bounds(x)
    assert np.all(made.run(x) >= -4 * ULP)


def test_an_inverse_root_of_less_than_the_least_is_about_that_of_the_least() -> None:
    x = on_grid(np.concatenate([np.arange(64) * ULP, np.geomspace(2**-6, 100, 64)]))
    made = compiled(lambda b, v: roots.inverse_root(b, v, least=2**-6), [x.shape], [(0, 100)])
    made.check_bounds(x)
    y, large = made.run(x), x >= 2**-6
    assert np.all(np.abs(y[large] - x[large] ** -0.5) <= 1e-4 * y[large] + 2 * ULP)
    assert np.all((y[x < 2**-8] >= 4) & (y[x < 2**-8] <= 16))


def test_a_root_of_what_may_be_zero_is_small_there() -> None:
    x = points(0, 2**-10, 65)
    made = compiled(roots.root, [x.shape], [(0, 100)])
    y = made.run(x)
    assert np.abs(y[x >= 4 * ULP] - np.sqrt(x[x >= 4 * ULP])).max() <= 1e-4
    assert y[0] <= 2 * ULP and np.all(np.abs(y) <= 2**-5 + 1e-4)


@pytest.mark.parametrize("function", [roots.inverse_root, roots.logarithm])
def test_poles_are_refused_where_a_range_is_proved(function: Any) -> None:
    with pytest.raises(Unsupported, match="expected to be positive"):
        compiled(function, [(4,)], [(-1, 4)])


@pytest.mark.parametrize("function", [roots.reciprocal, roots.inverse_root, roots.logarithm])
def test_functions_saturate_at_poles_that_only_samples_exclude(function: Any) -> None:
    x = points(0.5, 4, 1000)
    made = compiled(function, [x.shape], [(-1, 4)], known="calibrated")
    reference = {"reciprocal": 1 / x, "inverse_root": x**-0.5, "logarithm": np.log(x)}
    assert np.abs(made.run(x) - reference[function.__name__]).max() <= 2e-4
    smallest = np.full(1000, 2 * ULP)
    beyond = made.run(np.zeros(1000))
    assert np.all(np.abs(beyond) <= 2 * np.abs(made.run(smallest)) + 1)


@pytest.mark.parametrize("exponent", [0.5, -0.5, 0, 1, 2, 3, 5, -1, -2, 1.5, -0.3])
def test_powers_are_products_roots_or_exponentials(exponent: float) -> None:
    x = points(0.5, 3, 2000)
    made = compiled(lambda b, v: roots.power(b, v, exponent), [x.shape], [(0.5, 3)])
    error = np.abs(made.run(x) - x**exponent)
    assert np.all(error <= 5e-5 + 2e-4 * x**exponent)
    if exponent in (2, 3):
        assert made.bill.rounds == exponent - 1


def test_an_exponential_of_a_wide_range_is_right_relatively() -> None:
    x = points(-8, 8, COUNT)
    made = compiled(smooth.exp, [x.shape], [(-8, 8)])
    assert np.all(np.abs(made.run(x) - np.exp(x)) <= 3e-4 * np.exp(0.75 * x) + 4 * ULP)
    assert made.bill.rounds <= 5
    with pytest.raises(Unsupported, match="does not fit 64 bits"):
        compiled(smooth.exp, [(3,)], [(0, 100)])


def rows(rng: np.random.Generator, shape: tuple[int, ...], reach: float, spread: float) -> Array:
    """Normal values cut to a range; the first row has both its ends."""
    x = on_grid(np.clip(rng.normal(0, spread, shape), -reach, reach))
    x[0, :2] = -reach, reach
    return x


def exact_softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("reach", "group", "rounds", "online"),
    [(8, 2, 10, 80), (4, 2, 9, 70), (16, 4, 23, 50), (64, 4, 24, 50), (64, 2, 30, 50)],
)
def test_softmax_of_128_needs_no_maximum_for_narrow_ranges(
    reach: float, group: int, rounds: int, online: float
) -> None:
    rng = np.random.default_rng([3, int(reach)])
    x = rows(rng, (200, 128), reach, reach / 4)
    x[1] = -reach
    made = compiled(
        lambda b, v: softmax.softmax(b, v, 1), [x.shape], [(-reach, reach)], group=group
    )
    assert np.abs(made.run(x) - exact_softmax(x)).max() <= 5e-4
    assert made.bill.rounds <= rounds
    assert made.per_element(x.size)[0] <= online
    made = compiled(lambda b, v: softmax.log_softmax(b, v, 1), [x.shape], [(-reach, reach)])
    exact = x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))
    exact -= x.max(1, keepdims=True)
    assert np.abs(made.run(x) - exact).max() <= 5e-4


@pytest.mark.parametrize("reach", [2, 8, 40])
@pytest.mark.parametrize("count", [1, 2, 3, 33])
def test_no_value_of_a_softmax_leaves_its_bound(reach: float, count: int) -> None:
    x = rows(np.random.default_rng([4, count]), (5, max(count, 2)), reach, reach / 3)[:, :count]
    x[1], x[2] = -reach, reach
    for function in (softmax.softmax, softmax.log_softmax, softmax.log_sum_exp):
        made = compiled(lambda b, v, f=function: f(b, v, 1), [x.shape], [(-reach, reach)], group=4)
        made.check_bounds(x)


def test_a_function_may_be_wide_only_where_it_is_read_widely() -> None:
    x = points(-8, 8, 64)
    made = compiled(smooth.sigmoid, [x.shape], [(-8, 8)])
    assert made.plan.value(made.plan.outputs[0].id).width == 17
    assert all(i.value.width <= 24 for i in made.plan.instructions if i.op not in BITS)


@pytest.mark.parametrize("ends", [(-3.0, 3.0), (1.0, 2.0), (-16.0, 0.0), (0.0, 0.125)])
@pytest.mark.parametrize("to", [8, 12, 16, 19])
def test_a_fit_errs_by_no_more_than_asked_with_few_small_coefficients(
    ends: tuple[float, float], to: int
) -> None:
    bits = min(to + 4, 24)
    fit = fourier.fitted(np.exp, (), *ends, 2.0**-to * np.exp(ends[1]), bits, to)
    x = np.linspace(*ends, 3001)
    angle = 2 * np.pi * x * fit.factor / 2.0**fit.period_log2
    y = fit.constant + sum(
        a * np.sin(k * angle) + c * np.cos(k * angle)
        for k, (a, c) in enumerate(zip(fit.sine, fit.cosine, strict=True), 1)
    )
    assert np.abs(y - np.exp(x)).max() <= fit.error <= 2.0**-to * np.exp(ends[1])
    assert float(fit.constant * 2**to).is_integer()
    assert max(map(abs, (*fit.sine, *fit.cosine))) <= fourier.LARGEST
    again = fourier.fitted.__wrapped__(np.exp, (), *ends, 2.0**-to * np.exp(ends[1]), bits, to)
    assert again == fit


def test_a_fit_of_an_odd_function_has_no_cosines() -> None:
    fit = fourier.fitted(np.tanh, (), -4.0, 4.0, 1e-4, 20, 16)
    assert set(fit.cosine) == {0.0} and fit.constant == 0.0


@pytest.mark.parametrize("end", [-0.3, -3.0, -5.0])
@pytest.mark.parametrize("reach", [8.0, 40.0, 3000.0])
def test_a_coarse_comparison_is_right_away_from_its_end(end: float, reach: float) -> None:
    x = np.sort(
        on_grid(np.concatenate([points(-reach, reach, 500), points(end - 1, end + 1, 500)]))
    )
    x = np.clip(x, -reach, reach)
    ends = []

    def bit(b: Builder, v: Any) -> Any:
        ends.append(smooth.below(b, v, end))
        one = b.constant(np.ones(v.shape))
        assert ends[-1].bit is not None
        return b.select(ends[-1].bit, one, when=1)

    below = compiled(bit, [x.shape], [(-reach, reach)]).run(x) == 1
    assert np.all(x[below] < end)
    assert np.all(below[x <= ends[0].reach])
    assert ends[0].reach >= end * 1.3 - 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "reference", "megabytes"),
    [
        (smooth.sigmoid, sigmoid, 60),
        (smooth.tanh, np.tanh, 60),
        (smooth.gelu, lambda x: x * phi(x), 80),
        (smooth.swish, lambda x: x * sigmoid(x), 80),
    ],
)
def test_a_million_activations(function: Any, reference: Any, megabytes: float) -> None:
    x = points(-100, 100, 1_000_000)
    made = compiled(function, [x.shape], [(-100, 100)])
    assert np.abs(made.run(x) - reference(x)).max() <= 2e-4
    assert made.bill.online_bytes <= megabytes * 1e6
    assert made.bill.rounds <= 5


@pytest.mark.slow
def test_softmax_of_a_thousand_rows_stays_below_twenty_megabytes() -> None:
    x = rows(np.random.default_rng(6), (1000, 128), 32.0, 6.0)
    made = compiled(lambda b, v: softmax.softmax(b, v, 1), [x.shape], [(-32, 32)], group=4)
    assert np.abs(made.run(x) - exact_softmax(x)).max() <= 1e-3
    assert made.bill.online_bytes <= 20e6 and made.bill.rounds <= 24
