"""Exercise 01, task 1: an order that asks for a second connection while it holds one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sqlalchemy import Connection, event, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import evidence
from workshop.checks.lent import Conditions, connections, forget_orders, own_households
from workshop.checks.nesting import ONE_AT_A_TIME, Nested, Nesting
from workshop.checks.rules import ENGINES, forgets_to_commit
from workshop.checks.task import Task
from workshop.checks.unpooled import backends, connects_without_a_limit
from workshop.shop import Order, OrderLine, Product


@dataclass(kw_only=True)
class Orders(Nested):
    """The orders of a storm, as they are in the database: `households` have `placed` so many, `lines` have a line.

    `halves` is how many times an order was committed, and its line was not.
    """

    households: int
    placed: int
    lines: int
    halves: int


class Halves:
    """Counts the transactions of an engine that are committed with an order, and without a line."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.count = 0
        self._written: dict[Connection, set[str]] = {}
        for name, hear in (
            ("before_cursor_execute", self._sends),
            ("commit", self._commits),
            ("rollback", self._rolls_back),
        ):
            event.listen(engine.sync_engine, name, hear)

    def _sends(self, connection: Connection, _: Any, statement: str, *rest: Any) -> None:
        words = statement.lower().replace('"', "").replace("(", " ").split()
        tables = {table for into, table in pairwise(words) if into == "into"}
        self._written.setdefault(connection, set()).update(tables)

    def _commits(self, connection: Connection) -> None:
        written = self._written.pop(connection, set())
        self.count += "orders" in written and "order_lines" not in written

    def _rolls_back(self, connection: Connection) -> None:
        self._written.pop(connection, None)


async def place_orders(
    place_order: Callable[..., Any],
    conditions: Conditions,
    *,
    orders: int,
    capacity: int,
    sku: int,
) -> Orders:
    """Place so many orders at once."""
    engine, customers = conditions.engine(capacity), own_households()
    nesting, halves = Nesting(engine), Halves(engine)
    async with backends(conditions) as server, evidence(conditions, engine) as noted:
        sessions = async_sessionmaker(engine)
        await storm(lambda number: place_order(sessions, customers[number], sku), orders)
    await engine.dispose()
    async with engine.connect() as connection:
        price = await connection.scalar(select(Product.unit_price).where(Product.sku == sku))
        ours = Order.household_id.between(customers[0], customers[-1])
        placed = (await connection.scalars(select(Order.household_id).where(ours))).all()
        columns = select(OrderLine.order_id, OrderLine.sku, OrderLine.unit_price)
        lines = (await connection.execute(columns.join(Order).where(ours))).all()
        await forget_orders(connection, customers)
    return Orders(
        **vars(noted),
        **nesting.noted(),
        backends=server,
        halves=halves.count,
        households=len(set(placed)),
        placed=len(placed),
        lines=len({line.order_id for line in lines}),
        done=sum((line.sku, line.unit_price) == (sku, price) for line in lines),
    )


def demands(run: Recording, seen: Orders) -> Iterator[Finding]:
    """Each call places one order with one line, at the shop's price."""
    if seen.households < run.announced:
        yield Finding(
            "success-without-work",
            f"{run.completed} calls ended without an error, and {seen.placed} orders are in the database.",
        )
    if seen.halves:
        yield Finding(
            "half-an-order",
            f"{seen.halves} times an order was committed, and its line only later: in a transaction of its own.",
        )
    if seen.lines < seen.placed:
        yield Finding("half-an-order", f"Of {seen.placed} orders, {seen.lines} have a line.")
    if seen.placed > run.announced:
        yield Finding("twice", f"{run.announced} calls made {seen.placed} orders.")
    if seen.done < seen.placed:
        yield Finding(
            "guesses-the-price",
            f"{seen.placed - seen.done} of {seen.placed} lines have another product or price than the shop.",
        )


def needless_door(run: Recording, seen: Orders) -> Iterator[Finding]:
    """A lock or semaphore of the learner's that keeps orders out while connections are free."""
    pool = run.pools[0]
    if seen.queuers and pool.most_checked_out < (pool.capacity or 0):
        yield Finding(
            "needless-door",
            f"Up to {seen.queuers} calls waited at {seen.queues_at}, and never more than"
            f" {pool.most_checked_out} of {pool.capacity} connections were in use.",
        )


def prove(run: Recording, seen: Orders) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{run.completed} of {run.announced} orders placed with {connections(run)}, 0 deadlocks, 0 timeouts.\n"
        "No order asked for a connection while it held one. A session holds one from its first statement"
        " (add() sends none, flush() does) to its commit, rollback or end."
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
    rules=(*ENGINES, connects_without_a_limit, *ONE_AT_A_TIME),
    demands=(forgets_to_commit, demands, needless_door),
    proof=prove,
    hints=(
        "Count the connections that one order has at the line where price_of runs. Which of them could it do without?",
        "price_of opens a session because it is handed the factory. What else could it be handed? "
        "Or could it run before the order's session has taken a connection?",
        "A session takes its connection with its first statement. Hand price_of the session that place_order has, "
        "or ask for the price before the flush and outside of the session's block.",
    ),
    load_seconds=5.0,
)
