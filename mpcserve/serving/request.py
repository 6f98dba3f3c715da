"""A request as it arrives on a stream: who asks, under which id, for what.

A message is a JSON object made by somebody else, so every field is checked when it is read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from mpcserve.errors import Refused, WireError
from mpcserve.plan.plan import Plan
from mpcserve.plan.stack import can_stack
from mpcserve.serving.log import named_error
from mpcserve.transport import Channel

T = TypeVar("T")

MAX_PLAN_BYTES = 1 << 30

MAX_SLOTS = 256
"""Requests in one evaluation, whatever the config says."""


class Message:
    """The fields of a message, checked as they are read."""

    __slots__ = ("_fields", "_sender")

    def __init__(self, fields: Mapping[str, Any], sender: str) -> None:
        self._fields, self._sender = fields, sender

    def text(self, key: str) -> str:
        """A string. Raises: WireError."""
        return self._typed(key, str)

    def optional_text(self, key: str) -> str | None:
        """A string, or None where there is none."""
        return None if self._fields.get(key) is None else self.text(key)

    def flag(self, key: str) -> bool:
        """True or false."""
        return self._typed(key, bool)

    def optional_flag(self, key: str) -> bool:
        """True or false; false where it is not said."""
        return self._fields.get(key) is not None and self.flag(key)

    def size(self, key: str, most: int) -> int:
        """A whole number 0 … `most`."""
        value = self._typed(key, int)
        if not 0 <= value <= most:
            raise self._unlike(key, f"0 … {most}", value)
        return value

    def number(self, key: str) -> float:
        """A number."""
        value = self._fields.get(key)
        return float(value) if isinstance(value, int) else self._typed(key, float)

    def id(self, key: str) -> bytes:
        """16 bytes in hex."""
        text = self.text(key)
        try:
            value = bytes.fromhex(text)
        except ValueError:
            value = b""
        if len(value) != 16:
            raise self._unlike(key, "16 bytes in hex", text[:64])
        return value

    def optional_id(self, key: str) -> bytes | None:
        """16 bytes in hex, or None where there are none."""
        return None if self._fields.get(key) is None else self.id(key)

    def ids(self, key: str) -> tuple[bytes, ...]:
        """A list of ids."""
        return tuple(Message({key: item}, self._sender).id(key) for item in self._list(key))

    def optional_texts(self, key: str, count: int) -> list[str | None]:
        """A list of so many strings, of which some may be missing."""
        items = self._list(key)
        if len(items) != count:
            raise self._unlike(key, f"{count} items", len(items))
        return [Message({key: item}, self._sender).optional_text(key) for item in items]

    def objects(self, key: str) -> list[dict[str, Any]]:
        """A list of JSON objects."""
        return [Message({key: item}, self._sender)._typed(key, dict) for item in self._list(key)]

    def expect(self, kind: str) -> Message:
        """The message itself, if its type is `kind`. Raises: WireError."""
        if self._fields.get("type") != kind:
            raise self._unlike("type", kind, self._fields.get("type"))
        return self

    def _list(self, key: str) -> list[Any]:
        return self._typed(key, list)

    def _typed(self, key: str, kind: type[T]) -> T:
        value = self._fields.get(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._unlike(key, kind.__name__, type(value).__name__)
        return value

    def _unlike(self, key: str, expected: str, got: object) -> WireError:
        return WireError(
            f"a message of {self._sender}: {key}: expected {expected}, got {str(got)[:80]}",
            "run the same version of mpcserve on every machine",
        )


@dataclass(frozen=True, slots=True)
class Request:
    """`id` names the request on all its links; `channel` is where it came from and is answered."""

    channel: Channel
    message: Message
    deadline: Deadline

    @property
    def id(self) -> bytes:
        """16 bytes drawn by whoever made the request."""
        return self.channel.stream

    @property
    def name(self) -> str:
        """Short enough for a log line."""
        return self.id.hex()[:8]


class Deadline:
    """When a request must have ended."""

    __slots__ = ("_end", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, time.monotonic() + seconds

    def left(self, most: float = float("inf")) -> float:
        """Seconds still to wait, at most `most`; a passed deadline leaves none."""
        return max(0.0, min(self._end - time.monotonic(), most))


def receive_message(channel: Channel, kind: str | None, what: str, timeout: float) -> Message:
    """The next message on `channel`, which must be of type `kind`, if that is given."""
    message = Message(channel.receive_message(what, timeout), channel.peer)
    return message if kind is None else message.expect(kind)


@contextmanager
def failing(*channels: Channel) -> Iterator[None]:
    """Run the block; an error of it ends these channels and is told to their peers."""
    try:
        yield
    except Exception as e:
        error = named_error(e)
        for channel in channels:
            channel.fail(error)
        raise error from None
    except BaseException:  # Ctrl-C, where a program goes on after it
        for channel in channels:
            channel.fail(Refused("the request was interrupted", "send it again"))
        raise


def slots_of(message: Message, plan: Plan) -> int:
    """For how many requests a bundle is to be. Raises: Refused, WireError."""
    return check_slots(message.size("slots", MAX_SLOTS), plan)


def check_slots(slots: int, plan: Plan) -> int:
    """The number itself. Raises: Refused unless a bundle may be for so many requests."""
    if not 1 <= slots <= MAX_SLOTS or (slots > 1 and not can_stack(plan)):
        raise Refused(f"a bundle for {slots} requests", "see the log of alice")
    return slots


def check_digest(ours: Plan, theirs: str, who: str, role: str) -> None:
    """Both sides must mean one plan. Raises: Refused with both digests."""
    if theirs != ours.digest:
        raise Refused(
            f"plan digests differ: {role} has {ours.digest}, {who} has {theirs[:64]}",
            "the model was deployed again, or the plan file is another one: fetch the plan anew",
        )
