"""Randomised storms that are busy, and by their construction not deadlocked: no deadlock may be proved in any."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from ormscope import PoolScope
from workshop.database import Server

STORMS = 500
PATIENCE = 60  # seconds; a storm lasts a tenth of a second


@dataclass(frozen=True)
class Visit:
    """What one task does: `depth` connections at once, each of them used for `pause` ms by a way of its own."""

    depth: int
    pause: int
    way: str
    cancelled_after: int | None


WAYS = ("query", "sleep", "lock", "gather", "wait_for", "commits", "thread", "group")
visits = st.builds(
    Visit,
    depth=st.integers(1, 3),
    pause=st.integers(0, 8),
    way=st.sampled_from(WAYS),
    cancelled_after=st.none() | st.integers(0, 10),
)


async def use(engine: AsyncEngine, visit: Visit, lock: asyncio.Lock) -> None:
    """One connection, held for a while in one of the ways in which code holds connections."""
    pause = visit.pause / 1000
    async with AsyncSession(engine) as session:
        await session.execute(text("select 1"))
        match visit.way:
            case "query":
                await session.execute(text("select pg_sleep(:pause)"), {"pause": pause})
            case "sleep":
                await asyncio.sleep(pause)
            case "lock":
                async with lock:
                    await asyncio.sleep(pause)
            case "gather":
                await asyncio.gather(asyncio.sleep(pause), asyncio.sleep(0))
            case "wait_for":
                await asyncio.wait_for(asyncio.sleep(pause), 30)
            case "commits":
                for _ in range(visit.pause):
                    await session.execute(text("select 1"))
                    await session.commit()
            case "thread":
                await asyncio.to_thread(int)
            case "group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(asyncio.sleep(pause))
        if visit.depth > 1:
            await asyncio.create_task(
                use(engine, Visit(visit.depth - 1, visit.pause, visit.way, None), lock)
            )


async def storm_of(url: str, all_visits: list[Visit], spare: int) -> Counter[str]:
    """Run all visits at once on a pool that is just large enough, plus `spare`; what became of them."""
    # Every task could hold all but its last connection, and one of them still gets that.
    capacity = sum(visit.depth - 1 for visit in all_visits) + 1 + spare
    ours = asyncio.all_tasks()
    engine = create_async_engine(url, pool_size=capacity, max_overflow=0, pool_timeout=1)
    # All are open before anybody is cancelled: whoever is cancelled while connecting leaves the queue asleep.
    async with AsyncExitStack() as opened:
        for _ in range(capacity):
            await opened.enter_async_context(engine.connect())
    scope, lock = PoolScope(engine), asyncio.Lock()
    tasks = []
    for visit in all_visits:
        task = asyncio.create_task(use(engine, visit, lock))
        if visit.cancelled_after is not None:
            asyncio.get_running_loop().call_later(visit.cancelled_after / 1000, task.cancel)
        tasks.append(task)
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    outcomes = Counter("ok" if end is None else type(end).__name__ for end in ends)
    assert scope.deadlocks == [], scope.deadlocks[0]
    assert scope.most_held_by_one <= 1  # each connection in a task of its own
    # What a cancelled parent has left to its child ends by itself.
    others = asyncio.all_tasks() - ours
    await asyncio.gather(*others, return_exceptions=True)
    assert (scope.checked_out, len(scope.waiters)) == (0, 0)
    assert scope.verdict().cause == "healthy"
    await engine.dispose()
    return outcomes


seen: Counter[str] = Counter()


@settings(
    max_examples=STORMS,
    deadline=None,  # the load decides how long it takes
    database=None,
    # What depends on the moment cannot be made smaller by trying again.
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(all_visits=st.lists(visits, min_size=2, max_size=10), spare=st.integers(0, 2))
def check_storm(server: Server, all_visits: list[Visit], spare: int) -> None:
    outcomes = asyncio.run(asyncio.wait_for(storm_of(server.url, all_visits, spare), PATIENCE))
    assert set(outcomes) <= {"ok", "CancelledError", "TimeoutError"}
    seen["storms"] += 1
    seen.update(outcomes)


def test_no_deadlock_is_seen_where_there_is_none(server: Server) -> None:
    seen.clear()
    check_storm(server)
    assert seen["storms"] >= STORMS
    assert seen["ok"] > STORMS and seen["CancelledError"] > STORMS / 4
    assert seen["TimeoutError"] < seen["ok"] / 20  # after a cancelled attempt to connect, see above
