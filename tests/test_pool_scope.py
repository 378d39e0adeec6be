"""PoolScope on the real server, and on file SQLite: who holds, who waits, and what is a deadlock."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest
from helpers import PATIENCE, SELECT, cancelled, price_of, run, until
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from sqlalchemy import create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool

from ormscope import PoolScope
from ormscope.lab import storm
from workshop.database import Server

# Ways for a task that holds a connection to wait for one that another line asks for.


async def directly(engine: AsyncEngine) -> None:
    await price_of(engine)


async def through_gather(engine: AsyncEngine) -> None:
    await asyncio.gather(price_of(engine), price_of(engine))


async def through_task_group(engine: AsyncEngine) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(price_of(engine))


async def through_a_task(engine: AsyncEngine) -> None:
    await asyncio.create_task(price_of(engine))


async def through_wait(engine: AsyncEngine) -> None:
    await asyncio.wait({asyncio.create_task(price_of(engine))})


async def through_wait_for(engine: AsyncEngine) -> None:
    await asyncio.wait_for(price_of(engine), None)


async def through_shield(engine: AsyncEngine) -> None:
    await asyncio.shield(price_of(engine))


async def through_as_completed(engine: AsyncEngine) -> None:
    for first in asyncio.as_completed([price_of(engine), price_of(engine)]):
        await first


async def through_anyio(engine: AsyncEngine) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(price_of, engine)


async def through_gather_of_gathers(engine: AsyncEngine) -> None:
    await asyncio.gather(asyncio.gather(price_of(engine)), asyncio.gather(price_of(engine)))


async def fail() -> None:
    raise ValueError


async def through_gather_of_which_some_failed(engine: AsyncEngine) -> None:
    await asyncio.gather(fail(), price_of(engine), return_exceptions=True)


async def through_wait_of_which_some_failed(engine: AsyncEngine) -> None:
    await asyncio.wait({asyncio.create_task(child) for child in (fail(), price_of(engine))})


async def through_wait_for_a_failure_of_which_some_are_done(engine: AsyncEngine) -> None:
    children = {asyncio.create_task(child) for child in (asyncio.sleep(0), price_of(engine))}
    await asyncio.wait(children, return_when=asyncio.FIRST_EXCEPTION)


async def through_two_levels(engine: AsyncEngine) -> None:
    await asyncio.gather(through_task_group(engine))


WAYS = (
    directly,
    through_gather,
    through_task_group,
    through_a_task,
    through_wait,
    through_wait_for,
    through_two_levels,
    through_shield,
    through_as_completed,
    through_anyio,
    through_gather_of_gathers,
    through_gather_of_which_some_failed,
    through_wait_of_which_some_failed,
    through_wait_for_a_failure_of_which_some_are_done,
)


async def hold_and_ask(
    engine: AsyncEngine,
    way: Callable[[AsyncEngine], Coroutine[Any, Any, None]],
    meet: asyncio.Barrier,
) -> None:
    async with engine.connect() as outer:
        await outer.execute(SELECT)
        await meet.wait()
        await way(engine)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_deadlock_is_proved_however_the_holder_waits(
    url: str, way: Callable[[AsyncEngine], Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=3, max_overflow=0, pool_timeout=None)
        scope, meet = PoolScope(engine), asyncio.Barrier(3)
        holders = [
            asyncio.create_task(hold_and_ask(engine, way, meet), name=f"order {n}")
            for n in range(3)
        ]
        verdict = await scope.deadlock()
        assert verdict.cause == "deadlock"
        assert verdict.checked_out == verdict.capacity == 3
        assert {holder.owner for holder in verdict.holding} == {"order 0", "order 1", "order 2"}
        assert {holder.places[0].function for holder in verdict.holding} == {"hold_and_ask"}
        assert {holder.places[0].text for holder in verdict.holding} == {
            "async with engine.connect() as outer:"
        }
        assert {holder.waits.places[0].text for holder in verdict.holding if holder.waits} == {
            "async with engine.connect() as connection:"
        }
        assert (verdict.tasks, verdict.depth, verdict.needed) == (3, 2, 4)
        assert "never: pool_timeout is None" in str(verdict)
        await cancelled(*holders)
        while scope.waiters or scope.checked_out:  # children that nobody cancels go on
            await asyncio.sleep(0.01)
        assert scope.verdict().cause == "healthy"
        await engine.dispose()

    run(main())


# Ways to ask for a connection that hide the line from whoever only follows coroutines.


async def rows_of(engine: AsyncEngine) -> AsyncIterator[int]:
    async with engine.connect() as inner:  # in an async generator
        yield (await inner.execute(SELECT)).scalar_one()


async def in_a_generator(engine: AsyncEngine) -> None:
    async for _ in rows_of(engine):
        pass


async def in_an_await(engine: AsyncEngine) -> None:
    inner = await engine.connect()  # in an await
    await inner.close()


def look_up(session: Session) -> None:
    session.execute(SELECT)  # in a function that SQLAlchemy runs


async def in_run_sync(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await session.run_sync(look_up)


@pytest.mark.parametrize(
    "way", [in_a_generator, in_an_await, in_run_sync], ids=lambda x: x.__name__
)
def test_the_line_that_asks_is_found_wherever_it_stands(
    url: str, way: Callable[[AsyncEngine], Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=2, max_overflow=0, pool_timeout=None)
        scope, meet = PoolScope(engine), asyncio.Barrier(2)
        tasks = [asyncio.create_task(hold_and_ask(engine, way, meet)) for _ in range(2)]
        verdict = await scope.deadlock()
        asked = {holder.waits.places[0].text for holder in verdict.holding if holder.waits}
        assert len(asked) == 1
        assert re.search(r"# (in an? \w+)", asked.pop()), "not the line of the innermost function"
        assert {holder.places[0].text for holder in verdict.holding} == {
            "async with engine.connect() as outer:"
        }
        await cancelled(*tasks)
        await engine.dispose()

    run(main())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_one_connection_more_and_there_is_no_deadlock(
    url: str, way: Callable[[AsyncEngine], Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=4, max_overflow=0, pool_timeout=None)
        scope, meet = PoolScope(engine), asyncio.Barrier(3)
        await asyncio.gather(*(hold_and_ask(engine, way, meet) for _ in range(3)))
        assert scope.deadlocks == []
        assert scope.checked_out == 0
        await engine.dispose()

    run(main())


def test_a_holder_that_waits_for_the_database_is_no_deadlock(server: Server) -> None:
    """The pool is full and a task waits, but PostgreSQL will answer the holder."""

    async def main() -> None:
        engine = create_async_engine(server.url, pool_size=2, max_overflow=0)
        scope = PoolScope(engine)

        async def slow() -> None:
            async with engine.connect() as connection:
                await connection.execute(text("select pg_sleep(0.3)"))

        tasks = [asyncio.create_task(slow()) for _ in range(4)]
        while (
            len(scope.waiters) < 2
            or [holder.last_sql for holder in scope.holders] != ["select pg_sleep(0.3)"] * 2
        ):
            await asyncio.sleep(0.01)
        assert scope.verdict().cause == "saturated"
        assert {holder.places[0].text for holder in scope.verdict().holding} == {
            "async with engine.connect() as connection:"
        }
        await asyncio.gather(*tasks)
        assert scope.deadlocks == []
        await engine.dispose()

    run(main())


def test_a_holder_that_somebody_outside_can_wake_is_no_deadlock(url: str) -> None:
    """One of two holders sleeps on an Event: whoever sets it is not known, so nothing is proved."""

    async def main() -> None:
        engine = create_async_engine(url, pool_size=2, max_overflow=0)
        scope, meet, event = PoolScope(engine), asyncio.Barrier(2), asyncio.Event()

        async def on_event(engine: AsyncEngine) -> None:
            await event.wait()

        tasks = [
            asyncio.create_task(hold_and_ask(engine, on_event, meet)),
            asyncio.create_task(hold_and_ask(engine, directly, meet)),
        ]
        await until(lambda: scope.waiters)
        await asyncio.sleep(0.2)  # several of the scope's own looks
        assert scope.deadlocks == []
        event.set()
        await asyncio.gather(*tasks)
        await engine.dispose()

    run(main())


def test_deadlock_that_closes_late_is_found(url: str) -> None:
    """The last holder falls asleep on a task, not on the pool, after everybody else has been waiting a while."""

    async def main() -> None:
        engine = create_async_engine(url, pool_size=2, max_overflow=0, pool_timeout=None)
        scope, meet, event = PoolScope(engine), asyncio.Barrier(2), asyncio.Event()

        async def late(engine: AsyncEngine) -> None:
            child = asyncio.create_task(price_of(engine))
            await event.wait()
            await child

        tasks = [
            asyncio.create_task(hold_and_ask(engine, late, meet)),
            asyncio.create_task(hold_and_ask(engine, directly, meet)),
        ]
        while len(scope.waiters) < 2:
            await asyncio.sleep(0.01)
        assert scope.deadlocks == []
        event.set()
        assert (await scope.deadlock()).cause == "deadlock"
        await cancelled(*tasks)
        await engine.dispose()

    run(main())


def test_connection_handed_on_to_a_running_task_is_no_deadlock(url: str) -> None:
    """The task that took the connection waits, but another one uses it and will give it back."""

    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=None)
        scope, release = PoolScope(engine), asyncio.Event()
        connection = await engine.connect()

        async def use() -> None:
            await connection.execute(SELECT)
            await release.wait()
            await connection.close()

        user = asyncio.create_task(use())
        while scope.holders[0].last_user.subject is not user:
            await asyncio.sleep(0.01)
        asker = asyncio.create_task(price_of(engine))
        asyncio.get_running_loop().call_later(0.2, release.set)
        await asker
        await user
        assert scope.deadlocks == []
        await engine.dispose()

    run(main())


def test_deadlock_across_two_pools(url: str, tmp_path: Path) -> None:
    """Orders hold A and ask B, refunds hold B and ask A: each pool alone looks merely busy."""

    async def main() -> None:
        a = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=None)
        b = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=None)
        scopes, meet = (PoolScope(a, "a"), PoolScope(b, "b")), asyncio.Barrier(2)

        async def hold_one_ask_other(held: AsyncEngine, asked: AsyncEngine) -> None:
            async with held.connect():
                await meet.wait()
                await price_of(asked)

        tasks = [
            asyncio.create_task(hold_one_ask_other(a, b)),
            asyncio.create_task(hold_one_ask_other(b, a)),
        ]
        found = await asyncio.gather(*(scope.deadlock() for scope in scopes))
        assert [verdict.cause for verdict in found] == ["deadlock", "deadlock"]
        await cancelled(*tasks)
        await a.dispose()
        await b.dispose()

    run(main())


def test_timeout_ends_a_deadlock_and_the_pool_looks_healthy(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=2, max_overflow=0, pool_timeout=0.3)
        scope, meet = PoolScope(engine), asyncio.Barrier(2)
        outcomes = await asyncio.gather(
            *(hold_and_ask(engine, directly, meet) for _ in range(2)), return_exceptions=True
        )
        failed = [outcome for outcome in outcomes if isinstance(outcome, PoolTimeoutError)]
        assert failed and scope.timeouts == len(failed)
        assert len(scope.deadlocks) == 1
        assert "pool_timeout (0.3 s)" in str(scope.deadlocks[0])
        assert scope.verdict().cause == "healthy"
        assert (scope.checked_out, scope.waiters, scope.holders) == (0, [], [])
        assert scope.longest_wait >= 0.25
        await engine.dispose()

    run(main())


def test_connection_of_a_task_that_has_ended_is_leaked(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0)
        scope, kept = PoolScope(engine), []

        async def forget() -> None:
            connection = await engine.connect()
            await connection.execute(SELECT)
            kept.append(connection)

        await asyncio.create_task(forget())
        waiter = asyncio.create_task(price_of(engine))
        await until(lambda: scope.waiters)
        verdict = scope.verdict()
        assert verdict.cause == "leaked"
        assert verdict.holding[0].places[0].function.endswith("forget")
        await kept.pop().close()
        await waiter
        assert scope.deadlocks == []
        await engine.dispose()

    run(main())


def test_the_scope_keeps_no_task_alive(url: str) -> None:
    """An instrument that pinned its tasks would pin their frames, and cause the leak it looks for."""

    async def main() -> None:
        engine = create_async_engine(url)
        scope, kept = PoolScope(engine), []

        async def forget() -> None:
            kept.append(await engine.connect())

        await asyncio.create_task(forget())
        await asyncio.sleep(0)  # until then the loop itself holds on to the task that woke this one
        gc.collect()
        assert scope.holders[0].owner.subject is None
        await kept.pop().close()
        await engine.dispose()

    run(main())


def test_curve_has_every_change(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=2, max_overflow=1)
        scope = PoolScope(engine, samples=True)
        async with engine.connect(), engine.connect(), engine.connect():
            waiter = asyncio.create_task(price_of(engine))
            await until(lambda: scope.waiters)
        await waiter
        assert scope.capacity == 3
        assert max(sample.checked_out for sample in scope.samples) == 3
        assert max(sample.waiting for sample in scope.samples) == 1
        assert scope.samples[-1].checked_out == scope.samples[-1].waiting == 0
        times = [sample.time for sample in scope.samples]
        assert times == sorted(times)
        assert scope.served_after_wait == 1
        await engine.dispose()

    run(main())


def test_a_disposed_engine_goes_on_being_watched(url: str) -> None:
    """`dispose()` gives the engine a new pool; a gauge on the old one would be wrong for ever."""

    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0)
        scope = PoolScope(engine)
        async with engine.connect():
            await engine.dispose()
            assert scope.checked_out == 0
            async with engine.connect():
                assert scope.checked_out == 1
        await engine.dispose()
        assert scope.checked_out == 0

    run(main())


def test_a_scope_leaves_no_trace(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url)
        watched = (engine.pool, engine.dialect)
        before = [(type(thing), dict(vars(thing))) for thing in watched]
        scope = PoolScope(engine)
        assert type(engine.pool) is AsyncAdaptedQueuePool
        scope.close()
        scope.close()
        after = [(type(thing), dict(vars(thing))) for thing in watched]
        assert after == before
        async with engine.connect():
            assert scope.holders == []
        await engine.dispose()

    run(main())


def test_pools_without_a_limit_never_wait(url: str) -> None:
    async def main() -> None:
        for options in ({"poolclass": NullPool}, {"max_overflow": -1}, {"pool_size": 0}):
            engine = create_async_engine(url, **options)
            scope, meet = PoolScope(engine, samples=True), asyncio.Barrier(4)
            await asyncio.gather(*(hold_and_ask(engine, directly, meet) for _ in range(4)))
            assert scope.capacity is None
            assert max(sample.checked_out for sample in scope.samples) >= 4
            assert (scope.checked_out, scope.deadlocks, scope.served_after_wait) == (0, [], 0)
            await engine.dispose()

    run(main())


@pytest.mark.parametrize("waiting", [0, 1, 3])
def test_a_pool_below_is_asked_who_waits(server: Server, waiting: int) -> None:
    """Over psycopg_pool nobody waits in SQLAlchemy's pool; it is not healthy for that."""

    async def main() -> None:
        plain = server.url.replace("+asyncpg", "")
        options = {"min_size": 1, "max_size": 1, "close_returns": True, "open": False}
        async with AsyncConnectionPool(plain, name="below", **options) as pool:
            engine = create_async_engine(
                "postgresql+psycopg://", poolclass=NullPool, async_creator=pool.getconn
            )
            scope = PoolScope(engine)
            async with engine.connect() as connection:
                await connection.execute(SELECT)
                tasks = [asyncio.create_task(price_of(engine)) for _ in range(waiting)]
                await until(lambda: pool.get_stats()["requests_waiting"] == waiting)
                verdict = scope.verdict()
                assert verdict.below_waiting == waiting
                assert verdict.cause == ("unknown" if waiting else "healthy")
                told = f"{waiting} wait in the pool below, AsyncConnectionPool 'below'"
                assert (told in str(verdict)) is bool(waiting)
            await asyncio.gather(*tasks)
            assert scope.verdict().cause == "healthy"
            await engine.dispose()

    run(main())


def test_a_creator_that_names_no_pool_is_no_pool_below(server: Server) -> None:
    """Also not where a variable of it is assigned later, or where something else has statistics."""

    class Driver:
        def get_stats(self) -> str:
            return "not ours to ask"

        def connect(self) -> object:
            return psycopg.connect(server.url.replace("+asyncpg", ""))

    driver = Driver()

    def creator() -> object:
        return driver.connect() if driver else later

    engine = create_engine("postgresql+psycopg://", poolclass=NullPool, creator=creator)
    scope = PoolScope(engine)
    with engine.connect() as connection:
        connection.execute(SELECT)
        assert (scope.verdict().cause, scope.verdict().below) == ("healthy", "")
    assert not scope.failure
    bound = create_engine("postgresql+psycopg://", poolclass=NullPool, creator=driver.connect)
    assert PoolScope(bound).verdict().below == ""
    later = None


def test_a_pool_below_a_synchronous_engine(server: Server) -> None:
    plain = server.url.replace("+asyncpg", "")
    with ConnectionPool(plain, min_size=1, max_size=1, close_returns=True, open=True) as pool:
        engine = create_engine("postgresql+psycopg://", poolclass=NullPool, creator=pool.getconn)
        scope = PoolScope(engine)
        with engine.connect() as connection:
            connection.execute(SELECT)
            assert scope.verdict().below.startswith("ConnectionPool ")
        assert scope.verdict().cause == "healthy"


@pytest.mark.parametrize("threads, deadlocks", [(3, False), (4, True)])
def test_threads_on_a_synchronous_pool(server: Server, threads: int, deadlocks: bool) -> None:
    """Four connections: three threads that nest pass, four do not, exactly as tasks."""
    engine = create_engine(
        server.url.replace("asyncpg", "psycopg"), pool_size=4, max_overflow=0, pool_timeout=3
    )
    scope, meet = PoolScope(engine), threading.Barrier(threads)

    def hold_and_ask_in_thread(number: int) -> None:
        with engine.connect() as outer:
            outer.execute(SELECT)
            meet.wait(PATIENCE)
            with engine.connect() as inner:
                inner.execute(SELECT)

    run(storm(hold_and_ask_in_thread, threads, threads=threads))
    assert len(scope.deadlocks) == deadlocks
    if deadlocks:
        assert {
            holder.places[0].function.rpartition(".")[2] for holder in scope.deadlocks[0].holding
        } == {"hold_and_ask_in_thread"}
    engine.dispose()


def test_no_false_deadlock_in_busy_storms(server: Server) -> None:
    """Random storms on small pools that are always full, with gather, errors and cancellations, but never nested."""

    async def main() -> None:
        dice = random.Random(1)
        for _ in range(15):
            engine = create_async_engine(
                server.url,
                pool_size=dice.randint(1, 3),
                max_overflow=dice.randint(0, 2),
                pool_timeout=PATIENCE,
            )
            scope = PoolScope(engine)

            async def work(number: int, engine: AsyncEngine = engine) -> None:
                async with engine.connect() as connection:
                    await connection.execute(SELECT)
                    if dice.random() < 0.3:
                        await asyncio.sleep(dice.random() / 50)
                    if dice.random() < 0.1:
                        raise RuntimeError("as it happens")
                await asyncio.gather(price_of(engine), price_of(engine))

            tasks = [asyncio.create_task(work(number)) for number in range(40)]
            # Who is cancelled while connecting wakes nobody: where all are, the others would wait for the timeout.
            await until(lambda scope=scope: scope.checkouts)
            await asyncio.sleep(0.02)
            for task in dice.sample(tasks, 5):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert scope.deadlocks == []
            assert scope.checked_out == 0
            assert scope.served_after_wait > 0, "a storm in which nobody waits proves nothing"
            await engine.dispose()

    run(main())
