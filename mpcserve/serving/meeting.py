"""Where two halves of one request find each other: an owner asks alice and bob, alice leads bob.

Bob parks what the owner asked under the request's id until alice's half claims it, whichever comes
first. What the claimer fails with ends the other half too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from mpcserve.errors import MpcError, PeerTimeout, Refused
from mpcserve.serving.log import named_error

T = TypeVar("T")


@dataclass(slots=True)
class _Offer(Generic[T]):
    value: T
    over: threading.Condition  # `done`, or there is an `error`
    claimed: bool = False
    done: bool = False
    error: MpcError | None = None


class Meeting(Generic[T]):
    """At most `capacity` offers wait to be claimed. Safe to call from any thread."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._offers: dict[bytes, _Offer[T]] = {}
        self._lock = threading.Lock()
        self._offered = threading.Condition(self._lock)

    def offer(self, id: bytes, value: T, claimer: str, timeout: float) -> None:
        """Wait until `value` is claimed, then until its claimer is done.

        Raises: PeerTimeout when nobody claims it; the claimer's error; Refused.
        """
        mine = _Offer(value, threading.Condition(self._lock))
        with self._lock:
            self._admit(id, mine)
            try:
                # Nobody is woken to learn that he was claimed.
                mine.over.wait_for(lambda: mine.done or mine.error, timeout)
                if not (mine.claimed or mine.error):
                    raise PeerTimeout(
                        f"{claimer} did not take up request {id.hex()} in {timeout:.1f} s",
                        f"was the request sent to {claimer} too, and can she be reached?",
                    )
                mine.over.wait_for(lambda: mine.done or mine.error)
            finally:
                del self._offers[id]
        if mine.error:
            raise mine.error

    @contextmanager
    def claim(self, id: bytes, offerer: str, timeout: float) -> Iterator[T]:
        """The value offered under `id`, until the block ends; its error is the offerer's too.

        Raises: PeerTimeout naming who did not offer it.
        """
        with self._lock:
            if not self._offered.wait_for(lambda: self._unclaimed(id), timeout):
                raise PeerTimeout(
                    f"{offerer} did not send this half of request {id.hex()} in {timeout:.1f} s",
                    f"is {offerer} still there, and is `deadlines.round` long enough?",
                )
            offer = self._offers[id]
            offer.claimed = True
        error: MpcError | None = None
        try:
            yield offer.value
        except Exception as e:
            error = named_error(e)
            raise error from None
        finally:
            with self._lock:
                offer.done, offer.error = True, error
                offer.over.notify()

    def refuse_all(self, error: MpcError) -> None:
        """End every wait for a claim."""
        with self._lock:
            for offer in self._offers.values():
                if not offer.claimed:
                    offer.error = error
                    offer.over.notify()

    def __len__(self) -> int:
        return len(self._offers)

    def _admit(self, id: bytes, offer: _Offer[T]) -> None:
        if id in self._offers:
            raise Refused(f"request {id.hex()} was sent twice", "make a new id for each request")
        waiting = sum(not o.claimed for o in self._offers.values())
        if waiting >= self._capacity:
            raise Refused(f"busy: {waiting} requests wait already", "try again later")
        self._offers[id] = offer
        self._offered.notify_all()

    def _unclaimed(self, id: bytes) -> bool:
        offer = self._offers.get(id)
        return offer is not None and not offer.claimed and offer.error is None
