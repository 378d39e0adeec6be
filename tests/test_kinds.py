"""Kinds of situations in which an instrument is easily wrong: each member is run, and the verdict held against it."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from typing import Any

import anyio
import pytest
from helpers import PATIENCE, SELECT, cancelled, price_of, run, until
from sqlalchemy import create_engine, event
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.util import await_only

from ormscope import PoolScope, Verdict
from ormscope.metrics import PoolCollector
from workshop.database import Server, start_server

Way = Callable[..., Coroutine[Any, Any, Any]]


def named(way: Any) -> str:
    name: str = way.__name__
    return name


# Time limits of the caller's own.

LIMIT = 30.0  # seconds; not waited for


async def timeout(child: asyncio.Task[None]) -> None:
    async with asyncio.timeout(LIMIT):
        await asyncio.shield(child)


async def wait_for(child: asyncio.Task[None]) -> None:
    await asyncio.wait_for(asyncio.shield(child), LIMIT)


async def wait(child: asyncio.Task[None]) -> None:
    await asyncio.wait({child}, timeout=LIMIT)


async def as_completed(child: asyncio.Task[None]) -> None:
    for first in asyncio.as_completed([child], timeout=LIMIT):
        await first


async def fail_after(child: asyncio.Task[None]) -> None:
    with anyio.fail_after(LIMIT):
        await asyncio.shield(child)


async def move_on_after(child: asyncio.Task[None]) -> None:
    with anyio.move_on_after(LIMIT):
        await asyncio.shield(child)


async def a_cancel_later(child: asyncio.Task[None]) -> None:
    asyncio.get_running_loop().call_later(LIMIT, asyncio.current_task().cancel)  # type: ignore[union-attr]
    await asyncio.shield(child)


async def a_callback_that_cancels_later(child: asyncio.Task[None]) -> None:
    waiting = asyncio.shield(child)
    asyncio.get_running_loop().call_later(LIMIT, lambda: waiting.cancel())
    await waiting


LIMITS = (
    timeout, wait_for, wait, as_completed, fail_after, move_on_after, a_cancel_later,
    a_callback_that_cancels_later,
)  # fmt: skip


async def limited(way: Way, url: str) -> None:
    """A deadlock that a time limit of the caller's own would end."""
    engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=None)
    scope = PoolScope(engine)

    async def hold() -> asyncio.Task[None]:
        async with engine.connect():
            child = asyncio.create_task(price_of(engine))
            with suppress(TimeoutError, asyncio.CancelledError):
                await way(child)
        return child

    holding = asyncio.create_task(hold())
    # Where a loop hides its timers the whole heap is searched for them, which takes the longer the larger it is.
    await until(lambda: scope.waiters and scope.cause() != "saturated")
    for _ in range(10):  # nor is it called anything else later
        verdict = scope.verdict()
        assert verdict.cause == "deadlock until a timer", str(verdict)
        await asyncio.sleep(0.02)
    told = {
        sample.labels.get("cause", sample.name): sample.value
        for metric in PoolCollector(scope).collect()
        for sample in metric.samples
    }
    assert "never" not in str(verdict) and "time limit" in str(verdict)
    # The alert that says "restart" looks at these two.
    assert (told["deadlock"], told["sqlalchemy_pool_deadlocks_total"]) == (0, 0)
    assert told["deadlock until a timer"] == 1
    holding.cancel()
    await (await holding)
    assert scope.deadlock_count == 0
    assert scope.verdict().cause == "healthy"
    await engine.dispose()


@pytest.mark.parametrize("way", LIMITS, ids=named)
def test_what_a_time_limit_ends_is_not_called_endless(way: Way, url: str) -> None:
    run(limited(way, url))


@pytest.mark.parametrize("way", LIMITS, ids=named)
def test_nor_is_it_on_a_loop_that_hides_its_timers(way: Way, url: str) -> None:
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(limited(way, url))


async def timeout_around_a_task(engine: AsyncEngine) -> None:
    async with asyncio.timeout(0.8):
        await asyncio.create_task(twice(engine))


async def timeout_around_a_gather(engine: AsyncEngine) -> None:
    async with asyncio.timeout(0.8):
        await asyncio.gather(asyncio.gather(twice(engine)))


async def timeout_around_a_large_gather(engine: AsyncEngine) -> None:
    async with asyncio.timeout(0.8):
        await asyncio.gather(*(twice(engine) for _ in range(200)))


async def timeout_around_a_group(engine: AsyncEngine) -> None:
    async with asyncio.timeout(0.8), asyncio.TaskGroup() as group:
        group.create_task(twice(engine))


async def timeout_around_anyios_group(engine: AsyncEngine) -> None:
    with anyio.move_on_after(0.8):
        async with anyio.create_task_group() as group:
            group.start_soon(twice, engine)


async def wait_for_around_a_task(engine: AsyncEngine) -> None:
    await asyncio.wait_for(asyncio.create_task(twice(engine)), 0.8)


async def timeout_two_tasks_above(engine: AsyncEngine) -> None:
    async with asyncio.timeout(0.8):
        await asyncio.create_task(timeout_none(engine))


async def timeout_none(engine: AsyncEngine) -> None:
    async with asyncio.timeout(None):
        await asyncio.create_task(twice(engine))


async def wait_around_a_task(engine: AsyncEngine) -> None:
    task = asyncio.create_task(twice(engine))
    await asyncio.wait({task}, timeout=0.8)
    task.cancel()


async def as_completed_around_a_task(engine: AsyncEngine) -> None:
    task = asyncio.create_task(twice(engine))
    try:
        for done in asyncio.as_completed([task], timeout=0.8):
            await done
    finally:
        task.cancel()


async def timeout_around_a_shield(engine: AsyncEngine) -> None:
    task = asyncio.create_task(twice(engine))
    try:
        async with asyncio.timeout(0.8):
            await asyncio.shield(task)
    finally:
        task.cancel()


async def twice(engine: AsyncEngine) -> None:
    async with engine.connect(), engine.connect():
        pass


ENDING = [
    timeout_around_a_task,
    timeout_around_a_gather,
    timeout_around_a_large_gather,
    timeout_around_a_group,
    timeout_around_anyios_group,
    wait_for_around_a_task,
    timeout_two_tasks_above,
]
WAKING = [wait_around_a_task, as_completed_around_a_task, timeout_around_a_shield]


@pytest.mark.parametrize("way", [*ENDING, *WAKING], ids=named)
def test_the_time_limit_of_who_awaits_a_stuck_task_is_told(way: Way, url: str) -> None:
    """One that cancels the stuck task ends the deadlock; one that only wakes who awaits it may end it."""

    async def main() -> Verdict:
        engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=None)
        scope = PoolScope(engine)
        await price_of(
            engine
        )  # so that the limit does not run while the first connection is opened
        task = asyncio.create_task(way(engine))
        await until(lambda: scope.cause() in ("deadlock", "deadlock until a timer"))
        verdict = scope.verdict()
        await asyncio.wait({task})
        task.exception()
        await until(lambda: scope.cause() == "healthy")
        await engine.dispose()
        return verdict

    verdict = run(main())
    assert verdict.cause == ("deadlock until a timer" if way in ENDING else "deadlock")
    assert "never" not in str(verdict) and f"{named(way)}, line" in str(verdict)


def test_pool_timeout_ends_it_before_a_longer_limit_does(url: str) -> None:
    """A job that may last an hour has no part in what the pool's own limit ends after seconds."""

    async def main() -> Verdict:
        engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=2)
        scope = PoolScope(engine)
        task = asyncio.create_task(hurries(engine))
        verdict = await scope.deadlock()
        assert verdict is not None
        await asyncio.wait({task})
        assert isinstance(task.exception(), PoolTimeoutError)
        await engine.dispose()
        return verdict

    async def hurries(engine: AsyncEngine) -> None:
        async with asyncio.timeout(3600):
            await asyncio.create_task(twice(engine))

    verdict = run(main())
    assert verdict.cause == "deadlock" and "pool_timeout (2 s)" in str(verdict)
    assert "hurries" not in str(verdict)


def test_two_deadlocks_are_two(url: str) -> None:
    """A time limit that ends the deadlock of one engine has nothing to do with that of another."""

    async def main() -> None:
        engines = [
            create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=None) for _ in "ab"
        ]
        limited, endless = (
            PoolScope(engine, name) for engine, name in zip(engines, "ab", strict=True)
        )

        async def with_a_limit() -> None:
            async with asyncio.timeout(PATIENCE) as limit:
                limits.append(limit)
                await twice(engines[0])

        limits: list[asyncio.Timeout] = []
        tasks = [asyncio.create_task(with_a_limit()), asyncio.create_task(twice(engines[1]))]
        await until(lambda: limited.waiters)  # its connection may be the later one to be opened
        await endless.deadlock()
        await until(lambda: limited.cause() == "deadlock until a timer")
        limits[0].reschedule(asyncio.get_running_loop().time())
        await asyncio.wait({tasks[0]})
        tasks[0].exception()
        assert [limited.verdict().cause, endless.verdict().cause] == ["healthy", "deadlock"]
        assert [limited.deadlock_count, endless.deadlock_count] == [0, 1]
        await cancelled(*tasks)
        for engine in engines:
            await engine.dispose()

    run(main())


# What may wake a task beside tasks.


async def first_of_a_task_and_a_future(child: asyncio.Task[None]) -> None:
    stop = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.3, stop.set_result, None)
    await asyncio.wait({child, stop}, return_when=asyncio.FIRST_COMPLETED)


async def first_of_a_task_and_an_event(child: asyncio.Task[None]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.3, stop.set)
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({child, waiting}, return_when=asyncio.FIRST_COMPLETED)


async def first_of_a_task_and_a_thread(child: asyncio.Task[None]) -> None:
    work = asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.3)
    await asyncio.wait({child, work}, return_when=asyncio.FIRST_COMPLETED)


async def next_of_a_task_and_a_future(child: asyncio.Task[None]) -> None:
    stop = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.3, stop.set_result, None)
    for first in asyncio.as_completed([child, stop]):
        await first
        break


async def a_group_with_a_task_that_fails(child: asyncio.Task[None]) -> None:
    async def fail() -> None:
        await asyncio.sleep(0.3)
        raise ValueError

    async def wait_for_it() -> None:
        await asyncio.shield(child)

    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            group.create_task(wait_for_it())


async def gather_with_a_future_that_fails(child: asyncio.Task[None]) -> None:
    other = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.3, other.set_exception, ValueError())
    with pytest.raises(ValueError):
        await asyncio.gather(child, other)


async def gather_in_a_gather_with_a_future(child: asyncio.Task[None]) -> None:
    other = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.3, other.set_exception, ValueError())
    with pytest.raises(ValueError):
        await asyncio.gather(child, asyncio.gather(other))


async def a_future_of_the_users_own(child: asyncio.Task[None]) -> None:
    class Promise(asyncio.Future[None]):
        _children = (child,)

    promise = Promise()
    asyncio.get_running_loop().call_later(0.3, promise.set_result, None)
    await promise


async def a_group_of_the_users_own(child: asyncio.Task[None]) -> None:
    class Group:
        async def __aenter__(self) -> None:
            self._tasks = {child}
            self._on_completed_fut = asyncio.get_running_loop().create_future()

        async def __aexit__(self, *error: object) -> None:
            await self._on_completed_fut

    group = Group()
    async with group:
        asyncio.get_running_loop().call_later(0.3, group._on_completed_fut.set_result, None)


async def a_wait_of_the_users_own(child: asyncio.Task[None]) -> None:
    async def _wait(fs: Any) -> None:
        waiter = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.3, waiter.set_result, None)
        await waiter

    await _wait({child})


async def shield_of_a_future(child: asyncio.Task[None]) -> None:
    other = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.3, other.set_result, None)
    await asyncio.shield(other)


async def a_task_and_a_callback(child: asyncio.Task[None]) -> None:
    done = asyncio.get_running_loop().create_future()
    child.add_done_callback(lambda _: None if done.done() else done.set_result(None))
    asyncio.get_running_loop().call_later(0.3, done.set_result, None)
    await done


OTHERS = (
    first_of_a_task_and_a_future, first_of_a_task_and_an_event, first_of_a_task_and_a_thread,
    next_of_a_task_and_a_future, a_group_with_a_task_that_fails,
    gather_with_a_future_that_fails, gather_in_a_gather_with_a_future, a_future_of_the_users_own,
    a_group_of_the_users_own, a_wait_of_the_users_own, shield_of_a_future, a_task_and_a_callback,
)  # fmt: skip


@pytest.mark.parametrize("way", OTHERS, ids=named)
def test_what_something_else_may_wake_is_not_proved(way: Way, url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=20)
        scope = PoolScope(engine)
        async with engine.connect() as connection:
            await connection.execute(SELECT)
            child = asyncio.create_task(price_of(engine))
            await until(lambda: scope.waiters)
            asked = asyncio.get_running_loop().run_in_executor(None, _ask_often, scope)
            await way(child)
        await child
        assert "deadlock" not in {cause.partition(" until")[0] for cause in await asked}
        assert scope.deadlocks == []
        await engine.dispose()

    run(main())


def _ask_often(scope: PoolScope) -> list[str]:
    causes = []
    for _ in range(5):
        time.sleep(0.04)
        causes.append(scope.cause())
    return causes


@pytest.mark.parametrize("way", OTHERS, ids=named)
def test_what_is_just_being_woken_is_not_proved(way: Way, url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=20)
        scope = PoolScope(engine)
        loop = asyncio.get_running_loop()
        causes = set()

        def ask() -> None:
            # In each round of the loop: so also between what happens and the callback that tells of it.
            nonlocal next_round
            causes.add(scope.cause())
            next_round = loop.call_soon(ask)

        async with engine.connect() as connection:
            await connection.execute(SELECT)
            child = asyncio.create_task(price_of(engine))
            await until(lambda: scope.waiters)
            next_round = loop.call_soon(ask)
            await way(child)
            next_round.cancel()
        await child
        assert causes and "deadlock" not in {cause.partition(" until")[0] for cause in causes}
        assert scope.deadlocks == []
        await engine.dispose()

    run(main())


# Connections that are handed on: by whatever way, whoever took them is not whoever gives them back.

kept_in_context: contextvars.ContextVar[Any] = contextvars.ContextVar("kept_in_context")
kept_in_module: dict[int, Any] = {}


async def as_an_argument(connection: AsyncConnection, go_on: Way) -> None:
    asyncio.get_running_loop().create_task(go_on(connection))


async def in_a_queue(connection: AsyncConnection, go_on: Way) -> None:
    queue: asyncio.Queue[AsyncConnection] = asyncio.Queue()
    queue.put_nowait(connection)
    asyncio.get_running_loop().call_later(0.2, lambda: asyncio.create_task(go_on(queue)))


async def in_an_attribute(connection: AsyncConnection, go_on: Way) -> None:
    class Request:
        def __init__(self, connection: AsyncConnection) -> None:
            self.connection = connection

    asyncio.get_running_loop().create_task(go_on(Request(connection)))


async def in_a_module(connection: AsyncConnection, go_on: Way) -> None:
    kept_in_module[id(connection)] = connection
    asyncio.get_running_loop().create_task(go_on(id(connection)))


async def in_a_context(connection: AsyncConnection, go_on: Way) -> None:
    token = kept_in_context.set(connection)
    asyncio.get_running_loop().create_task(go_on(None))
    kept_in_context.reset(token)


async def in_a_callback(connection: AsyncConnection, go_on: Way) -> None:
    asyncio.get_running_loop().call_later(
        0.3, functools.partial(asyncio.ensure_future, go_on(connection))
    )


async def in_an_exit_stack(connection: AsyncConnection, go_on: Way) -> None:
    stack = AsyncExitStack()
    stack.push_async_callback(connection.close)
    asyncio.get_running_loop().create_task(go_on(stack))


HANDED_ON = (
    as_an_argument, in_a_queue, in_an_attribute, in_a_module, in_a_context, in_a_callback,
    in_an_exit_stack,
)  # fmt: skip


async def _give_back(held: Any) -> None:
    await asyncio.sleep(0.3)
    if held is None:
        held = kept_in_context.get()
    elif isinstance(held, int):
        held = kept_in_module.pop(held)
    elif isinstance(held, asyncio.Queue):
        held = await held.get()
    elif isinstance(held, AsyncExitStack):
        await held.aclose()
        return
    elif not isinstance(held, AsyncConnection):
        held = held.connection
    await held.close()


@pytest.mark.parametrize("way", HANDED_ON, ids=named)
def test_a_connection_that_was_handed_on_is_no_deadlock(way: Way, url: str) -> None:
    async def main() -> list[str]:
        engine = create_async_engine(url, pool_size=2, max_overflow=0, pool_timeout=None)
        scope, causes = PoolScope(engine), []

        async def accept() -> None:
            while True:
                await way(await engine.connect(), _give_back)

        accepting = asyncio.create_task(accept())
        for _ in range(10):
            await asyncio.sleep(0.1)
            causes.append(await asyncio.to_thread(scope.cause))
        await cancelled(accepting)
        assert scope.deadlocks == [] and scope.holds.count >= 2
        await until(lambda: not scope.checked_out)
        await engine.dispose()
        return causes

    causes = run(main())
    assert not {"deadlock", "deadlock until a timer", "leaked"} & set(causes), causes


def test_a_dependency_in_a_worker_thread_is_no_deadlock(server: Server) -> None:
    """FastAPI's way: `def` dependencies take it in a thread, which goes on to the next; the endpoint is a task."""
    engine = create_engine(
        server.url.replace("asyncpg", "psycopg"), pool_size=2, max_overflow=0, pool_timeout=PATIENCE
    )
    scope, wanted = PoolScope(engine), "held across a foreign await"

    async def main() -> tuple[list[Verdict], int]:
        loop, found, served = asyncio.get_running_loop(), [], 0
        workers, closers = ThreadPoolExecutor(2), ThreadPoolExecutor(2)
        seen = asyncio.Event()

        async def request() -> None:
            nonlocal served
            for _ in range(2):
                connection = await loop.run_in_executor(workers, engine.connect)
                await asyncio.sleep(1.0)
                while not seen.is_set():  # a look takes long on a busy machine
                    await asyncio.sleep(1.0)
                await loop.run_in_executor(closers, connection.close)
                served += 1

        requests = [asyncio.create_task(request()) for _ in range(4)]
        while not all(task.done() for task in requests):
            await asyncio.sleep(0.1)
            found.append(await asyncio.to_thread(scope.verdict))
            if found[-1].cause == wanted:
                seen.set()
        return found, served

    found, served = run(main())
    engine.dispose()
    assert (served, scope.deadlocks) == (8, [])
    held = next(verdict for verdict in found if verdict.cause == wanted)
    assert "request: await asyncio.sleep(1.0)" in str(held)


# Several pools.


@pytest.mark.parametrize("number", [2, 3])
def test_a_ring_of_pools(url: str, number: int) -> None:
    async def main() -> list[Verdict]:
        names = ["orders", "audit", "stock"][:number]
        engines = [create_async_engine(url, pool_size=1, max_overflow=0) for _ in names]
        scopes = [PoolScope(engine, name) for engine, name in zip(engines, names, strict=True)]
        meet = asyncio.Barrier(number)

        async def both(first: AsyncEngine, second: AsyncEngine) -> None:
            async with first.connect():
                await meet.wait()
                await price_of(second)

        tasks = [
            asyncio.create_task(both(engine, engines[(position + 1) % number]))
            for position, engine in enumerate(engines)
        ]
        await asyncio.gather(*(scope.deadlock() for scope in scopes))
        found = [scope.verdict() for scope in scopes]
        assert [scope.deadlock_count for scope in scopes] == [1] * number
        await cancelled(*tasks)
        for engine in engines:
            await engine.dispose()
        return found

    for verdict in run(main()):
        report = str(verdict)
        assert verdict.cause == "deadlock" and "of the same pool" not in report
        (other,) = {holding.waits.pool for holding in verdict.holding if holding.waits}
        assert other != verdict.pool and f"ask {other}" in report
        assert "one order everywhere" in report and " tasks × " not in report


def test_who_queues_in_another_pool_is_told(url: str) -> None:
    """No deadlock: the other pool's holder is at work, and will be done."""

    async def main() -> Verdict:
        orders = create_async_engine(url, pool_size=1, max_overflow=0)
        audit = create_async_engine(url, pool_size=1, max_overflow=0)
        scope, other = PoolScope(orders, "orders"), PoolScope(audit, "audit")

        async def place() -> None:
            async with orders.connect():
                await price_of(audit)

        async with audit.connect():
            tasks = [asyncio.create_task(place()) for _ in range(2)]
            await until(lambda: scope.waiters and other.waiters)
            await asyncio.sleep(0.2)
            verdict = scope.verdict()
        await asyncio.gather(*tasks)
        assert scope.deadlock_count == other.deadlock_count == 0
        await orders.dispose()
        await audit.dispose()
        return verdict

    report = str(run(main()))
    assert "1 of the holders are in line for a connection of audit" in report


# Sessions that a child began, and that live on.


async def in_a_task(session: AsyncSession) -> None:
    await asyncio.create_task(session.execute(SELECT))  # type: ignore[arg-type]


async def in_a_wait_for(session: AsyncSession) -> None:
    await asyncio.wait_for(session.execute(SELECT), 5)


async def in_a_gather(session: AsyncSession) -> None:
    await asyncio.gather(session.execute(SELECT))


class Loader:
    """A session in an object, begun by one task and used by others, as data loaders have it."""

    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    async def load(self) -> None:
        await self.session.execute(SELECT)


async def in_a_loader(session: AsyncSession) -> None:
    await asyncio.create_task(Loader(session).load())


async def in_a_fixture(session: AsyncSession) -> None:
    async def fixture() -> AsyncIterator[AsyncSession]:
        await session.execute(SELECT)
        yield session

    await asyncio.create_task(anext(fixture()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "way", [in_a_task, in_a_wait_for, in_a_gather, in_a_loader, in_a_fixture], ids=named
)
def test_a_session_that_a_child_began_is_not_leaked(way: Way, url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=20)
        scope = PoolScope(engine)
        async with AsyncSession(engine) as session:
            await way(session)
            assert scope.verdict().cause == "healthy"
            asking = asyncio.create_task(price_of(engine))
            await until(lambda: scope.waiters)
            causes = await asyncio.to_thread(_ask_often, scope)
            assert set(causes) <= {"saturated", "held across a foreign await"}, causes
        await asking
        async with AsyncSession(engine) as session:
            await way(session)
            nested = asyncio.create_task(price_of(engine))
            await until(lambda: scope.waiters)
            proof = asyncio.create_task(scope.deadlock())
            await asyncio.wait({nested, proof}, return_when=asyncio.FIRST_COMPLETED, timeout=0.3)
            assert not proof.done(), "a time limit would have ended it"
            nested.cancel()
        await cancelled(nested, proof)
        await engine.dispose()

    run(main())


async def warm_up(url: str) -> None:
    """gather makes a task of each connect(); the list is that of whoever awaited it."""
    engine = create_async_engine(url, pool_size=3, max_overflow=0, pool_timeout=20)
    scope = PoolScope(engine)
    connections = await asyncio.gather(*(engine.connect() for _ in range(3)))
    asking = asyncio.create_task(price_of(engine))
    await until(lambda: scope.waiters)
    causes = await asyncio.to_thread(_ask_often, scope)
    assert "leaked" not in causes
    for connection in connections:
        await connection.close()
    await asking
    await engine.dispose()


def test_sessions_that_a_warm_up_took_are_not_leaked(url: str) -> None:
    run(warm_up(url))


def test_nor_are_they_on_a_loop_whose_steps_have_no_frames(url: str) -> None:
    """Below a task's own functions then comes whoever started the loop: he has taken nothing."""
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(warm_up(url))


# Asked where people ask.


def test_asked_in_except_the_verdict_still_tells_of_the_deadlock(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=2, max_overflow=0, pool_timeout=0.4)
        scope, meet, told = PoolScope(engine), asyncio.Barrier(2), []

        async def order() -> None:
            try:
                async with engine.connect():
                    await meet.wait()
                    await price_of(engine)
            except PoolTimeoutError:
                told.append(scope.verdict())

        async def customer() -> None:
            await asyncio.sleep(0.1)
            try:
                await price_of(engine)
            except PoolTimeoutError:
                told.append(scope.verdict())

        await asyncio.gather(order(), order(), customer())
        assert told and {verdict.cause for verdict in told} == {"deadlock"}
        assert scope.verdict().cause == "healthy", "who was not part of it is not told of it"
        await price_of(engine)
        await engine.dispose()

    run(main())


def test_each_loop_is_watched_by_itself(url: str) -> None:
    """One engine in several asyncio.run(): a worker, or tests."""
    engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=5)
    scope = PoolScope(engine)

    async def nested() -> None:
        async with engine.connect():
            tasks = [asyncio.create_task(price_of(engine))]
            proof = asyncio.create_task(scope.deadlock())
            await asyncio.sleep(0.05)
            waiting = asyncio.gather(*tasks)
            await asyncio.wait({waiting, proof}, return_when=asyncio.FIRST_COMPLETED)
            await cancelled(waiting, proof)

    async def holds_and_waits() -> Verdict | None:
        async def order() -> None:
            async with engine.connect():
                await price_of(engine)

        ordering = asyncio.create_task(order())
        verdict = await scope.deadlock()
        await cancelled(ordering)
        return verdict

    for number in range(3):
        verdict = asyncio.run(asyncio.wait_for(holds_and_waits(), 5))
        assert verdict is not None and verdict.cause == "deadlock"
        assert scope.deadlock_count == number + 1
        engine.sync_engine.dispose(close=False)


# The server.


def test_a_server_that_stops_is_remembered() -> None:
    """The pool is warm; a place in it that is connected anew counts, and one good connect is no cure."""
    server = start_server()

    async def main() -> list[Verdict]:
        engine = create_async_engine(server.url, pool_size=2, max_overflow=0, pool_pre_ping=True)
        scope, found = PoolScope(engine), []
        await asyncio.gather(price_of(engine), price_of(engine))
        assert scope.verdict().cause == "healthy"
        await asyncio.to_thread(server.stop)
        for _ in range(4):
            with pytest.raises(OSError):
                await price_of(engine)
        found.append(scope.verdict())
        assert scope.connects_failed == 4
        url = engine.url

        @event.listens_for(engine.sync_engine, "do_connect")
        def elsewhere(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
            return other.sync_engine.pool._invoke_creator(record)  # type: ignore[attr-defined]

        other = create_async_engine(f"sqlite+aiosqlite:///{url.database}.not-used")
        event.remove(engine.sync_engine, "do_connect", elsewhere)
        await engine.dispose()
        return found

    (verdict,) = run(main())
    assert verdict.cause == "connects failing"
    assert "4 of the last" in str(verdict) and "look at the server" in str(verdict)


# Advice is tried: each `fix` is applied to what it was given for.


def test_the_advice_for_a_cancelled_connect_cures(url: str) -> None:
    async def main(warm: bool) -> Verdict | None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=None)
        scope = PoolScope(engine)
        if warm:
            await price_of(engine)

        @event.listens_for(engine.sync_engine, "do_connect")
        def slowly(*about: Any) -> None:
            await_only(asyncio.sleep(0.2))

        async def order() -> None:
            async with engine.connect():
                await asyncio.sleep(0.2)

        first = asyncio.create_task(order())
        await asyncio.sleep(0.05)
        second = asyncio.create_task(price_of(engine))
        await asyncio.sleep(0.05)
        first.cancel()
        done, _ = await asyncio.wait({second}, timeout=0.6)
        verdict = None if done else scope.verdict()
        await cancelled(first, second)
        await engine.dispose()
        return verdict

    ill = run(main(warm=False))
    assert ill is not None and ill.cause == "connects failing"
    assert "open the pool's connections before the load comes" in str(ill)
    assert "look at the server" not in str(ill)
    assert run(main(warm=True)) is None


@pytest.mark.parametrize("threads", [False, True], ids=["tasks", "threads"])
def test_the_advice_for_barging_cures(server: Server, threads: bool) -> None:
    def main(pause: bool) -> tuple[int, Verdict]:
        return in_threads(pause) if threads else run(in_tasks(pause))

    async def in_tasks(pause: bool) -> tuple[int, Verdict]:
        engine = create_async_engine(server.url, pool_size=2, max_overflow=0, pool_timeout=0.8)
        scope = PoolScope(engine)

        async def work() -> None:
            async with AsyncSession(engine) as session:
                while True:
                    await session.execute(SELECT)
                    await session.commit()
                    if pause:
                        await asyncio.sleep(0)

        working = [asyncio.create_task(work()) for _ in range(2)]
        await asyncio.sleep(0.1)
        customers = [asyncio.create_task(price_of(engine)) for _ in range(4)]
        await asyncio.sleep(0.5)
        verdict = scope.verdict()
        served = await asyncio.gather(*customers, return_exceptions=True)
        await cancelled(*working)
        await engine.dispose()
        return served.count(None), verdict

    def in_threads(pause: bool) -> tuple[int, Verdict]:
        engine = create_engine(
            server.url.replace("asyncpg", "psycopg"), pool_size=1, max_overflow=0, pool_timeout=20
        )
        scope, stop, found = PoolScope(engine), threading.Event(), []

        def work() -> None:
            with engine.connect() as connection:
                connection.execute(SELECT)
            while not stop.is_set():
                connection = engine.connect()
                connection.execute(SELECT)
                connection.close()
                if pause:
                    time.sleep(0.001)

        def customer() -> None:
            with engine.connect():
                found.append(time.perf_counter())

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.2)
        asked = time.perf_counter()
        customers = [threading.Thread(target=customer) for _ in range(3)]
        for customer in customers:
            customer.start()
        time.sleep(0.5)
        verdict = scope.verdict()
        served = sum(at - asked < 0.6 for at in found)
        stop.set()
        for other in (thread, *customers):
            other.join()
        engine.dispose()
        return served, verdict

    served, ill = main(pause=False)
    if threads and served:
        pytest.skip("on this machine the interpreter lets the others in by itself")
    assert served == 0
    assert ill.cause == "unfair", str(ill)
    assert ("time.sleep(0.001)" if threads else "await asyncio.sleep(0)") in str(ill)
    served, cured = main(pause=True)
    assert served == (3 if threads else 4) and cured.cause != "unfair"


def test_no_number_is_named_where_connections_are_taken_one_after_another(url: str) -> None:
    async def main(size: int) -> Verdict | None:
        engine = create_async_engine(url, pool_size=size, max_overflow=0, pool_timeout=None)
        scope = PoolScope(engine)

        async def take_all() -> None:
            async with AsyncExitStack() as stack:
                for _ in range(8):
                    await stack.enter_async_context(engine.connect())

        taking = asyncio.create_task(take_all())
        proof = asyncio.create_task(scope.deadlock())
        await asyncio.wait({taking, proof}, return_when=asyncio.FIRST_COMPLETED)
        verdict = proof.result() if proof.done() else None
        await cancelled(taking, proof)
        await engine.dispose()
        return verdict

    for size in (5, 7):
        verdict = run(main(size))
        assert verdict is not None and " tasks × " not in str(verdict)
        assert "give each connection back before the next is taken" in str(verdict)
    assert run(main(8)) is None


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_the_formula_names_a_number_that_is_enough(url: str, levels: int) -> None:
    """As deep as they were seen to go; and one level deeper, the second number."""

    async def main(size: int) -> Verdict | None:
        engine = create_async_engine(url, pool_size=size, max_overflow=0, pool_timeout=None)
        scope, meets = PoolScope(engine), [asyncio.Barrier(3) for _ in range(levels - 1)]

        async def take(level: int) -> None:
            async with engine.connect():
                if level == levels:
                    return
                if level == 1:
                    await meets[0].wait()
                await take(level + 1)

        everybody = asyncio.gather(*(take(1) for _ in range(3)))
        proof = asyncio.create_task(scope.deadlock())
        await asyncio.wait({everybody, proof}, return_when=asyncio.FIRST_COMPLETED)
        verdict = proof.result() if proof.done() else None
        await cancelled(everybody, proof)
        await engine.dispose()
        return verdict

    size, seen = 3, []
    while (verdict := run(main(size))) is not None:
        seen.append(verdict.depth)
        assert f"{verdict.needed} connections" in str(verdict)
        size = verdict.needed
    assert seen[0] == 2 and size <= 3 * (levels - 1) + 1


def test_the_end_of_a_session_that_begins_is_followed(url: str) -> None:
    """`async with Session.begin()` ends in a task of its own that SQLAlchemy shields."""

    async def main() -> Verdict | None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=PATIENCE)
        scope, sessions = PoolScope(engine), async_sessionmaker(engine)

        async def order() -> None:
            async with sessions.begin() as session:
                await session.execute(SELECT)

                @event.listens_for(session.sync_session, "before_commit")
                def note(_: Any) -> None:
                    await_only(price_of(engine))

        ordering = asyncio.create_task(order())
        verdict = await scope.deadlock()
        # Also the task in which the session ends, which is shielded from who cancels the other one.
        await cancelled(ordering, *asyncio.all_tasks() - {asyncio.current_task()})
        await engine.dispose()
        return verdict

    verdict = run(main())
    assert verdict is not None and verdict.cause == "deadlock"
    assert "price_of" in str(verdict)
