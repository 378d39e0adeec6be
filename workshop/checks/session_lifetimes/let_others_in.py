"""Exercise 06, task 4: workers that give their connection back, and take it again before anybody else can."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, event, func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from ormscope.lab import Recording, storm
from ormscope.places import place
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import evidence
from workshop.checks.lent import Conditions
from workshop.checks.rules import (
    ENGINES,
    LEFT_OVER,
    another_pool,
    deadlock,
    one_session_many_tasks,
    retries,
)
from workshop.checks.session_lifetimes.calls import (
    Seen,
    close_sessions,
    current_call,
    is_own,
    to_be_told,
    unless_raised,
)
from workshop.checks.task import Task, Trials
from workshop.checks.unpooled import backends, blocking_one, connects_past_the_pools
from workshop.shop import ExportJob

_TURNS = 4  # that customers may have to wait, in units of the capacity; fair is one or two


@dataclass(kw_only=True)
class Jobs(Seen):
    """What became of the jobs that were `asked` for: how many were `exported`, and their statuses at the end.

    `again` is how many were exported once more by another worker, and `again_by_itself` by the same; `touched` how
    many others were changed or exported. `unfinished` is how often a worker exported a job when its job before was
    not done, and `done_before` how often a job was done already; both as another process would see it. `written` is how
    often "done" was written, be it committed or not, `failed_workers` how many raised.

    `pauses` counts where workers slept by the clock. `idle` workers exported nothing, and `waiting` is how many of the
    workers waited on average for a row that another had locked. Of so many `customers`, `served` had a connection, and
    `waited` is the longest that one of them waited for it, in the workers' turns.
    """

    workers: int
    asked: int
    exported: int
    statuses: Counter[str | None]
    again: int
    again_by_itself: int
    touched: int
    unfinished: int
    done_before: int
    written: int
    failed_workers: int
    pauses: Counter[str]
    idle: int
    waiting: float
    customers: int
    served: int
    waited: int


class Pauses:
    """Where the workers slept by the clock, and how often.

    A look at the tasks now and then would miss those who sleep for a millisecond.
    """

    def __init__(self) -> None:
        self.at: Counter[str] = Counter()
        loop = asyncio.get_running_loop()
        self._call_later = loop.call_later
        loop.call_later = self._note  # type: ignore[method-assign, assignment]  # until the process ends

    def _note(self, delay: float, callback: Callable[..., object], *rest: Any, **more: Any) -> Any:
        caller = sys._getframe(1)
        if caller.f_code is asyncio.sleep.__code__ and current_call.get() is not None:
            sleeper = caller.f_back or caller
            self.at[place((sleeper.f_code, sleeper.f_lineno)).short] += 1
        return self._call_later(delay, callback, *rest, **more)


class Turns:
    """What workers and customers do with a pool, counted in the workers' turns: the connections that they take.

    `exports` are the workers who exported each job, in their order, `unfinished` and `done_before` what the database
    said meanwhile, `written` how often an UPDATE spoke of "done", and `waited` are the turns that passed between a
    customer's question and the connection.
    """

    def __init__(self, conditions: Conditions, engine: AsyncEngine, known: Collection[int]) -> None:
        self.exports: dict[int, list[int | None]] = {}
        self.unfinished = 0
        self.done_before = 0
        self.written = 0
        self.waited: list[int] = []
        self.customers_come = asyncio.Event()
        self._known = known
        self._come_after = len(known) // 10
        self._turns = 0
        self._before: dict[int | None, int] = {}
        self._database = blocking_one(conditions)
        event.listen(engine.sync_engine, "checkout", self._checked_out)
        event.listen(engine.sync_engine, "before_cursor_execute", self._note_done)

    def export(self, number: int) -> None:
        """What the learner's code is lent: write the file of a job."""
        if number not in self._known:
            raise ValueError(f"export({number!r}): there is no job with this number")
        call = current_call.get()
        self.done_before += self._is_done(number)
        if (before := self._before.get(call, number)) != number:
            self.unfinished += not self._is_done(before)
        self._before[call] = number
        self.exports.setdefault(number, []).append(call)
        if len(self.exports) >= self._come_after:
            self.customers_come.set()

    def _is_done(self, number: int) -> bool:
        """As another process sees it; for `export` is no coroutine, this takes a connection that is none either."""
        found = "SELECT status = 'done' FROM export_jobs WHERE id = %s"
        row = self._database.execute(found, [number]).fetchone()
        return row is not None and row[0]

    def close(self) -> None:
        """There will be no more exports."""
        self._database.close()

    async def ask(self, engine: AsyncEngine) -> None:
        """What a customer does."""
        asked = self._turns
        async with engine.connect():
            self.waited.append(self._turns - asked)

    def _checked_out(self, *_: Any) -> None:
        self._turns += current_call.get() is not None

    def _note_done(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any
    ) -> None:
        is_update = statement.lstrip().upper().startswith("UPDATE")
        self.written += is_update and "done" in f"{statement}{parameters}"


async def work_and_ask(
    work_through: Callable[..., Any],
    conditions: Conditions,
    *,
    workers: int,
    customers: int,
    jobs: int,
) -> Jobs:
    """Let so many workers, one for each connection, do jobs while customers come."""
    engine = conditions.engine(workers)
    ours = f"exercise 06, {os.getpid()}"
    all_of_them = ExportJob.kind.in_([ours, f"{ours}, not asked for"])
    columns = select(ExportJob.id, ExportJob.kind, ExportJob.status).where(all_of_them)
    made = [
        {"kind": kind, "status": status}
        for kind, status, count in (
            (ours, "queued", jobs),
            (ours, "failed", 10),
            (f"{ours}, not asked for", "queued", 10),
        )
        for _ in range(count)
    ]
    async with backends(conditions) as server:
        async with engine.begin() as connection:
            await connection.execute(insert(ExportJob), made)
            before = {job.id: job for job in await connection.execute(columns)}
        # All connections are there from the beginning: to make one takes longer than a job.
        await asyncio.gather(*(_touch(engine) for _ in range(workers)))
        turns, pauses = Turns(conditions, engine, before.keys()), Pauses()
        left, failed, raised = workers, 0, False

        async def work_or_ask(number: int) -> None:
            nonlocal left, failed, raised
            if number < workers:
                current_call.set(number)
                try:
                    await work_through(sessions, ours, turns.export)
                except Exception as error:
                    failed, mistake = failed + 1, to_be_told(error)
                    raised = raised or is_own(mistake)
                    raise mistake from mistake.__cause__
                finally:
                    left -= 1
                    if not left:
                        turns.customers_come.set()
            else:
                # In a task of its own: who waits for an event is taken for one of the learner's.
                await arrival
                await turns.ask(engine)

        async with evidence(conditions, engine) as noted:
            sessions = async_sessionmaker(engine)
            arrival = asyncio.create_task(turns.customers_come.wait(), name="the check")
            server.waiting.clear()
            await storm(work_or_ask, workers + customers)
        waiting = [*server.waiting]
    turns.close()
    await close_sessions(noted)
    await engine.dispose()
    async with engine.begin() as connection:
        after = {job.id: job for job in await connection.execute(columns)}
        await connection.execute(delete(ExportJob).where(all_of_them))
    asked = {job.id for job in before.values() if (job.kind, job.status) == (ours, "queued")}
    exports = turns.exports
    return Jobs(
        **vars(noted),
        backends=server,
        raised=raised,
        workers=workers,
        asked=len(asked),
        exported=len(asked & exports.keys()),
        statuses=Counter(
            after[number].status if number in after else None for number in asked & exports.keys()
        ),
        again=sum(len({*by}) > 1 for by in exports.values()),
        again_by_itself=sum(len({*by}) < len(by) for by in exports.values()),
        touched=sum(after.get(number) != before[number] for number in before.keys() - asked)
        + len(exports.keys() - asked),
        unfinished=turns.unfinished,
        done_before=turns.done_before,
        written=turns.written,
        failed_workers=failed,
        pauses=pauses.at,
        idle=len({*range(workers)} - {call for by in exports.values() for call in by}),
        waiting=sum(waiting) / max(1, len(waiting)),
        customers=customers,
        served=len(turns.waited),
        waited=max(turns.waited, default=0),
    )


async def _touch(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(select(func.pg_sleep(0.02)))


def wrong_way_of_working(run: Recording, seen: Jobs) -> Iterator[Finding]:
    """Workers that do not commit job by job, take the same one twice, or do not work side by side."""
    if seen.exported and not seen.statuses["done"] and not seen.failed_workers:
        yield _none_is_done(seen)
    if seen.again:
        yield Finding("claim-that-races", "Some jobs were exported by two workers.")
    if seen.again_by_itself:
        yield Finding("not-what-was-asked", "A worker exported the same job again.")
    if seen.done_before:
        yield Finding(
            "done-before-it-is-done",
            'When a job was exported, others could see already that it was "done".',
        )
    if seen.unfinished:
        yield Finding(
            "one-transaction-for-all",
            'When a worker exported a job, others could not yet see that its job before was "done".',
        )
    if seen.pauses.total() > seen.asked // 4:
        ((where, _),) = seen.pauses.most_common(1)
        yield Finding(
            "waits-by-the-clock", f"The workers slept {seen.pauses.total()} times, in {where}."
        )
    if seen.exported and seen.queuers >= seen.workers - 1:
        yield Finding(
            "one-at-a-time",
            f"{seen.queuers} of {seen.workers} workers stood before {seen.queues_at}.",
        )
    if seen.waiting > seen.workers / 2:
        yield Finding(
            "stands-in-the-lock-queue",
            f"Of {seen.workers} workers, more than half waited in the server, most of the time,"
            " for a row that another had locked.",
        )


def _none_is_done(seen: Jobs) -> Finding:
    statuses = " and ".join(f'"{status}"' for status in seen.statuses)
    evidence = f'{seen.exported} jobs were exported, and they are {statuses} at the end; asked for was "done".'
    is_lost = seen.written and {*seen.statuses} == {"queued"}
    return Finding("forgets-to-commit" if is_lost else "not-what-was-asked", evidence)


def leaves_it_to_the_others(run: Recording, seen: Jobs) -> Iterator[Finding]:
    """Workers that do not work."""
    if seen.exported == seen.asked and seen.idle:
        where = f" Up to {seen.queuers} stood before {seen.queues_at}." if seen.queuers else ""
        yield Finding(
            "leaves-it-to-the-others",
            f"Of {seen.workers} workers, {seen.idle} exported nothing.{where}",
        )


def overtakes_the_queue(run: Recording, seen: Jobs) -> Iterator[Finding]:
    """Workers who are always there first."""
    if seen.waited > _TURNS * seen.workers or run.pools[0].timeouts:
        yield Finding(
            "overtakes-the-queue",
            f"While customers waited, connections came back again and again, more than {_TURNS} times as many as"
            " there are, and workers took them.",
        )


def demands(run: Recording, seen: Jobs) -> Iterator[Finding]:
    """All jobs that were asked for are exported and done, and no other."""
    if seen.touched:
        yield Finding("more-than-asked", "Jobs were changed, or exported, that nobody asked for.")
    if seen.exported < seen.asked:
        yield Finding("part-of-the-rows", f"Of {seen.asked} jobs, {seen.exported} were exported.")
    if seen.statuses["done"] < seen.asked:
        (other, *_) = (status for status in seen.statuses if status != "done")
        yield Finding(
            "not-what-was-asked",
            f'{seen.asked} jobs were exported, and {seen.statuses["done"]} are "done".'
            f" One {'was gone' if other is None else f'has the status {other!r}'}.",
        )


def prove(trials: Trials[Jobs]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{seen.statuses['done']} of {seen.asked} jobs done once by {seen.workers} workers"
        f" on {run.pools[0].capacity} connections, and {seen.served} of {seen.customers} customers served between them."
        for run, seen in trials
    )


let_others_in = Task(
    "06",
    "let_others_in",
    "work_through",
    load=work_and_ask,
    trials=(
        {"workers": 8, "customers": 10, "jobs": 72},
        {"workers": 3, "customers": 6, "jobs": 36},
    ),
    rules=unless_raised(
        *ENGINES,
        another_pool,
        connects_past_the_pools("another-pool"),
        wrong_way_of_working,
        one_session_many_tasks,
        retries,
        deadlock,
        *LEFT_OVER,
        overtakes_the_queue,
        leaves_it_to_the_others,
    ),
    demands=(demands,),
    proof=prove,
    hints=(
        "Each commit does give the connection back. Who is the first to ask for one after that, and in which step of "
        "the event loop?",
        "Whoever waits in the queue is woken by the commit, and needs one step of the event loop to take the "
        "connection. How can the worker let that step pass before it asks again, without the clock?",
        "await asyncio.sleep(0) after the commit; or async with Session() inside of the loop, for each job.",
    ),
)
