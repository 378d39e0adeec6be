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
from workshop.checks.returned import another_answer
from workshop.checks.task import Task

_LARGEST_POOL, _DEEPEST = 16, 6
# Whatever rounds, leaves out a setting or forgets the depth is wrong for one of these.
_OTHERS = [
    (pool_size, capacity - pool_size, depth)
    for depth in range(2, _DEEPEST + 1)
    for capacity in range(_LARGEST_POOL, depth - 1, -1)
    for pool_size in (capacity, capacity // 3 + 1)
]


@dataclass(kw_only=True)
class Permits(Evidence):
    """How many `permits` were chosen, 0 where there was no number, for a pool and orders of so many connections.

    `another` tells what was returned in place of a number.
    """

    permits: int
    another: Finding | None
    pool_size: int
    max_overflow: int
    depth: int

    @property
    def safe(self) -> int:
        """How many may be inside: the lesson's formula, solved for the number of tasks."""
        return safe(self.pool_size, self.max_overflow, self.depth)


def safe(pool_size: int, max_overflow: int, depth: int) -> int:
    """The largest T for which P >= T × (d - 1) + 1."""
    return (pool_size + max_overflow - 1) // (depth - 1)


async def try_permits(
    permits: Callable[..., Any],
    conditions: Conditions,
    *,
    pool_size: int,
    max_overflow: int,
    depth: int,
    orders: int,
    search: bool = False,
) -> Permits:
    """A bad day behind a door with so many permits, and one behind a door with one more.

    With `search`, on another pool if there is one for which the number is not the formula's.
    """
    asked = pool_size, max_overflow, depth
    found: list[int] = []
    another: list[Finding] = []

    async def ask(number: int) -> None:
        nonlocal asked
        for settings in [*(_OTHERS if search else ()), (pool_size, max_overflow, depth)]:
            answer, asked = permits(*settings), settings
            if answer != safe(*settings):
                break
        if isinstance(answer, int) and not isinstance(answer, bool):
            found.append(answer)
        else:
            another.append(another_answer(f"permits{asked}", answer, safe(*asked)))

    async with evidence(conditions) as noted:
        await storm(ask, 1)
        size, overflow, depth = asked
        engines = [
            create_async_engine(
                conditions.url, pool_size=size, max_overflow=overflow, pool_logging_name=name
            )
            for name in ("yours", "+ 1")
        ]
        noted.lent = len(engines)
        for engine, count in zip(engines, [found[0], found[0] + 1] if found else [], strict=False):
            if count > 0:
                await _bad_day(engine, count, size + overflow, depth, orders)
    return Permits(
        **vars(noted),
        permits=found[0] if found else 0,
        another=another[0] if another else None,
        pool_size=asked[0],
        max_overflow=asked[1],
        depth=asked[2],
    )


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
    capacity = seen.pool_size + seen.max_overflow
    settings = f"pool_size={seen.pool_size}, max_overflow={seen.max_overflow}, depth={seen.depth}"
    if seen.another is not None:
        yield seen.another
    if seen.permits < 1:
        yield Finding("nobody-gets-in", f"For {settings} your number of permits is {seen.permits}.")
    yours, one_more = run.pools[:2]
    if yours.deadlocks:
        evidence = (
            f"For {settings} your number is {seen.permits}. On a bad day that is a deadlock:"
            f" {seen.permits} orders that hold {seen.depth - 1} of {capacity} connections each leave none."
        )
        if seen.permits == capacity:
            yield Finding("as-many-permits-as-connections", evidence)
        if seen.permits == capacity - 1:
            yield Finding("permits-ignore-the-depth", evidence)
        yield Finding("too-many-permits", evidence)
    if not one_more.deadlocks:
        evidence = (
            f"For {settings} your number is {seen.permits}. There was no deadlock, and with"
            f" {seen.permits + 1} there was none either."
        )
        if seen.permits == safe(seen.pool_size, 0, seen.depth):
            yield Finding("forgets-the-overflow", evidence)
        if seen.permits == capacity // seen.depth:
            yield Finding("sets-all-apart", evidence)
        yield Finding("too-careful", evidence)


def prove(run: Recording, seen: Permits) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{seen.pool_size} + {seen.max_overflow} connections, {seen.depth} for each order: {seen.permits} permits"
        f" survive the worst moment, {seen.permits + 1} do not."
    )


choose_the_permits = Task(
    "02",
    "choose_the_permits",
    "permits",
    load=try_permits,
    trials=(
        {"pool_size": 20, "max_overflow": 10, "depth": 2, "orders": 60},
        {"pool_size": 4, "max_overflow": 10, "depth": 6, "orders": 20, "search": True},
    ),
    rules=(),
    demands=(demands,),
    proof=prove,
    curves=("connections",),
    hints=(
        "How many connections has the pool at most? Both of its settings count.",
        "In the worst moment each order inside holds all but its last connection. How many connections are out then, "
        "and how many must be left?",
        "The lesson's formula is P >= T × (d - 1) + 1. You know P and d; solve it for T. "
        "Which way is a remainder rounded?",
    ),
    load_seconds=4.0,
)
