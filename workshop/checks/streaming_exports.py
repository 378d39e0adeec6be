"""The checks of exercise 04: an export in a container, a change of many rows, and a delivery that takes its time."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import dataclasses
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper
from itertools import zip_longest
from tempfile import TemporaryFile
from typing import Any, TextIO
from zlib import crc32

from sqlalchemy import delete, event, func, insert, select
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, close_all_sessions
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from ormscope.lab import Recording, storm
from workshop.checks.evidence import evidence
from workshop.checks.lent import engine_of, forget_orders, own_households
from workshop.checks.memory_rules import SAMPLED_SECONDS, wrong_remedy, wrong_use_of_memory
from workshop.checks.task import Finding, Task
from workshop.shop import ExportJob, Order

_ENDED_CURSOR = "cursor cannot be created outside of a transaction"


def _cursor_without_transaction(run: Recording) -> Finding | None:
    if any(_ENDED_CURSOR in one.error for one in run.requests):
        return Finding(
            "stream-without-its-transaction",
            "The next batch raised NoActiveSQLTransactionError: its cursor had ended with its transaction.",
        )
    return None


# export_under_64_mib

_CONTAINER = 64  # MiB
_GROWTH = 3  # MiB; right answers stay below 2, and 40,000 more lines of text take 5
_TWO_BATCHES = 10_000


async def export_twice(
    export: Callable[..., Any], url: str, *, first: int, lines: tuple[int, int]
) -> dict[str, Any]:
    """Export a few lines and then many, each to a file of its own; what is in the files, and what was noted."""
    engine = engine_of(url, 5)
    sessions = async_sessionmaker(engine)

    async def export_range(file: TextIO, ids: range, number: int) -> None:
        await export(sessions, file, ids[0], ids[-1])

    with text_file() as few, text_file() as many:
        ranges = {few: range(first, first + lines[0]), many: range(first, first + lines[1])}
        async with evidence(engine) as noted:
            for file, ids in ranges.items():
                await storm(partial(export_range, file, ids), 1)
                await asyncio.sleep(SAMPLED_SECONDS)  # also a short export is seen
        await engine.dispose()
        found = [await compare(engine, file, ids) for file, ids in ranges.items()]
    return dataclasses.asdict(noted) | {
        "asked": sum(lines),
        "last": lines[1],
        "written": sum(one.written for one in found),
        "difference": next((one.difference for one in found if one.difference), ""),
    }


def text_file() -> Any:
    """A file as the learner's code is lent it."""
    return TemporaryFile("w+", encoding="utf-8", newline="")


@dataclass
class Comparison:
    """How many lines were written, and the first that is not as it should be."""

    written: int = 0
    difference: str = ""


async def compare(engine: AsyncEngine, file: TextIO, ids: range) -> Comparison:
    """Compare a file with the sales lines of these numbers, as PostgreSQL writes them."""
    query = f"SELECT * FROM sales WHERE id BETWEEN {ids[0]} AND {ids[-1]} ORDER BY id"
    comparison = Comparison()
    with TemporaryFile() as wanted:  # in memory it would count as the export's
        async with engine.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            await driver.copy_from_query(query, output=wanted, format="csv")
        for one in (wanted, file):
            one.flush()
            one.seek(0)
        expected = csv.reader(TextIOWrapper(wanted, encoding="utf-8", newline=""))
        for number, (line, right) in enumerate(zip_longest(csv.reader(file), expected), 1):
            comparison.written += line is not None
            if line != right and not comparison.difference:
                comparison.difference = (
                    f"Line {number} is {_shown(line)}; wanted is {_shown(right)}."
                )
    return comparison


def _shown(line: list[str] | None) -> str:
    return "missing" if line is None else ",".join(line)[:80] or "empty"


def judge_export(run: Recording) -> Finding | None:
    """What is wrong with an export."""
    finding = wrong_use_of_memory(run, _TWO_BATCHES, _CONTAINER, _GROWTH)
    finding = finding or _cursor_without_transaction(run)
    if finding is not None or run.completed < run.announced:
        return finding
    seen = run.result
    if not seen["ended"]:
        return None
    if seen["written"] < seen["asked"]:
        return Finding(
            "part-of-the-rows", f"Of {seen['asked']:,} lines, {seen['written']:,} were written."
        )
    if seen["difference"]:
        return Finding("another-file", seen["difference"])
    return None


def prove_export(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.result['written']:,} lines as they should be, under {_CONTAINER} MiB, and no more memory for the last"
        f" {run.result['last']:,} than for the first {run.result['asked'] - run.result['last']:,}."
        for run in runs
    )


export_under_64_mib = Task(
    "04",
    "export_under_64_mib",
    "export",
    load=export_twice,
    trials=(
        {"first": 1, "lines": (10_000, 50_000)},
        {"first": 150_001, "lines": (2_000, 2_000)},
    ),
    judge=judge_export,
    proof=prove_export,
    curves=("memory", "objects"),
    memory_limit=_CONTAINER,
    hints=(
        "How many lines are in memory when the first one is written?",
        "Let the lines come in batches. In which of the lesson's rungs does a batch have a size, "
        "and what do you keep of a batch once it is written?",
        "Add execution_options(yield_per=1_000) to the statement, await session.stream_scalars(…) in place of "
        "session.scalars(…), and write each batch of `async for batch in sales.partitions()`.",
    ),
)


# mark_the_jobs_done

_ALIVE = 1_000


class NotingSession(Session):
    """A session that notes in `info["noted"]` what becomes of changes that are not flushed."""

    def expunge_all(self) -> None:
        """As always."""
        self.info["noted"]["expunged"] += len(self.dirty)
        super().expunge_all()

    def expunge(self, instance: object) -> None:
        """As always."""
        self.info["noted"]["expunged"] += self.is_modified(instance)
        super().expunge(instance)

    def expire_all(self) -> None:
        """As always."""
        self.info["noted"]["expired"] += len(self.dirty)
        super().expire_all()

    def expire(self, instance: object, attribute_names: Iterable[str] | None = None) -> None:
        """As always."""
        self.info["noted"]["expired"] += self.is_modified(instance)
        super().expire(instance, attribute_names)

    def flush(self, objects: Any = None) -> None:
        """As always."""
        noted = self.info["noted"]
        noted["most in a flush"] = max(noted["most in a flush"], len(self.dirty))
        super().flush(objects)


def count_alive(noted: Counter[str]) -> None:
    """Count the jobs that are alive from here on; the instruments look 20 times a second, this misses none."""

    def loaded(job: ExportJob, context: Any) -> None:
        noted["alive"] += 1
        noted["most alive"] = max(noted["most alive"], noted["alive"])
        weakref.finalize(job, noted.subtract, ["alive"])

    event.listen(ExportJob, "load", loaded)


def lines_of(number: int) -> int:
    """What the exercise gives under this name."""
    return crc32(str(number).encode()) % 10_000


async def change_jobs(mark_done: Callable[..., Any], url: str, *, jobs: int) -> dict[str, Any]:
    """Let so many jobs be marked as done, among others; what became of all of them, and what was noted."""
    engine, seen = engine_of(url, 5), Counter[str]()
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
    count_alive(seen)
    event.listen(
        engine.sync_engine, "before_cursor_execute", lambda *_: seen.update(["statements"])
    )
    async with evidence(engine) as noted:
        sessions = async_sessionmaker(
            engine, sync_session_class=NotingSession, info={"noted": seen}
        )
        await storm(lambda _: mark_done(sessions, ours), 1)
    executed = seen["statements"]
    await close_all_sessions()  # one that was left open would lock the rows against what follows
    await engine.dispose()
    async with engine.begin() as connection:
        after = {one.id: one for one in await connection.execute(columns)}
        await connection.execute(delete(ExportJob).where(all_of_them))
    facts, waiting = Counter[str](), 0
    for job in before:
        now = after.get(job.id)
        if (job.kind, job.status) != (ours, "queued"):
            facts["touched"] += now != job
            continue
        facts["asked"] += 1
        if now is not None:
            facts["right"] += (now.status, now.rows_done) == ("done", lines_of(job.id))
        facts["touched"] += now is None or (now.kind, now.created_at, now.finished_at) != (
            job.kind,
            job.created_at,
            job.finished_at,
        )
        if now == job:
            waiting += 1
        else:
            facts["changed"] += 1
            facts["skipped"] += waiting
            waiting = 0
    return dataclasses.asdict(noted) | {"jobs": facts, "seen": seen, "executed": executed}


def judge_jobs(run: Recording) -> Finding | None:
    """What is wrong with how jobs were marked as done."""
    jobs, seen = run.result["jobs"], run.result["seen"]
    finding = wrong_remedy(run) or _cursor_without_transaction(run)
    if finding is not None:
        return finding
    evidence = (
        f"{jobs['changed']:,} of {jobs['asked']:,} jobs are changed, and no error was raised."
    )
    if run.completed == run.announced and jobs["changed"] < jobs["asked"]:
        if seen["expunged"]:
            return Finding("expunge-loses-changes", evidence)
        if seen["expired"]:
            return Finding("expire-loses-changes", evidence)
    if seen["most in a flush"] > _ALIVE:
        return Finding(
            "one-flush-at-the-end", f"More than {_ALIVE:,} changed objects waited for one flush."
        )
    if seen["most alive"] > _ALIVE:
        return Finding(
            "loads-everything", f"More than {_ALIVE:,} objects were alive at the same time."
        )
    if run.completed < run.announced or not run.result["ended"]:
        return None
    if not jobs["changed"] and run.result["executed"]:
        return Finding("forgets-to-commit", evidence)
    if jobs["touched"]:
        return Finding(
            "more-than-asked", f"{jobs['touched']:,} rows have a change that nobody asked for."
        )
    if jobs["skipped"]:
        return Finding("pages-shift", f"{evidence} Those that are not lie between others that are.")
    if jobs["changed"] < jobs["asked"]:
        return Finding("part-of-the-rows", evidence)
    if jobs["right"] < jobs["asked"]:
        return Finding(
            "one-value-for-all",
            f"{jobs['right']:,} of {jobs['asked']:,} jobs are done, with the rows_done that lines_of gives.",
        )
    if run.result["left_out"]:
        return Finding("leaves-it-checked-out", "A connection was still checked out at the end.")
    return None


def prove_jobs(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.result['jobs']['right']:,} of {run.result['jobs']['asked']:,} jobs done,"
        f" never more than {_ALIVE:,} objects alive, and no other row was touched."
        for run in runs
    )


mark_the_jobs_done = Task(
    "04",
    "mark_the_jobs_done",
    "mark_done",
    load=change_jobs,
    trials=({"jobs": 2_400}, {"jobs": 1_200}),
    judge=judge_jobs,
    proof=prove_jobs,
    curves=("memory", "objects"),
    hints=(
        "Two hold on to the jobs: the list, and the session, which keeps what is changed until it is flushed. "
        "How many of them do you need at a time?",
        "Read a page, change it, let the session write it, and only then read the next. By what does the next page "
        "begin, when the jobs that are done are no longer among those that you ask for?",
        "while jobs := (await session.scalars(queued.limit(500))).all(): change them, then await session.commit(). "
        "No expunge, no OFFSET: what is committed is neither queued nor kept.",
    ),
)


# hold_no_connection

_BATCH = 500
_API_SECONDS = 0.02  # that the API takes for a batch, and
_CUSTOMERS_SECONDS = 0.06  # more at most, until the customers have done what they want
_CUSTOMERS = "customers"
_AT_ONCE = 20


class Warehouse:
    """The slow API of somebody else; while it takes a batch, customers cancel orders and place new ones.

    `batches` are the numbers of all orders that were delivered, and `cancelled` has for each order that was
    cancelled how many batches there were by then. `held` says whether the job had a connection during a delivery.
    """

    def __init__(self, engine: AsyncEngine, orders: list[int], household: int) -> None:
        self.batches: list[list[int]] = []
        self.cancelled: dict[int, int] = {}
        self.held = False
        self._engine = engine
        self._orders = orders
        self._household = household
        # At least two full batches are still to come when the last order is cancelled.
        self._busy_for = len(orders) // _BATCH - 2
        self._meanwhile: list[asyncio.Task[None]] = []
        self._under_way = 0
        self._holding: set[ConnectionPoolEntry] = set()
        event.listen(engine.sync_engine, "checkout", self._checked_out)
        event.listen(engine.sync_engine, "checkin", self._checked_in)

    async def deliver(self, batch: Any) -> None:
        """Take a batch: orders, rows that have their number first or as `id`, or just the numbers."""
        self.batches.append([_number(one) for one in batch])
        self.held = self.held or bool(self._holding)
        self._under_way += 1
        try:
            if len(self.batches) <= self._busy_for:
                served = asyncio.Event()
                task = asyncio.create_task(self._shop_goes_on(served), name=_CUSTOMERS)
                self._meanwhile.append(task)
                # An event has no owner: to await the task would make a circle with a job that holds on.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_CUSTOMERS_SECONDS):
                        await served.wait()
            await asyncio.sleep(_API_SECONDS)
        finally:
            self._under_way -= 1

    async def close(self) -> None:
        """Wait until the last customer has left."""
        await asyncio.gather(*self._meanwhile)

    async def _shop_goes_on(self, served: asyncio.Event) -> None:
        try:
            async with self._engine.begin() as connection:
                delivered = [one for batch in self.batches for one in batch]
                known, gone = {*self._orders}, {*delivered, *self.cancelled}
                left = [one for one in self._orders if one not in gone]
                cancelled = left[:_AT_ONCE] + left[-_AT_ONCE:]
                archived = [one for one in delivered if one in known][-_AT_ONCE:]
                await connection.execute(delete(Order).where(Order.id.in_(cancelled + archived)))
                new = [{"household_id": self._household}] * _AT_ONCE
                await connection.execute(insert(Order), new)
        except PoolTimeoutError:
            return  # the job held what they waited for, and that is noted
        self.cancelled |= dict.fromkeys(cancelled, len(self.batches))
        served.set()

    def _checked_out(self, connection: Any, entry: ConnectionPoolEntry, proxy: Any) -> None:
        task = asyncio.current_task()
        if task is not None and task.get_name() != _CUSTOMERS:
            self._holding.add(entry)
            self.held = self.held or self._under_way > 0

    def _checked_in(self, connection: Any, entry: ConnectionPoolEntry) -> None:
        self._holding.discard(entry)


def _number(one: Any) -> int:
    number = one if isinstance(one, int) else getattr(one, "id", None)
    if number is None:
        number = one["id"] if isinstance(one, Mapping) else one[0]
    if not isinstance(number, int):
        raise TypeError(f"deliver was handed {one!r}; wanted are orders, or their numbers")
    return number


async def deliver_orders(
    nightly: Callable[..., Any], url: str, *, orders: int, capacity: int
) -> dict[str, Any]:
    """Let so many orders be delivered while the shop goes on; what was delivered, and what was noted."""
    engine, customers = engine_of(url, capacity), own_households()
    ours, others = customers[:5_000], customers[5_000:]
    number = func.generate_series(1, orders).column_valued()
    made = insert(Order).from_select(["household_id"], select(ours[0] + number * 7 % 1_000))
    async with engine.begin() as connection:
        await connection.execute(made)
        await connection.execute(insert(Order), [{"household_id": others[0]}] * 100)
        placed = select(Order.id).where(Order.household_id.in_(ours)).order_by(Order.id)
        wanted = list(await connection.scalars(placed))
    await engine.dispose()
    warehouse, told = Warehouse(engine, wanted, ours[0]), False

    async def refuse(batch: Any) -> None:
        raise ConnectionError("the warehouse does not answer")

    async def job(number: int) -> None:
        await nightly(sessions, ours[0], ours[-1], warehouse.deliver)

    async def job_without_warehouse(number: int) -> None:
        nonlocal told
        try:
            await nightly(sessions, ours[0], ours[-1], refuse)
        except Exception:  # whatever it makes of it, it says so
            told = True

    async with evidence(engine) as noted:
        sessions = async_sessionmaker(engine)
        ends = await storm(job, 1)
        await warehouse.close()
        if ends["ok"]:
            await storm(job_without_warehouse, 1)
    await warehouse.close()
    await engine.dispose()
    async with engine.connect() as connection:
        known = {*wanted, *await connection.scalars(placed)}
        await forget_orders(connection, customers)
    delivered = Counter(one for batch in warehouse.batches for one in batch)
    missing = [one for one in wanted if one not in delivered and one not in warehouse.cancelled]
    return dataclasses.asdict(noted) | {
        "told": told,
        "held": warehouse.held,
        "orders": len(wanted),
        "delivered": len(delivered),
        "largest": max(map(len, warehouse.batches), default=0),
        "twice": sum(count > 1 for count in delivered.values()),
        "strange": len({*delivered} - known),
        "missing": len(missing),
        "between": sum(min(delivered) < one < max(delivered) for one in missing if delivered),
        "stale": sum(
            number >= warehouse.cancelled[one] + 2
            for number, batch in enumerate(warehouse.batches, 1)
            for one in batch
            if one in warehouse.cancelled
        ),
    }


def judge_deliveries(run: Recording) -> Finding | None:
    """What is wrong with how orders were delivered."""
    seen = run.result
    if seen["tampered"]:
        return Finding("changes-the-pool", "The pool came back with other settings than it had.")
    if run.pools[1:]:
        return Finding("another-pool", "Your code made an engine of its own.")
    if (finding := _cursor_without_transaction(run)) is not None:
        return finding
    if any("MissingGreenlet" in one.outcome for one in run.requests):
        return Finding(
            "expired-objects",
            "Reading an order's number in deliver raised MissingGreenlet.",
        )
    if seen["held"]:
        return Finding(
            "holds-while-it-waits", "While deliver ran, your job had a connection checked out."
        )
    if run.completed < run.announced or not seen["ended"]:
        return None
    return _wrong_orders(seen)


def _wrong_orders(seen: dict[str, Any]) -> Finding | None:
    """What is wrong with what was delivered."""
    if seen["largest"] > _BATCH:
        return Finding("larger-batches", f"A batch had {seen['largest']:,} orders.")
    if seen["twice"]:
        return Finding("delivers-twice", "Some orders were delivered a second time.")
    if seen["strange"]:
        return Finding("more-than-asked", "Orders of other households were delivered as well.")
    if seen["stale"]:
        return Finding(
            "read-too-early",
            "Some orders were delivered although they had been cancelled two batches before.",
        )
    if seen["between"]:
        return Finding(
            "pages-shift",
            "Some orders were never delivered, and others on either side of them were.",
        )
    if seen["missing"]:
        return Finding(
            "part-of-the-rows",
            f"Of {seen['orders']:,} orders, {seen['delivered']:,} were delivered.",
        )
    if not seen["told"]:
        return Finding(
            "swallows-the-refusal", "deliver raised ConnectionError, and your job raised nothing."
        )
    if seen["left_out"]:
        return Finding("leaves-it-checked-out", "A connection was still checked out at the end.")
    return None


def prove_deliveries(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.result['orders']:,} orders: each that nobody cancelled was delivered once, in batches of at most"
        f" {_BATCH}, and no connection was held meanwhile."
        for run in runs
    )


hold_no_connection = Task(
    "04",
    "hold_no_connection",
    "nightly",
    load=deliver_orders,
    trials=({"orders": 5_000, "capacity": 1}, {"orders": 2_300, "capacity": 3}),
    judge=judge_deliveries,
    proof=prove_deliveries,
    hints=(
        "Which line of nightly takes the connection, and which gives it back? How often does deliver run in between?",
        "Each batch needs a query of its own, in a session that has ended before deliver begins. How does the next "
        "query know where to go on, when rows before it may have gone?",
        "Remember the highest number of the batch. The next page is orders.where(Order.id > last).limit(500), read "
        "within `async with Session() as session:`; deliver it outside of that block.",
    ),
)
