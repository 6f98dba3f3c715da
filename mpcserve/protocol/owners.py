"""The two owners' side: masking weights and inputs, opening results.

An owner learns the two mask shares of its own value from two seeds, sends the same Δ to both
servers, and keeps nothing.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from mpcserve.errors import PeerError
from mpcserve.kernels import bits, packing
from mpcserve.plan.bill import TAG_BYTES
from mpcserve.plan.ops import packed_bytes
from mpcserve.plan.plan import Plan
from mpcserve.protocol.server import unpack_value
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
    plan: Plan, index: int, x: NDArray[np.floating], seed_alice: bytes, seed_bob: bytes
) -> memoryview:
    """Encode input `index` at its plan's scale and mask it; the same bytes go to both servers."""
    spec = plan.inputs[index]
    value = plan.value(spec.id)
    delta = from_signed(spec.encoded(x, value), value.width)
    for seed in (seed_alice, seed_bob):
        delta = delta + Stream(seed).masks(value.shape, value.width)
    return packing.pack(reduce(delta, value.width), value.width)


def reveal(
    plan: Plan,
    from_alice: bytes | bytearray | memoryview,
    from_bob: bytes | bytearray | memoryview,
) -> list[NDArray[np.generic]]:
    """Add the two shares of every output, decode and cast to its declared dtype.

    Raises: PeerError when the servers' tags differ: they did not compute on the same values.
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
        shares = [
            unpack_value(plan, spec.id, memoryview(m)[at : at + size], spec.name)
            for m in (from_alice, from_bob)
        ]
        at += size
        if value.width == 1:
            flags = bits.flags_of(shares[0] ^ shares[1], value.shape)
            outputs.append(flags.astype(spec.dtype).reshape(spec.shape))
            continue
        signed = to_signed(reduce(shares[0] + shares[1], value.width), value.width)
        real = np.ldexp(signed.astype(np.float64), -value.frac_bits) if value.frac_bits else signed
        outputs.append(spec.decoded(np.asarray(real)))
    return outputs
