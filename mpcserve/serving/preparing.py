"""One server's half of a bundle: prepared in one thread, perhaps while another evaluates with it.

    agreed ── start, finish ──→ under way ──→ whole
       └──────────── abandon, an error ─────────→ over

Materials come in plan order and leave as the evaluation reaches them; each is freed when it is
taken. What goes wrong while preparing is raised where the next material is wanted.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from mpcserve.errors import MpcError, PeerTimeout, Refused
from mpcserve.plan.plan import Plan
from mpcserve.protocol import OUTPUTS, Bundle, ServerProgram, size_of
from mpcserve.serving.log import named_error
from mpcserve.serving.report import merged
from mpcserve.serving.request import Deadline
from mpcserve.transport import Link
from mpcserve.transport.crew import Crew

_CREW = Crew()

Take: TypeAlias = Callable[[int], memoryview]
"""The next n dealt bytes."""


@dataclass(frozen=True, slots=True)
class Timer:
    """Wall and CPU seconds of this thread since it was made."""

    wall: float
    cpu: float

    @classmethod
    def start(cls) -> Timer:
        """Begin now."""
        return cls(time.perf_counter(), time.thread_time())

    def seconds(self) -> tuple[float, float]:
        """(wall, cpu) so far."""
        return time.perf_counter() - self.wall, time.thread_time() - self.cpu

    def facts(self) -> dict[str, Any]:
        """Both, as a report names them."""
        wall, cpu = self.seconds()
        return {"preprocessing_seconds": wall, "preprocessing_cpu_seconds": cpu}


class Preparation(ABC):
    """`link`: what the bundle's life hangs on. `awaited`: who is waited for, in errors.

    `nbytes`: memory of all that was prepared. `small`: whoever starts it prepares it. Safe to call
    from any thread.
    """

    def __init__(
        self, program: ServerProgram, id: bytes, link: Link, awaited: str, slots: int = 1
    ) -> None:
        self.id, self.slots = id, slots
        self.link = link
        self.nbytes = 0
        self.small = False
        self._done = False
        self._program, self._awaited = program, awaited
        self._bundle: Bundle | None = None
        self._parts: dict[int, Any] = {}
        self._facts: dict[str, Any] = {}
        self._begun = self._filled = False
        self._error: MpcError | None = None
        self._wanted: int | None = None  # the material that somebody waits for
        self._deadline = Deadline(0.0)
        self._changed = threading.Condition()

    @property
    def bundle(self) -> Bundle:
        """What evaluates with it: made when the evaluation first asks for it."""
        with self._changed:
            if self._bundle is None:
                self._bundle = self._program.bundle(self.id, self, self.slots)
            return self._bundle

    @property
    def alive(self) -> bool:
        """Whether the link is."""
        return self.link.reason is None

    @property
    def at_once(self) -> bool:
        """Whether to prepare it before the data owner hears that this server is ready: it waits for
        nobody, and the other server is not ready any sooner."""
        return False

    @property
    def whole(self) -> bool:
        """All is prepared, on both servers as far as this side knows."""
        return self._done

    @property
    def _plan(self) -> Plan:
        return self._program.plan_of(self.slots)

    def __repr__(self) -> str:
        return f"Preparation({self.id.hex()}, {self.nbytes} bytes, whole={self.whole})"

    # -- the thread that prepares -----------------------------------------------------------------

    def start(self) -> None:
        """See to it that it is prepared, if nobody is at it: in another thread unless it is small.

        What goes wrong `take` raises.
        """
        if self._is_first():
            if self.small:
                self._run()
            else:
                _CREW.call(self._run, "mpcserve-preparing")

    def finish(self) -> None:
        """Prepare it in this thread, or wait for whoever does. Raises: what went wrong."""
        if self._is_first():
            self._run()
        with self._changed:
            self._changed.wait_for(lambda: self._done or self._error)
            self._check()

    @abstractmethod
    def work(self) -> None:
        """Prepare: `fill`, then `settle`. Called once, by whoever starts or finishes this first."""

    def fill(self, take: Take | None = None) -> None:
        """Prepare all materials; bob takes dealt bytes. Raises: Refused when it was given up."""
        self.bundle.seals  # noqa: B018  made now, as there is time
        for id, material in self._program.materials(self.id, take, self.slots):
            size = size_of(material)
            with self._changed:
                self._check()
                self._parts[id] = material
                self.nbytes += size
                if self._wanted == id:  # to wake a thread for each would cost more than they do
                    self._changed.notify_all()

    def settle(self, facts: Mapping[str, Any]) -> None:
        """What it cost, beside what is known already: all is prepared on this side."""
        with self._changed:
            self._facts = merged(self._facts, facts)
            self._filled = True
            self._changed.notify_all()

    def add_facts(self, facts: Mapping[str, Any]) -> None:
        """What the bundle cost before it was prepared."""
        self._facts = merged(self._facts, facts)

    def abandon(self, error: MpcError | None = None) -> None:
        """Nobody wants it any more, or it failed: free it, prepare no more."""
        with self._changed:
            if self._error is not None:
                return
            id = self.id.hex()
            self._error = error or Refused(f"bundle {id} was given up", "take another one")
            self._parts.clear()
            self._changed.notify_all()
        self.let_go()

    def admit(self) -> None:  # noqa: B027  it may be admitted
        """Called before anything that depends on the bundle leaves this machine: its id is in the
        ledger when this returns. Raises: Refused."""

    def let_go(self) -> None:  # noqa: B027  there may be nothing to do
        """Called once when it is abandoned."""

    # -- the thread that evaluates ----------------------------------------------------------------

    def until(self, deadline: Deadline) -> None:
        """From now on `take` and `facts` wait until this deadline."""
        self._deadline = deadline

    def take(self, id: int) -> Any:
        """The material of an instruction, once; waits for it.

        Raises: PeerTimeout naming the instruction; what went wrong in preparing.
        """
        if (ready := self._parts.pop(id, None)) is not None:
            return ready
        with self._changed:
            self._wanted = id
            self._wait(lambda: id in self._parts, lambda: _name(self._plan, id))
            return self._parts.pop(id)

    def facts(self) -> dict[str, Any]:
        """What it cost, when it is prepared. Raises: as `take`."""
        with self._changed:
            self._wait(lambda: self._filled, lambda: "all instructions")
            return self._facts

    # -- helpers ----------------------------------------------------------------------------------

    def _is_first(self) -> bool:
        with self._changed:
            begun, self._begun = self._begun, True
            return not begun

    def _run(self) -> None:
        try:
            self.work()
        except Exception as e:
            self.abandon(named_error(e))
        with self._changed:
            self._done = self._error is None
            self._changed.notify_all()

    def _wait(self, came: Callable[[], bool], what: Callable[[], str]) -> None:
        """`_changed` held."""
        if came():
            return
        seconds = self._deadline.left()
        self._changed.wait_for(lambda: came() or self._error, seconds)
        if came():
            return
        self._check()
        raise PeerTimeout(
            f"the randomness of {what()} was not ready after {seconds:.1f} s; {self._awaited}",
            "a deeper pool has it dealt before it is wanted; or raise `deadlines.request`",
        )

    def _check(self) -> None:
        """Raises: what went wrong, if something has; each time a new exception."""
        if self._error is not None:
            raise type(self._error)(self._error.message, self._error.hint)


def _name(plan: Plan, id: int) -> str:
    if id == OUTPUTS:
        return "the outputs"
    i = plan[id]
    layer = f" ({i.layer})" if i.layer else ""
    return f"instruction {i.id} {i.op}{layer}"
