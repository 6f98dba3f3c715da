"""Every primitive against Python integers: value, error bound, rounds, bytes and dealt bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mpcserve.plan import bill_of, verify_plan
from mpcserve.plan.plan import Plan
from mpcserve.protocol import Together
from mpcserve.reference import evaluate_clear
from tests.plans import PlanWriter, even_chunks, inside

SEED = 20240611
SIGN_WIDTHS = [2, 3, 5, 8, 9, 12, 20, 24, 32, 33, 40, 52]


def edge_values(rng: np.random.Generator, bound: int, size: int) -> np.ndarray:
    """Random integers of |x| < 2^bound that include 0, ±1 and both ends."""
    top = 1 << bound
    x = rng.integers(-top + 1, top, size)
    ends = [0, 1, -1, top - 1, -top + 1][:size]
    x[: len(ends)] = np.clip(ends, -top + 1, top - 1)
    return x


@pytest.fixture(autouse=True, params=[lambda plan: plan, inside], ids=["told", "opened"])
def place(request: pytest.FixtureRequest) -> None:
    """Every primitive once as an output that is not opened, and once where another reads it."""
    global _placed
    _placed = request.param


_placed: Callable[[Plan], Plan]


def run(plan: Plan, *inputs: np.ndarray, **weights: np.ndarray) -> list[np.ndarray]:
    """Verify the plan, run all three roles, hold the measured bill to the predicted one."""
    plan = _placed(plan)
    verify_plan(plan)
    outputs, bill = Together(plan, weights).infer([np.asarray(x, np.float64) for x in inputs])
    assert bill == bill_of(plan)
    return outputs


def groups_for(count: int) -> list[int]:
    if count <= 7:
        return [count]
    return [count // 3 + (k < count % 3) for k in range(3)]


@pytest.mark.parametrize("size", [1, 63, 64, 65, 500])
@pytest.mark.parametrize("width", SIGN_WIDTHS)
def test_sign_select_and_extend_are_exact_at_every_width(width: int, size: int) -> None:
    rng = np.random.default_rng([SEED, width, size])
    chunks = even_chunks(width, 8 if width <= 9 else 5)
    p = PlanWriter()
    bound = max(width - 2, 0)
    x = p.input((size,), width, bound=bound)
    bit = p.sign(x, width, chunks, groups_for(len(chunks)))
    outs = [
        p.emit("select", [bit, x], width=w, bound=width - 1, reads=width, when=0, nonnegative=True)
        for w in (width, 64)
    ]
    outs.append(
        p.emit("select", [bit, x], width=64, bound=bound, reads=width, when=1, nonnegative=False)
    )
    outs.append(p.emit("extend", [x], width=min(width + 3, 64), bound=bound, reads=width))
    v = edge_values(rng, bound, size)
    relu, wide, negative, extended = run(p.done(*outs), v)
    assert np.array_equal(relu, np.maximum(v, 0))
    assert np.array_equal(wide, np.maximum(v, 0))
    assert np.array_equal(negative, np.minimum(v, 0))
    assert np.array_equal(extended, v)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 6, 7, 8])
def test_sign_is_exact_for_every_chunk_size_and_grouping(chunk: int) -> None:
    rng = np.random.default_rng([SEED, chunk])
    width = 14
    chunks = even_chunks(width, chunk)
    count = len(chunks)
    groupings = [groups_for(count), [1] * (count - 1) + [1], [1, count - 1]]
    for groups in groupings:
        groups = [g for g in groups if g]
        if max(len(groups), max(groups)) > 8:
            continue
        p = PlanWriter()
        x = p.input((200,), width, bound=width - 1)
        bit = p.sign(x, width, chunks, groups)
        out = p.emit("select", [bit, x], width=20, reads=width, when=0, nonnegative=True)
        v = edge_values(rng, width - 1, 200)
        assert np.array_equal(run(p.done(out), v)[0], np.maximum(v, 0)), (chunks, groups)


def test_sign_reads_a_wider_operand_modulo_its_own_width() -> None:
    rng = np.random.default_rng(SEED)
    p = PlanWriter()
    x = p.input((300,), 61, bound=10)
    bit = p.sign(x, 12, even_chunks(12, 5), [3])
    out = p.emit("select", [bit, x], width=30, bound=11, reads=12, when=0, nonnegative=True)
    v = edge_values(rng, 10, 300)
    assert np.array_equal(run(p.done(out), v)[0], np.maximum(v, 0))


def product_plan(
    op: str, ring: int, truncate: int, width: int, secret: bool, addend: bool
) -> tuple[Plan, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    shapes = {
        "mul": ((3, 1, 40), (5, 1)),
        "matmul": ((2, 7, 33), (33, 9)),
        "conv": ((2, 4, 9, 8), (6, 2, 3, 3)),
    }
    attrs = {}
    if op == "conv":
        attrs = {"strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2], "groups": 2}
    p = PlanWriter()
    a = p.input(shapes[op][0], ring, bound=9)
    make = p.input if secret else p.weight
    b = make(shapes[op][1], ring, bound=9)
    operands = [a, b]
    bias: tuple[int, ...] = {"mul": (40,), "matmul": (9,), "conv": (6, 1, 1)}[op]
    if addend:
        operands.append(make(bias, ring, bound=12))
    z = p.emit(
        op, operands, width=width, frac_bits=-truncate, bound=26 - truncate,
        ring=ring, truncate=truncate, **attrs,
    )  # fmt: skip
    return p.done(z), *shapes[op], bias


@pytest.mark.parametrize("addend", [False, True])
@pytest.mark.parametrize("secret", [False, True])
@pytest.mark.parametrize(("ring", "truncate", "width"), [(64, 13, 51), (40, 8, 32), (30, 0, 28)])
@pytest.mark.parametrize("op", ["mul", "matmul", "conv"])
def test_products_are_within_one_ulp_of_the_exact_quotient(
    op: str, ring: int, truncate: int, width: int, secret: bool, addend: bool
) -> None:
    rng = np.random.default_rng([SEED, ring, truncate])
    plan, sa, sb, sd = product_plan(op, ring, truncate, width, secret, addend)
    a, b, d = (rng.integers(-500, 500, s) for s in (sa, sb, sd))
    operands = [b, d][: 2 if addend else 1]
    names = dict(zip(plan.weights, operands, strict=False))
    inputs = [a] if names else [a, *operands]
    (got,) = run(plan, *inputs, **names)
    # the same plan without truncation, in the clear, is the exact integer result
    exact_plan, *_ = product_plan(op, 64, 0, 63, secret, addend)
    (exact,) = evaluate_clear(exact_plan, names, inputs)
    ulps = got.astype(np.float64) / 2.0**truncate - exact.astype(np.float64) / 2.0**truncate
    assert np.abs(ulps).max() < 1
    if truncate == 0:
        assert np.array_equal(got, exact)


@pytest.mark.parametrize("ring", [30, 32, 44, 63, 64])
def test_a_convolution_with_fewer_products_is_exact_in_every_ring(ring: int) -> None:
    rng = np.random.default_rng([SEED, ring])
    at = {"strides": [1, 1], "pads": [1, 1, 1, 1], "dilations": [1, 1], "groups": 1}
    p = PlanWriter()
    x, w = p.input((2, 33, 29, 30), ring, bound=ring - 16), p.weight((17, 33, 3, 3), ring, bound=5)
    width = min(ring, 63)
    z = p.emit("conv", [x, w], width=width, bound=width - 1, ring=ring, truncate=0, **at)
    plan, high = p.done(z), 2 ** (ring - 16)
    a, b = rng.integers(-high, high, (2, 33, 29, 30)), rng.integers(-32, 32, (17, 33, 3, 3))
    names = dict(zip(plan.weights, [b], strict=True))
    (got,) = run(plan, a, **names)
    (exact,) = evaluate_clear(plan, names, [a])
    assert np.array_equal(got, exact)


def test_square_of_one_value_is_a_product() -> None:
    p = PlanWriter()
    x = p.input((50,), 40, bound=10)
    z = p.emit("mul", [x, x], width=40, bound=20, ring=40, truncate=0)
    v = np.arange(-25, 25)
    assert np.array_equal(run(p.done(z), v)[0], v * v)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5)])
def test_products_and_local_ops_work_on_any_rank(shape: tuple[int, ...]) -> None:
    p = PlanWriter()
    x = p.input(shape, 40, bound=10)
    w = p.weight(shape, 40, bound=10)
    z = p.emit("mul", [x, w], width=40, bound=20, ring=40, truncate=0)
    s = p.emit("scale", [z], width=40, bound=22, factor=-3)
    o = p.emit("offset", [s], width=40, bound=23, value=-7)
    v, u = np.full(shape, 21), np.full(shape, -11)
    name = next(iter(p.done(o).weights))
    assert np.array_equal(run(p.done(o), v, **{name: u})[0], v * u * -3 - 7)


def test_local_ops_equal_the_reference_and_cost_nothing() -> None:
    rng = np.random.default_rng(SEED)
    p = PlanWriter()
    x, y = p.input((2, 3, 4), 30, bound=20), p.input((3, 1), 30, bound=20)
    outs = [
        p.emit("add", [x, y], width=30, bound=21),
        p.emit("sub", [y, x], width=25, bound=21),
        p.emit("scale", [x], width=30, bound=23, factor=5),
        p.emit("offset", [x], width=30, bound=21, value=-12345),
        p.shaped("reshape", x, (4, 6), 30),
        p.shaped("expand", y, (2, 3, 4), 30),
        p.emit("transpose", [x], width=30, bound=20, perm=[2, 0, 1]),
        p.emit(
            "slice", [x], width=30, bound=20, starts=[0, 1, 0], stops=[2, 3, 4], steps=[1, 1, 3]
        ),
        p.emit("concat", [x, x], width=28, bound=20, axis=1),
        p.emit("pad", [x], width=30, bound=20, before=[0, 1, 0], after=[1, 0, 2], value=-99),
        p.emit("gather", [x], width=30, bound=20, axis=2, indices=[3, 3, 0]),
        p.emit("sum", [x], width=30, bound=24, axes=[0, 2]),
        p.emit("sum", [x], width=30, bound=25, axes=[0, 1, 2]),
    ]
    plan = p.done(*outs)
    assert bill_of(plan).rounds == 0
    assert bill_of(plan).online_bytes == 0
    a, b = edge_values(rng, 20, 24).reshape(2, 3, 4), edge_values(rng, 20, 3).reshape(3, 1)
    for got, expected in zip(run(plan, a, b), evaluate_clear(plan, {}, [a, b]), strict=True):
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("bits", [1, 4, 13])
def test_shift_divides_by_a_power_of_two_within_one_and_a_half_ulp(bits: int) -> None:
    rng = np.random.default_rng([SEED, bits])
    p = PlanWriter()
    x = p.input((20000,), 40, bound=30)
    out = p.emit("shift", [x], width=40 - bits, bound=31 - bits, bits=bits)
    v = edge_values(rng, 30, 20000)
    (got,) = run(p.done(out), v)
    error = got.astype(np.float64) - v / 2.0**bits
    assert np.abs(error).max() < 1.5
    assert abs(error.mean() + 2.0 ** -(bits + 1)) < 0.02


def test_constants_are_public_shares_with_no_mask() -> None:
    p = PlanWriter()
    x = p.input((2, 2), 20, bound=10)
    c = p.constant((2, 2), [1, -2, 3, -4], 20)
    v = np.array([[5, 6], [7, 8]])
    (got,) = run(p.done(p.emit("add", [x, c], width=20, bound=11)), v)
    assert np.array_equal(got, v + np.array([[1, -2], [3, -4]]))


@pytest.mark.parametrize(
    ("chunks", "n"),
    [
        ([4, 5], 20),
        ([8, 8], 26),
        ([7, 6, 6], 20),
        ([7, 6, 6], 32),
        ([6, 6, 6, 5], 40),
        ([6, 5], 12),
        ([8, 8, 8, 8], 64),
        ([1, 1, 1, 1, 1, 1], 33),
    ],
)
@pytest.mark.parametrize("size", [1, 64, 77, 5000])
def test_rectify_is_exact_in_two_rounds(chunks: list[int], n: int, size: int) -> None:
    rng, m = np.random.default_rng([SEED, n, size]), sum(chunks) + 1
    p = PlanWriter()
    x = p.input((size,), m + 3, bound=m - 1)
    plan = p.done(p.emit("rectify", [x], width=n, bound=m - 1, chunks=chunks))
    v = edge_values(rng, m - 1, size)
    assert np.array_equal(run(plan, v)[0], np.maximum(v, 0))
    assert np.array_equal(evaluate_clear(plan, {}, [v])[0], np.maximum(v, 0))
    bill, plane = bill_of(inside(plan)), (size + 7) // 8
    assert bill.rounds == 2
    assert bill.bytes["alice->bob"] == (2 * len(chunks) - 1) * plane + (size * n + 7) // 8


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_all_joins_any_number_of_bits_in_one_round(count: int) -> None:
    rng = np.random.default_rng([SEED, count])
    p, size, width = PlanWriter(), 200, 9
    xs = [p.input((size,), width, bound=6) for _ in range(count)]
    signs = [p.sign(x, width, [8], [1]) for x in xs]
    when = rng.integers(0, 2, count).tolist()
    joined = p.emit("all", signs, width=1, bound=0, when=when)
    one = p.constant((size,), [1] * size, 4)
    out = p.emit("select", [joined, one], width=5, bound=2, reads=4, when=1, nonnegative=True)
    plan = p.done(out)
    assert bill_of(inside(plan)).rounds == 3
    # few elements are negative, so that all `when` hold now and then
    values = [np.where(rng.random(size) < (0.8 if w else 0.2), -1, 1) for w in when]
    expected = np.logical_and.reduce([(v < 0) == w for v, w in zip(values, when, strict=True)])
    assert expected.any()
    assert np.array_equal(run(plan, *values)[0], expected.astype(np.int64))


@pytest.mark.parametrize("width", [14, 40])
def test_select_of_many_pairs_is_one_round(width: int) -> None:
    rng = np.random.default_rng([SEED, width])
    p, size = PlanWriter(), 1100
    a, b = p.input((size,), width, bound=10), p.input((size,), width, bound=10)
    c = p.input((size,), 12, bound=10)
    low = p.sign(c, 12, even_chunks(12, 5), [3])
    shifted = p.emit("offset", [c], width=12, bound=11, value=-1)
    not_positive = p.sign(shifted, 12, even_chunks(12, 5), [3])
    zero = p.emit("all", [low, not_positive], width=1, bound=0, when=[0, 1])
    out = p.emit(
        "select", [low, a, zero, b], width=width + 3, bound=11, reads=12, when=1, nonnegative=False
    )
    va, vb = edge_values(rng, 10, size), edge_values(rng, 10, size)
    vc = rng.integers(-2, 3, size)
    expected = np.where(vc < 0, va, np.where(vc == 0, vb, 0))
    assert np.array_equal(run(p.done(out), va, vb, vc)[0], expected)


def wave_plan(size: int, period: int, bits: int, width: int, harmonics: int, sums: int = 1) -> Plan:
    rng = np.random.default_rng(SEED)
    sine, cosine = rng.integers(-(1 << bits), 1 << bits, (2, harmonics * sums)).tolist()
    waves = [bits - min(k, 4) for k in range(harmonics)]
    p = PlanWriter()
    x = p.input((size,), 40, bound=39)
    truncate = 2 * bits - 16
    out = p.emit(
        "spectral", [x], width=width, frac_bits=16, bound=width - 1, reads=period,
        ring=width + truncate, truncate=truncate, bits=bits, waves=waves, sums=sums, sine=sine,
        cosine=cosine,
    )  # fmt: skip
    return p.done(out)


@pytest.mark.parametrize("sums", [1, 3])
@pytest.mark.parametrize(
    ("period", "bits", "width", "harmonics"), [(21, 20, 24, 12), (11, 16, 40, 1), (26, 24, 24, 20)]
)
def test_spectral_is_sums_of_the_same_waves_in_one_round(
    period: int, bits: int, width: int, harmonics: int, sums: int
) -> None:
    rng = np.random.default_rng([SEED, period])
    plan = wave_plan(3000, period, bits, width, harmonics, sums)
    assert bill_of(inside(plan)).rounds == 1
    v = edge_values(rng, period - 1, 3000)
    v[5:8] += 1 << period  # the ring wraps with the function
    (got,) = run(plan, v)
    at = plan[1].attrs
    turns = np.outer(2 * np.pi * v / 2.0**period, np.arange(1, harmonics + 1))
    sine, cosine = (np.reshape(at[name], (sums, harmonics)).T for name in ("sine", "cosine"))
    exact = np.sin(turns) @ sine + np.cos(turns) @ cosine
    # the truncation's ulp, and half a unit of coefficients and waves per harmonic
    allowed = 2.0**-16 + 2 * harmonics * 2.0**-bits + sum(2.0 ** -np.array(at["waves"]))
    assert np.abs(got.reshape(exact.shape) - exact / 2.0**bits).max() < allowed
