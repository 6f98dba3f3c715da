"""The two halves of a bundle: how alice and bob each come by theirs.

    alice ── prepare ──→ bob ── deal ──→ carol          both write the id in their ledgers
    alice ←── agreed ─── bob ←═ corrections ═ carol     both prepare
    alice ←─ prepared ── bob

Of a fresh one, which is wanted now, bob hears as he is told to `run` a request with it, and he does
not say `agreed`. Neither lets anything leave its machine that depends on the bundle before its
ledger has the id, on the disk. The id itself goes ahead.

To be spooled, bob says `agreed` when all corrections are on his disk, and neither prepares before
alice asks him to `load` the bundle or tells him to `run` a request with it.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import Any

from mpcserve.errors import MpcError
from mpcserve.serving.deployment import ID_BYTES
from mpcserve.serving.evaluation import Live
from mpcserve.serving.ledger import Ledger
from mpcserve.serving.log import log
from mpcserve.serving.preparing import Preparation, Timer
from mpcserve.serving.report import Meter, merged
from mpcserve.serving.request import Deadline, Message, failing, receive_message
from mpcserve.serving.spool import Spool, Spooled
from mpcserve.transport import Channel, Link

SMALL_BYTES = 32 << 10
"""A bundle of which carol deals no more takes less time to prepare than two threads lose by it."""


def is_small(live: Live, slots: int) -> bool:
    """Whether a bundle that is wanted now is prepared by the thread that evaluates."""
    return live.dealt_bytes(slots) <= SMALL_BYTES


class AliceHalf(Preparation):
    """Alice expands hers from the id alone. `bob`: where he says what he has done with his."""

    def __init__(
        self,
        live: Live,
        id: bytes,
        bob: Channel,
        timeout: float,
        slots: int,
        ledger: Ledger,
        admitted: bool,
    ) -> None:
        super().__init__(live.program, id, bob.link, "alice expands it herself", slots)
        self._ledger, self._admitted = ledger, admitted
        self._deployment = live.deployment.id
        self.fresh = False  # bob has not heard of it
        self._bob: Channel | None = bob
        self._link, self._timeout = bob.link, timeout

    def admit(self) -> None:
        """To the ledger, unless that was done. Raises: Refused."""
        if not self._admitted:
            self._ledger.admit(self.id, self._deployment)
            self._admitted = True

    @property
    def at_once(self) -> bool:
        """What is small, bob takes longer to hear of than this takes."""
        return self.small

    @property
    def whole(self) -> bool:
        """Nobody waits to hear from bob of a fresh one; of a small one he says nothing."""
        if self.fresh and self._bob is not None:
            return super().whole and not (self.small or self._bob.inbox.is_bare())
        return super().whole

    def hear_agreed(self) -> None:
        """Wait until bob has it in his ledger; to be spooled, on his disk."""
        assert self._bob is not None
        receive_message(self._bob, "agreed", "a bundle to agree on", self._timeout)

    def leave_spooled(self) -> None:
        """Bob prepares his half when he is asked to."""
        assert self._bob is not None
        self._bob.close()
        self._bob = None

    def load(self) -> None:
        """Have bob prepare his half from his disk."""
        bob = self._link.channel(secrets.token_bytes(ID_BYTES))
        with failing(bob):
            bob.send_message(
                {
                    "type": "load",
                    "deployment": self._deployment.hex(),
                    "bundle": self.id.hex(),
                }
            )
            receive_message(bob, "loading", "word of a spooled bundle", self._timeout)
        self._bob = bob

    def work(self) -> None:
        """Expand the streams; where bob was asked to prepare, hear that he has."""
        bob, timer = self._bob, Timer.start()
        if bob is None or self.fresh:
            self.fill()
            self.settle(timer.facts())
            return
        with failing(bob):
            self.fill()
            self.settle(timer.facts())
            theirs = receive_message(bob, "prepared", "bob's half of a bundle", self._timeout)
            self.nbytes = max(self.nbytes, theirs.size("nbytes", 1 << 62))
        bob.close()

    def leave(self) -> None:
        """It is used up."""
        if self.fresh and self._bob is not None:
            self._bob.close()

    def let_go(self) -> None:
        """Bob may hold his half, not knowing that it will never be used."""
        self.leave()
        if self.fresh or not self.alive:
            return  # he has not heard of it, or only with the request; he has dropped it
        try:
            channel = self._link.channel(secrets.token_bytes(ID_BYTES))
            channel.send_message({"type": "drop", "bundle": self.id.hex()})
            channel.close()
        except MpcError as error:
            log.debug("bob was not told to drop a bundle: %s", error)


BLOCK_BYTES = 32 << 10
"""Corrections are sent and received in blocks of about this size: each block wakes bob."""


class Dealing:
    """Corrections of one bundle as carol sends them to bob, on the stream `carol`: she is asked."""

    def __init__(
        self, live: Live, slots: int, carol: Channel, deadline: Deadline, timeout: float
    ) -> None:
        self.carol, self.slots = carol, slots
        self.total = live.dealt_bytes(slots)
        self._deadline, self._timeout = deadline, timeout
        self._meter = Meter(carol.link)
        self._asked = 0
        self._dealt: Message | None = None
        deployment = live.deployment
        carol.send_message(
            {
                "type": "deal",
                "deployment": deployment.id.hex(),
                "digest": deployment.plan.digest,
                "slots": slots,
            }
        )
        self._begun = False
        self._rest = memoryview(b"")  # received, not taken yet

    def _begin(self) -> None:
        """Wait for the first of them; as long as it takes her, if it is not her turn yet."""
        self._begun = True
        if self.carol.message_is_next(self._awaited, self._deadline.left(self._timeout)):
            first = receive_message(self.carol, None, self._awaited, self._timeout)
            if first.text("type") == "waiting":
                receive_message(self.carol, "dealing", "her turn to deal", self._deadline.left())
            else:  # there are none
                self._dealt = first.expect("dealt")

    @property
    def _awaited(self) -> str:
        return f"dealt bytes {self._asked} … of {self.total}"

    def take(self, n: int) -> memoryview:
        """The next n bytes."""
        if not self._begun:
            self._begin()
        missing = n - len(self._rest)
        if missing <= 0:
            taken, self._rest = self._rest[:n], self._rest[n:]
            return taken
        block = self._receive(max(missing, min(BLOCK_BYTES, self.total - self._asked)))
        taken = block[:missing]
        if self._rest:
            taken = memoryview(bytearray(self._rest) + taken)
        self._rest = block[missing:]
        return taken

    def _receive(self, n: int) -> memoryview:
        what = self._awaited
        self._asked += n
        return self.carol.receive(n, what, self._deadline.left(self._timeout))

    def end(self) -> dict[str, Any]:
        """When all have come: what they cost."""
        if not self._begun:
            self._begin()
        dealt = self._dealt or receive_message(
            self.carol, "dealt", "the end of dealing", self._timeout
        )
        self.carol.close()
        return merged(
            {
                "dealt_bytes": self.carol.payload_received,
                "carol_cpu_seconds": dealt.number("cpu_seconds"),
                "carol_peak_rss_bytes": dealt.size("peak_rss_bytes", 1 << 62),
            },
            self._meter.received("carol->bob", self.carol),
        )


class BobHalf(Preparation):
    """Bob prepares his from carol's corrections: from her stream, or from his disk."""

    def __init__(self, live: Live, id: bytes, alice: Link, dealing: Dealing) -> None:
        awaited = f"carol at {dealing.carol.link.address} deals it"
        super().__init__(live.program, id, alice, awaited, dealing.slots)
        self._dealing = dealing
        self._spooled: Spooled | None = None
        self._alice: Channel | None = None
        self._took: dict[str, Any] = {}

    def tell(self, alice: Channel) -> None:
        """Say on this stream when it is prepared."""
        self._alice = alice

    def keep(self, spool: Spool) -> None:
        """Have carol deal it now, and prepare it from the disk when that is wanted."""
        timer = Timer.start()
        with failing(self._dealing.carol):
            self._spooled = spool.write(self._dealing.total, self._dealing.take)
            self.add_facts(merged(timer.facts(), self._dealing.end()))

    def work(self) -> None:
        """Prepare from where the corrections are."""
        timer = Timer.start()
        if self._spooled is not None:
            self.fill(self._spooled.take)
            self._spooled.close()
            self.settle(timer.facts())
            return
        with failing(self._dealing.carol):
            self.fill(self._dealing.take)
            self._took = timer.facts()
            if not self.small:
                self._conclude()
        if self._alice is not None:
            with suppress(MpcError):  # she may be done with it
                self._alice.finish({"type": "prepared"})
            self._alice.close()

    def facts(self) -> dict[str, Any]:
        """Adds what carol says when all is dealt: of a small half nobody has waited for it."""
        if self.small and self._took and not self._filled:
            with failing(self._dealing.carol):
                self._conclude()
        return super().facts()

    def _conclude(self) -> None:
        self.settle(merged(self._took, self._dealing.end()))

    def let_go(self) -> None:
        """Free the disk."""
        if self._alice is not None:
            self._alice.close()
        if self._is_first() or self.small:
            self._dealing.carol.close()  # nobody takes what she deals
        if self._spooled is not None:
            self._spooled.close()
