"""Cast: between floats nothing, to whole numbers a truncation, from and to booleans bits."""

from __future__ import annotations

from mpcserve.compiler.booleans import number_of, zero
from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers
from mpcserve.compiler.whole import truncated

_FLOATS = (1, 10, 11, 16)
"""TensorProto's float, float16, double and bfloat16."""

_INTEGERS = (2, 3, 4, 5, 6, 7, 12, 13)
"""From uint8 to uint64. A number outside of the type's range is kept as it is."""

_STRING, _BOOL = 8, 9


@lowers("Cast", since=6)
def cast(b: Builder, x: Ref, /, *, to: int, saturate: int = 1, round_mode: str = "up") -> Ref:
    """x; 4 rounds from fractions to whole numbers, 2 to a boolean, 1 from one."""
    if to == _BOOL:
        return _boolean(b, x)
    if to == _STRING and b.labels(x):
        return x
    if to in _FLOATS:
        return number_of(b, x)
    if to in _INTEGERS:
        return truncated(b, number_of(b, x))
    raise Unsupported(
        f"casts a secret value to ONNX element type {to}", "keep it a float or an integer"
    )


@lowers("CastLike", since=15)
def cast_like(
    b: Builder, x: Ref, like: Operand, /, *, saturate: int = 1, round_mode: str = "up"
) -> Ref:
    """x cast to the kind of the other operand: a real number, a whole one or a boolean."""
    if isinstance(like, Ref):
        kind = "b" if b.is_bit(like) else "f" if like.frac_bits else "i"
    else:
        kind = like.dtype.kind
    if kind == "b":
        return _boolean(b, x)
    return truncated(b, number_of(b, x)) if kind in "iu" else number_of(b, x)


def _boolean(b: Builder, x: Ref) -> Ref:
    """The bit [x ≠ 0]."""
    if b.is_bit(x):
        return x
    held = b.interval(x)
    if not x.frac_bits and held.least >= 0 and held.most <= 1:
        return b.odd(x)
    return b.flip(zero(b, x))
