"""Smooth functions through the real protocol: error, rounds and bytes on their whole domains."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import erf, inf
from typing import Any, NamedTuple

import numpy as np
import pytest

from mpcserve.compiler import ends as ends_of
from mpcserve.compiler import fourier, roots, smooth, softmax
from mpcserve.compiler.builder import Builder
from mpcserve.compiler.problems import Unsupported
from mpcserve.plan import bill_of
from mpcserve.plan.ops import BITS
from tests.onnx_cases import model_of, node
from tests.smooth_support import ULP, Array, compiled, on_grid, points
from tests.test_ops_activation import close
from tests.test_secrecy import VIEWS, views_of

pytestmark = pytest.mark.slow

COUNT = 1_000_000
"""Points of each function, both ends of its range among them."""

FEWER = 50_000
"""Points of a function's further ranges."""


def phi(x: Array) -> Array:
    return 0.5 + 0.5 * np.array([erf(v) for v in x / np.sqrt(2)])


def sigmoid(x: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(x / 2)


class Case(NamedTuple):
    """`online`, `dealt`: most bytes per element. `many`: see `compiled`."""

    name: str
    function: Any
    reference: Any
    low: float
    high: float
    error: float
    rounds: int
    online: float
    dealt: float
    many: float = inf

    @property
    def key(self) -> str:
        """Of a test."""
        return f"{self.name}{self.low}{'' if self.many else 'halves'}"

    def points(self, cases: Sequence[Case]) -> int:
        """COUNT of the first case of each name."""
        return COUNT if next(c for c in cases if c.name == self.name) is self else FEWER


SELU_ALPHA, SELU_GAIN = 1.67326319217681884765625, 1.05070102214813232421875


def gelu_by_tanh(x: Array) -> Array:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dip(x: Array) -> Array:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


SHAPES = [
    Case("sigmoid", smooth.sigmoid, sigmoid, -64, 64, 2e-4, 3, 11, 112, 0),
    Case("tanh", smooth.tanh, np.tanh, -64, 64, 2e-4, 3, 12.5, 129, 0),
    Case("silu", smooth.swish, lambda x: x * sigmoid(x), -64, 64, 2e-4, 3, 19, 128, 0),
    Case("silu", smooth.swish, lambda x: x * sigmoid(x), -16, 16, 2e-4, 3, 19, 128, 0),
    Case("softplus", smooth.softplus, lambda x: np.logaddexp(0, x), -64, 64, 2e-4, 3, 14, 130, 0),
    Case("gelu", smooth.gelu, lambda x: x * phi(x), -64, 64, 2e-4, 3, 15, 100, 0),
    Case("sigmoid", smooth.sigmoid, sigmoid, -64, 64, 4.5e-5, 2, 10, 225),
    Case("sigmoid", smooth.sigmoid, sigmoid, -8, 8, 3e-5, 1, 4.25, 111),
    Case("sigmoid", smooth.sigmoid, sigmoid, -1000, 1000, 4.5e-5, 3, 12, 171),
    Case("tanh", smooth.tanh, np.tanh, -64, 64, 4.5e-5, 3, 11.5, 178),
    Case("tanh", smooth.tanh, np.tanh, -5, 5, 3e-5, 1, 4.5, 164),
    Case("erf", smooth.erf, lambda x: 2 * phi(x * np.sqrt(2)) - 1, -64, 64, 4.5e-5, 3, 11.5, 110),
    Case("gelu", smooth.gelu, lambda x: x * phi(x), -64, 64, 7e-5, 3, 14, 118),
    Case("gelu", smooth.gelu, lambda x: x * phi(x), -4, 4, 5e-5, 1, 5, 73),
    Case("gelu", smooth.gelu, lambda x: x * phi(x), -1000, 1000, 7e-5, 3, 16.5, 127),
    Case(
        "tanh gelu", lambda b, x: smooth.gelu(b, x, True), gelu_by_tanh, -64, 64, 7e-5, 3, 14, 127
    ),
    Case("silu", smooth.swish, lambda x: x * sigmoid(x), -64, 64, 7e-5, 2, 13, 335),
    Case("silu", smooth.swish, lambda x: x * sigmoid(x), -8, 8, 5e-5, 1, 5, 115),
    Case(
        "swish",
        lambda b, x: smooth.swish(b, x, -1.7),
        lambda x: x * sigmoid(-1.7 * x),
        *(-20, 20, 7e-5, 2, 12, 280),
    ),
    Case("softplus", smooth.softplus, lambda x: np.logaddexp(0, x), -64, 64, 7e-5, 2, 13, 234),
    Case(
        "mish",
        smooth.mish,
        lambda x: x * np.tanh(np.logaddexp(0, x)),
        *(-64, 64, 7e-5, 3, 13.5, 305),
    ),
    Case("elu", smooth.elu, dip, -64, 64, 5e-5, 3, 15, 172),
    Case(
        "selu",
        lambda b, x: smooth.elu(b, x, SELU_ALPHA, gain=SELU_GAIN),
        lambda x: SELU_GAIN * np.where(x > 0, x, SELU_ALPHA * np.expm1(np.minimum(x, 0))),
        *(-64, 64, 7e-5, 3, 17, 200),
    ),
    Case(
        "celu",
        lambda b, x: smooth.elu(b, x, 2.0, scale=2.0),
        lambda x: np.where(x > 0, x, 2 * np.expm1(np.minimum(x, 0) / 2)),
        *(-64, 64, 7e-5, 3, 15, 203),
    ),
    Case("sine", smooth.sine, np.sin, -1000, 1000, 3e-5, 1, 4.5, 11),
    Case("cosine", lambda b, x: smooth.sine(b, x, True), np.cos, -1000, 1000, 3e-5, 1, 4.5, 11),
    Case("exp", smooth.exp, np.exp, -16, 0, 2e-5, 1, 5.5, 179),
    Case("exp", smooth.exp, np.exp, -100, 0, 2.5e-5, 2, 12, 189),
    Case("exp", smooth.exp, np.exp, -5, 3, 5e-5, 1, 7, 115),
]
"""Functions of the whole line, or of a whole range."""


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.key)
def test_smooth_functions_err_and_cost_no_more_than_stated(case: Case) -> None:
    x = points(case.low, case.high, case.points(SHAPES))
    made = compiled(case.function, [x.shape], [(case.low, case.high)], many=case.many)
    assert np.abs(made.run(x) - case.reference(x)).max() <= case.error
    assert made.bill.rounds == case.rounds
    online, dealt = made.per_element(x.size)
    assert online <= case.online and dealt <= case.dealt


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.key)
def test_no_value_of_a_smooth_function_leaves_its_bound(case: Case) -> None:
    x = points(case.low, case.high, 200)
    ends = [(case.low, case.high)]
    compiled(case.function, [x.shape], ends, many=case.many).check_bounds(x)


POLES = [
    Case("reciprocal", roots.reciprocal, lambda x: 1 / x, 0.01, 100, 1e-4, 6, 34, 290),
    Case("reciprocal", roots.reciprocal, lambda x: 1 / x, 1, 2, 1e-4, 1, 5.5, 45),
    Case("inverse root", roots.inverse_root, lambda x: x**-0.5, 0.01, 100, 1e-4, 6, 38, 320),
    Case("inverse root", roots.inverse_root, lambda x: x**-0.5, 2**-10, 1000, 1e-4, 6, 45, 440),
    Case("root", roots.root, np.sqrt, 2**-10, 1000, 1e-4, 6, 63, 560),
]


@pytest.mark.parametrize("case", POLES, ids=lambda c: c.key)
def test_inverses_and_roots_are_right_relatively(case: Case) -> None:
    x = on_grid(np.geomspace(case.low, case.high, case.points(POLES)))
    x[0], x[-1] = case.low, case.high
    made = compiled(case.function, [x.shape], [(case.low, case.high)])
    y = case.reference(on_grid(x))
    assert np.all(np.abs(made.run(x) - y) <= case.error * y + 2 * ULP)
    assert made.bill.rounds == case.rounds
    online, dealt = made.per_element(x.size)
    assert online <= case.online and dealt <= case.dealt
    some = on_grid(np.geomspace(case.low, case.high, 100))
    compiled(case.function, [some.shape], [(case.low, case.high)]).check_bounds(some)


@pytest.mark.parametrize(
    ("low", "high", "rounds", "count"),
    [(1, 2, 1, FEWER), (0.5, 4, 4, FEWER), (2**-10, 1000, 5, COUNT)],
)
def test_a_logarithm_errs_by_a_few_ulp(low: float, high: float, rounds: int, count: int) -> None:
    x = on_grid(np.geomspace(low, high, count))
    made = compiled(roots.logarithm, [x.shape], [(low, high)])
    assert np.abs(made.run(x) - np.log(x)).max() <= 6e-5
    assert made.bill.rounds == rounds


def test_a_quotient_is_right_relatively_though_its_divisor_is_large_or_small() -> None:
    rng = np.random.default_rng(5)
    x, y = on_grid(rng.uniform(-8, 8, FEWER)), on_grid(np.geomspace(0.1, 100, FEWER))
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
    parts = [np.arange(64) * ULP, np.full(4096, 2**-6), np.geomspace(2**-6, 100, 64)]
    x = on_grid(np.concatenate(parts))
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
    x = points(0.5, 3, COUNT if exponent == 1.5 else 2000)
    made = compiled(lambda b, v: roots.power(b, v, exponent), [x.shape], [(0.5, 3)])
    error = np.abs(made.run(x) - x**exponent)
    assert np.all(error <= 5e-5 + 2e-4 * x**exponent)
    if exponent in (2, 3):
        assert made.bill.rounds == exponent - 1


def test_an_exponential_of_a_wide_range_is_right_relatively() -> None:
    x = points(-8, 8, FEWER)
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
        ends.append(ends_of.below(b, v, end))
        one = b.constant(np.ones(v.shape))
        assert ends[-1].bit is not None
        return b.select(ends[-1].bit, one, when=1)

    below = compiled(bit, [x.shape], [(-reach, reach)]).run(x) == 1
    assert np.all(x[below] < end)
    assert np.all(below[x <= ends[0].reach])
    assert ends[0].reach >= end * 1.3 - 0.1


@pytest.mark.parametrize(
    ("function", "megabytes"),
    [(smooth.sigmoid, 60), (smooth.tanh, 60), (smooth.gelu, 80), (smooth.swish, 80)],
)
@pytest.mark.parametrize("many", [0, inf])
def test_a_million_activations_take_few_bytes(function: Any, megabytes: float, many: float) -> None:
    made = compiled(function, [(1_000_000,)], [(-100, 100)], many=many)
    assert made.bill.online_bytes <= megabytes * 1e6
    assert made.bill.rounds <= 5


def test_softmax_of_a_thousand_rows_stays_below_twenty_megabytes() -> None:
    function = lambda b, v: softmax.softmax(b, v, 1)  # noqa: E731
    made = compiled(function, [(1000, 128)], [(-32, 32)], group=4)
    assert made.bill.online_bytes <= 20e6 and made.bill.rounds <= 24


@pytest.mark.parametrize(("reach", "rounds"), [(8.0, 10), (32.0, 24)])
def test_softmax_of_128_over_a_million_values(reach: float, rounds: int) -> None:
    x = rows(np.random.default_rng(6), (-(-COUNT // 128), 128), reach, reach / 5)
    x[1] = -reach
    made = compiled(lambda b, v: softmax.softmax(b, v, 1), [x.shape], [(-reach, reach)], group=4)
    assert np.abs(made.run(x) - exact_softmax(x)).max() <= 1e-3
    assert made.bill.rounds <= rounds


def test_layer_normalisation_of_768_over_a_million_values() -> None:
    rng = np.random.default_rng(7)
    x = rng.normal(0.3, 1, (-(-COUNT // 768), 768)).astype(np.float32)
    x[0, :2] = -8, 8
    weights = {
        "s": rng.normal(1, 0.3, 768).astype(np.float32),
        "t": rng.normal(0, 0.3, 768).astype(np.float32),
    }
    model = model_of([node("LayerNormalization", ["x", "s", "t"])], {"x": x.shape}, weights)
    made = close(model, [np.clip(x, -8, 8)], 2e-3)
    assert bill_of(made.plan).rounds <= 12


@pytest.mark.parametrize(
    "function",
    [
        smooth.sigmoid,
        smooth.gelu,
        smooth.elu,
        smooth.exp,
        smooth.sine,
        roots.reciprocal,
        roots.inverse_root,
        roots.logarithm,
        lambda b, x: softmax.softmax(b, b.reshape(x, (8, 4)), 1),
    ],
)
@pytest.mark.parametrize("many", [0, inf])
def test_what_a_server_receives_of_a_smooth_function_is_uniform(function: Any, many: float) -> None:
    made = compiled(
        function, [(32,)], [(2**-4, 20)] if is_pole(function) else [(-20, 20)], many=many
    )
    x, runs = np.full(32, 3.0), 400
    transcripts = [made.transcript(x) for _ in range(runs)]
    for party in VIEWS:
        bits = views_of(transcripts, party).astype(np.float32) * 2 - 1
        assert np.abs(bits.sum(axis=0)).max() / np.sqrt(runs) < 6.5


def is_pole(function: Any) -> bool:
    return function in (roots.reciprocal, roots.inverse_root, roots.logarithm)


STATED = re.compile(
    r"(many )?on \[(−?[\d.]+), (−?[\d.]+)\]: (\d+) rounds?, (\d+) bits each way, (\d+) dealt"
)
FUNCTIONS = [
    *(smooth.sigmoid, smooth.tanh, smooth.erf, smooth.gelu, smooth.swish, smooth.softplus),
    *(smooth.mish, smooth.elu, smooth.exp, smooth.sine),
    *(roots.reciprocal, roots.inverse_root, roots.root, roots.logarithm),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_docstring_states_what_a_function_costs(function: Any) -> None:
    count = 1 << 14
    stated = STATED.findall(function.__doc__)
    assert stated
    for many, low, high, *costs in stated:
        ends = (float(low.replace("−", "-")), float(high))
        made = compiled(function, [(count,)], [ends], many=0 if many else inf)
        online, dealt = (8 * n for n in made.per_element(count))
        assert list(map(int, costs)) == [made.bill.rounds, online / 2, dealt]
