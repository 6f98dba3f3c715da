"""What alice and bob tell the data owner: a tag, and their additive shares of every output.

An output that was opened, because something else reads it too, is masked: alice's share is
Δ − λ_A + r, bob's −λ_B − r. One that nobody else reads is never opened: what its last round would
have sent to the other server goes to the data owner, under r and −r instead of λ_A and λ_B. Only
alice and bob know r, so the data owner learns the output and nothing of what it was computed from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from mpcserve.kernels import bits, handover, packing
from mpcserve.plan.plan import Plan, Value
from mpcserve.protocol.opening import tiles
from mpcserve.protocol.parties import Buffer, Side
from mpcserve.randomness import Mac, Stream, derive
from mpcserve.ring import Words, reduce


class Seal:
    """What alice and bob alone know of one request, derived from their key: no owner can make it.

    `inputs`: tags what both received. `outputs`: tags the masked result, or what it is computed
    from. `shares`: what is added to one share of an opened result and taken from the other.
    """

    __slots__ = ("inputs", "outputs", "shares")

    def __init__(self, peer_key: bytes, digest: str, bundle_id: bytes, slot: int) -> None:
        self.inputs = Mac(derive(peer_key, "inputs", digest, bundle_id, slot))
        secret = derive(peer_key, "output", digest, bundle_id, slot)
        self.outputs = Mac(derive(secret, "tag"))
        self.shares = Stream(derive(secret, "shares"))


class Results:
    """The outputs of `plan` on one server, of all slots that `stacked` computes at once.

    `tagged`: ids there of the values that `plan.tagged` names.
    """

    def __init__(self, plan: Plan, stacked: Plan, tagged: tuple[int, ...], side: Side) -> None:
        self._plan, self._stacked, self.tagged = plan, stacked, tagged
        self._leader = side == "alice"
        unopened = stacked.unopened.values()
        self._opened = tuple(k for k in range(len(plan.outputs)) if k not in unopened)

    def opened(self, values: Sequence[Words]) -> tuple[Words, ...]:
        """Those of all values that are opened outputs."""
        return tuple(values[self._stacked.outputs[k].id] for k in self._opened)

    def zeros(self, peer_key: bytes, bundle_id: bytes) -> dict[int, Callable[[], Words]]:
        """By instruction what makes this side's share of zero of an unopened value: r, or −r."""
        return {
            id: partial(self._share_of_zero, peer_key, bundle_id, self._stacked.value(id), k)
            for id, k in self._stacked.unopened.items()
        }

    def _share_of_zero(self, peer_key: bytes, bundle_id: bytes, value: Value, output: int) -> Words:
        fresh = Stream(derive(peer_key, "unopened", self._plan.digest, bundle_id, output))
        if value.width == 1:
            return np.asarray(fresh.planes(1, value.size)[0])
        r = fresh.masks(value.shape, value.width)
        return r if self._leader else np.asarray(reduce(np.negative(r), value.width))

    def messages(
        self,
        values: Sequence[Any],
        halves: Sequence[Words],
        seals: Sequence[Seal],
        wanted: Sequence[bool],
    ) -> list[bytes | None]:
        """To the data owner of each slot that has one.

        `values`: of what is opened Δ, of what is not this side's share, in packed pieces. `halves`:
        mask shares of the opened outputs.
        """
        slots, opened = len(wanted), [self._plan.outputs[k].id for k in self._opened]
        tagged = self._by_slot(self._plan.tagged, [values[j] for j in self.tagged], slots)
        deltas = self._by_slot(opened, self.opened(values), slots)
        mine = self._by_slot(opened, halves, slots)
        told = {k: self._told(k, values[id], slots) for id, k in self._stacked.unopened.items()}
        messages: list[bytes | None] = []
        for slot, seal in enumerate(seals):
            if not wanted[slot]:
                messages.append(None)
                continue
            parts: list[Buffer] = [seal.outputs.tag(self._seen(tagged[slot]))]
            shares = zip(deltas[slot], mine[slot], strict=True)
            for k, spec in enumerate(self._plan.outputs):
                if k in told:
                    parts += told[k][slot]
                else:
                    parts += self._shares(self._plan.value(spec.id), *next(shares), seal.shares)
            messages.append(b"".join(parts))
        return messages

    def _by_slot(
        self, ids: Sequence[int], stacked: Sequence[Words], slots: int
    ) -> list[list[Words]]:
        """What each slot has of these values of the plan."""
        if slots == 1:
            return [list(stacked)]
        parts: list[list[Words]] = [[] for _ in range(slots)]
        for id, array in zip(ids, stacked, strict=True):
            value = self._plan.value(id)
            if value.width == 1:
                flags = bits.flags_of(array, (slots, value.size))
                for part, row in zip(parts, flags, strict=True):
                    part.append(bits.plane_of(row))
            else:
                for k, part in enumerate(parts):
                    part.append(array[k, ...])
        return parts

    def _told(self, output: int, share: list[Buffer], slots: int) -> list[list[Buffer]]:
        """What each slot is told of an output that was not opened."""
        if slots == 1:
            return [share]
        value, data = self._plan.value(self._plan.outputs[output].id), b"".join(share)
        if value.width == 1:
            plane = bits.unpack_planes(data, 1, slots * value.size)[0]
            flags = bits.flags_of(plane, (slots, value.size))
            return [[bits.pack_planes(bits.plane_of(row)[None], value.size)] for row in flags]
        words = packing.unpack(data, slots * value.size, value.width).reshape(slots, value.size)
        return [[packing.pack(row, value.width)] for row in words]

    def _seen(self, tagged: Sequence[Words]) -> Iterator[Buffer]:
        """The bytes that both servers' tags are over."""
        for id, delta in zip(self._plan.tagged, tagged, strict=True):
            value = self._plan.value(id)
            if value.width == 1:
                yield bits.pack_planes(delta[None], value.size)
            else:
                yield np.ascontiguousarray(delta).data.cast("B")

    def _shares(self, value: Value, delta: Words, half: Words, fresh: Stream) -> Iterator[Buffer]:
        """This side's share of one output that was opened, packed tile by tile."""
        if value.width == 1:
            share = fresh.planes(1, value.size) ^ half
            yield bits.pack_planes(share ^ delta if self._leader else share, value.size)
            return
        delta, half = (np.ascontiguousarray(x).reshape(-1) for x in (delta, half))
        for part in tiles(value.size):
            r = fresh.masks(delta[part].shape, value.width)
            space = packing.packed_space(r.size, value.width)
            handover.share_out(delta[part], half[part], r, self._leader, value.width, space)
            yield packing.packed_bytes(space)
