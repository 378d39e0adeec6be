"""What an attached PoolScope costs: CPU time for a checkout, and memory. Exact figures are `python3 lab.py bench`'s."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import sys
import time
import tracemalloc
from pathlib import Path
from types import FrameType

from helpers import SELECT, run, until
from random_systems import connect_to_nothing
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

import ormscope
from ormscope import PoolScope

TASKS, EACH, PAIRS = 100, 10, 7
# Measured: 1.2 of SQLAlchemy's own time with a driver that does nothing, the worst case, and 1.6 on a busy
# machine; with PostgreSQL it is less.
MOST_CPU = 2.5
# Measured: 22.4 calls of Python functions, 0.075 of all.
MOST_CALLS, MOST_OF_CALLS = 28, 0.095


async def storm(engine: AsyncEngine) -> float:
    """CPU seconds for each checkout with one statement, in a pool that many wait for."""

    async def work() -> None:
        for _ in range(EACH):
            async with engine.connect() as connection:
                await connection.execute(SELECT)

    gc.collect()
    start = time.process_time()
    await asyncio.gather(*(work() for _ in range(TASKS)))
    return (time.process_time() - start) / (TASKS * EACH)


def engine_of_nothing() -> AsyncEngine:
    return create_async_engine(
        "sqlite+aiosqlite:///nothing",
        async_creator=connect_to_nothing,
        poolclass=AsyncAdaptedQueuePool,
        pool_size=10,
        max_overflow=0,
        pool_timeout=60,
    )


def test_a_checkout_costs_little_more_with_a_scope() -> None:
    """The cheapest of several runs of each, in turns: whatever else the machine does only adds to a run.

    It does not add evenly: what a scope does comes cold to a processor whose caches others fill. So
    this bound is a wide one, and the test after this counts instead.
    """

    async def main() -> tuple[float, float]:
        bare, watched = engine_of_nothing(), engine_of_nothing()
        scope = PoolScope(watched)
        without, with_scope = [], []
        for _ in range(PAIRS):
            without.append(await storm(bare))
            with_scope.append(await storm(watched))
        assert scope.checkouts == PAIRS * TASKS * EACH
        await bare.dispose()
        await watched.dispose()
        return min(without), min(with_scope)

    without, with_scope = run(main())
    assert with_scope / without < MOST_CPU, f"{(with_scope - without) * 1e6:.0f} µs a checkout"


def test_of_the_calls_for_a_checkout_few_are_the_scopes() -> None:
    """Of some 300 Python calls for a checkout with one statement 22 are ours, on every machine and at every load."""
    calls = {"ours": 0, "all": 0}
    folder = str(Path(ormscope.__file__).parent)

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            calls["all"] += 1
            calls["ours"] += frame.f_code.co_filename.startswith(folder)

    async def main() -> int:
        engine = engine_of_nothing()
        scope = PoolScope(engine)
        await storm(engine)  # opens the connections
        before = scope.checkouts
        sys.setprofile(count)
        try:
            await storm(engine)
        finally:
            sys.setprofile(None)
        await engine.dispose()
        return scope.checkouts - before

    checkouts = run(main())
    assert checkouts == TASKS * EACH
    assert checkouts < calls["ours"] < MOST_CALLS * checkouts
    assert calls["ours"] / calls["all"] < MOST_OF_CALLS


def test_those_in_line_share_the_places_where_they_asked() -> None:
    """Tuples of their own for thousands in line make the garbage collector look at the whole heap more often."""

    async def main() -> set[int]:
        engine = engine_of_nothing()
        scope = PoolScope(engine)
        tasks = [asyncio.create_task(storm(engine)) for _ in range(2)]
        await until(lambda: len(scope.waiters) > TASKS)
        places = {id(waiter.frames) for waiter in scope.waiters}
        await asyncio.gather(*tasks)
        await engine.dispose()
        return places

    assert len(run(main())) == 1


def check_out(engine: Engine, times: int) -> None:
    for _ in range(times):
        engine.raw_connection().close()


def test_the_memory_of_a_scope_is_flat() -> None:
    engine = create_engine(
        "sqlite://",
        creator=lambda: sqlite3.connect(":memory:", check_same_thread=False),
        poolclass=QueuePool,
    )
    scope = PoolScope(engine)
    check_out(engine, 1_000)
    tracemalloc.start()
    try:
        check_out(engine, 5_000)
        gc.collect()
        early, _ = tracemalloc.get_traced_memory()
        check_out(engine, 20_000)
        gc.collect()
        late, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert scope.checkouts == 26_000
    assert late - early < 20_000  # bytes, for 20,000 checkouts
    engine.dispose()
