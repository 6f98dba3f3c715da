"""The one place that says how kernels are compiled.

Kernels release the GIL, so requests run side by side, and are cached on disk, so that only the
first start on a machine compiles. Explicit signatures compile at import: a server that says
`ready` has every kernel it will ever need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def kernel(*signatures: str) -> Callable[[F], F]:
    """Compile for exactly these signatures; integer arithmetic wraps, indices are not checked."""

    def decorate(function: F) -> F:
        jit = numba.njit(list(signatures), cache=True, nogil=True, boundscheck=False)
        return cast(F, jit(function))

    return decorate
