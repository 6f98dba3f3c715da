"""Sums of a few elements with public weights along one axis: interpolation, in one pass."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpcserve.kernels.jit import kernel
from mpcserve.ring import Words


@kernel(
    "void(uint64[:,:,::1], int64[:,::1], uint64[:,::1], uint64[:,:,::1])",
    "void(uint32[:,:,::1], int64[:,::1], uint32[:,::1], uint32[:,:,::1])",
)
def weighed(x: Words, indices: NDArray[np.int64], factors: Words, out: Words) -> None:
    """out[l, k, j] ← Σ_t factors[k, t]·x[l, indices[k, t], j] in the ring of the words.

    Shapes: [l, n, j], twice [k, t] → [l, k, j].
    """
    count, taps = indices.shape
    tail = x.shape[2]
    for lead in range(x.shape[0]):
        for k in range(count):
            if tail == 1:
                # The first index's own word makes the sum's.
                total = x[lead, indices[k, 0], 0] * factors[k, 0]
                for t in range(1, taps):
                    total += x[lead, indices[k, t], 0] * factors[k, t]
                out[lead, k, 0] = total
            else:
                row = out[lead, k]
                source, factor = x[lead, indices[k, 0]], factors[k, 0]
                for j in range(tail):
                    row[j] = source[j] * factor
                for t in range(1, taps):
                    source, factor = x[lead, indices[k, t]], factors[k, t]
                    for j in range(tail):
                        row[j] += source[j] * factor
