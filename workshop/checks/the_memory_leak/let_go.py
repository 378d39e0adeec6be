"""Exercise 03, task 2: a job that adds up many lines, and keeps them all."""

from __future__ import annotations

import asyncio
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import Any

from sqlalchemy import event, func, select
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_ss_cursor
from sqlalchemy.ext.asyncio import AsyncConnection, async_sessionmaker
from sqlalchemy.orm import Session

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import Conditions
from workshop.checks.memory import (
    SAMPLED_SECONDS,
    MemoryBudget,
    collects_garbage,
    expunge_all_in_a_stream,
)
from workshop.checks.rules import leaves_it_checked_out
from workshop.checks.task import Task, Trials
from workshop.shop import Base, Sale

BUDGET = MemoryBudget(
    container=100,  # the function as given takes 70
    objects=5_000,
    mebibytes=14,
    growth=3.5,  # right answers stay below 3, and two lists of bare decimals take 4.5
)


@dataclass(kw_only=True)
class Sums:
    """What one call returned, beside the truth: so many `lines` in so many `stores`.

    `right` is how many of them have their sum, `floats` how many sums are floats, and `more` how many keys are no
    store.
    """

    returned: str
    lines: int
    stores: int
    is_mapping: bool
    right: int = 0
    floats: int = 0
    more: int = 0


@dataclass(kw_only=True)
class Job(Evidence):
    """What the calls returned, and the most objects at once that were `detached`, or `fetched` of a stream."""

    detached: int
    fetched: int
    sums: list[Sums]


async def add_up(
    revenue_by_store: Callable[..., Any], conditions: Conditions, *, days: Sequence[datetime]
) -> Job:
    """Let the job run since each of these days, the last of them with most lines."""
    engine = conditions.engine(capacity=5)
    returned: dict[datetime, Any] = {}
    most: Counter[str] = Counter()
    detached: weakref.WeakSet[Base] = weakref.WeakSet()
    fetch_all: Callable[[Any], Any] = AsyncAdapt_asyncpg_ss_cursor.fetchall

    def note_detached(session: Session, instance: Base) -> None:
        detached.add(instance)
        most["detached"] = max(most["detached"], len(detached))

    def note_fetched(cursor: Any) -> Any:
        rows = fetch_all(cursor)
        most["fetched"] = max(most["fetched"], len(rows))
        return rows

    async def work(since: datetime, number: int) -> None:
        returned[since] = await revenue_by_store(async_sessionmaker(engine), since)

    event.listen(Session, "persistent_to_detached", note_detached)
    # A server-side cursor that is read in one piece: SQLAlchemy has no event for it.
    AsyncAdapt_asyncpg_ss_cursor.fetchall = note_fetched  # type: ignore[method-assign]
    async with evidence(conditions, engine) as noted:
        for since in days:
            await storm(partial(work, since), 1)
            await asyncio.sleep(SAMPLED_SECONDS)
    event.remove(Session, "persistent_to_detached", note_detached)
    await engine.dispose()
    async with engine.connect() as connection:
        sums = [await compare(connection, since, returned.get(since)) for since in days]
    return Job(**vars(noted), detached=most["detached"], fetched=most["fetched"], sums=sums)


async def compare(connection: AsyncConnection, since: datetime, sums: Any) -> Sums:
    """Compare the sums that the job returned with those of the database."""
    total = select(Sale.store_id, func.sum(Sale.sales_value), func.count())
    found = await connection.execute(total.where(Sale.sold_at >= since).group_by(Sale.store_id))
    stores = found.all()
    compared = Sums(
        returned=type(sums).__name__,
        lines=sum(lines for _, _, lines in stores),
        stores=len(stores),
        is_mapping=isinstance(sums, Mapping),
    )
    if isinstance(sums, Mapping):
        exact = {store: value for store, value in sums.items() if isinstance(value, Decimal | int)}
        compared.right = sum(exact.get(store) == total for store, total, _ in stores)
        compared.floats = sum(isinstance(value, float) for value in sums.values())
        compared.more = len(sums.keys() - {store for store, _, _ in stores})
    return compared


def reads_a_stream_in_one_piece(run: Recording, seen: Job) -> Iterator[Finding]:
    """Too much memory, for a stream that was not read in batches."""
    if BUDGET.exceeded(run) and seen.fetched > BUDGET.objects:
        yield Finding(
            "stream-without-yield-per",
            f"A stream was read in one piece: more than {BUDGET.objects:,} rows at once.",
        )


def detached_is_freed(run: Recording, seen: Job) -> Iterator[Finding]:
    """Too much memory, for objects that no session has any more."""
    if BUDGET.exceeded(run) and seen.detached > BUDGET.objects:
        yield Finding(
            "detached-is-freed",
            f"More than {BUDGET.objects:,} objects belonged to no session any more, and were still alive.",
        )


def demands(run: Recording, seen: Job) -> Iterator[Finding]:
    """Each call returns a dictionary with the exact sum of each store."""
    for sums in seen.sums:
        if not sums.is_mapping:
            yield Finding(
                "returns-something-else", f"Your function returned {sums.returned}, not a dict."
            )
        if sums.floats:
            yield Finding("floats-lose-cents", f"{sums.floats} of the sums are floats.")
        if sums.right < sums.stores or sums.more:
            more = f", and there are {sums.more} keys more" if sums.more else ""
            yield Finding(
                "returns-something-else",
                f"{sums.right} of {sums.stores} stores have the right sum{more}.",
            )


def prove(trials: Trials[Job]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{few.lines:,} and {many.lines:,} lines, all {few.stores} and {many.stores} sums right;"
        f" never more than {BUDGET.objects:,} objects alive, and no more memory for more lines."
        for few, many in (seen.sums for _, seen in trials)
    )


let_go = Task(
    "03",
    "let_go",
    "revenue_by_store",
    load=add_up,
    trials=(
        {"days": (datetime(2017, 2, 25), datetime(2017, 2, 17))},
        {"days": (datetime(2017, 2, 26), datetime(2017, 2, 19))},
    ),
    rules=(
        collects_garbage,
        expunge_all_in_a_stream,
        reads_a_stream_in_one_piece,
        BUDGET.loads_everything,
        detached_is_freed,
        BUDGET.keeps_everything,
    ),
    demands=(leaves_it_checked_out, demands),
    proof=prove,
    curves=("memory", "objects"),
    memory=BUDGET,
    hints=(
        "Two things keep every line: which are they? And what of a line is needed once its value has been added?",
        "stream_scalars() hands over batches, if somebody says how large: "
        "execution_options(yield_per=1000). A batch whose sums are taken may go; nothing has to be called for that.",
        "Go through `async for page in (await session.stream_scalars(statement)).partitions()`, add each line's value "
        "to a dictionary of sums that begin at Decimal(0), and keep no line. Or let the database add: "
        "select(Sale.store_id, func.sum(Sale.sales_value)) with group_by(Sale.store_id).",
    ),
)
