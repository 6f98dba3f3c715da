"""Fits by waves, however many and in whatever order they are asked for, are least squares."""

from __future__ import annotations

import numpy as np
import pytest

from mpcserve.compiler.leastsquares import CHECKED, FITTED, Waves, waves_of


def expected(
    waves: Waves, target: np.ndarray, harmonics: int, ridge: float, constant: bool
) -> float:
    """The least that |error|² + ridge·Σ c² can be, by NumPy's singular values."""
    rows = waves_of(waves.kinds, waves.points * waves.angle, 1, harmonics)
    weights = np.full(len(rows), np.sqrt(ridge))
    if constant:
        rows, weights = np.vstack([np.ones(FITTED), rows]), np.append(0.0, weights)
    longer = np.vstack([rows.T, np.diag(weights)])
    wanted = np.append(target, np.zeros(len(rows)))
    found = np.linalg.lstsq(longer, wanted, rcond=None)[0]
    return float(np.square(longer @ found - wanted).sum())


@pytest.mark.parametrize("kinds", [(np.cos, np.sin), (np.sin,), (np.cos,)])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("bits", [16, 20, 24])
def test_no_sum_of_so_many_waves_is_nearer(
    kinds: tuple[np.ufunc, ...], constant: bool, bits: int
) -> None:
    ridge = FITTED / 12 / 4.0**bits
    # The range is less than a third of a period: the waves are nearly dependent.
    waves = Waves(-6.0, 7.0, 2 * np.pi / 40, kinds, ridge)
    target = np.tanh(waves.points)
    for harmonics in (3, 1, 12, 7, 40, 12):
        found = waves.fitted(target, harmonics, constant)
        assert len(found) == harmonics * len(kinds) + constant
        rows = waves_of(kinds, waves.points * waves.angle, 1, harmonics)
        rows = np.vstack([np.ones(FITTED), rows]) if constant else rows
        cost = np.square(found @ rows - target).sum() + ridge * np.square(found[constant:]).sum()
        assert cost <= expected(waves, target, harmonics, ridge, constant) * (1 + 1e-6) + 1e-18


def test_what_is_checked_is_the_sum_on_even_points() -> None:
    waves = Waves(0.0, 2.0, 1.3, (np.cos, np.sin), 1e-12)
    found = waves.fitted(np.exp(-waves.points), 5, False)
    x = np.linspace(0.0, 2.0, CHECKED + 1)
    by_hand = sum(
        found[2 * k] * np.cos((k + 1) * 1.3 * x) + found[2 * k + 1] * np.sin((k + 1) * 1.3 * x)
        for k in range(5)
    )
    assert np.abs(waves.checked(found) - by_hand).max() < 1e-9
