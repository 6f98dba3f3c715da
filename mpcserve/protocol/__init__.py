"""Masked sharing on two servers with a helper: what each role computes, without sockets."""

from mpcserve.kernels.tasks import Run, Task, one_by_one
from mpcserve.protocol.dealer import Dealer
from mpcserve.protocol.owners import reveal, share_input, share_weights, unpack_weight
from mpcserve.protocol.parties import Round, Steps
from mpcserve.protocol.server import (
    OUTPUTS,
    WAITING,
    Bundle,
    Materials,
    ServerProgram,
    Watch,
    size_of,
)
from mpcserve.protocol.together import Together, Transcript, drive, simulate

__all__ = [
    "OUTPUTS",
    "WAITING",
    "Bundle",
    "Dealer",
    "Materials",
    "Round",
    "Run",
    "ServerProgram",
    "Steps",
    "Task",
    "Together",
    "Transcript",
    "Watch",
    "drive",
    "one_by_one",
    "reveal",
    "share_input",
    "share_weights",
    "simulate",
    "size_of",
    "unpack_weight",
    "warm_up",
]


def warm_up() -> None:
    """Kernels compile when this package is imported; calling this says that it has happened."""
