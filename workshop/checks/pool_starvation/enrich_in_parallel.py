"""Exercise 01, task 2: a shelf that holds its connection while five tasks of its own ask for one each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import async_sessionmaker

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Work, evidence
from workshop.checks.lent import Conditions, connections
from workshop.checks.returned import another_answer, is_same
from workshop.checks.rules import USE_OF_POOLS
from workshop.checks.task import Task, Trials
from workshop.shop import Product


@dataclass(kw_only=True)
class Shelves(Work):
    """The shelves that were shown; `another` is the first that is not as the database has it."""

    another: Finding | None


async def show_shelves(
    shelf: Callable[..., Any], conditions: Conditions, *, calls: int, capacity: int, first: int
) -> Shelves:
    """Show so many shelves at once."""
    engine = conditions.engine(capacity)
    shown: dict[int, Any] = {}

    async def show(sessions: Any, number: int) -> None:
        shown[number] = await shelf(sessions, first + 1_000 * number)

    async with evidence(conditions, engine) as noted:
        await storm(partial(show, async_sessionmaker(engine)), calls)
    await engine.dispose()
    right, another = 0, None
    async with engine.connect() as connection:
        for number in range(calls):
            sku = first + 1_000 * number
            products = (
                select(Product.sku, Product.unit_price)
                .where(Product.sku > sku)
                .order_by(Product.sku)
                .limit(5)
            )
            expected = {row.sku: row.unit_price for row in await connection.execute(products)}
            if is_same(shown.get(number), expected):
                right += 1
            elif number in shown and another is None:
                another = another_answer(f"shelf(Session, {sku})", shown[number], expected)
    return Shelves(**vars(noted), done=right, another=another)


def demands(run: Recording, seen: Shelves) -> Iterator[Finding]:
    """Each call returns the prices that were asked for."""
    if seen.another is not None:
        yield seen.another


def prove(trials: Trials[Shelves]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{seen.done} of {run.announced} shelves right with {connections(run)}, 0 deadlocks, 0 timeouts."
        for run, seen in trials
    )


enrich_in_parallel = Task(
    "01",
    "enrich_in_parallel",
    "shelf",
    load=show_shelves,
    trials=(
        {"calls": 60, "capacity": 10, "first": 1_000_000},
        {"calls": 20, "capacity": 1, "first": 870_000},
    ),
    rules=USE_OF_POOLS,
    demands=(demands,),
    proof=prove,
    hints=(
        "gather makes a task of each price_of. How many connections does one shelf have while its five tasks wait?",
        "The session in shelf needs its connection for one query. When does it give it back?",
        "End the session's block before the gather (the list of numbers is all that it needs), "
        "or fetch numbers and prices with one statement.",
    ),
)
