"""Exercise 11, task 1: the order of exercise 01 in Tortoise ORM, which asks past its own transaction."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg

from ormscope.lab import Recording, storm
from ormscope.stacks import is_sleeping, sleeping_frames
from workshop import stacks
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import THE_CHECK, Evidence, evidence, look_often
from workshop.checks.lent import Conditions, own_households
from workshop.checks.rules import fire_and_forget, sleeps
from workshop.checks.task import Task
from workshop.checks.unpooled import of_the_check

_NO_PRODUCT = 1
_ASYNCPGS_POOL = os.path.join(os.path.dirname(asyncpg.__file__), "pool.py")
_ORDERS = """
    SELECT household_id, array_agg(order_lines.sku) AS skus, array_agg(order_lines.unit_price) AS prices
    FROM orders LEFT JOIN order_lines ON order_lines.order_id = orders.id
    WHERE household_id = ANY ($1::int[]) GROUP BY orders.id
"""


@dataclass(kw_only=True)
class Orders(Evidence):
    """The orders of a storm, as they are in the database.

    `placed` orders of `households` customers have a good line `done` times, and `bare` of them have none. Of the
    `unlucky`, who wanted a product that does not exist, so many were told, as `refused`, and left so many orders, as
    `halves`. `most` is how many connections were out at most, of `capacity`; `stuck` the most tasks that waited for
    one when all were out.
    """

    capacity: int
    households: int = 0
    placed: int = 0
    bare: int = 0
    done: int = 0
    unlucky: int
    refused: int
    halves: int = 0
    most: int = 0
    stuck: int = 0


async def place_orders(
    place_order: Callable[..., Any],
    conditions: Conditions,
    *,
    orders: int,
    unlucky: int,
    capacity: int,
    sku: int,
) -> Orders:
    """Place so many orders at once, `unlucky` of them for a product that does not exist."""
    from tortoise.connection import get_connections
    from tortoise.exceptions import DoesNotExist

    customers, refused = own_households()[:orders], 0

    async def place(number: int) -> None:
        nonlocal refused
        if number >= unlucky:
            await place_order(database, customers[number], sku)
            return
        try:
            await place_order(database, customers[number], _NO_PRODUCT)
        except DoesNotExist:
            refused += 1

    async with stacks.tortoise(conditions.url, capacity), of_the_check(conditions, 1) as others:
        database = get_connections().get("default")
        await database.execute_query("SELECT 1")  # opens its pool
        looked = Orders(capacity=capacity, unlucky=unlucky, refused=0)
        looking = asyncio.create_task(
            look_often(partial(_look, database._pool, looked)), name=THE_CHECK
        )
        async with evidence(conditions) as noted:
            await storm(place, orders)
        looking.cancel()
        price = await others.fetchval("SELECT unit_price FROM products WHERE sku = $1", sku)
        found = await others.fetch(_ORDERS, [*customers])
        await _forget(others, [*customers])
    seen = Orders(
        **vars(noted),
        capacity=capacity,
        unlucky=unlucky,
        refused=refused,
        most=looked.most,
        stuck=looked.stuck,
    )
    lucky = [row for row in found if row["household_id"] in customers[unlucky:]]
    seen.halves = len(found) - len(lucky)
    seen.placed, seen.households = len(lucky), len({row["household_id"] for row in lucky})
    seen.bare = sum(row["skus"] == [None] for row in lucky)
    seen.done = sum((row["skus"], row["prices"]) == ([sku], [price]) for row in lucky)
    return seen


def _look(pool: asyncpg.Pool, seen: Orders) -> None:
    out = pool.get_size() - pool.get_idle_size()
    seen.most = max(seen.most, out)
    waiting = [
        task
        for task in asyncio.all_tasks()
        if is_sleeping(task)
        and any(frame.f_code.co_filename == _ASYNCPGS_POOL for frame in sleeping_frames(task))
    ]
    if out == seen.capacity:
        seen.stuck = max(seen.stuck, len(waiting))


async def _forget(others: asyncpg.Pool, customers: list[int]) -> None:
    ours = "household_id = ANY ($1::int[])"
    lines = f"DELETE FROM order_lines USING orders WHERE order_id = orders.id AND {ours}"
    await others.execute(lines, customers)
    await others.execute(f"DELETE FROM orders WHERE {ours}", customers)


def asks_past_the_transaction(run: Recording, seen: Orders) -> Iterator[Finding]:
    """All connections are out, and whoever has one waits for another."""
    if not seen.ended and seen.stuck > run.announced - seen.capacity:
        where = "; ".join(place for place, _ in seen.standing.most_common(2))
        yield Finding(
            "asks-past-its-transaction",
            f"All {seen.capacity} connections were out, {seen.stuck} tasks waited for one, and nothing came back."
            f" Your code stood at {where}.",
        )


def one_at_a_time(run: Recording, seen: Orders) -> Iterator[Finding]:
    """A lock before work that could go on side by side."""
    if seen.ended and seen.queuers > run.announced // 2 and seen.most <= seen.capacity // 4:
        yield Finding(
            "one-at-a-time",
            f"Nearly all calls waited at {seen.queues_at}, while at most {seen.most} of {seen.capacity} connections"
            " were in use.",
        )


def demands(run: Recording, seen: Orders) -> Iterator[Finding]:
    """Each sentence of the task's text."""
    lucky = run.announced - seen.unlucky
    if seen.households < lucky:
        told = f"{run.completed} calls ended without an error, and {seen.placed} of {lucky} orders are in the database."
        yield Finding("success-without-work", told)
    if seen.halves:
        told = f"{seen.unlucky} customers wanted a product that does not exist, and {seen.halves} orders of theirs are"
        yield Finding("half-an-order", f"{told} in the database.")
    if seen.bare:
        yield Finding("half-an-order", f"{seen.bare} of {seen.placed} orders have no line.")
    if seen.refused < seen.unlucky:
        told = f"Of {seen.unlucky} customers who wanted a product that does not exist, {seen.refused} got DoesNotExist."
        yield Finding("not-what-was-asked", told)
    if seen.placed > lucky:
        yield Finding("twice", f"{lucky} calls made {seen.placed} orders.")
    if seen.done < seen.placed:
        told = f"{seen.placed - seen.done} of {seen.placed} orders have another product or price than the shop."
        yield Finding("guesses-the-price", told)


def prove(run: Recording, seen: Orders) -> str:
    """What a run of a right answer has shown."""
    connections = "1 connection" if seen.capacity == 1 else f"{seen.capacity} connections"
    return (
        f"{seen.done} of {run.announced - seen.unlucky} orders placed with {connections}.\n"
        "Who wanted a product that does not exist was told, and left no order."
    )


stay_in_the_context: Task[Orders] = Task(
    "11",
    "stay_in_the_context",
    "place_order",
    load=place_orders,
    trials=(
        {"orders": 60, "unlucky": 5, "capacity": 8, "sku": 1082185},
        {"orders": 20, "unlucky": 2, "capacity": 1, "sku": 1029743},
    ),
    rules=(asks_past_the_transaction, sleeps, one_at_a_time, fire_and_forget),
    demands=(demands,),
    proof=prove,
    curves=("requests",),
    load_seconds=5.0,
    hints=(
        "in_transaction() puts its connection where whatever runs below it finds it. Which line does not look there?",
        "using_db says which connection a query takes. `database` is the whole pool: a query that is told so takes a"
        " second connection. What happens if nobody says anything?",
        "Take out using_db; or hand price_of the connection of `async with in_transaction() as connection`; or ask for"
        " the price before the transaction begins.",
    ),
)
