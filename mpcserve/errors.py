"""Every error a user can meet: what happened, where, expected, got, and what to do next.

    MpcError                      exit 1   (never raised itself)
    ├── ConfigError               exit 2   config file, keys, command line, input file
    │   └── InputError            exit 2   an input array: dtype, shape, range, finiteness
    ├── ModelError                exit 3   the ONNX model: unreadable, unsupported, bad weights
    │   └── PlanError             exit 3   a plan breaks its law, or a bound cannot be met
    ├── PeerError                 exit 4   another party: lost, late, or speaking out of turn
    │   ├── PeerLost              exit 4   connection refused, reset or closed
    │   ├── PeerTimeout           exit 4   a deadline passed while waiting
    │   └── WireError             exit 4   bytes that are not the protocol
    └── Refused                   exit 5   not authorised, spent bundle, differing digest

Rule: no message, repr or log line ever holds a secret: no weight, no input, no share, no mask. One
exception: an InputError about the data owner's own file or text, which nobody else reads, may name
the cell that it is about.
"""

from __future__ import annotations


class MpcError(Exception):
    """One line of error and one line of hint; `exit_code` is the process's exit status."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class ConfigError(MpcError):
    """The config file, the keys or the command line are wrong."""

    exit_code = 2


class InputError(ConfigError):
    """An input array has the wrong name, dtype, shape, range, or is not finite."""


class ModelError(MpcError):
    """The ONNX model cannot be compiled. `problems` lists all of them, one line each."""

    exit_code = 3

    def __init__(self, message: str, hint: str = "", problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint)
        self.problems = problems


class PlanError(ModelError):
    """A plan breaks its law: a bound does not fit its width, a shape or an attribute is wrong."""


class PeerError(MpcError):
    """Another party failed: the request ends, the server goes on."""

    exit_code = 4


class PeerLost(PeerError):
    """The connection to a peer was refused, reset or closed."""


class PeerTimeout(PeerError):
    """A deadline passed; the message names whom we waited for, where, for what, how long."""


class WireError(PeerError):
    """A peer sent bytes that are not the protocol."""


class Refused(MpcError):
    """The other side understood and said no: role, deployment, digest or spent bundle."""

    exit_code = 5
