"""Values on their way from an owner to the servers and back, in one pass over a block each.

Numbers become words, are masked and packed while they lie in the cache; so do the servers' shares
of a result, and the sum of two shares becomes numbers again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpcserve.kernels.jit import kernel
from mpcserve.kernels.packing import Bytes, pack_from
from mpcserve.kernels.places import on, place_of
from mpcserve.ring import Words

_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_BLOCK = 2048
"""A multiple of 8, so that every block begins at a whole byte."""


def _words(signature: str) -> tuple[str, str]:
    """For words of 64 and of 32 bits, W. `given` are arrays that are only read."""
    for word in ("W", "float64"):
        signature = signature.replace(f"given {word}", f"Array({word}, 1, 'C', readonly=True)")
    return signature.replace("W", "uint64"), signature.replace("W", "uint32")


@kernel(*_words("void(given float64, float64, W[::1], given W, int64, uint8[::1])"))
def mask_reals(
    x: NDArray[np.float64], unit: float, lam: Words, other: Words, width: int, space: Bytes
) -> None:
    """space ← round(x · unit) + lam + other (mod 2^width), packed. `lam` is overwritten.

    Domain: |x · unit| < 2^63. Halves go to the even integer.
    """
    T = lam.dtype.type
    mask = T(_ALL >> np.uint64(64 - width))
    first, to = place_of(lam, 0), place_of(space, 0)
    for begin in range(0, x.size, _BLOCK):
        size = min(_BLOCK, x.size - begin)
        real, mine, its = place_of(x, begin), on(first, begin), place_of(other, begin)
        for k in range(size):
            value = T(np.int64(np.rint(real[k] * unit)))
            mine[k] = T(T(value + T(mine[k] + its[k])) & mask)
        pack_from(on(first, begin), size, width, on(to, begin // 8 * width))


@kernel(*_words("void(given W, given W, W[::1], boolean, int64, uint8[::1])"))
def share_out(
    delta: Words, half: Words, fresh: Words, leader: bool, width: int, space: Bytes
) -> None:
    """space ← this server's share of Δ − λ, packed: Δ − λ_A + r or −λ_B − r (mod 2^width).

    `half` is λ_A or λ_B; `fresh`, r, is overwritten.
    """
    T = fresh.dtype.type
    mask = T(_ALL >> np.uint64(64 - width))
    first, to = place_of(fresh, 0), place_of(space, 0)
    for begin in range(0, fresh.size, _BLOCK):
        size = min(_BLOCK, fresh.size - begin)
        open_, mine, r = place_of(delta, begin), place_of(half, begin), on(first, begin)
        if leader:
            for k in range(size):
                r[k] = T(T(T(open_[k] - mine[k]) + r[k]) & mask)
        else:
            for k in range(size):
                r[k] = T(T(T(0) - T(mine[k] + r[k])) & mask)
        pack_from(on(first, begin), size, width, on(to, begin // 8 * width))


@kernel(*_words("void(given W, int64, float64, float64[::1])"))
def reals_of(x: Words, width: int, ulp: float, out: NDArray[np.float64]) -> None:
    """out ← the signed value of each word (mod 2^width), times `ulp`."""
    high = np.uint64(64 - width)
    for k in range(x.size):
        out[k] = np.float64(np.int64(np.uint64(x[k]) << high) >> np.int64(high)) * ulp
