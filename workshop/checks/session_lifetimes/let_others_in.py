"""Exercise 06, task 4: workers that give their connection back, and take it again before anybody else can."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, event, func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import Conditions
from workshop.checks.rules import (
    ENGINES,
    LEFT_OVER,
    another_pool,
    deadlock,
    one_at_a_time,
    one_session_many_tasks,
    retries,
)
from workshop.checks.session_lifetimes.calls import close_sessions, current_call
from workshop.checks.task import Task, Trials
from workshop.shop import ExportJob

_TURNS = 4  # that customers may have to wait, in units of the capacity; fair is one or two


@dataclass(kw_only=True)
class Jobs(Evidence):
    """What became of the jobs that were `asked` for: how many were `exported`, and how many are `done`.

    `twice` is how many were exported again, and `touched` how many others were changed or exported; `most` is the
    most that a worker exported in one transaction. Of so many `customers`, `served` had a connection, and `waited`
    is the longest that one of them waited for it, in the workers' turns.
    """

    workers: int
    asked: int
    exported: int
    done: int
    twice: int
    touched: int
    most: int
    customers: int
    served: int
    waited: int


class Turns:
    """What workers and customers do with a pool, counted in the workers' turns: the connections that they take.

    `exports` counts how often each job was exported, `most` the most that one worker exported in one transaction,
    and `waited` are the turns that passed between a customer's question and the connection.
    """

    def __init__(self, engine: AsyncEngine, jobs: int) -> None:
        self.exports: Counter[int] = Counter()
        self.most = 0
        self.waited: list[int] = []
        self.customers_come = asyncio.Event()
        self._come_after = jobs // 10
        self._turns = 0
        self._unfinished: Counter[int | None] = Counter()
        event.listen(engine.sync_engine, "checkout", self._checked_out)
        event.listen(engine.sync_engine, "commit", self._ends)
        event.listen(engine.sync_engine, "rollback", self._ends)

    def export(self, number: int) -> None:
        """What the learner's code is lent: write the file of a job."""
        call = current_call.get()
        self.exports[number] += 1
        self._unfinished[call] += 1
        self.most = max(self.most, self._unfinished[call])
        if self.exports.total() >= self._come_after:
            self.customers_come.set()

    async def ask(self, engine: AsyncEngine) -> None:
        """What a customer does."""
        asked = self._turns
        async with engine.connect():
            self.waited.append(self._turns - asked)

    def _checked_out(self, *_: Any) -> None:
        self._turns += current_call.get() is not None

    def _ends(self, connection: Any) -> None:
        self._unfinished[current_call.get()] = 0


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
    async with engine.begin() as connection:
        await connection.execute(insert(ExportJob), made)
        before = {job.id: job for job in await connection.execute(columns)}
    # All connections are there from the beginning: to make one takes longer than a job.
    await asyncio.gather(*(_touch(engine) for _ in range(workers)))
    turns = Turns(engine, jobs)
    left = workers

    async def work_or_ask(number: int) -> None:
        nonlocal left
        if number < workers:
            current_call.set(number)
            try:
                await work_through(sessions, ours, turns.export)
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
        await storm(work_or_ask, workers + customers)
    await close_sessions(noted)
    await engine.dispose()
    async with engine.begin() as connection:
        after = {job.id: job for job in await connection.execute(columns)}
        await connection.execute(delete(ExportJob).where(all_of_them))
    asked = {job.id for job in before.values() if (job.kind, job.status) == (ours, "queued")}
    exports = turns.exports
    return Jobs(
        **vars(noted),
        workers=workers,
        asked=len(asked),
        done=sum(number in after and after[number].status == "done" for number in asked),
        exported=len(asked & exports.keys()),
        twice=sum(count > 1 for count in exports.values()),
        touched=sum(after.get(number) != before[number] for number in before.keys() - asked)
        + len(exports.keys() - asked),
        most=turns.most,
        customers=customers,
        served=len(turns.waited),
        waited=max(turns.waited, default=0),
    )


async def _touch(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(select(func.pg_sleep(0.02)))


def wrong_way_of_working(run: Recording, seen: Jobs) -> Iterator[Finding]:
    """Workers that do not commit job by job, take the same one twice, or let others in by the clock or one by one."""
    if seen.exported and not seen.done:
        yield Finding("forgets-to-commit", "Jobs were exported, and none of them is done.")
    if seen.twice:
        yield Finding("claim-that-races", "Some jobs were exported twice.")
    if seen.most > 1:
        yield Finding(
            "one-transaction-for-all", "A worker exported several jobs before it committed."
        )
    if seen.sleepers > seen.workers // 4:
        yield Finding("waits-by-the-clock", f"The workers slept in {seen.sleeps_at}.")
    if seen.exported and seen.queuers > seen.workers // 2:
        yield Finding("one-at-a-time", f"Nearly all workers stood before {seen.queues_at}.")


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
    if seen.done < seen.asked:
        yield Finding(
            "forgets-to-commit", f"{seen.asked} jobs were exported, and {seen.done} are done."
        )


def prove(trials: Trials[Jobs]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{seen.done} of {seen.asked} jobs done once by {seen.workers} workers on {run.pools[0].capacity} connections,"
        f" and {seen.served} of {seen.customers} customers served between them."
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
    rules=(
        *ENGINES,
        another_pool,
        wrong_way_of_working,
        one_session_many_tasks,
        one_at_a_time,
        retries,
        deadlock,
        *LEFT_OVER,
        overtakes_the_queue,
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
