"""What owners send and accept."""

from __future__ import annotations

import numpy as np
import pytest

from mpcserve.errors import PeerError, WireError
from mpcserve.protocol import Together, drive, reveal, share_input
from tests.plans import PlanWriter


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
