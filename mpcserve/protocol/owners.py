"""The two owners' side: masking weights and inputs, opening results.

An owner learns the two mask shares of its own value from two seeds, sends the same Δ to both
servers, and keeps nothing.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcserve.errors import PeerError
from mpcserve.kernels import bits, handover, packing
from mpcserve.plan.bill import TAG_BYTES
from mpcserve.plan.ops import packed_bytes
from mpcserve.plan.plan import OutputSpec, Plan, Value
from mpcserve.protocol.opening import tiles
from mpcserve.protocol.parties import Buffer
from mpcserve.protocol.server import check_size, unpack_value
from mpcserve.randomness import Stream, derive
from mpcserve.ring import Words, from_signed, reduce, to_signed


def share_weights(
    plan: Plan,
    weights: Mapping[str, NDArray[np.int64]],
    seed_alice: bytes,
    seed_bob: bytes,
) -> Iterator[tuple[str, memoryview]]:
    """(name, packed Δw) of every weight in plan order; the same bytes go to alice and to bob."""
    for name, id in plan.weights.items():
        value = plan.value(id)
        delta = from_signed(weights[name].reshape(value.shape), value.width)
        for seed in (seed_alice, seed_bob):
            delta = delta + Stream(derive(seed, id)).masks(value.shape, value.width)
        yield name, packing.pack(reduce(delta, value.width), value.width)


def unpack_weight(plan: Plan, name: str, data: bytes | bytearray | memoryview) -> Words:
    """A server's side of `share_weights`. Raises: WireError on a wrong length."""
    return unpack_value(plan, plan.weights[name], data, name)


def share_input(
    plan: Plan, index: int, x: NDArray[np.generic], seed_alice: bytes, seed_bob: bytes
) -> Iterator[memoryview]:
    """`mask_input` under the streams of these seeds."""
    return mask_input(plan, index, x, [Stream(seed) for seed in (seed_alice, seed_bob)])


def mask_input(
    plan: Plan, index: int, x: NDArray[np.generic], streams: Sequence[Stream]
) -> Iterator[memoryview]:
    """Encode input `index` at its plan's scale and mask it, part by part; all of them packed.

    `streams`: of the seeds of both servers. The same bytes go to both, in memory that nobody else
    writes to.
    """
    spec = plan.inputs[index]
    value, numbers = plan.value(spec.id), spec.flat(x)
    for part in tiles(value.size):
        reals = spec.reals(numbers, part.start, part.stop)
        lam, other = (s.masks(reals.shape, value.width) for s in streams)
        space = packing.packed_space(reals.size, value.width)
        handover.mask_reals(reals, 2.0**value.frac_bits, lam, other, value.width, space)
        yield packing.packed_bytes(space)


def reveal(plan: Plan, from_alice: Buffer, from_bob: Buffer) -> list[NDArray[np.generic]]:
    """Add the two shares of every output, decode and cast to its declared dtype.

    Raises: PeerError when the servers' tags differ: they did not compute on the same values.
    WireError when a message has another size than the plan's.
    """
    if not hmac.compare_digest(bytes(from_alice[:TAG_BYTES]), bytes(from_bob[:TAG_BYTES])):
        raise PeerError(
            "alice and bob disagree on the masked result: at least one of them is faulty",
            "send the request again; if it persists, compare the servers' versions and logs",
        )
    outputs, at = [], TAG_BYTES
    for spec in plan.outputs:
        value = plan.value(spec.id)
        size = packed_bytes(value.size, value.width)
        shares = [memoryview(m)[at : at + size] for m in (from_alice, from_bob)]
        for share in shares:
            check_size(value, share, spec.name)
        at += size
        if value.width == 1:
            planes = [bits.unpack_planes(share, 1, value.size)[0] for share in shares]
            numbers = bits.flags_of(planes[0] ^ planes[1], value.shape).astype(spec.dtype)
        else:
            numbers = _sums(spec, value, shares)
        outputs.append(numbers.reshape(spec.shape))
    return outputs


def _sums(spec: OutputSpec, value: Value, shares: Sequence[memoryview]) -> NDArray[Any]:
    """Decoded sums of two packed shares, part by part. Shapes: [value.size]."""
    decoded: list[NDArray[Any]] = []
    for part in tiles(value.size):
        first, end = part.start * value.width // 8, (part.stop * value.width + 7) // 8
        mine, other = (share[first:end] for share in shares)
        words = packing.sum_of(mine, other, part.stop - part.start, value.width)
        decoded.append(spec.decoded(_numbers(words, value)))
    return decoded[0] if len(decoded) == 1 else np.concatenate(decoded)


def _numbers(words: Words, value: Value) -> NDArray[Any]:
    """What words stand for; whole numbers stay exact."""
    if not value.frac_bits:
        return to_signed(reduce(words, value.width), value.width)
    reals = np.empty(words.size)
    handover.reals_of(words, value.width, 2.0**-value.frac_bits, reals)
    return reals
