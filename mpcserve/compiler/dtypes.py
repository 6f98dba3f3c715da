"""Element types: what the data owner may hand in, and how it is held in fixed point."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_REALS = ("float32", "float64", "float16", "bfloat16")
_INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "bool")


def is_integer(dtype: str) -> bool:
    """Whether values of the type are whole numbers: then they need no fraction bits."""
    return dtype in _INTEGERS


def is_supported(dtype: str) -> bool:
    """Whether an input may have the type."""
    return dtype in _REALS or dtype in _INTEGERS


def natural_range(dtype: str) -> tuple[float, float] | None:
    """All values of a small integer type; None where the type says nothing useful."""
    if dtype == "bool":
        return 0.0, 1.0
    if dtype in ("uint8", "int8", "uint16", "int16"):
        info = np.iinfo(dtype)
        return float(info.min), float(info.max)
    return None


def held(x: NDArray[Any]) -> NDArray[Any]:
    """Reals of 16 bits as float32: the compiler computes with what weights are encoded from."""
    return x.astype(np.float32) if str(x.dtype) in ("float16", "bfloat16") else x
