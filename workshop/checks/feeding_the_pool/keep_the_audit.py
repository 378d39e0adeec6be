"""Exercise 02, task 2: an audit log that tells also of the orders that were rolled back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import async_sessionmaker

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Work, evidence
from workshop.checks.lent import Conditions, forget_orders, own_households
from workshop.checks.rules import USE_OF_POOLS
from workshop.checks.task import Task, Trials
from workshop.shop import AuditEntry, Order


@dataclass(kw_only=True)
class Charges(Work):
    """Of orders whose card was `accepted` or `declined`, how many are placed and in the audit log.

    `too_many` is how many rows there are more than one for each call.
    """

    accepted: int
    declined: int
    placed: int
    placed_although_declined: int
    logged: int
    logged_although_declined: int
    too_many: int


async def charge_cards(
    place_order: Callable[..., Any],
    conditions: Conditions,
    *,
    orders: int,
    capacity: int,
    audit: int,
) -> Charges:
    """Place so many orders at once, every third of which is declined."""
    shop, log = conditions.engine(capacity), conditions.engine(audit, "audit")
    customers = own_households()
    declined = {customers[number] for number in range(0, orders, 3)}

    async def charge(number: int) -> bool:
        await asyncio.sleep(0)  # a card terminal in the same process answers at once
        return number not in declined

    async with evidence(conditions, shop, log) as noted:
        sessions, logs = async_sessionmaker(shop), async_sessionmaker(log)
        await storm(lambda number: place_order(sessions, logs, customers[number], charge), orders)
    await log.dispose()
    await shop.dispose()
    async with shop.connect() as connection:
        ours = Order.household_id.between(customers[0], customers[-1])
        placed = list(await connection.scalars(select(Order.household_id).where(ours)))
        wanted = {str(customers[number]): customers[number] for number in range(orders)}
        entries = select(AuditEntry.detail).where(AuditEntry.detail.in_(wanted))
        logged = [wanted[str(detail)] for detail in await connection.scalars(entries)]
        await connection.execute(delete(AuditEntry).where(AuditEntry.detail.in_(wanted)))
        await forget_orders(connection, customers)
    accepted = set(wanted.values()) - declined
    return Charges(
        **vars(noted),
        done=len(accepted.intersection(placed)) + len(declined),
        accepted=len(accepted),
        declined=len(declined),
        placed=len(accepted.intersection(placed)),
        placed_although_declined=len(declined.intersection(placed)),
        logged=len(accepted.intersection(logged)),
        logged_although_declined=len(declined.intersection(logged)),
        too_many=len(placed) + len(logged) - len(set(placed)) - len(set(logged)),
    )


def demands(run: Recording, seen: Charges) -> Iterator[Finding]:
    """Accepted orders are placed, declined ones are not, and both are in the audit log, once."""
    if seen.placed_although_declined:
        yield Finding(
            "commits-what-should-roll-back",
            f"Of {seen.declined} orders whose card was declined, {seen.placed_although_declined} are placed.",
        )
    if seen.logged_although_declined < seen.declined and seen.logged == seen.accepted:
        yield Finding(
            "audit-rolls-back-too",
            f"Of {seen.declined} orders whose card was declined, {seen.logged_although_declined} are in the audit"
            f" log; of {seen.accepted} that were accepted, {seen.logged}.",
        )
    if seen.placed < seen.accepted or seen.logged < seen.accepted:
        yield Finding(
            "success-without-work",
            f"Of {seen.accepted} orders whose card was accepted, {seen.placed} are placed and"
            f" {seen.logged} are in the audit log.",
        )
    if seen.too_many:
        yield Finding(
            "twice",
            f"There are {seen.too_many} rows more than {run.announced} calls should leave.",
        )


def prove(trials: Trials[Charges]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{seen.placed} orders placed, {seen.declined} declined, {run.announced} in the audit log,"
        f" with {run.pools[0].capacity} + {run.pools[1].capacity} connections, 0 deadlocks, 0 timeouts."
        for run, seen in trials
    )


keep_the_audit = Task(
    "02",
    "keep_the_audit",
    "place_order",
    load=charge_cards,
    trials=(
        {"orders": 60, "capacity": 10, "audit": 2},
        {"orders": 20, "capacity": 1, "audit": 1},
    ),
    rules=USE_OF_POOLS,
    demands=(demands,),
    proof=prove,
    hints=(
        "Two things are asked of the entry: it must survive the rollback, and it must not need the orders' pool while "
        "an order holds a connection of it.",
        "Audit makes sessions on a pool of its own. Who waits for it, and does any of its holders wait for an order?",
        "Write the entry in a session of Audit, or write it when the order's session is closed.",
    ),
)
