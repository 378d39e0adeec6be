"""Whether a call asks a pool for a connection while it holds one of it, be there enough of them or not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, Pool

from ormscope.lab import Recording
from ormscope.places import calling_places, places
from ormscope.waitgraph import below
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, Work
from workshop.checks.rules import (
    Rule,
    deadlock,
    fire_and_forget,
    leaves_it_checked_out,
    one_at_a_time,
    one_session_many_tasks,
    retries,
    sleeps,
    swallows_the_timeout,
)
from workshop.checks.unpooled import Unpooled


@dataclass(eq=False)
class _Hold:
    """A connection that is out: of which pool, whose it is, and the line that took it."""

    pool: Pool
    task: asyncio.Task[Any] | None
    place: str
    is_over: bool = False


_HOLD = "the check: hold"
# What this task holds or has held, and what those held who started it.
_holds: ContextVar[tuple[_Hold, ...]] = ContextVar("holds", default=())


@dataclass(kw_only=True)
class Nested(Work, Unpooled):
    """The evidence of calls that are to need one connection at a time.

    `nested` tells the first time that a call asked for a connection while it had one; empty where none did.
    `nested_in_a_task` says whether the second was for a task that the call awaited meanwhile. `from_another_loop` is
    the line that asked for one in another event loop than the pool was lent to.
    """

    nested: str
    nested_in_a_task: bool
    from_another_loop: str


class Nesting:
    """Watches the engines' pools; made before the learner's code runs, so that these are what they were at the end."""

    def __init__(self, *engines: AsyncEngine) -> None:
        self._first: dict[str, Any] = {"nested": "", "nested_in_a_task": False}
        self._from_another_loop = ""
        self._loop = asyncio.get_running_loop()
        for engine in engines:
            pool = engine.sync_engine.pool
            pool.connect = partial(self._ask, pool, pool.connect)  # type: ignore[method-assign]
            event.listen(pool, "checkout", partial(self._checked_out, pool))
            event.listen(pool, "checkin", self._checked_in)

    def noted(self) -> dict[str, Any]:
        """What there is of Nested."""
        return {**self._first, "from_another_loop": self._from_another_loop}

    def _ask(self, pool: Pool, connect: Callable[[], Any]) -> Any:
        if asyncio.get_running_loop() is not self._loop:
            self._from_another_loop = self._from_another_loop or _own_line()
            # Else two threads would use a connection's memory at once, which can end the process.
            raise RuntimeError("the pool belongs to another event loop")
        if not self._first["nested"]:
            held = (hold for hold in _holds.get() if hold.pool is pool and not hold.is_over)
            hold = next(filter(_waits_for_this_task, held), None)
            if hold is not None:
                self._first = _told(hold)
        return connect()

    def _checked_out(
        self, pool: Pool, connection: Any, entry: ConnectionPoolEntry, proxy: Any
    ) -> None:
        hold = entry.info[_HOLD] = _Hold(pool, asyncio.current_task(), _own_line())
        _holds.set((*(hold for hold in _holds.get() if not hold.is_over), hold))

    def _checked_in(self, connection: Any, entry: ConnectionPoolEntry) -> None:
        if _HOLD in entry.info:
            entry.info.pop(_HOLD).is_over = True


def _waits_for_this_task(hold: _Hold) -> bool:
    """Else its connection may come back meanwhile, whatever becomes of this task."""
    task = asyncio.current_task()
    return hold.task is task or (hold.task is not None and task in below(hold.task))


def _told(hold: _Hold) -> dict[str, Any]:
    own = _own_line()
    # A session closes in a task of SQLAlchemy's own, where the learner has no line.
    asks, holds = own or "the end of a session's block", hold.place or "another block"
    return {
        "nested": f"{asks}, asked for a connection while {holds}, held one of the same pool.",
        "nested_in_a_task": bool(own) and hold.task is not asyncio.current_task(),
    }


def _own_line() -> str:
    frames = places(calling_places())
    return frames[0].short if frames else ""


def asks_while_it_holds(run: Recording, seen: Nested) -> Iterator[Finding]:
    """A call that needs a second connection of its pool; where there is but one, it waits for itself."""
    if not seen.nested:
        return
    evidence = seen.nested
    if run.deadlocks:
        verdict = run.deadlocks[0]
        stuck = sum(holder.waits is not None for holder in verdict.holding)
        evidence += f" {stuck} of {verdict.capacity} connections were held by calls that waited for another."
    if seen.nested_in_a_task:
        yield Finding("children-count-too", evidence)
    if seen.queuers:
        yield Finding("door-for-one-size", f"{evidence} Others waited at {seen.queues_at}.")
    yield Finding("holds-and-waits", evidence)


def uses_another_loop(run: Recording, seen: Nested) -> Iterator[Finding]:
    """A connection that is asked for by asyncio.run() in a thread."""
    if seen.from_another_loop:
        yield Finding(
            "another-loop",
            f"{seen.from_another_loop}, asked for a connection in an event loop of its own.",
        )


def leaves_a_session_open(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """Asked before the next one, which it may be the reason for; a load that was cancelled had no time to close any."""
    if seen.ended:
        yield from leaves_it_checked_out(run, seen)


# In the order of asking; a task asks for its own rules on engines before these.
ONE_AT_A_TIME: tuple[Rule[Nested], ...] = (
    uses_another_loop,
    one_session_many_tasks,
    sleeps,
    one_at_a_time,
    swallows_the_timeout,
    retries,
    fire_and_forget,
    leaves_a_session_open,
    asks_while_it_holds,
    deadlock,
    leaves_it_checked_out,
)
