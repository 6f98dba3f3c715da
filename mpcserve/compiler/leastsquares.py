"""Least squares by waves of one period: of more and more waves, without starting anew each time.

Waves are made orthogonal one after the other, so that what is known of the first of them stays.
Nothing is squared: on a part of their period waves are nearly made up of each other. Sums are
einsum's, not a threaded library's: these are many small problems, and threads that wait for each
other take five times as long, and much longer on a busy machine.

Source: Gram-Schmidt, twice, which is enough; see Giraud, Langou, Rozložník (2005).
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]
Kinds = tuple[np.ufunc, ...]
"""Cosine, sine or both."""

FITTED, CHECKED = 400, 1600
"""Points of a fit, and of its check."""

REFINEMENTS, SETTLED = 8, 2.0**-48
"""At most so many; one that changes no coefficient by more than this part of the largest is the
last."""


def combined(rows: Reals, factors: Reals) -> Reals:
    """Σ factors[i] · rows[i]."""
    return np.asarray(np.einsum("in,i->n", rows, factors))


def _products(rows: Reals, x: Reals) -> Reals:
    """rows[i] · x, for each of them."""
    return np.asarray(np.einsum("in,n->i", rows, x))


def waves_of(kinds: Kinds, angles: Reals, first: int, last: int) -> Reals:
    """Rows: of harmonics `first` to `last`, each kind by turns."""
    turns = np.outer(np.arange(first, last + 1), angles)
    return np.stack([kind(turns) for kind in kinds], 1).reshape(-1, len(angles))


class Waves:
    """Waves on [low, high] at `points`, for fits, and at `dense` ones, for checks.

    `angle`: of one unit of x, for the first harmonic. `ridge`: what a coefficient's square costs.
    """

    def __init__(self, low: float, high: float, angle: float, kinds: Kinds, ridge: float) -> None:
        # Chebyshev's points: denser towards the ends, where a fit on even points errs most.
        turn = np.cos(np.pi * (np.arange(FITTED) + 0.5) / FITTED)
        self.points = (low + high) / 2 - (high - low) / 2 * turn
        self.dense = np.linspace(low, high, CHECKED + 1)
        self.angle, self.kinds, self.harmonics = angle, kinds, 0
        self._dense = np.empty((0, CHECKED + 1))
        self._alone, self._beside = Fitter(ridge), Fitter(ridge)
        self._beside.add(np.ones((1, FITTED)), free=1)

    def fitted(self, target: Reals, harmonics: int, constant: bool) -> Reals:
        """c with least |c @ rows − target|² + ridge·Σ c², of so many harmonics.

        With a `constant`, which comes first, and which the ridge leaves alone.
        """
        self._grow(harmonics)
        count = harmonics * len(self.kinds)
        if constant:
            return self._beside.solved(target, 1 + count)
        return self._alone.solved(target, count)

    def checked(self, coefficients: Reals) -> Reals:
        """The sum of waves at the dense points."""
        return combined(self._dense[: len(coefficients)], coefficients)

    def _grow(self, harmonics: int) -> None:
        if harmonics <= self.harmonics:
            return
        rows, dense = (
            waves_of(self.kinds, x * self.angle, self.harmonics + 1, harmonics)
            for x in (self.points, self.dense)
        )
        self._alone.add(rows)
        self._beside.add(rows)
        self._dense = np.vstack([self._dense, dense])
        self.harmonics = harmonics


class Fitter:
    """Rows, and what makes each orthogonal to those before: `turned` = `makes` @ `rows`.

    Rows count as longer by √ridge in a place of their own: then the ridge needs no other mention,
    and no row is made up of others. Shapes: [n, points], `makes` [n, n], zero above the diagonal.
    """

    def __init__(self, ridge: float) -> None:
        self._ridge = ridge
        self._rows = self._turned = np.empty((0, FITTED))
        self._makes, self._ridges = np.empty((0, 0)), np.empty(0)

    def add(self, rows: Reals, free: int = 0) -> None:
        """Rows behind the others; the ridge leaves the first `free` of them alone."""
        known, count = len(self._rows), len(self._rows) + len(rows)
        self._rows = np.vstack([self._rows, rows])
        ridges = np.full(len(rows), self._ridge)
        ridges[:free] = 0.0
        self._ridges = np.append(self._ridges, ridges)
        turned, makes = np.empty((count, FITTED)), np.zeros((count, count))
        turned[:known], makes[:known, :known] = self._turned, self._makes
        for k in range(known, count):
            row, make = self._rows[k].copy(), np.zeros(count)
            make[k] = 1.0
            for _ in range(2):
                shares = _products(turned[:k], row) + _products(makes[:k], self._ridges * make)
                row -= combined(turned[:k], shares)
                make -= combined(makes[:k], shares)
            size = sqrt(
                np.einsum("n,n->", row, row) + np.einsum("n,n,n->", self._ridges, make, make)
            )
            turned[k], makes[k] = row / size, make / size
        self._turned, self._makes = turned, makes

    def solved(self, target: Reals, count: int) -> Reals:
        """The coefficients of the first rows with least error and ridge."""
        rows, turned = self._rows[:count], self._turned[:count]
        makes, ridges = self._makes[:count, :count], self._ridges[:count]
        found = np.zeros(count)
        for _ in range(REFINEMENTS):
            rest = target - combined(rows, found)
            step = combined(makes, _products(turned, rest) - _products(makes, ridges * found))
            found = found + step
            if np.abs(step).max() <= SETTLED * np.abs(found).max():
                break
        return found
