"""Exercise 02, task 1: how many orders may be inside at once, where each needs several connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ormscope import PoolScope
from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import Conditions
from workshop.checks.task import Task, Trials


@dataclass(kw_only=True)
class Permits(Evidence):
    """How many `permits` were chosen, 0 where there was no number, for orders of so many connections: `depth`."""

    permits: int
    depth: int


async def try_permits(
    permits: Callable[..., Any],
    conditions: Conditions,
    *,
    pool_size: int,
    max_overflow: int,
    depth: int,
    orders: int,
) -> Permits:
    """A bad day behind a door with so many permits, and one behind a door with one more."""
    found: list[int] = []

    async def ask(number: int) -> None:
        answer = permits(pool_size, max_overflow, depth)
        if not isinstance(answer, int):
            raise TypeError(f"permits returned {answer!r}; a whole number was asked for")
        found.append(answer)

    engines = [
        create_async_engine(
            conditions.url, pool_size=pool_size, max_overflow=max_overflow, pool_logging_name=name
        )
        for name in ("yours", "+ 1")
    ]
    async with evidence(conditions, *engines) as noted:
        await storm(ask, 1)
        for engine, count in zip(engines, [found[0], found[0] + 1] if found else [], strict=False):
            if count > 0:
                await _bad_day(engine, count, pool_size + max_overflow, depth, orders)
    return Permits(**vars(noted), permits=found[0] if found else 0, depth=depth)


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


def demands(run: Recording, seen: Permits) -> Iterator[Finding]:
    """Somebody comes in, the worst moment ends in no deadlock, and nobody is kept out who could come in."""
    if seen.permits < 1:
        yield Finding("nobody-gets-in", f"Your number of permits is {seen.permits}.")
    yours, one_more = run.pools[:2]
    if yours.deadlocks:
        spare = seen.permits < (yours.capacity or 0)
        yield Finding(
            "permits-ignore-the-depth" if spare else "as-many-permits-as-connections",
            f"With {seen.permits} permits, {yours.capacity} connections and {seen.depth} for each order,"
            " a bad day ends in a deadlock.",
        )
    if not one_more.deadlocks:
        yield Finding(
            "too-careful",
            f"With {seen.permits} permits, {yours.capacity} connections and {seen.depth} for each order there was no"
            f" deadlock, and with {seen.permits + 1} there was none either.",
        )


def prove(trials: Trials[Permits]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.pools[0].capacity} connections, {seen.depth} for each order: {seen.permits} permits"
        f" survive the worst moment, {seen.permits + 1} do not."
        for run, seen in trials
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
    rules=(),
    demands=(demands,),
    proof=prove,
    curves=("connections",),
    hints=(
        "How many connections has the pool at most? Both of its settings count.",
        "In the worst moment each order inside holds all but its last connection. How many connections are out then, "
        "and how many must be left?",
        "The lesson's formula is P >= T × (d - 1) + 1. You know P and d; solve it for T, and round down.",
    ),
)
