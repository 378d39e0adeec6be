"""Exercise 04, task 3: a nightly delivery that holds a connection while the warehouse takes its time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Insert, case, func, insert, select, update
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.pool import QueuePool

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import evidence
from workshop.checks.lent import Conditions, forget_orders, own_households
from workshop.checks.memory import (
    Read,
    collects_garbage,
    cursor_without_transaction,
    pages_without_order,
    reading,
    yield_per_without_a_stream,
)
from workshop.checks.rules import (
    another_pool,
    changes_the_pool,
    expired_objects,
    leaves_it_checked_out,
)
from workshop.checks.streaming_exports.warehouse import BATCH, SMALL, Warehouse
from workshop.checks.task import Task
from workshop.checks.unpooled import Unpooled, backends, connects_past_the_pools
from workshop.shop import Order

GAP = 700  # numbers of orders that are not the job's, in a row
NEW = 600  # orders that are placed before the warehouse refuses


@dataclass(kw_only=True)
class Deliveries(Read, Unpooled):
    """What was delivered of so many `orders`.

    `told` says whether a refusal of the warehouse was reported, and `retried` how many orders were handed over again
    after it. `held` says whether a connection was out during a delivery, and `at_once` how many deliveries were under
    way at once. `largest` is the largest batch; `twice` is how many orders came again, `strange` how many nobody
    asked for, `deleted` how many rows the job has deleted, `stale` how many orders had been cancelled two batches
    before; `missing` how many never came, `between` how many of these lie between others that did, and `lack` what
    all of them have in common, in words.
    """

    told: bool
    retried: int
    held: bool
    at_once: int
    orders: int
    delivered: int
    largest: int
    twice: int
    strange: int
    deleted: int
    stale: int
    missing: int
    between: int
    lack: str


async def deliver_orders(
    nightly: Callable[..., Any], conditions: Conditions, *, orders: int, capacity: int
) -> Deliveries:
    """Let so many orders be delivered while the shop goes on."""
    engine, customers = conditions.engine(capacity), own_households()
    ours, neighbours = customers[1:1_001], (customers[0], customers[1_001])
    async with engine.begin() as connection:
        await connection.execute(_place(ours, orders // 2))
        await connection.execute(
            insert(Order), [{"household_id": household} for household in neighbours] * (GAP // 2)
        )
        await connection.execute(_place(ours, orders - orders // 2))
        # The rows of these move behind all others.
        moved = update(Order).where(Order.household_id.in_(ours), Order.id % 3 == 0)
        await connection.execute(moved.values(status=Order.status))
        placed = select(Order.id, Order.household_id, Order.status).where(
            Order.household_id.in_(ours)
        )
        wanted = {order.id: order for order in await connection.execute(placed.order_by(Order.id))}
    await engine.dispose()
    between = [number for number, order in wanted.items() if order.household_id in ours[1:-1]]
    told = True

    async def job(number: int) -> None:
        await nightly(sessions, ours[0], ours[-1], warehouse.deliver)

    async def job_without_warehouse(number: int) -> None:
        nonlocal told
        told = False
        try:
            await nightly(sessions, ours[0], ours[-1], warehouse.deliver)
        except Exception:  # whatever it makes of it, it says so
            told = True

    with reading(nightly, engine) as noted_of_reading:
        warehouse = Warehouse(engine, between, ours[0], noted_of_reading)
        async with backends(conditions) as server, evidence(conditions, engine) as noted:
            sessions = async_sessionmaker(engine)
            ends = await storm(job, 1)
            await warehouse.close()
            if ends["ok"] and not cast(QueuePool, engine.pool).checkedout():
                # Else a job that remembers how far it came would have nothing to be refused.
                async with engine.begin() as connection:
                    await connection.execute(_place(ours, NEW))
                warehouse.refuses = True
                await storm(job_without_warehouse, 1)
    await warehouse.close()
    await engine.dispose()
    async with engine.connect() as connection:
        still_there = {*await connection.scalars(placed)}
        await forget_orders(connection, customers)
    delivered = Counter(number for batch in warehouse.batches for number in batch)
    missing = [
        number for number in wanted if number not in delivered and number not in warehouse.cancelled
    ]
    refused = Counter(number for batch in warehouse.refused for number in batch)
    return Deliveries(
        **vars(noted),
        **vars(noted_of_reading),
        told=told,
        retried=sum(count > 1 for count in refused.values()),
        held=warehouse.held,
        backends=server,
        at_once=warehouse.at_once,
        orders=len(wanted),
        delivered=len(delivered),
        largest=max(map(len, warehouse.batches), default=0),
        twice=sum(count > 1 for count in delivered.values()),
        strange=len({*delivered} - {*wanted} - warehouse.placed),
        deleted=len(
            {*wanted, *warehouse.placed} - still_there - warehouse.archived - {*warehouse.cancelled}
        ),
        missing=len(missing),
        between=sum(min(delivered) < number < max(delivered) for number in missing if delivered),
        lack=_in_common(
            [wanted[number] for number in missing],
            [wanted[number] for number in delivered if number in wanted],
            ours,
        ),
        stale=sum(
            batches >= warehouse.cancelled[number] + 2
            for batches, batch in enumerate(warehouse.batches, 1)
            for number in batch
            if number in warehouse.cancelled
        ),
    )


def _place(households: range, orders: int) -> Insert:
    """Place so many orders, of these households in turn."""
    number = func.generate_series(1, orders).column_valued()
    status = case((number % 9 == 0, "paid"), else_="new")
    of_each = select(households[0] + number * 7 % len(households), status)
    return insert(Order).from_select(["household_id", "status"], of_each)


def _in_common(missing: list[Any], delivered: list[Any], households: range) -> str:
    """What tells the orders that never came from those that did."""
    apart = {order.household_id for order in missing} - {order.household_id for order in delivered}
    for household, name in ((households[0], "first"), (households[-1], "last")):
        if apart == {household}:
            return name
    statuses = {order.status for order in missing} - {order.status for order in delivered}
    return f"status {missing[0].status!r}" if delivered and len(statuses) == 1 else ""


def holds_while_it_waits(run: Recording, seen: Deliveries) -> Iterator[Finding]:
    """A connection that waits for somebody else's API."""
    if seen.at_once > 1:
        yield Finding(
            "batches-at-once",
            f"deliver was called while it was at work: {seen.at_once} batches were under way at once.",
        )
    if seen.held:
        yield Finding(
            "holds-while-it-waits", "While deliver ran, your job had a connection checked out."
        )


def delivers_what_it_must_not(run: Recording, seen: Deliveries) -> Iterator[Finding]:
    """What is known also of a job that has not ended."""
    if seen.largest > BATCH:
        yield Finding("larger-batches", f"A batch had {seen.largest:,} orders.")
    if seen.strange:
        yield Finding(
            "more-than-asked",
            f"deliver was handed {seen.strange:,} numbers that no order of these households has.",
        )
    if seen.twice:
        yield from pages_without_order(run, seen)
    if seen.twice:
        yield Finding(
            "delivers-twice", f"{seen.twice:,} of {seen.delivered:,} orders were delivered again."
        )
    if not seen.ended and 0 < seen.largest < SMALL:
        yield Finding(
            "small-batches",
            f"When the time was over, {seen.delivered:,} of {seen.orders:,} orders had been delivered,"
            f" at most {seen.largest} in a batch.",
        )


def demands(run: Recording, seen: Deliveries) -> Iterator[Finding]:
    """Each order that nobody cancelled is delivered once, in small batches, and a refusal is told."""
    if seen.deleted:
        yield Finding("more-than-asked", f"Your code deleted {seen.deleted:,} orders.")
    if seen.stale:
        yield Finding(
            "read-too-early",
            "Some orders were delivered although they had been cancelled two batches before.",
        )
    if seen.missing:
        yield from pages_without_order(run, seen)
    never = f"Of {seen.orders:,} orders, {seen.missing:,} were never delivered"
    if seen.lack in ("first", "last"):
        yield Finding("leaves-out-an-end", f"{never}: all those of the {seen.lack} household.")
    if seen.lack:
        yield Finding("part-of-the-rows", f"{never}, and all of these have {seen.lack}.")
    if seen.between:
        yield Finding("pages-shift", f"{never}, and others on either side of them were.")
    if seen.missing:
        yield Finding(
            "part-of-the-rows",
            f"Of {seen.orders:,} orders, {seen.delivered:,} were delivered.",
        )
    if not seen.told:
        yield Finding(
            "swallows-the-refusal", "deliver raised ConnectionError, and your job raised nothing."
        )
    if seen.retried:
        yield Finding(
            "delivers-twice",
            f"After deliver had raised, {seen.retried} of the same orders were handed over again.",
        )
    yield from pages_without_order(run, seen)


def prove(run: Recording, seen: Deliveries) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{seen.orders:,} orders: each that nobody cancelled was delivered once, in batches of at most"
        f" {BATCH}, and no connection was held meanwhile."
    )


hold_no_connection: Task[Deliveries] = Task(
    "04",
    "hold_no_connection",
    "nightly",
    load=deliver_orders,
    trials=({"orders": 4_900, "capacity": 1}, {"orders": 2_300, "capacity": 3}),
    rules=(
        changes_the_pool,
        another_pool,
        connects_past_the_pools("another-pool"),
        collects_garbage,
        yield_per_without_a_stream,
        cursor_without_transaction,
        expired_objects,
        holds_while_it_waits,
        delivers_what_it_must_not,
    ),
    demands=(
        demands,
        leaves_it_checked_out,
    ),
    proof=prove,
    hints=(
        "Which line of nightly takes the connection, and which gives it back? How often does deliver run in between?",
        "Each batch needs a query of its own, in a session that has ended before deliver begins. How does the next "
        "query know where to go on, when rows before it may have gone?",
        "Remember the highest number of the batch. The next page is orders.where(Order.id > last).limit(500), read "
        "within `async with Session() as session:`; deliver it outside of that block.",
    ),
)
