"""Exercise 05, task 2: sums of many lines, in which even an asynchronous driver lets everybody wait."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sqlalchemy import event, func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import Conditions
from workshop.checks.rules import leaves_it_checked_out, sync_engine_in_async_code
from workshop.checks.task import Task, Trials
from workshop.checks.the_blocked_loop.pulse import pulse
from workshop.shop import Sale

# Of the time that the code as it was given keeps the loop; the exercise asks for a fifth.
_OVERLOOKED = 0.5
_LINES_PER_ROUND_TRIP = 10
_MANY_ROUND_TRIPS = 500  # in a call that did not end


@dataclass
class Statements:
    """How the database was asked: how many round trips it took, and whether the rows were to come in batches."""

    round_trips: int = 0
    streamed: bool = False
    in_batches: bool = False


@dataclass(kw_only=True)
class Sums(Evidence):
    """What came of so many `lines` of so many `stores`.

    `kept` is for how long the loop was kept in one go, as a part of how long the code as given keeps it. `right`
    says whether all sums are exact, and `nearly` whether they are but for what a float loses.
    """

    lines: int
    stores: int
    kept: float
    asked: Statements
    right: bool
    nearly: bool


async def sum_stores(
    revenue: Callable[..., Any], conditions: Conditions, *, first: int, lines: int
) -> Sums:
    """Sum up so many sales lines for each store."""
    engine, last = conditions.engine(5), first + lines - 1
    sessions, found, asked = async_sessionmaker(engine), list[Any](), Statements()

    async def ask(number: int) -> None:
        found.append(await revenue(sessions, first, last))

    def note(*about: Any) -> None:
        options = about[4].execution_options
        batch = options.get("yield_per")
        asked.round_trips += 1 if batch is None else max(lines // batch, 1)
        asked.streamed |= bool(options.get("stream_results"))
        asked.in_batches |= batch is not None

    async with sessions() as session:
        sums = select(Sale.store_id, func.sum(Sale.sales_value)).group_by(Sale.store_id)
        rows = await session.execute(sums.where(Sale.id.between(first, last)))
        right: dict[int, Decimal] = {row.store_id: row.sum for row in rows}
    gc.collect()
    gc.freeze()  # to look through all modules again and again is not the learner's work
    # On a loop of its own, so that the picture does not show it.
    as_given = await asyncio.to_thread(asyncio.run, _kept_by_all_at_once(conditions, first, last))
    event.listen(engine.sync_engine, "before_cursor_execute", note)
    async with evidence(conditions, engine) as noted:
        with pulse() as measured:
            await storm(ask, 1)
    await engine.dispose()
    answer = found[0] if found else None
    return Sums(
        **vars(noted),
        lines=lines,
        stores=len(right),
        kept=measured.longest_work / as_given,
        asked=asked,
        right=answer == right and not any(isinstance(value, float) for value in answer.values()),
        nearly=_nearly(answer, right),
    )


async def _kept_by_all_at_once(conditions: Conditions, first: int, last: int) -> float:
    """How long the given code keeps a loop, in one go, to load these lines, in seconds of its thread."""
    engine = conditions.engine(1, "as given")
    async with AsyncSession(engine) as session:
        await session.connection()
        worked = []
        for _ in range(2):  # the machine may slow down one of them
            with pulse() as measured:
                (await session.scalars(select(Sale).where(Sale.id.between(first, last)))).all()
            worked.append(measured.longest_work)
    await engine.dispose()
    return min(worked)


def _nearly(answer: Any, right: dict[int, Decimal]) -> bool:
    """Whether an answer has the right stores and sums, but for what a float loses."""
    try:
        return answer.keys() == right.keys() and all(
            abs(float(answer[store]) - float(right[store])) < 0.01 for store in right
        )
    except (AttributeError, TypeError, ValueError):
        return False


def keeps_the_loop(run: Recording, seen: Sums) -> Iterator[Finding]:
    """Too many lines in one go."""
    if seen.kept <= _OVERLOOKED:
        return
    stall = "Your code kept the loop about as long, in one go, as the code that was given"
    if seen.asked.in_batches:
        yield Finding("one-huge-batch", f"{stall}, although it asked for batches.")
    if seen.asked.streamed:
        yield Finding("stream-without-yield-per", f"{stall}, although it asked to stream.")
    yield Finding("the-driver-awaits-so-all-is-well", f"{stall}.")


def batch_of_one(run: Recording, seen: Sums) -> Iterator[Finding]:
    """Too few lines in one go."""
    most = seen.lines // _LINES_PER_ROUND_TRIP if seen.ended else _MANY_ROUND_TRIPS
    if seen.asked.round_trips > most:
        yield Finding(
            "batch-of-one",
            f"The loop was free, and your code went to the server far too often for {seen.lines:,} lines.",
        )


def demands(run: Recording, seen: Sums) -> Iterator[Finding]:
    """Each store's sum, to the cent."""
    if not seen.right and seen.nearly:
        yield Finding("floats-lose-cents", "The sums are floats, or no longer exact.")
    if not seen.right:
        yield Finding(
            "part-of-the-rows",
            f"The sums of {seen.stores} stores were asked for, and some are missing or differ.",
        )


def prove(trials: Trials[Sums]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{seen.lines:,} lines, the sums of {seen.stores} stores exact, and the loop was kept for"
        " less than half as long, in one go, as by the code that was given."
        for _, seen in trials
    )


sum_without_a_stall = Task(
    "05",
    "sum_without_a_stall",
    "revenue",
    load=sum_stores,
    trials=({"first": 1, "lines": 14_000}, {"first": 150_001, "lines": 12_000}),
    rules=(sync_engine_in_async_code, keeps_the_loop, batch_of_one),
    demands=(leaves_it_checked_out, demands),
    proof=prove,
    curves=("loop lag",),
    hints=(
        "The driver awaits while the rows come. Which line makes objects of them, and how many in one go?",
        "Between two batches the loop has its turn. Or does Python need the lines at all, to know their sum?",
        "Either stream_scalars with execution_options(yield_per=1_000) and `async for batch in sales.partitions()`, or "
        "select(Sale.store_id, func.sum(Sale.sales_value)) with group_by(Sale.store_id).",
    ),
)
