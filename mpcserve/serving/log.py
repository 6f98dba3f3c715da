"""Log lines of a server: stderr, one line each, with request ids and never a secret."""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path

from mpcserve.errors import MpcError, PeerError

_PACKAGE = Path(__file__).parent.parent

log = logging.getLogger("mpcserve")


def start_log(role: str, level: str) -> None:
    """Write `mpcserve alice: 12:30:59 …` lines to stderr from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"mpcserve {role}: %(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    log.propagate = False


def named_error(error: BaseException) -> MpcError:
    """The error itself, or one that says where ours went wrong without any of its values.

    The text of a foreign exception may quote data, so only its type and place are told.
    """
    if isinstance(error, MpcError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).is_relative_to(_PACKAGE)]
    frame = (ours or frames)[-1]
    place = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
    log.error("internal error: %s", place)
    return PeerError(f"internal error: {place}", "this is a defect of mpcserve: please report it")
