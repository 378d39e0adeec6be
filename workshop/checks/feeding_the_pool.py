"""The checks of exercise 02: how many may come in, and an audit log that outlives a rollback."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from ormscope import PoolScope
from ormscope.lab import Recording, storm
from workshop.checks.evidence import evidence
from workshop.checks.lent import engine_of, forget_orders, own_households
from workshop.checks.pool_rules import wrong_use_of_pools
from workshop.checks.task import Finding, Task
from workshop.shop import AuditEntry, Order

# choose_the_permits


async def try_permits(
    permits: Callable[..., Any],
    url: str,
    *,
    pool_size: int,
    max_overflow: int,
    depth: int,
    orders: int,
) -> dict[str, Any]:
    """A bad day behind a door with so many permits, and one behind a door with one more."""
    found: list[int] = []

    async def ask(number: int) -> None:
        answer = permits(pool_size, max_overflow, depth)
        if not isinstance(answer, int):
            raise TypeError(f"permits returned {answer!r}; a whole number was asked for")
        found.append(answer)

    engines = [
        create_async_engine(
            url, pool_size=pool_size, max_overflow=max_overflow, pool_logging_name=name
        )
        for name in ("yours", "+ 1")
    ]
    async with evidence(*engines) as noted:
        await storm(ask, 1)
        for engine, count in zip(engines, [found[0], found[0] + 1] if found else [], strict=False):
            if count > 0:
                await _bad_day(engine, count, pool_size + max_overflow, depth, orders)
    return dataclasses.asdict(noted) | {"permits": found[0] if found else None, "depth": depth}


async def _bad_day(
    engine: AsyncEngine, permits: int, capacity: int, depth: int, orders: int
) -> None:
    """So many orders before a door, of which the first to come in meet in the worst moment; to its end or deadlock."""
    door, free, meetings = asyncio.Semaphore(permits), capacity, []
    for _ in range(depth - 1):
        meeting = min(permits, orders, free)
        meetings.append(asyncio.Barrier(max(meeting, 1)))
        free -= meeting

    async def take(level: int, meets: bool) -> None:
        async with engine.connect():
            if level < depth:
                if meets:
                    await meetings[level - 1].wait()
                await take(level + 1, meets)

    async def order(number: int) -> None:
        async with door:
            await take(1, number < permits)

    day: asyncio.Future[Any] = asyncio.gather(*(order(number) for number in range(orders)))
    proof: asyncio.Future[Any] = asyncio.create_task(PoolScope(engine).deadlock())
    await asyncio.wait({day, proof}, return_when=asyncio.FIRST_COMPLETED)
    day.cancel()
    proof.cancel()
    await asyncio.gather(day, proof, return_exceptions=True)


def judge_permits(run: Recording) -> Finding | None:
    """What is wrong with a number of permits."""
    permits, depth = run.result["permits"], run.result["depth"]
    if permits is None:
        return None
    if permits < 1:
        return Finding("nobody-gets-in", f"Your number of permits is {permits}.")
    yours, one_more = run.pools[:2]
    if yours.deadlocks:
        evidence = (
            f"With {permits} permits, {yours.capacity} connections and {depth} for each order,"
            " a bad day ends in a deadlock."
        )
        spare = permits < (yours.capacity or 0)
        return Finding(
            "permits-ignore-the-depth" if spare else "as-many-permits-as-connections", evidence
        )
    if not one_more.deadlocks:
        return Finding(
            "too-careful",
            f"With {permits} permits, {yours.capacity} connections and {depth} for each order there was no deadlock,"
            f" and with {permits + 1} there was none either.",
        )
    return None


def prove_permits(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.pools[0].capacity} connections, {run.result['depth']} for each order: {run.result['permits']} permits"
        f" survive the worst moment, {run.result['permits'] + 1} do not."
        for run in runs
    )


choose_the_permits = Task(
    "02",
    "choose_the_permits",
    "permits",
    load=try_permits,
    trials=(
        {"pool_size": 20, "max_overflow": 10, "depth": 2, "orders": 60},
        {"pool_size": 5, "max_overflow": 10, "depth": 3, "orders": 40},
    ),
    judge=judge_permits,
    proof=prove_permits,
    curves=("connections",),
    hints=(
        "How many connections has the pool at most? Both of its settings count.",
        "In the worst moment each order inside holds all but its last connection. How many connections are out then, "
        "and how many must be left?",
        "The lesson's formula is P >= T × (d - 1) + 1. You know P and d; solve it for T, and round down.",
    ),
)


# keep_the_audit


async def charge_cards(
    place_order: Callable[..., Any], url: str, *, orders: int, capacity: int, audit: int
) -> dict[str, Any]:
    """Place so many orders at once, every third of which is declined; what is in the database, and what was noted."""
    shop, log = engine_of(url, capacity), engine_of(url, audit, "audit")
    customers = own_households()
    declined = {customers[number] for number in range(0, orders, 3)}

    async def charge(number: int) -> bool:
        await asyncio.sleep(0)  # a card terminal in the same process answers at once
        return number not in declined

    async with evidence(shop, log) as noted:
        sessions, logs = async_sessionmaker(shop), async_sessionmaker(log)
        await storm(lambda one: place_order(sessions, logs, customers[one], charge), orders)
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
    return dataclasses.asdict(noted) | {
        "accepted": len(accepted),
        "declined": len(declined),
        "placed": len(accepted.intersection(placed)),
        "placed_although_declined": len(declined.intersection(placed)),
        "logged": len(accepted.intersection(logged)),
        "logged_although_declined": len(declined.intersection(logged)),
        "too_many": len(placed) + len(logged) - len(set(placed)) - len(set(logged)),
    }


def judge_audit(run: Recording) -> Finding | None:
    """What is wrong with how orders and their audit log were written."""
    seen = run.result
    done = seen["placed"] + seen["declined"]
    if (finding := wrong_use_of_pools(run, lent=2, done=done)) is not None:
        return finding
    if run.completed < run.announced:
        return None
    if seen["placed_although_declined"]:
        return Finding(
            "commits-what-should-roll-back",
            f"Of {seen['declined']} orders whose card was declined, {seen['placed_although_declined']} are placed.",
        )
    if seen["logged_although_declined"] < seen["declined"] and seen["logged"] == seen["accepted"]:
        return Finding(
            "audit-rolls-back-too",
            f"Of {seen['declined']} orders whose card was declined, {seen['logged_although_declined']} are in the audit"
            f" log; of {seen['accepted']} that were accepted, {seen['logged']}.",
        )
    if seen["placed"] < seen["accepted"] or seen["logged"] < seen["accepted"]:
        return Finding(
            "success-without-work",
            f"Of {seen['accepted']} orders whose card was accepted, {seen['placed']} are placed and"
            f" {seen['logged']} are in the audit log.",
        )
    if seen["too_many"]:
        return Finding(
            "twice",
            f"There are {seen['too_many']} rows more than {run.announced} calls should leave.",
        )
    return None


def prove_audit(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.result['placed']} orders placed, {run.result['declined']} declined, {run.announced} in the audit log,"
        f" with {run.pools[0].capacity} + {run.pools[1].capacity} connections, 0 deadlocks, 0 timeouts."
        for run in runs
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
    judge=judge_audit,
    proof=prove_audit,
    hints=(
        "Two things are asked of the entry: it must survive the rollback, and it must not need the orders' pool while "
        "an order holds a connection of it.",
        "Audit makes sessions on a pool of its own. Who waits for it, and does any of its holders wait for an order?",
        "Write the entry in a session of Audit, or write it when the order's session is closed.",
    ),
)
