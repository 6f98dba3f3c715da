"""Attention over secret queries, keys and values, and rotary positions."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpcserve.compiler import softmax as of
from mpcserve.compiler.builder import Array, Builder, Operand, Ref
from mpcserve.compiler.functions import aligned, ints_of, secret, times, with_frac_bits
from mpcserve.compiler.masking import Mask, mask_of
from mpcserve.compiler.ops.linear import matmul
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers, lowers_fused
from mpcserve.compiler.smooth import tanh


class Heads(NamedTuple):
    """Queries, keys, values. Shapes: batch × heads × length × size."""

    q: Ref
    k: Ref
    v: Ref

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """batch × query heads × queries × keys."""
        return (*self.q.shape[:3], self.k.shape[2])  # type: ignore[return-value]


@lowers("Attention", since=23)
def attention(
    b: Builder,
    q: Operand,
    k: Operand,
    v: Operand,
    mask: Operand | None = None,
    past_key: Operand | None = None,
    past_value: Operand | None = None,
    lengths: Operand | None = None,
    /,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> tuple[Ref | None, ...]:
    """softmax(q·kᵀ·scale + mask)·v per head; what a public mask hides is not computed."""
    flat = len(secret(b, q).shape) == 3
    heads = Heads(_split(b, q, q_num_heads), _split(b, k, kv_num_heads), _split(b, v, kv_num_heads))
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        joined = [
            b.concat(aligned(b, before, new), 2)
            for before, new in ((past_key, heads.k), (past_value, heads.v))
        ]
        heads = Heads(heads.q, *joined)
    raw = _scores(b, heads, scale)
    capped = raw if softcap <= 0 else times(b, tanh(b, times(b, raw, 1 / softcap)), softcap)
    seen = _visible(
        heads.scores, past, lengths, bool(is_causal), left_window_size, right_window_size
    )
    biased, structure = _masked(b, capped, mask, seen)
    weights = None
    if qk_matmul_output_mode == 3 and b.n_outputs in (2, 4):
        weights = of.softmax(b, biased, 3, structure)
        y = b.matmul(weights, _repeated(b, heads.v, heads.q.shape[1]))
    else:
        y = _attended(b, biased, heads.v, structure)
    if qk_matmul_output_mode == 2 and b.n_outputs in (2, 4):
        weights = _shown(b, biased, structure)
    shown = {0: raw, 1: capped}.get(qk_matmul_output_mode, weights)
    return _joined(b, y) if flat else y, heads.k, heads.v, shown


def _split(b: Builder, x: Operand, heads: int | None) -> Ref:
    """Heads as an axis of their own."""
    x = secret(b, x)
    if len(x.shape) == 4:
        return x
    if not heads:
        raise Unsupported("its inputs have three axes, yet the number of heads is not given")
    batch, length, size = x.shape
    return b.transpose(b.reshape(x, (batch, length, heads, size // heads)), (0, 2, 1, 3))


def _joined(b: Builder, y: Ref) -> Ref:
    batch, heads, length, size = y.shape
    return b.reshape(b.transpose(y, (0, 2, 1, 3)), (batch, length, heads * size))


def _scores(b: Builder, heads: Heads, scale: float | None) -> Ref:
    """q·kᵀ·scale; queries that share keys are one longer sequence."""
    size = heads.q.shape[-1]
    q = times(
        b, with_frac_bits(b, heads.q, b.frac_bits), 1 / sqrt(size) if scale is None else scale
    )
    keys = b.transpose(heads.k, (0, 1, 3, 2))
    return b.reshape(b.matmul(_grouped(b, q, heads.k.shape[1]), keys), heads.scores)


def _grouped(b: Builder, x: Ref, groups: int) -> Ref:
    """batch × heads × length × · → batch × groups × (heads of the group · length) × ·."""
    batch, heads, length, size = x.shape
    return b.reshape(x, (batch, groups, heads // groups * length, size))


def _repeated(b: Builder, x: Ref, heads: int) -> Ref:
    """Each head of keys or values once per query head."""
    return b.gather(x, 1, np.repeat(np.arange(x.shape[1]), heads // x.shape[1]).tolist())


def _attended(b: Builder, scores: Ref, v: Ref, mask: Mask) -> Ref:
    return of.attend(b, scores, _repeated(b, v, scores.shape[1]), mask)


def _visible(
    shape: tuple[int, int, int, int],
    past: int,
    lengths: Operand | None,
    causal: bool,
    left: int,
    right: int,
) -> NDArray[np.bool_]:
    """Which keys each query may see by its position. Shapes: 1 or batch × 1 × queries × keys."""
    queries, keys = shape[2:]
    offset = np.array([past])
    seen = np.ones((1, 1, queries, keys), bool)
    if lengths is not None:
        ends = np.array(ints_of(lengths, "nonpad_kv_seqlen"))
        seen = seen & (np.arange(keys) < ends[:, None, None, None])
        offset = ends - queries
    ahead = np.arange(keys) - np.arange(queries)[:, None] - offset[:, None, None, None]
    if causal:
        seen = seen & (ahead <= 0)
    if left >= 0:
        seen = seen & (-ahead <= left)
    if right >= 0:
        seen = seen & (ahead <= right)
    return seen


def _masked(
    b: Builder, scores: Ref, mask: Operand | None, seen: NDArray[np.bool_]
) -> tuple[Ref, Mask]:
    """(scores with a secret mask added, the public part of the masks)."""
    hidden = np.where(seen, 0.0, -np.inf)
    if mask is None:
        return scores, mask_of(hidden)
    short = scores.shape[-1] - mask.shape[-1]
    if isinstance(mask, Ref):
        if short:
            hidden = hidden + np.where(np.arange(scores.shape[-1]) < mask.shape[-1], 0.0, -np.inf)
            mask = b.pad(mask, [0] * len(mask.shape), [*[0] * (len(mask.shape) - 1), short])
        return b.add(*aligned(b, scores, b.expand(mask, scores.shape))), mask_of(hidden)
    return scores, mask_of(hidden + _added(mask, short))


def _added(mask: Array, short: int) -> NDArray[np.float64]:
    """A constant mask as what it adds; keys that it does not cover are hidden."""
    added = np.where(mask, 0.0, -np.inf) if mask.dtype == bool else np.asarray(mask, np.float64)
    widths = [(0, 0)] * (added.ndim - 1) + [(0, short)]
    return np.pad(added, widths, constant_values=-np.inf)


def _shown(b: Builder, scores: Ref, mask: Mask) -> Ref:
    if not mask.kept.all():
        raise Unsupported(
            "its output qk_matmul_output holds -inf", "set qk_matmul_output_mode to 0, 1 or 3"
        )
    return scores


@lowers("RotaryEmbedding", since=23)
def rotary_embedding(
    b: Builder,
    x: Ref,
    cosine: Operand,
    sine: Operand,
    positions: Operand | None = None,
    /,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Ref:
    """Pairs of features turned by an angle per position: one product. Error: 1 ulp."""
    shape = x.shape
    if len(shape) == 3:
        x = b.reshape(x, (*shape[:2], num_heads, shape[2] // num_heads))
    else:
        x = b.transpose(x, (0, 2, 1, 3))
    size = rotary_embedding_dim or x.shape[-1]
    part = b.slice(x, 3, 0, size)
    cosine, sine = _at(b, cosine, positions), _at(b, sine, positions)
    y = rotated(b, part, cosine, sine, bool(interleaved))
    if size < x.shape[-1]:
        y = b.concat(aligned(b, y, b.slice(x, 3, size, x.shape[-1])), 3)
    return b.reshape(y, shape) if len(shape) == 3 else b.transpose(y, (0, 2, 1, 3))


def _at(b: Builder, table: Operand, positions: Operand | None) -> Operand:
    """The table's rows of each position. Shapes: 1 or batch × length × size / 2."""
    if positions is None:
        return table
    where = np.array(ints_of(positions, "position_ids")).reshape(positions.shape)
    if (where == where[:1]).all():
        where = where[:1]
    if not isinstance(table, Ref):
        found: Array = np.asarray(table)[where]
        return found
    rows = b.gather(table, 0, where.ravel().tolist())
    return b.reshape(rows, (*where.shape, table.shape[1]))


def rotated(b: Builder, x: Ref, cosine: Operand, sine: Operand, interleaved: bool) -> Ref:
    """(x1, x2) → (x1·cos − x2·sin, x1·sin + x2·cos), as products with matrices of two by two.

    Shapes: batch × length × heads × size, tables 1 or batch × length × size / 2.
    """
    batch, length, heads, size = x.shape
    pairs = (size // 2, 2) if interleaved else (2, size // 2)
    split = b.reshape(x, (batch, length, heads, *pairs))
    order = (0, 1, 3, 2, 4) if interleaved else (0, 1, 4, 2, 3)
    turn = b.matmul(b.transpose(split, order), _turns(b, cosine, sine))
    back = b.transpose(turn, (0, 1, 3, 2, 4) if interleaved else (0, 1, 3, 4, 2))
    return b.reshape(back, x.shape)


def _turns(b: Builder, cosine: Operand, sine: Operand) -> Ref:
    """[[cos, sin], [−sin, cos]] of each table entry: a weight, or made of secret tables."""
    if not isinstance(cosine, Ref) and not isinstance(sine, Ref):
        rows = np.stack([np.stack([cosine, sine], -1), np.stack([-sine, cosine], -1)], -2)
        return b.weight(rows)
    c, s = aligned(b, cosine, sine)
    columns = [b.reshape(t, (*t.shape, 1)) for t in (c, s, b.scale(s, -1), c)]
    return b.reshape(b.concat(columns, len(c.shape)), (*c.shape, 2, 2))


@lowers_fused("Attend")
def attend(b: Builder, scores: Ref, values: Operand, mask: Operand | None = None, /) -> Ref:
    """softmax(scores + mask) @ values. Error: 1e-4 of the largest value."""
    return of.attend(
        b, scores, secret(b, values), None if mask is None else mask_of(np.asarray(mask))
    )


@lowers_fused("MaskedSoftmax")
def masked_softmax(b: Builder, scores: Ref, mask: Array, /) -> Ref:
    """softmax(scores + mask) over the last axis. Error: 1e-4."""
    return of.softmax(b, scores, len(scores.shape) - 1, mask_of(np.asarray(mask)))


@lowers_fused("Scale")
def scale(b: Builder, x: Ref, /, *, factor: float) -> Ref:
    """x · a public number. Error: 1.75 ulp."""
    return times(b, with_frac_bits(b, x, b.frac_bits), factor)


@lowers_fused("ScaledMatMul")
def scaled_matmul(b: Builder, x: Ref, y: Ref, /, *, factor: float) -> Ref:
    """(x · a public number) @ y. Error: 1.75 ulp of x."""
    return matmul(b, scale(b, x, factor=factor), y)
