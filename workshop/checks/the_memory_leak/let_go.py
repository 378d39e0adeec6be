"""Exercise 03, task 2: a job that adds up many lines, and keeps them all."""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import Any

from sqlalchemy import event, func, select
from sqlalchemy.ext.asyncio import AsyncConnection, async_sessionmaker
from sqlalchemy.orm import Session

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import evidence
from workshop.checks.lent import Conditions
from workshop.checks.memory import (
    LARGEST_BATCH,
    SAMPLED_SECONDS,
    LookedAt,
    MemoryBudget,
    Read,
    added_by_the_database,
    collects_garbage,
    cursor_without_transaction,
    expunge_all_in_a_stream,
    pages_without_order,
    reading,
    reads_a_stream_in_one_piece,
    yield_per_without_a_stream,
)
from workshop.checks.returned import another_answer
from workshop.checks.rules import leaves_it_checked_out
from workshop.checks.task import Task
from workshop.shop import Base, Sale

BUDGET = MemoryBudget(
    container=100,  # the function as given takes 70
    objects=LARGEST_BATCH,
    mebibytes=100,
    growth=3.5,  # right answers stay below 3
)
# More small objects of Python than this are kept of 14,000 lines more. Both calls have more than two batches of the
# largest size, so that what a right answer has in memory is the same.
_KEPT = 8_000


@dataclass(kw_only=True)
class Sums:
    """What one call returned, beside the truth: so many `lines` in so many `stores`.

    `other` says what it returned in place of a dictionary with numbers; it is empty where it did.

    `right` is how many of them have their sum, `floats` how many sums are floats, and `more` how many keys are no
    store. `blocks` is how many small objects of Python there were during the call, at most.
    """

    other: str
    lines: int
    stores: int
    blocks: int
    right: int = 0
    floats: int = 0
    more: int = 0


@dataclass(kw_only=True)
class Job(Read):
    """What the calls returned, and the most objects at once that were `detached`."""

    detached: int
    sums: list[Sums]


async def add_up(
    revenue_by_store: Callable[..., Any], conditions: Conditions, *, days: Sequence[datetime]
) -> Job:
    """Let the job run since each of these days, the last of them with most lines."""
    engine = conditions.engine(capacity=5)
    returned: dict[datetime, Any] = {}
    most: Counter[str | datetime] = Counter()
    detached: weakref.WeakSet[Base] = weakref.WeakSet()

    def note_detached(session: Session, instance: Base) -> None:
        detached.add(instance)
        most["detached"] = max(most["detached"], len(detached))

    async def work(since: datetime, number: int) -> None:
        def note_blocks() -> None:
            most[since] = max(most[since], sys.getallocatedblocks())

        job = revenue_by_store(async_sessionmaker(engine), since)
        returned[since] = await LookedAt(job, note_blocks)

    event.listen(Session, "persistent_to_detached", note_detached)
    with reading(revenue_by_store, engine) as noted_of_reading:
        async with evidence(conditions, engine) as noted:
            for since in days:
                await storm(partial(work, since), 1)
                # What the first call alone brings in, such as a module, is nobody's fault.
                most[since] = max(most[since], sys.getallocatedblocks())
                await asyncio.sleep(SAMPLED_SECONDS)
    event.remove(Session, "persistent_to_detached", note_detached)
    await engine.dispose()
    async with engine.connect() as connection:
        sums = [
            await compare(connection, since, returned.get(since), blocks=most[since])
            for since in days
        ]
    return Job(
        **vars(noted),
        **vars(noted_of_reading),
        detached=most["detached"],
        sums=sums,
    )


async def compare(connection: AsyncConnection, since: datetime, sums: Any, *, blocks: int) -> Sums:
    """Compare the sums that the job returned with those of the database."""
    total = select(Sale.store_id, func.sum(Sale.sales_value), func.count())
    found = await connection.execute(total.where(Sale.sold_at >= since).group_by(Sale.store_id))
    stores = found.all()
    compared = Sums(
        other=_other(sums, {store: total for store, total, _ in stores}),
        lines=sum(lines for _, _, lines in stores),
        stores=len(stores),
        blocks=blocks,
    )
    if isinstance(sums, Mapping):
        exact = {store: value for store, value in sums.items() if isinstance(value, Decimal | int)}
        compared.right = sum(exact.get(store) == total for store, total, _ in stores)
        compared.floats = sum(isinstance(value, float) for value in sums.values())
        compared.more = len(sums.keys() - {store for store, _, _ in stores})
    return compared


def _other(sums: Any, expected: dict[int, Decimal]) -> str:
    """What a call returned in place of numbers by store, in words."""
    values = sums.values() if isinstance(sums, Mapping) else [sums]
    if all(isinstance(value, Decimal | int | float) for value in values):
        return ""
    return another_answer("revenue_by_store(Session, since)", sums, expected).evidence


def detached_is_freed(run: Recording, seen: Job) -> Iterator[Finding]:
    """Too much memory, for objects that no session has any more."""
    if seen.detached > BUDGET.objects:
        yield Finding(
            "detached-is-freed",
            f"More than {BUDGET.objects:,} objects belonged to no session any more, and were still alive.",
        )


def keeps_something_of_each_line(run: Recording, seen: Job) -> Iterator[Finding]:
    """Few objects of the shop's, and something else for each line."""
    few, many = seen.sums
    if seen.queried > BUDGET.objects:
        yield Finding(
            "keeps-everything-in-another-shape",
            f"A query brought {seen.queried:,} rows at once: no Sale objects, but just as many.",
        )
    if many.lines - few.lines > _KEPT and many.blocks - few.blocks > _KEPT and few.blocks:
        yield Finding(
            "keeps-everything-in-another-shape",
            f"While your code added up {many.lines - few.lines:,} lines more, there were"
            f" {many.blocks - few.blocks:,} small objects more in Python's memory.",
        )


def added_too_slowly(run: Recording, seen: Job) -> Iterator[Finding]:
    """The same of code that did not end in time, as with a query for each store."""
    if not seen.ended:
        yield from added_by_the_database(run, seen)


def demands(run: Recording, seen: Job) -> Iterator[Finding]:
    """Each call returns a dictionary with the exact sum of each store."""
    for sums in seen.sums:
        if sums.other:
            yield Finding("not-what-was-asked", sums.other)
        if sums.floats:
            yield Finding("floats-lose-cents", f"{sums.floats} of the sums are floats.")
        if sums.right < sums.stores or sums.more:
            more = f", and there are {sums.more} keys more" if sums.more else ""
            yield Finding(
                "returns-something-else",
                f"{sums.right} of {sums.stores} stores have the right sum{more}.",
            )
    yield from added_by_the_database(run, seen)


def prove(run: Recording, seen: Job) -> str:
    """What a run of a right answer has shown."""
    few, many = seen.sums
    return (
        f"{few.lines:,} and {many.lines:,} lines, all {few.stores} and {many.stores} sums right;"
        f" never more than {BUDGET.objects:,} objects alive, and no more memory for more lines."
    )


let_go = Task(
    "03",
    "let_go",
    "revenue_by_store",
    load=add_up,
    # The moments of receipts: their lines have been sold since then, too.
    trials=(
        {"days": (datetime(2017, 2, 25, 0, 10, 28), datetime(2017, 2, 21, 0, 17, 34))},
        {"days": (datetime(2017, 2, 26, 23, 1, 7), datetime(2017, 2, 26, 18, 6, 14))},
    ),
    rules=(
        collects_garbage,
        expunge_all_in_a_stream,
        cursor_without_transaction,
        yield_per_without_a_stream,
        reads_a_stream_in_one_piece,
        BUDGET.loads_everything,
        detached_is_freed,
        keeps_something_of_each_line,
        BUDGET.keeps_everything,
        added_too_slowly,
    ),
    demands=(leaves_it_checked_out, pages_without_order, demands),
    proof=prove,
    curves=("memory", "objects"),
    memory=BUDGET,
    hints=(
        "Two things keep every line: which are they? And what of a line is needed once its value has been added?",
        "stream_scalars() hands over batches, if somebody says how large: "
        "execution_options(yield_per=1000). A batch whose sums are taken may go; nothing has to be called for that.",
        "Go through `async for page in (await session.stream_scalars(statement)).partitions()`, add each line's value "
        "to a dictionary of sums that begin at Decimal(0), and keep no line.",
    ),
)
