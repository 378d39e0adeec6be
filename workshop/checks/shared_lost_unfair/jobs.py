"""Jobs, workers that do them, and customers who come meanwhile, for exercise 07, task 2."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from sqlalchemy import delete, event, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from ormscope.lab import storm
from ormscope.places import place
from workshop.checks.calls import (
    Holds,
    close_sessions,
    current_call,
    raise_own,
)
from workshop.checks.evidence import THE_CHECK, evidence
from workshop.checks.lent import Conditions
from workshop.checks.unpooled import Unpooled, backends, blocking_one
from workshop.shop import ExportJob


@dataclass
class Fate:
    """What became of a job: whether it was `asked` for, which workers exported it, and its status at the end."""

    asked: bool
    by: list[int | None] = field(default_factory=list)
    after: str | None = None
    is_changed: bool = False


@dataclass(kw_only=True)
class Jobs(Unpooled):
    """What became of the jobs.

    `unfinished` is how often a worker exported a job when its job before was not done, and `done_before` how often a
    job was done already; both as another process would see it. `written` says whether "done" was written, be it
    committed or not. `pauses` counts where workers slept by the clock, and `waiting` is how many of the workers
    waited on average for a row that another had locked. Of so many `customers`, each that had a connection `waited`
    for it so many turns of the workers.
    """

    workers: int
    customers: int
    fates: list[Fate]
    unfinished: int
    done_before: int
    written: bool
    pauses: Counter[str]
    waiting: float
    waited: list[int]

    @property
    def asked(self) -> list[Fate]:
        """The jobs that were asked for."""
        return [fate for fate in self.fates if fate.asked]

    @property
    def statuses(self) -> Counter[str | None]:
        """How those that were asked for and exported ended."""
        return Counter(fate.after for fate in self.asked if fate.by)


class Turns:
    """What workers do, and a `count` of their turns: the connections that they take. For the rest see `Jobs`."""

    def __init__(
        self, conditions: Conditions, engine: AsyncEngine, fates: dict[int, Fate], come_after: int
    ) -> None:
        self.count = 0
        self.unfinished = 0
        self.done_before = 0
        self.waited: list[int] = []
        self.customers_come = asyncio.Event()
        self._fates = fates
        self._left = come_after
        self._before: dict[int | None, int] = {}
        self.database = blocking_one(conditions)
        event.listen(engine.sync_engine, "checkout", self._checked_out)

    def export(self, number: int) -> None:
        """What the learner's code is lent: write the file of a job."""
        if number not in self._fates:
            raise ValueError(f"export({number!r}): there is no job with this number")
        call = current_call.get()
        self.done_before += self._is_done(number)
        if (before := self._before.get(call, number)) != number:
            self.unfinished += not self._is_done(before)
        self._before[call] = number
        self._left -= not self._fates[number].by
        self._fates[number].by.append(call)
        if self._left <= 0:
            self.customers_come.set()

    def _is_done(self, number: int) -> bool:
        """As another process sees it; for `export` is no coroutine, this takes a connection that is none either."""
        found = "SELECT status = 'done' FROM export_jobs WHERE id = %s"
        row = self.database.execute(found, [number]).fetchone()
        return row is not None and row[0]

    def _checked_out(self, *_: Any) -> None:
        self.count += current_call.get() is not None


def _note_pauses() -> Counter[str]:
    """Where workers sleep by the clock, and how often, until the process ends.

    A look at the tasks now and then would miss those who sleep for a millisecond.
    """
    at, loop = Counter[str](), asyncio.get_running_loop()
    call_later = loop.call_later

    def note(delay: float, callback: Callable[..., object], *rest: Any, **more: Any) -> Any:
        caller = sys._getframe(1)
        if caller.f_code is asyncio.sleep.__code__ and current_call.get() is not None:
            sleeper = caller.f_back or caller
            at[place((sleeper.f_code, sleeper.f_lineno)).short] += 1
        return call_later(delay, callback, *rest, **more)

    loop.call_later = note  # type: ignore[method-assign, assignment]
    return at


async def work_and_ask(
    work: Callable[..., Any], conditions: Conditions, *, workers: int, customers: int, jobs: int
) -> Jobs:
    """Let so many workers, one for each connection, do jobs while customers come."""
    engine = conditions.engine(workers)
    ours = f"exercise 07, {os.getpid()}"
    others = f"{ours}, not asked for"
    all_of_them = ExportJob.kind.in_([ours, others])
    columns = select(ExportJob.id, ExportJob.kind, ExportJob.status).where(all_of_them)
    made = [{"kind": ours, "status": "queued"}] * jobs
    made += [{"kind": ours, "status": "failed"}, {"kind": others, "status": "queued"}] * 10
    async with backends(conditions) as server:
        async with engine.begin() as connection:
            await connection.execute(insert(ExportJob), made)
            before = {job.id: job for job in await connection.execute(columns)}
        # All connections are there from the beginning: to make one takes longer than a job.
        async with AsyncExitStack() as stack:
            for _ in range(workers):
                await stack.enter_async_context(engine.connect())
        fates = {
            number: Fate((job.kind, job.status) == (ours, "queued"))
            for number, job in before.items()
        }
        turns = Turns(conditions, engine, fates, come_after=jobs // 10)
        holds, pauses, left = Holds(engine), _note_pauses(), workers

        async def work_or_ask(number: int) -> None:
            nonlocal left
            if number >= workers:
                # In a task of its own: who waits for an event is taken for one of the learner's.
                await arrival
                asked = turns.count
                async with engine.connect():
                    turns.waited.append(turns.count - asked)
                return
            current_call.set(number)
            try:
                await work(sessions, ours, turns.export)
            except Exception as error:
                raise_own(error)
            finally:
                left -= 1
                if not left:
                    turns.customers_come.set()

        async with evidence(conditions, engine) as noted:
            sessions = async_sessionmaker(engine)
            arrival = asyncio.create_task(turns.customers_come.wait(), name=THE_CHECK)
            server.waiting.clear()
            await storm(work_or_ask, workers + customers)
    turns.database.close()
    await close_sessions(noted)
    await engine.dispose()
    async with engine.begin() as connection:
        after = {job.id: job for job in await connection.execute(columns)}
        await connection.execute(delete(ExportJob).where(all_of_them))
    for number, fate in fates.items():
        fate.after = after[number].status if number in after else None
        fate.is_changed = after.get(number) != before[number]
    return Jobs(
        **vars(noted),
        backends=server,
        workers=workers,
        customers=customers,
        fates=[*fates.values()],
        unfinished=turns.unfinished,
        done_before=turns.done_before,
        written=any("done" in update for update in holds.updates),
        pauses=pauses,
        waiting=fmean(server.waiting or [0]),
        waited=turns.waited,
    )
