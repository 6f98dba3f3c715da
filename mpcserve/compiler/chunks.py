"""How a comparison is split: chunks of the low bits, and groups of chunks.

A chunk of c bits costs 2^c − 1 dealt bits and no communication; merging J chunks at once costs one
round, 2(J − 1) opened bits and about 3·2^(J−1) dealt bits.
"""

from __future__ import annotations

from mpcserve.plan.verify import MAX_CHUNK

CHUNK_BITS = 5
"""The default: about the fewest opened and dealt bits together."""

ONE_LEVEL = 7
"""More chunks than this merge in two rounds: 2^J dealt bits would outgrow them."""


def sign_chunks(
    width: int, chunk: int = CHUNK_BITS, single: int = MAX_CHUNK
) -> tuple[list[int], list[int]]:
    """(bits per chunk, low to high; chunks per first-level group) for the sign of `width` bits.

    Up to `single` bits one chunk, and no merging round at all. Else chunks have at most `chunk`
    bits, and more only if that saves the second round.
    """
    low = width - 1
    assert low >= 1
    if low <= single:
        return [low], [1]
    count = -(-low // CHUNK_BITS)
    if count > ONE_LEVEL and -(-low // chunk) <= ONE_LEVEL:
        count = -(-low // chunk)
    chunks = _even(low, count)
    if count <= ONE_LEVEL:
        return chunks, [count]
    groups = next(g for g in range(2, count) if -(-count // g) <= g + 1)
    return chunks, _even(count, groups)


def _even(total: int, parts: int) -> list[int]:
    """`total` in `parts` that differ by at most one, larger ones first."""
    small, larger = divmod(total, parts)
    return [small + 1] * larger + [small] * (parts - larger)
