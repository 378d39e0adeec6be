"""The checks of exercise 01: two handlers that hold a connection while they ask for another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import (
    async_sessionmaker,
)

from ormscope.lab import Recording, storm
from workshop.checks.evidence import evidence
from workshop.checks.lent import engine_of, forget_orders, own_households
from workshop.checks.pool_rules import wrong_use_of_pools
from workshop.checks.task import Finding, Task
from workshop.shop import Order, OrderLine, Product

Handler = Callable[..., Any]


# reuse_the_session


async def place_orders(
    place_order: Handler, url: str, *, orders: int, capacity: int, sku: int
) -> dict[str, Any]:
    """Place so many orders at once; how many are in the database as they should be, and what was noted."""
    engine, customers = engine_of(url, capacity), own_households()
    async with evidence(engine) as noted:
        sessions = async_sessionmaker(engine)
        await storm(lambda number: place_order(sessions, customers[number], sku), orders)
    await engine.dispose()
    async with engine.connect() as connection:
        price = await connection.scalar(select(Product.unit_price).where(Product.sku == sku))
        ours = Order.household_id.between(customers[0], customers[-1])
        placed = (await connection.execute(select(Order.household_id).where(ours))).all()
        line = select(OrderLine.order_id, OrderLine.sku, OrderLine.unit_price)
        lines = (await connection.execute(line.join(Order).where(ours))).all()
        await forget_orders(connection, customers)
    return dataclasses.asdict(noted) | {
        "households": len({one.household_id for one in placed}),
        "placed": len(placed),
        "lines": len({one.order_id for one in lines}),
        "right": sum((one.sku, one.unit_price) == (sku, price) for one in lines),
    }


def judge_orders(run: Recording) -> Finding | None:
    """What is wrong with how orders were placed."""
    seen = run.result
    if (finding := wrong_use_of_pools(run, lent=1, done=seen["right"])) is not None:
        return finding
    if run.completed < run.announced:
        return None
    if seen["households"] < run.announced:
        return Finding(
            "success-without-work",
            f"{run.completed} calls ended without an error, and {seen['placed']} orders are in the database.",
        )
    if seen["placed"] > run.announced:
        return Finding("twice", f"{run.announced} calls made {seen['placed']} orders.")
    if seen["lines"] < seen["placed"]:
        return Finding("half-an-order", f"Of {seen['placed']} orders, {seen['lines']} have a line.")
    if seen["right"] < seen["placed"]:
        return Finding(
            "guesses-the-price",
            f"{seen['placed'] - seen['right']} of {seen['placed']} lines have another product or price than the shop.",
        )
    return None


def prove_orders(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.completed} of {run.announced} orders placed with {run.pools[0].capacity} connection"
        f"{'s' * (run.pools[0].capacity != 1)}, 0 deadlocks, 0 timeouts."
        for run in runs
    )


reuse_the_session = Task(
    "01",
    "reuse_the_session",
    "place_order",
    load=place_orders,
    trials=(
        {"orders": 60, "capacity": 10, "sku": 1082185},
        {"orders": 20, "capacity": 1, "sku": 1029743},
    ),
    judge=judge_orders,
    proof=prove_orders,
    hints=(
        "Count the connections that one order has at the line where price_of runs. Which of them could it do without?",
        "price_of opens a session because it is handed the factory. What else could it be handed? "
        "Or could it run before the order's session has taken a connection?",
        "A session takes its connection with its first statement. Hand price_of the session that place_order has, "
        "or ask for the price before the flush and outside of the session's block.",
    ),
)


# enrich_in_parallel


async def show_shelves(
    shelf: Handler, url: str, *, calls: int, capacity: int, first: int
) -> dict[str, Any]:
    """Show so many shelves at once; how many were right, and what was noted."""
    engine = engine_of(url, capacity)
    shown: dict[int, Any] = {}

    async def show(sessions: Any, number: int) -> None:
        shown[number] = await shelf(sessions, first + 1_000 * number)

    async with evidence(engine) as noted:
        await storm(partial(show, async_sessionmaker(engine)), calls)
    await engine.dispose()
    right = 0
    async with engine.connect() as connection:
        for number in range(calls):
            products = (
                select(Product.sku, Product.unit_price)
                .where(Product.sku > first + 1_000 * number)
                .order_by(Product.sku)
                .limit(5)
            )
            rows = await connection.execute(products)
            right += shown.get(number) == {one.sku: one.unit_price for one in rows}
    return dataclasses.asdict(noted) | {"right": right}


def judge_shelves(run: Recording) -> Finding | None:
    """What is wrong with how shelves were shown."""
    seen = run.result
    if (finding := wrong_use_of_pools(run, lent=1, done=seen["right"])) is not None:
        return finding
    if run.completed == run.announced > seen["right"]:
        return Finding(
            "success-without-work",
            f"{run.completed} calls ended without an error, and {seen['right']} returned what was asked for.",
        )
    return None


def prove_shelves(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.result['right']} of {run.announced} shelves right with {run.pools[0].capacity} connection"
        f"{'s' * (run.pools[0].capacity != 1)}, 0 deadlocks, 0 timeouts."
        for run in runs
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
    judge=judge_shelves,
    proof=prove_shelves,
    hints=(
        "gather makes a task of each price_of. How many connections does one shelf have while its five tasks wait?",
        "The session in shelf needs its connection for one query. When does it give it back?",
        "End the session's block before the gather (the list of numbers is all that it needs), "
        "or fetch numbers and prices with one statement.",
    ),
)
