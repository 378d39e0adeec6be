"""Who can still use a connection: what has it without being able to do anything with it is nobody."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
from helpers import SELECT, cancelled, price_of, run, until
from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from ormscope import PoolScope, reach
from ormscope.reach import Users, users_of
from workshop.database import Server


def users_now(scope: PoolScope) -> Users:
    """Who can use the one connection that is checked out, asked by whoever runs at this moment."""
    (holder,) = scope.holders
    (users,) = users_of([holder.handle])
    return users


def test_who_has_a_coroutine_that_another_task_runs_is_no_user(url: str) -> None:
    """As with the test runner of anyio: one task hands a coroutine to another, and waits for what comes of it."""

    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0)
        scope = PoolScope(engine)
        handed: asyncio.Queue[tuple[Coroutine[Any, Any, Users], asyncio.Future[Users]]] = (
            asyncio.Queue()
        )

        async def work() -> Users:
            async with engine.connect() as connection:
                await connection.execute(SELECT)
                return users_now(scope)

        async def runner() -> None:
            coroutine, outcome = await handed.get()
            outcome.set_result(await coroutine)

        async def hands_on() -> Users:
            outcome: asyncio.Future[Users] = asyncio.get_running_loop().create_future()
            coroutine = work()
            handed.put_nowait((coroutine, outcome))
            return await outcome

        async with engine.connect():  # somebody has waited, so the loop is known
            running, waiting = asyncio.create_task(runner()), asyncio.create_task(hands_on())
            await until(lambda: scope.waiters)
        users = await waiting
        await running
        assert running in users.everybody
        assert waiting not in users.everybody
        await engine.dispose()

    run(main())


class _Keeping(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


async def give_back(records: list[logging.LogRecord]) -> None:
    """Give back the connection that was left in the frames of a logged error."""
    (record,) = records
    assert record.exc_info is not None
    trace = record.exc_info[2]
    assert trace is not None and trace.tb_next is not None
    connection: AsyncConnection = trace.tb_next.tb_frame.f_locals["connection"]
    await connection.close()


def test_a_log_record_with_an_error_is_told_and_nobody_uses_it(url: str) -> None:
    """Its traceback has the frames, and so the connection, for as long as the handler keeps it."""
    logger, handler = logging.getLogger("tests.reach"), _Keeping()

    async def fails(engine: AsyncEngine) -> None:
        connection: AsyncConnection = await engine.connect()
        await connection.execute(SELECT)
        raise ValueError

    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0)
        scope = PoolScope(engine)
        try:
            await fails(engine)
        except ValueError:
            logger.exception("it failed")

        # Of each Logger, and so of each engine and whoever has one, a way leads to the handlers and their records.
        async def sleeps(_logger: logging.Logger) -> None:
            await asyncio.sleep(60)

        sleeping = asyncio.create_task(sleeps(logger))
        await asyncio.sleep(0)
        users = users_now(scope)
        assert users.elsewhere == "a log record"
        assert sleeping not in users.everybody
        sleeping.cancel()
        await give_back(handler.records)
        await engine.dispose()

    logger.addHandler(handler)
    try:
        run(main())
    finally:
        logger.removeHandler(handler)


def test_a_registry_of_connections_is_not_followed_for_long(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a set within a listener the way leads to the engine and to everything: nothing is proved, and each look
    at the heap stops the program, so there are few, and they are not made anew for each verdict.
    """
    looks = 0
    count_referrers = reach._count_referrers

    def count(*arguments: Any) -> None:
        nonlocal looks
        looks += 1
        count_referrers(*arguments)

    monkeypatch.setattr(reach, "_count_referrers", count)

    async def main() -> None:
        engine = create_async_engine(url, pool_size=8, max_overflow=0, pool_timeout=30)
        in_use: set[Connection] = set()

        @event.listens_for(engine.sync_engine, "before_cursor_execute")
        def begins(connection: Connection, *_about: Any) -> None:
            in_use.add(connection)

        @event.listens_for(engine.sync_engine, "rollback")
        def ends(connection: Connection) -> None:
            in_use.discard(connection)

        scope = PoolScope(engine)

        async def nested() -> None:
            async with engine.connect() as connection:
                await connection.execute(SELECT)
                await price_of(engine)

        tasks = [asyncio.create_task(nested()) for _ in range(16)]
        await until(lambda: len(scope.holders) == 8 and len(scope.waiters) == 16)
        verdicts = [scope.verdict()]
        first = looks
        for _ in range(10):
            await asyncio.sleep(0.05)
            verdicts.append(scope.verdict())
        assert first > 0
        assert looks - first < 30
        assert "deadlock" not in {verdict.cause for verdict in verdicts}
        assert "who could give back 8 of them" in str(verdicts[-1])
        assert "8 of the holders are in line" in str(verdicts[-1])
        await cancelled(*tasks)
        await engine.dispose()

    run(main())


class Kept:
    """What a program keeps for as long as it runs."""

    connections: ClassVar[list[AsyncConnection]] = []
    by_name: ClassVar[dict[str, Any]] = {}


by_name: dict[str, Any] = {"none": []}  # with something in it: the collector knows no others


@pytest.fixture
def frozen() -> Iterator[None]:
    """As servers do that fork their workers."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(
    "put, take",
    [
        (Kept.connections.append, Kept.connections.pop),
        (partial(Kept.by_name.__setitem__, "one"), partial(Kept.by_name.pop, "one")),
        (partial(by_name.__setitem__, "one"), partial(by_name.pop, "one")),
    ],
    ids=["a list of a class", "a dict of a class", "a dict of a module"],
)
@pytest.mark.usefixtures("frozen")
def test_what_is_kept_by_something_frozen_can_be_given_back(
    put: Callable[[AsyncConnection], None], take: Callable[[], AsyncConnection], server: Server
) -> None:
    """Whoever holds it waits for another one, but somebody else gives it back."""

    async def main() -> None:
        engine = create_async_engine(server.url, pool_size=1, max_overflow=0, pool_timeout=60)
        scope = PoolScope(engine)

        async def hold_and_wait() -> None:
            connection = await engine.connect()
            await connection.execute(SELECT)
            put(connection)
            await price_of(engine)

        stuck = asyncio.create_task(hold_and_wait())
        await until(lambda: scope.waiters)
        seen = set()
        for _ in range(10):
            await asyncio.sleep(0.1)
            seen.add(scope.verdict().cause)
        assert not seen & {"deadlock", "leaked", "held across a foreign await"}
        await take().close()
        await stuck
        assert scope.deadlocks == []
        await engine.dispose()

    run(main())


@pytest.mark.usefixtures("frozen")
def test_a_deadlock_is_proved_beside_what_is_frozen(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=2, max_overflow=0, pool_timeout=60)
        scope = PoolScope(engine)
        meet = asyncio.Barrier(2)

        async def nested() -> None:
            async with engine.connect() as connection:
                await connection.execute(SELECT)
                await meet.wait()
                await price_of(engine)

        stuck = [asyncio.create_task(nested()) for _ in range(2)]
        await until(lambda: scope.verdict().cause == "deadlock")
        await cancelled(*stuck)
        await engine.dispose()

    run(main())
