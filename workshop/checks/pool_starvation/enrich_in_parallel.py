"""Exercise 01, task 2: a shelf that holds its connection while five tasks of its own ask for one each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import evidence
from workshop.checks.lent import Conditions, connections
from workshop.checks.nesting import ONE_AT_A_TIME, Nested, Nesting
from workshop.checks.returned import another_answer, is_same
from workshop.checks.rules import ENGINES
from workshop.checks.task import Task
from workshop.checks.unpooled import backends, connects_without_a_limit
from workshop.shop import Product

_END_OF_THE_RANGE = 18_292_004  # six products are behind it
# It hides the shop's table from its connection; its rows lie in no order, so that who asks for none gets others.
_UNSORTED = """CREATE TEMPORARY TABLE products AS
    SELECT * FROM products WHERE sku BETWEEN {first} AND {last} OR sku > {end} ORDER BY md5(sku::text)"""


@dataclass(kw_only=True)
class Shelves(Nested):
    """The shelves that were shown; `another` is the first that is not as the database has it."""

    another: Finding | None


async def show_shelves(
    shelf: Callable[..., Any],
    conditions: Conditions,
    *,
    calls: int,
    capacity: int,
    first: int,
    to_the_end: bool = False,
) -> Shelves:
    """Show so many shelves at once; with `to_the_end` the last two are, and rows lie in no order."""
    engine = conditions.engine(capacity)
    skus = [first + 1_000 * number for number in range(calls)]
    if to_the_end:
        unsorted = _UNSORTED.format(first=first, last=skus[-1], end=_END_OF_THE_RANGE)
        event.listen(engine.sync_engine, "connect", partial(_run_first, unsorted))
        skus[-2:] = _END_OF_THE_RANGE + 500, _END_OF_THE_RANGE + 1_000_000
    shown: dict[int, Any] = {}

    async def show(sessions: Any, number: int) -> None:
        shown[number] = await shelf(sessions, skus[number])

    nesting = Nesting(engine)
    async with backends(conditions) as server, evidence(conditions, engine) as noted:
        await storm(partial(show, async_sessionmaker(engine)), calls)
    await engine.dispose()
    right, another = 0, None
    async with engine.connect() as connection:
        for number, sku in enumerate(skus):
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
    return Shelves(**vars(noted), **nesting.noted(), backends=server, done=right, another=another)


def _run_first(statement: str, connection: Any, entry: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute(statement)
    cursor.close()
    connection.commit()


def demands(run: Recording, seen: Shelves) -> Iterator[Finding]:
    """Each call returns the prices that were asked for."""
    if seen.another is not None:
        yield seen.another


def prove(run: Recording, seen: Shelves) -> str:
    """What a run of a right answer has shown."""
    return f"{seen.done} of {run.announced} shelves right with {connections(run)}, 0 deadlocks, 0 timeouts."


enrich_in_parallel = Task(
    "01",
    "enrich_in_parallel",
    "shelf",
    load=show_shelves,
    trials=(
        {"calls": 30, "capacity": 10, "first": 1_000_000},
        {"calls": 12, "capacity": 1, "first": 870_000, "to_the_end": True},
    ),
    rules=(*ENGINES, connects_without_a_limit, *ONE_AT_A_TIME),
    demands=(demands,),
    proof=prove,
    hints=(
        "gather makes a task of each price_of. How many connections does one shelf have while its five tasks wait?",
        "The session in shelf needs its connection for one query. When does it give it back?",
        "End the session's block before the gather (the list of numbers is all that it needs), "
        "or fetch numbers and prices with one statement.",
    ),
    load_seconds=5.0,
)
