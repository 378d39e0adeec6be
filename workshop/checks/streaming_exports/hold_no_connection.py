"""Exercise 04, task 3: a nightly delivery that holds a connection while the warehouse takes its time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import async_sessionmaker

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import Conditions, forget_orders, own_households
from workshop.checks.rules import (
    another_pool,
    changes_the_pool,
    cursor_without_transaction,
    expired_objects,
    leaves_it_checked_out,
)
from workshop.checks.streaming_exports.warehouse import BATCH, Warehouse
from workshop.checks.task import Task, Trials
from workshop.shop import Order


@dataclass(kw_only=True)
class Deliveries(Evidence):
    """What was delivered of so many `orders`.

    `told` says whether a refusal of the warehouse was reported, `held` whether a connection was out during a
    delivery. `largest` is the largest batch; `twice` is how many orders came again, `strange` how many nobody asked
    for, `stale` how many had been cancelled two batches before; `missing` how many never came, and `between` how
    many of these lie between others that did.
    """

    told: bool
    held: bool
    orders: int
    delivered: int
    largest: int
    twice: int
    strange: int
    stale: int
    missing: int
    between: int


async def deliver_orders(
    nightly: Callable[..., Any], conditions: Conditions, *, orders: int, capacity: int
) -> Deliveries:
    """Let so many orders be delivered while the shop goes on."""
    engine, customers = conditions.engine(capacity), own_households()
    ours, others = customers[:5_000], customers[5_000:]
    number = func.generate_series(1, orders).column_valued()
    made = insert(Order).from_select(["household_id"], select(ours[0] + number * 7 % 1_000))
    async with engine.begin() as connection:
        await connection.execute(made)
        await connection.execute(insert(Order), [{"household_id": others[0]}] * 100)
        placed = select(Order.id).where(Order.household_id.in_(ours)).order_by(Order.id)
        wanted = list(await connection.scalars(placed))
    await engine.dispose()
    warehouse, told = Warehouse(engine, wanted, ours[0]), False

    async def refuse(batch: Any) -> None:
        raise ConnectionError("the warehouse does not answer")

    async def job(number: int) -> None:
        await nightly(sessions, ours[0], ours[-1], warehouse.deliver)

    async def job_without_warehouse(number: int) -> None:
        nonlocal told
        try:
            await nightly(sessions, ours[0], ours[-1], refuse)
        except Exception:  # whatever it makes of it, it says so
            told = True

    async with evidence(conditions, engine) as noted:
        sessions = async_sessionmaker(engine)
        ends = await storm(job, 1)
        await warehouse.close()
        if ends["ok"]:
            await storm(job_without_warehouse, 1)
    await warehouse.close()
    await engine.dispose()
    async with engine.connect() as connection:
        known = {*wanted, *await connection.scalars(placed)}
        await forget_orders(connection, customers)
    delivered = Counter(number for batch in warehouse.batches for number in batch)
    missing = [
        number for number in wanted if number not in delivered and number not in warehouse.cancelled
    ]
    return Deliveries(
        **vars(noted),
        told=told,
        held=warehouse.held,
        orders=len(wanted),
        delivered=len(delivered),
        largest=max(map(len, warehouse.batches), default=0),
        twice=sum(count > 1 for count in delivered.values()),
        strange=len({*delivered} - known),
        missing=len(missing),
        between=sum(min(delivered) < number < max(delivered) for number in missing if delivered),
        stale=sum(
            batches >= warehouse.cancelled[number] + 2
            for batches, batch in enumerate(warehouse.batches, 1)
            for number in batch
            if number in warehouse.cancelled
        ),
    )


def holds_while_it_waits(run: Recording, seen: Deliveries) -> Iterator[Finding]:
    """A connection that waits for somebody else's API."""
    if seen.held:
        yield Finding(
            "holds-while-it-waits", "While deliver ran, your job had a connection checked out."
        )


def demands(run: Recording, seen: Deliveries) -> Iterator[Finding]:
    """Each order that nobody cancelled is delivered once, in small batches, and a refusal is told."""
    if seen.largest > BATCH:
        yield Finding("larger-batches", f"A batch had {seen.largest:,} orders.")
    if seen.twice:
        yield Finding("delivers-twice", "Some orders were delivered a second time.")
    if seen.strange:
        yield Finding("more-than-asked", "Orders of other households were delivered as well.")
    if seen.stale:
        yield Finding(
            "read-too-early",
            "Some orders were delivered although they had been cancelled two batches before.",
        )
    if seen.between:
        yield Finding(
            "pages-shift",
            "Some orders were never delivered, and others on either side of them were.",
        )
    if seen.missing:
        yield Finding(
            "part-of-the-rows",
            f"Of {seen.orders:,} orders, {seen.delivered:,} were delivered.",
        )
    if not seen.told:
        yield Finding(
            "swallows-the-refusal", "deliver raised ConnectionError, and your job raised nothing."
        )


def prove(trials: Trials[Deliveries]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{seen.orders:,} orders: each that nobody cancelled was delivered once, in batches of at most"
        f" {BATCH}, and no connection was held meanwhile."
        for _, seen in trials
    )


hold_no_connection = Task(
    "04",
    "hold_no_connection",
    "nightly",
    load=deliver_orders,
    trials=({"orders": 5_000, "capacity": 1}, {"orders": 2_300, "capacity": 3}),
    rules=(
        changes_the_pool,
        another_pool,
        cursor_without_transaction,
        expired_objects,
        holds_while_it_waits,
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
