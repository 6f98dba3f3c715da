"""What owners send and accept."""

from __future__ import annotations

import numpy as np
import pytest

from mpcserve.errors import PeerError, WireError
from mpcserve.protocol import ServerProgram, Together, drive, reveal, share_input
from tests.plans import PlanWriter, even_chunks


def doubled() -> Together:
    p = PlanWriter()
    x = p.input((3, 5), 30, frac_bits=8, bound=20)
    return Together(p.done(p.emit("add", [x, x], width=30, frac_bits=8, bound=21)), {})


def messages_of(together: Together, x: np.ndarray) -> tuple[bytes, bytes]:
    alice, bob, _ = together.prepare()
    packed = b"".join(share_input(together.plan, 0, x, alice.input_seeds[0], bob.input_seeds[0]))
    steps = together.alice.evaluate(alice, [packed]), together.bob.evaluate(bob, [packed])
    return drive(*steps)[2]


def test_the_owner_decodes_to_the_declared_dtype_and_shape() -> None:
    x = np.linspace(-3, 3, 15).reshape(3, 5)
    together = doubled()
    (y,) = reveal(together.plan, *messages_of(together, x))
    assert y.shape == (3, 5)
    assert y.dtype == np.float64
    assert np.abs(y - 2 * x).max() <= 2**-8


def test_servers_that_disagree_are_noticed() -> None:
    together = doubled()
    a, b = messages_of(together, np.zeros((3, 5)))
    forged = bytes([b[0] ^ 1]) + b[1:]
    with pytest.raises(PeerError, match="disagree"):
        reveal(together.plan, a, forged)


def test_servers_that_compute_an_unopened_result_from_other_values_are_noticed() -> None:
    """The tag is of what it was computed from: here the product that was opened."""
    p = PlanWriter()
    x, w = p.input((3, 5), 30, bound=8), p.weight((5, 4), 30, bound=8)
    z = p.emit("matmul", [x, w], width=20, bound=18, ring=30, truncate=0)
    bit = p.sign(z, 20, even_chunks(20, 5), [4])
    y = p.emit("select", [bit, z], width=20, bound=18, reads=20, when=0, nonnegative=True)
    plan = p.done(y)
    assert (list(plan.unopened), plan.tagged) == ([y], (bit, z))
    together = Together(plan, {"w1": np.ones((5, 4), np.int64)})
    a, b = messages_of(together, np.ones((3, 5)))
    assert np.array_equal(reveal(plan, a, b)[0], np.full((3, 4), 5))
    for other in (bit, z):
        altered = Together(plan, {"w1": np.ones((5, 4), np.int64)})
        alter(altered.bob, other)
        with pytest.raises(PeerError, match="disagree"):
            reveal(plan, *messages_of(altered, np.ones((3, 5))))


def alter(program: ServerProgram, id: int) -> None:
    """One bit of a value is another on this server when the message is made."""
    results = program._walks[1].results
    seen = results.messages

    def messages(values: list[np.ndarray], *rest: object) -> list[bytes | None]:
        values[id] = values[id].copy()
        values[id].reshape(-1)[0] ^= values[id].dtype.type(1)
        return seen(values, *rest)

    results.messages = messages


def test_each_output_share_alone_is_random_and_differs_between_requests() -> None:
    together = doubled()
    first, second = (messages_of(together, np.zeros((3, 5))) for _ in range(2))
    for k in (0, 1):
        assert first[k] != second[k]


def test_a_message_of_another_size_is_refused() -> None:
    together = doubled()
    alice, _, _ = together.prepare()
    with pytest.raises(WireError, match=r"57 bytes.*|.*expected 57"):
        next(together.alice.evaluate(alice, [b"x" * 56]))
    a, b = messages_of(together, np.zeros((3, 5)))
    with pytest.raises(WireError, match="expected 57"):
        reveal(together.plan, a, b[:-1])
