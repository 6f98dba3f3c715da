"""The one place that says how kernels are compiled, and where the machine code is kept.

Kernels release the GIL, so requests run side by side. Explicit signatures compile at import: a
server that says `ready` has every kernel it will ever need. Machine code is cached per user, in a
folder named after the kernels' own sources: numba looks at one source file per function, but
kernels inline each other across files. Processes may fill the cache at once; numba keys its files
by Python, numba and processor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from llvmlite.binding import add_symbol  # type: ignore[import-untyped]

F = TypeVar("F", bound=Callable[..., Any])


def _cache_folder() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return str(Path.home() / ".cache" / "mpcserve" / f"kernels-{digest.hexdigest()[:16]}")


# NUMBA_CACHE_DIR, where it is set, has the last word.
if not numba.config.CACHE_DIR:  # type: ignore[attr-defined]
    numba.config.CACHE_DIR = _cache_folder()  # type: ignore[attr-defined]


def kernel(*signatures: str) -> Callable[[F], F]:
    """Compile for exactly these signatures; integer arithmetic wraps, indices are not checked."""

    def decorate(function: F) -> F:
        jit = numba.njit(list(signatures), cache=True, nogil=True, boundscheck=False)
        return cast(F, jit(function))

    return decorate


def shared(symbol: str, signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a C function of this name once: kernels that call it hold no copy of it.

    Whoever calls must hold what this returns.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = numba.cfunc(signature, cache=True)(function)
        add_symbol(symbol, compiled.address)
        return compiled

    return decorate
