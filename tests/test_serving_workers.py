"""Several threads compute one large instruction: the same words, in the same order."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from mpcserve.config import Address, Config, Limits, Servers
from mpcserve.kernels import linear, linear_weights
from mpcserve.kernels.linear_bilinear import KARATSUBA
from mpcserve.protocol import Together
from mpcserve.protocol.walk import Walk
from mpcserve.serving import workers as workers_module
from mpcserve.serving.workers import Workers, threads_of
from tests.plans import PlanWriter, even_chunks

SEED = 20261123
WAIT = 20.0


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers(3)
    yield made
    made.close()


def test_results_come_in_order_while_several_tasks_run(workers: Workers) -> None:
    meeting = threading.Barrier(3)

    def task(k: int) -> int:
        meeting.wait(WAIT)  # three at a time, or never
        return k

    assert list(workers.run((lambda k=k: task(k)) for k in range(9))) == list(range(9))


def test_a_single_task_runs_where_it_is_asked_for(workers: Workers) -> None:
    assert list(workers.run([threading.current_thread])) == [threading.current_thread()]
    assert list(workers.run([])) == []


def test_an_error_of_a_task_is_raised_in_its_place(workers: Workers) -> None:
    results = workers.run([lambda: 1, lambda: 1 // 0, lambda: 3])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("word", [np.uint32, np.uint64])
def test_tiles_that_are_computed_ahead_are_the_product(
    workers: Workers, word: type[np.unsignedinteger]
) -> None:
    rng = np.random.default_rng(SEED)
    a, b = (rng.integers(0, 1 << 32, s).astype(word) for s in ((1400, 40), (40, 300)))
    x, w = (rng.integers(0, 1 << 32, s).astype(word) for s in ((2, 3, 90, 90), (40, 3, 3, 3)))
    conv = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
    for tiles, whole in (
        (linear.matmul_tiles(a, linear_weights.pack_matmul_b(b), workers.run), a @ b),
        (
            linear.conv2d_tiles(x, linear_weights.pack_conv_w(w, 1), *conv, workers.run),
            linear.conv2d(x, w, *conv),
        ),
        (
            linear.conv2d_tiles(x, linear_weights.pack_conv_w(w, 1, KARATSUBA), *conv, workers.run),
            linear.conv2d(x, w, *conv),
        ),
    ):
        parts = [(start, words.copy()) for start, words in tiles]
        assert len(parts) > 2
        assert [start for start, _ in parts] == np.cumsum(
            [0, *(p.size for _, p in parts[:-1])]
        ).tolist()
        assert np.array_equal(np.concatenate([p for _, p in parts]), whole.reshape(-1))


def test_an_evaluation_on_several_threads_is_the_same_bytes(workers: Workers) -> None:
    rng = np.random.default_rng(SEED + 1)
    p = PlanWriter()
    x, w = p.input((1200, 30), 40, bound=8), p.weight((30, 300), 40, bound=8)
    z = p.emit("matmul", [x, w], width=24, bound=22, ring=24, truncate=0)
    bit = p.sign(z, 24, even_chunks(24, 5), [5])
    plan = p.done(
        p.emit("select", [bit, z], width=40, bound=22, reads=24, when=0, nonnegative=True)
    )
    weights = rng.integers(-200, 200, (30, 300))
    together = Together(plan, {"w1": weights})
    given = rng.integers(-200, 200, (1200, 30)).astype(np.float64)
    for program in (together.alice, together.bob):
        program._walks = {
            1: Walk(plan, program.role, program._fixed, workers.run, program._walks[1].results)
        }
    outputs, _ = together.infer([given])
    assert np.array_equal(outputs[0], np.maximum(given @ weights, 0))


def config(alice: str, bob: str, threads: int = 0) -> Config:
    return Config(Servers(Address(alice, 1), Address(bob, 2)), limits=Limits(threads=threads))


@pytest.mark.parametrize(("cores", "alone", "shared"), [(1, 1, 1), (2, 2, 1), (16, 16, 5)])
def test_servers_on_one_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, alone: int, shared: int
) -> None:
    monkeypatch.setattr(
        workers_module.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False
    )
    assert threads_of(config("10.0.0.1", "10.0.0.2")) == alone
    assert threads_of(config("127.0.0.1", "127.0.0.1")) == shared
    assert threads_of(config("127.0.0.1", "127.0.0.1", threads=7)) == 7
