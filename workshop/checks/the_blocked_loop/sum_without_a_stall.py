"""Exercise 05, task 2: sums of many lines, in which even an asynchronous driver lets everybody wait."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from weakref import WeakSet

from sqlalchemy import event, func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import THE_CHECK, evidence
from workshop.checks.lent import Conditions
from workshop.checks.memory import (
    Read,
    added_by_the_database,
    cursor_without_transaction,
    expunge_all_in_a_stream,
    pages_without_order,
    reading,
)
from workshop.checks.returned import another_answer, is_same
from workshop.checks.rules import leaves_it_checked_out, sync_engine_in_async_code
from workshop.checks.task import Task
from workshop.checks.the_blocked_loop.pulse import pulse
from workshop.shop import Sale

_KEPT = 0.25  # of the time that the code as it was given keeps the loop; the exercise says so
_TRIES = 4  # the machine may slow down some of them
_TRIES_AS_GIVEN = 3
_LINES_PER_ROUND_TRIP = 10
_IN_ONE_GO = 2_000  # lines that may become objects or rows
_KEPT_ALIVE = 0.6  # of the lines; a few batches at once are less
_LOOK_SECONDS = 0.003


class TooOftenError(Exception):
    """The learner's code asks the server again and again, and would do so for long."""


@dataclass
class Statements:
    """How the database was asked: how many round trips it took, and how the rows were to come.

    `largest` is how many rows there were to be in a batch, None where no batches were asked for; `collected` says
    whether rows that were to come in batches were handed on all at once.
    """

    round_trips: int = 0
    largest: int | None = None
    streamed: bool = False
    collected: bool = False

    def note(self, options: Mapping[str, Any], lines: int) -> None:
        """A statement that is sent, to read so many lines."""
        batch = options.get("yield_per")
        self.round_trips += 1 if batch is None else max(lines // batch, 1)
        self.streamed |= bool(options.get("stream_results"))
        if batch is not None:
            self.largest = max(self.largest or 0, batch)
            self.collected |= bool(options.get("prebuffer_rows"))


@dataclass(kw_only=True)
class Sums(Read):
    """What came of so many `lines` of so many `stores`.

    `kept` is for how long the loop was kept in one go, as a part of how long the code as given keeps it, and `alive`
    how many lines were there as objects at once. `right` says whether all sums are exact, and `nearly` whether they
    are but for what a float loses; `another` says what came back otherwise, and `left_out` which lines are not in it.
    """

    lines: int
    stores: int
    kept: float
    alive: int
    asked: Statements
    right: bool
    nearly: bool
    another: Finding | None
    left_out: str


async def sum_stores(
    revenue: Callable[..., Any], conditions: Conditions, *, first: int, lines: int
) -> Sums:
    """Sum up so many sales lines for each store."""
    engine, last = conditions.engine(5), first + lines - 1
    sessions, found, asked = async_sessionmaker(engine), list[Any](), Statements()

    async def ask(number: int) -> None:
        found.append(await revenue(sessions, first, last))

    def note(*about: Any) -> None:
        if not found:
            asked.note(about[4].execution_options, lines)
        if asked.round_trips > lines // _LINES_PER_ROUND_TRIP:
            raise TooOftenError("more round trips than the exercise allows")

    async with sessions() as session:
        right = await _sums(session, first, last)
        without = {
            f"line {first}": await _sums(session, first + 1, last),
            f"line {last}": await _sums(session, first, last - 1),
            f"lines {first} and {last}": await _sums(session, first + 1, last - 1),
        }
    gc.collect()
    gc.freeze()  # to look through all modules again and again is not the learner's work
    # On a loop of its own, so that the picture does not show it.
    as_given = await asyncio.to_thread(asyncio.run, _kept_as_given(conditions, first, last))
    event.listen(engine.sync_engine, "before_cursor_execute", note)
    kept: list[float] = []
    with _objects_alive() as alive, reading(revenue, engine) as noted_of_reading:
        async with evidence(conditions, engine) as noted:
            while not kept or (
                len(found) == len(kept) < _TRIES
                and kept[-1] > _KEPT
                and noted_of_reading.in_one_go <= _IN_ONE_GO
            ):
                with pulse() as measured:
                    await storm(ask, 1)
                kept.append(measured.longest_work / as_given)
    await engine.dispose()
    answer = found[0] if found else None
    is_right = is_same(answer, right)
    return Sums(
        **vars(noted),
        **vars(noted_of_reading),
        lines=lines,
        stores=len(right),
        kept=min(kept, default=0.0),
        alive=max(alive),
        asked=asked,
        right=is_right,
        nearly=_nearly(answer, right),
        another=None
        if is_right
        else another_answer(f"revenue(Session, {first}, {last})", answer, right),
        left_out=next((name for name, sums in without.items() if is_same(answer, sums)), ""),
    )


async def _sums(session: AsyncSession, first: int, last: int) -> dict[int, Decimal]:
    sums = select(Sale.store_id, func.sum(Sale.sales_value)).group_by(Sale.store_id)
    rows = await session.execute(sums.where(Sale.id.between(first, last)))
    return {row.store_id: row.sum for row in rows}


async def _kept_as_given(conditions: Conditions, first: int, last: int) -> float:
    """How long the given code keeps a loop, in one go, in seconds of its thread."""
    engine = conditions.engine(1, "as given")
    async with AsyncSession(engine) as session:
        await session.connection()
        worked = []
        for _ in range(_TRIES_AS_GIVEN):
            sums: dict[int, Decimal | int] = {}
            with pulse() as measured:
                wanted = select(Sale).where(Sale.id.between(first, last))
                for sale in (await session.scalars(wanted)).all():
                    sums[sale.store_id] = sums.get(sale.store_id, 0) + sale.sales_value
            worked.append(measured.longest_work)
    await engine.dispose()
    return min(worked)


@contextmanager
def _objects_alive() -> Iterator[list[int]]:
    """How many objects the sessions of the process knew at once, look by look."""
    sessions, seen = WeakSet[Session](), [0]

    def note(session: Session, *about: Any) -> None:
        sessions.add(session)

    async def look() -> None:
        while True:
            seen.append(sum(len(session.identity_map) for session in list(sessions)))
            await asyncio.sleep(_LOOK_SECONDS)

    event.listen(Session, "after_begin", note)
    task = asyncio.create_task(look(), name=THE_CHECK)
    try:
        yield seen
    finally:
        task.cancel()
        event.remove(Session, "after_begin", note)


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
    asked = seen.asked
    collects = seen.alive > _KEPT_ALIVE * seen.lines and not asked.collected
    if collects and asked.largest is not None and asked.largest <= _IN_ONE_GO:
        yield Finding(
            "collects-the-batches",
            f"Your code asked for {asked.largest:,} lines at a time, and most of the {seen.lines:,} lines were there "
            "at once.",
        )
    if seen.in_one_go > _IN_ONE_GO:
        stall = f"SQLAlchemy made {seen.in_one_go:,} lines into objects or rows in one go"
    elif seen.kept > _KEPT:
        stall = "Your code kept the loop, in one go, for more than a quarter of the time that the given code does"
    else:
        return
    if asked.collected:
        yield Finding(
            "yield-per-without-a-stream",
            f"{stall}. It asked for yield_per={asked.largest}, and did not stream.",
        )
    if asked.largest is not None and asked.largest > _IN_ONE_GO:
        yield Finding("one-huge-batch", f"{stall}, with {asked.largest:,} lines in a batch.")
    if asked.streamed and asked.largest is None:
        yield Finding("stream-without-yield-per", f"{stall}, although it asked to stream.")
    yield Finding("the-driver-awaits-so-all-is-well", f"{stall}.")


def asks_too_often(run: Recording, seen: Sums) -> Iterator[Finding]:
    """Too few lines in one go."""
    allowed = seen.lines // _LINES_PER_ROUND_TRIP
    if seen.asked.round_trips > allowed:
        yield Finding(
            "batch-of-one",
            f"For {seen.lines:,} lines your code went to the server more than {allowed:,} times.",
        )


def demands(run: Recording, seen: Sums) -> Iterator[Finding]:
    """Each store's sum, to the cent."""
    if not seen.right and seen.nearly and not seen.left_out:
        yield Finding("floats-lose-cents", "The sums are floats, or no longer exact.")
    if seen.left_out:
        yield Finding(
            "not-what-was-asked",
            f"The sums are right but for {seen.left_out}: `first` to `last` was asked for, both included.",
        )
    if seen.another is not None:
        yield seen.another


def prove(run: Recording, seen: Sums) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{seen.lines:,} lines, the sums of {seen.stores} stores exact, and the loop was kept, in one go, for less"
        " than a quarter of the time that the given code keeps it."
    )


sum_without_a_stall = Task(
    "05",
    "sum_without_a_stall",
    "revenue",
    load=sum_stores,
    trials=({"first": 1, "lines": 14_000}, {"first": 150_001, "lines": 12_000}),
    rules=(
        sync_engine_in_async_code,
        cursor_without_transaction,
        expunge_all_in_a_stream,
        asks_too_often,
        keeps_the_loop,
    ),
    demands=(leaves_it_checked_out, demands, pages_without_order, added_by_the_database),
    proof=prove,
    curves=("loop lag",),
    hints=(
        "The driver awaits while the rows come. Which line makes objects of them, and how many in one go?",
        "Between two batches the loop has its turn. Which method of the session hands over batches, and who says how "
        "large they are?",
        "Give the statement execution_options(yield_per=1_000), await session.stream_scalars(…), and go through "
        "`async for batch in sales.partitions()`: add up each batch before the next comes.",
    ),
)
