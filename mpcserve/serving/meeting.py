"""Where two halves of one request find each other: an owner asks alice and bob, alice tells bob.

Bob parks what he is asked under the request's id until alice claims it, whichever comes first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from mpcserve.errors import MpcError, PeerTimeout, Refused

T = TypeVar("T")


@dataclass(slots=True)
class _Offer(Generic[T]):
    value: T
    claimed: bool = False
    error: MpcError | None = None


class Meeting(Generic[T]):
    """At most `capacity` offers wait at once. Safe to call from any thread."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._offers: dict[bytes, _Offer[T]] = {}
        self._changed = threading.Condition()

    def offer(self, id: bytes, value: T, claimer: str, timeout: float) -> None:
        """Wait until `value` is claimed. Raises: PeerTimeout, Refused, or why it was refused."""
        mine = _Offer(value)
        with self._changed:
            if id in self._offers:
                raise Refused(f"request {id.hex()} was sent twice", "make a new request id")
            if len(self._offers) >= self._capacity:
                raise Refused(f"{len(self._offers)} requests wait already", "try again later")
            self._offers[id] = mine
            self._changed.notify_all()
            self._changed.wait_for(lambda: mine.claimed or mine.error, timeout)
            del self._offers[id]
        if mine.error:
            raise mine.error
        if not mine.claimed:
            raise PeerTimeout(
                f"{claimer} did not take up request {id.hex()} in {timeout:.1f} s",
                f"is the request sent to {claimer} too, and is she reachable?",
            )

    def claim(self, id: bytes, offerer: str, timeout: float) -> T:
        """The value offered under `id`. Raises: PeerTimeout naming who did not offer it."""
        with self._changed:
            self._changed.wait_for(lambda: self._open(id), timeout)
            if offer := self._open(id):
                offer.claimed = True
                self._changed.notify_all()
                return offer.value
        raise PeerTimeout(
            f"{offerer} did not send its half of request {id.hex()} in {timeout:.1f} s",
            f"is {offerer} still there, and is `deadlines.round` long enough?",
        )

    def refuse(self, id: bytes, error: MpcError) -> None:
        """End the wait of whoever offered under `id`."""
        self._refuse(lambda other: other == id, error)

    def refuse_all(self, error: MpcError) -> None:
        """End every wait."""
        self._refuse(lambda other: True, error)

    def _open(self, id: bytes) -> _Offer[T] | None:
        offer = self._offers.get(id)
        return offer if offer and not (offer.claimed or offer.error) else None

    def _refuse(self, chosen: Callable[[bytes], bool], error: MpcError) -> None:
        with self._changed:
            for id, offer in self._offers.items():
                if chosen(id) and not offer.claimed:
                    offer.error = error
            self._changed.notify_all()
