"""Exercise 04, task 2: a change of many rows, of which few may be in memory."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from sqlalchemy import Row, delete, event, insert, select
from sqlalchemy.ext.asyncio import async_sessionmaker, close_all_sessions
from sqlalchemy.orm import Session, object_session

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import evidence
from workshop.checks.lent import Conditions
from workshop.checks.memory import (
    Read,
    collects_garbage,
    cursor_without_transaction,
    expunge_all_in_a_stream,
    reading,
    yield_per_without_a_stream,
)
from workshop.checks.rules import leaves_it_checked_out
from workshop.checks.task import Task
from workshop.shop import ExportJob

_ALIVE = 1_000


@dataclass
class Writes:
    """What was seen while the jobs were changed.

    `expunged` and `expired` are how many changes were thrown away by these calls, and `detached` how many objects were
    changed that belonged to no session. `most_in_a_flush` is how many changed objects waited for one flush,
    `most_alive` how many were alive at once.
    """

    detached: int = 0
    expunged: int = 0
    expired: int = 0
    most_in_a_flush: int = 0
    alive: int = 0
    most_alive: int = 0


@dataclass(kw_only=True)
class Jobs(Read):
    """What became of the jobs that were `asked` for, and of others.

    `changed` is how many of them differ, `right` how many are as they should be, and `skipped` how many are as they
    were, and come before one that is changed. `values` are the rows_done of those that differ, and `wrong` tells the
    first that is not right. `touched` is how many rows have a change that nobody asked for.
    """

    writes: Writes
    asked: int = 0
    changed: int = 0
    right: int = 0
    skipped: int = 0
    touched: int = 0
    wrong: str = ""
    values: set[int] = field(default_factory=set)

    @property
    def tally(self) -> str:
        """How many were changed, in words."""
        return f"{self.changed:,} of {self.asked:,} jobs are changed, and no error was raised."


class WatchedSession(Session):
    """A session that notes in `info["writes"]` what becomes of changes that are not flushed."""

    def expunge_all(self) -> None:
        """As always."""
        self.info["writes"].expunged += len(self.dirty)
        super().expunge_all()

    def expunge(self, instance: object) -> None:
        """As always."""
        self.info["writes"].expunged += self.is_modified(instance)
        super().expunge(instance)

    def expire_all(self) -> None:
        """As always."""
        self.info["writes"].expired += len(self.dirty)
        super().expire_all()

    def expire(self, instance: object, attribute_names: Iterable[str] | None = None) -> None:
        """As always."""
        self.info["writes"].expired += self.is_modified(instance)
        super().expire(instance, attribute_names)

    def flush(self, objects: Any = None) -> None:
        """As always."""
        writes = self.info["writes"]
        writes.most_in_a_flush = max(writes.most_in_a_flush, len(self.dirty))
        super().flush(objects)


def watch_jobs(writes: Writes) -> None:
    """Count the jobs that are alive from here on; the instruments look 20 times a second, this misses none.

    Those that are changed when they have no session are counted, too.
    """

    def freed() -> None:
        writes.alive -= 1

    def loaded(job: ExportJob, context: Any) -> None:
        writes.alive += 1
        writes.most_alive = max(writes.most_alive, writes.alive)
        weakref.finalize(job, freed)

    def changed(job: ExportJob, *_: Any) -> None:
        writes.detached += object_session(job) is None

    event.listen(ExportJob, "load", loaded)
    event.listen(ExportJob.status, "set", changed)


def lines_of(number: int) -> int:
    """What the exercise gives under this name."""
    return crc32(str(number).encode()) % 10_000


async def change_jobs(mark_done: Callable[..., Any], conditions: Conditions, *, jobs: int) -> Jobs:
    """Let so many jobs be marked as done, among others."""
    engine, writes = conditions.engine(5), Writes()
    ours, theirs = f"exercise 04, {os.getpid()}", f"exercise 04, not asked for, {os.getpid()}"
    all_of_them = ExportJob.kind.in_([ours, theirs])
    columns = select(*ExportJob.__table__.columns).where(all_of_them).order_by(ExportJob.id)
    made = [
        {"kind": theirs if number % 10 == 0 else ours, "status": status}
        for number in range(jobs * 5 // 4)
        for status in ["failed" if number % 10 == 5 else "queued"]
    ]
    async with engine.begin() as connection:
        await connection.execute(insert(ExportJob), made)
        before = (await connection.execute(columns)).all()
    watch_jobs(writes)
    with reading(mark_done, engine) as noted_of_reading:
        async with evidence(conditions, engine) as noted:
            sessions = async_sessionmaker(
                engine, sync_session_class=WatchedSession, info={"writes": writes}
            )
            await storm(lambda _: mark_done(sessions, ours), 1)
    await close_all_sessions()  # one that was left open would lock the rows against what follows
    await engine.dispose()
    async with engine.begin() as connection:
        after = {job.id: job for job in await connection.execute(columns)}
        await connection.execute(delete(ExportJob).where(all_of_them))
    found = Jobs(**vars(noted), **vars(noted_of_reading), writes=writes)
    _compare(found, ours, before, after)
    return found


def _compare(
    found: Jobs, ours: str, before: Sequence[Row[Any]], after: dict[int, Row[Any]]
) -> None:
    """Count what became of each job."""
    unchanged = 0  # since the last that was changed
    for job in before:
        now = after.get(job.id)
        if (job.kind, job.status) != (ours, "queued"):
            found.touched += now != job
            continue
        found.asked += 1
        right = ("done", lines_of(job.id))
        if now is not None and now != job:
            found.values.add(now.rows_done)
        if now is not None and (now.status, now.rows_done) == right:
            found.right += 1
        elif now is not None and now != job and not found.wrong:
            found.wrong = (
                f"Job {job.id} has status {now.status!r} and rows_done {now.rows_done};"
                f" the task wants {right[0]!r} and {right[1]}."
            )
        found.touched += now is None or (now.kind, now.created_at, now.finished_at) != (
            job.kind,
            job.created_at,
            job.finished_at,
        )
        if now == job:
            unchanged += 1
        else:
            found.changed += 1
            found.skipped += unchanged
            unchanged = 0


def loses_or_hoards_changes(run: Recording, seen: Jobs) -> Iterator[Finding]:
    """Changes that are thrown away before they are written, or all kept until the end."""
    if run.completed == run.announced and seen.changed < seen.asked:
        if seen.writes.expunged:
            yield Finding("expunge-loses-changes", seen.tally)
        if seen.writes.expired:
            yield Finding("expire-loses-changes", seen.tally)
    if seen.writes.most_in_a_flush > _ALIVE:
        yield Finding(
            "one-flush-at-the-end", f"More than {_ALIVE:,} changed objects waited for one flush."
        )
    if seen.writes.most_alive > _ALIVE:
        yield Finding(
            "loads-everything", f"More than {_ALIVE:,} objects were alive at the same time."
        )


def commits_in_a_stream(run: Recording, seen: Jobs) -> Iterator[Finding]:
    """The next job of a stream that is read after a commit."""
    raised = {request.outcome.rpartition(".")[2] for request in run.requests}
    if "MissingGreenlet" in raised and seen.streams and seen.committed:
        yield Finding(
            "stream-without-its-transaction",
            "Your code committed within a stream, and then an attribute of a job could not be read (MissingGreenlet).",
        )


def demands(run: Recording, seen: Jobs) -> Iterator[Finding]:
    """All jobs that were asked for are done, each with its own number, and nothing else has changed."""
    if not seen.changed and seen.rolled_back:
        yield Finding("forgets-to-commit", seen.tally)
    if not seen.changed and seen.writes.detached:
        yield Finding(
            "changes-what-is-detached",
            f"{seen.tally} {seen.writes.detached:,} objects were changed that belonged to no session.",
        )
    if seen.touched:
        yield Finding(
            "more-than-asked", f"{seen.touched:,} rows have a change that nobody asked for."
        )
    if seen.skipped:
        yield Finding(
            "pages-shift", f"{seen.tally} Those that are not lie between others that are."
        )
    if seen.changed < seen.asked:
        yield Finding("part-of-the-rows", seen.tally)
    if seen.right < seen.asked and len(seen.values) == 1:
        yield Finding("one-value-for-all", f"All {seen.changed:,} jobs have the same rows_done.")
    if seen.wrong:
        yield Finding("not-what-was-asked", seen.wrong)


def prove(run: Recording, seen: Jobs) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{seen.right:,} of {seen.asked:,} jobs done,"
        f" never more than {_ALIVE:,} objects alive, and no other row was touched."
    )


mark_the_jobs_done = Task(
    "04",
    "mark_the_jobs_done",
    "mark_done",
    load=change_jobs,
    trials=({"jobs": 1_032}, {"jobs": 216}),
    rules=(
        collects_garbage,
        expunge_all_in_a_stream,
        yield_per_without_a_stream,
        cursor_without_transaction,
        commits_in_a_stream,
        loses_or_hoards_changes,
    ),
    demands=(
        demands,
        leaves_it_checked_out,
    ),
    proof=prove,
    curves=("memory", "objects"),
    hints=(
        "Two hold on to the jobs: the list, and the session, which keeps what is changed until it is flushed. "
        "How many of them do you need at a time?",
        "Read a page, change it, let the session write it, and only then read the next. Where does the next page "
        "begin, when the jobs that are done are no longer among those that you ask for?",
        "while jobs := (await session.scalars(queued.limit(500))).all(): change them, then await session.commit(). "
        "No expunge, no OFFSET: what is committed is neither queued nor kept.",
    ),
)
