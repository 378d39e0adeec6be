"""What only PostgreSQL and the pool together know: locks in the server, on a real one."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import TextClause, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ormscope import PoolScope, proof, server_limits, server_report
from ormscope import server as asking
from ormscope.server import ServerReport
from workshop.database import Server

SELECT = text("select 1")
SLOW = text("select pg_sleep(20)")
ADVISORY = text("select pg_advisory_xact_lock(-4711)")
ROW = text("update products set title = title where sku = (select min(sku) from products)")
PATIENCE = 20  # seconds; only a broken instrument takes so long


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """The scopes of one test are of no concern to the next."""
    yield
    for scope in list(proof.scopes):
        scope.close()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, PATIENCE))


@asynccontextmanager
async def running(scope: PoolScope, *work: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
    """These tasks, until the end of the block; they are named, so that reports can be compared."""
    tasks = [asyncio.create_task(each, name=each.__name__) for each in work]
    try:
        yield
        assert scope.failure is None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await AsyncEngine(scope.engine).dispose()


async def blocked(scope: PoolScope, count: int) -> ServerReport:
    """The report once the server, too, knows of so many statements that they wait for a lock."""
    async with asyncio.timeout(PATIENCE):
        while True:
            report = await scope.ask_server()
            if report.problem or sum(bool(it.lock and it.owner) for it in report.sessions) == count:
                return report


async def order(engine: AsyncEngine, lock: TextClause) -> None:
    """Takes the lock, and needs a second connection once the others wait for it."""
    async with engine.begin() as connection:
        await connection.execute(lock)
        await until(lambda: locked_out(engine) == 2)
        async with engine.connect():
            pass


async def update(engine: AsyncEngine, lock: TextClause) -> None:
    async with engine.begin() as connection:
        await connection.execute(lock)


def locked_out(engine: AsyncEngine) -> int:
    """How many connections have a statement in progress."""
    (scope,) = [each for each in proof.scopes if each.engine is engine.sync_engine]
    return sum(holder.statements for holder in scope.holders)


def pool_of_three(url: str, **options: Any) -> tuple[AsyncEngine, PoolScope]:
    options = {"pool_timeout": None, **options}
    engine = create_async_engine(url, pool_size=3, max_overflow=0, **options)
    return engine, PoolScope(engine, "shop")


async def asked(
    url: str,
    lock: TextClause,
    prepare: Callable[[AsyncEngine], object] = lambda engine: None,
    **options: Any,
) -> ServerReport:
    """The report on a task that has a lock and waits for the pool, whose other tasks wait for the lock."""
    engine, scope = pool_of_three(url, **options)
    prepare(engine)
    async with running(scope, order(engine, lock)):
        await until(lambda: scope.holders and scope.holders[0].last_sql)
        async with running(scope, update(engine, lock), update(engine, lock)):
            await until(lambda: len(scope.waiters) == 1)
            return await blocked(scope, 2)


@pytest.mark.parametrize(
    "lock, words",
    [(ADVISORY, "advisory lock -4711"), (ROW, "row of table products")],
    ids=["advisory", "row"],
)
def test_a_deadlock_through_a_lock_in_the_server(
    server: Server, lock: TextClause, words: str
) -> None:
    report = run(asked(server.url, lock))
    assert report.cause == "deadlock", str(report)
    told = str(report)
    lines = told.splitlines()
    assert lines[0] == "DEADLOCK through the server in shop: 3 of 3 checked out, 1 waiting"
    assert f"lock      {words}" in told
    assert re.search(r"has it    order at test_server.py:\d+, order: async with engine.begin", told)
    assert re.search(
        r"they ask  shop at test_server.py:\d+, order: async with engine.connect", told
    )
    assert re.search(r"blocked   2 × update at test_server.py:\d+, update: await connection", told)
    assert lock.text[:40] in told
    assert lines[-2] == f"  ends      {server_limits.NEVER}"
    assert re.fullmatch(
        r"  fix       order: use the connection .* \(line \d+\) also at line \d+", lines[-1]
    )
    assert told == str(run(asked(server.url, lock)))


def test_who_else_stands_in_line_for_the_lock_does_not_matter(server: Server) -> None:
    """Several processes of one service: what the others do changes nothing for who waits behind them."""

    async def main() -> ServerReport:
        outside = create_async_engine(server.url)
        engine, scope = pool_of_three(server.url)

        async def stand_in_line() -> None:
            async with outside.begin() as connection:
                await connection.execute(ADVISORY)

        async with running(scope, order(engine, ADVISORY)):
            await until(lambda: scope.holders and scope.holders[0].last_sql)
            async with running(scope, stand_in_line()):
                await asyncio.sleep(0.3)
                async with running(scope, update(engine, ADVISORY), update(engine, ADVISORY)):
                    await until(lambda: scope.waiters)
                    report = await blocked(scope, 2)
        await outside.dispose()
        return report

    assert run(main()).cause == "deadlock"


def test_what_moves_between_two_looks_is_no_deadlock(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has the lock is cancelled after the first look, so that the others go on, one after the other."""
    slowly = text("select pg_advisory_xact_lock(-4711), pg_sleep(2)")
    suspect, suspicions = asking.suspect, []

    async def main() -> str:
        engine, scope = pool_of_three(server.url)
        holder = asyncio.create_task(order(engine, ADVISORY))

        def suspect_and_cancel(*about: Any) -> Any:
            suspicions.append(suspect(*about))
            holder.cancel()
            return suspicions[-1]

        await until(lambda: scope.holders and scope.holders[0].last_sql)
        async with running(scope, update(engine, slowly), update(engine, slowly)):
            await until(lambda: scope.waiters)
            assert (await blocked(scope, 2)).cause == "deadlock"
            monkeypatch.setattr(asking, "suspect", suspect_and_cancel)
            return (await scope.ask_server()).cause

    assert "deadlock" not in run(main()) and suspicions != [None]


def set_in_each_connection(engine: AsyncEngine) -> None:
    @event.listens_for(engine.sync_engine, "connect")
    def set_it(connection: Any, record: Any) -> None:
        connection.cursor().execute("set lock_timeout = '7s'")
        connection.commit()


@pytest.mark.parametrize("way", ["connect_args", "event"])
def test_a_time_limit_of_the_server_ends_it(server: Server, way: str) -> None:
    if way == "event":
        report = run(asked(server.url, ADVISORY, set_in_each_connection, pool_timeout=30))
    else:
        limits = {"server_settings": {"lock_timeout": "7s"}}
        report = run(asked(server.url, ADVISORY, connect_args=limits, pool_timeout=30))
    assert report.cause == "deadlock until a timer", str(report)
    assert "ends      when lock_timeout (7s) or pool_timeout (30 s) ends it" in str(report)


def test_a_time_limit_of_the_program_ends_it(server: Server) -> None:
    async def main() -> ServerReport:
        engine, scope = pool_of_three(server.url)

        async def hurry() -> None:
            async with asyncio.timeout(60):
                await order(engine, ADVISORY)

        async with running(scope, hurry()):
            await until(lambda: scope.holders and scope.holders[0].last_sql)
            async with running(scope, update(engine, ADVISORY), update(engine, ADVISORY)):
                await until(lambda: scope.waiters)
                return await blocked(scope, 2)

    report = run(main())
    assert report.cause == "deadlock until a timer" and "a time limit in hurry" in str(report)


def test_a_task_that_will_go_on_is_no_deadlock(server: Server) -> None:
    """The same, but who has the lock sleeps, and is named with the line where it does."""

    async def main() -> ServerReport:
        engine, scope = pool_of_three(server.url)

        async def hold() -> None:
            async with engine.begin() as connection:
                await connection.execute(ADVISORY)
                await asyncio.sleep(20)

        async with running(scope, hold()):
            await until(lambda: scope.holders and scope.holders[0].last_sql)
            async with running(scope, *(update(engine, ADVISORY) for _ in range(3))):
                await until(lambda: scope.waiters and locked_out(engine) == 2)
                return await blocked(scope, 2)

    report = run(main())
    assert report.cause == "blocked"
    told = str(report)
    assert re.search(
        r"blocked   (2 × )?update at test_server.py:\d+, update: .* for advisory lock -4711", told
    )
    assert re.search(
        r"by        hold at test_server.py:\d+, hold: .*; idle in transaction for", told
    )
    assert re.search(r"fix       end the transaction before hold, line \d+", told)


def test_the_table_lock_of_a_migration(server: Server) -> None:
    """All of the pool waits, one of its holders for the pool; but who has the lock is not one of ours."""

    async def main() -> ServerReport:
        outside = create_async_engine(
            server.url, connect_args={"server_settings": {"application_name": "alembic"}}
        )
        engine, scope = pool_of_three(server.url)
        async with outside.begin() as migration:
            await migration.execute(text("lock table sales in access exclusive mode"))
            count = text("select count(*) from sales")
            async with running(scope, *(update(engine, count) for _ in range(4))):
                await until(lambda: scope.waiters and locked_out(engine) == 3)
                report = await blocked(scope, 3)
        await outside.dispose()
        return report

    report = run(main())
    assert report.cause == "blocked", str(report)
    told = str(report)
    assert told.startswith("BLOCKED in the server, shop: 3 of 3 checked out, 1 waiting")
    assert "for table sales, AccessShareLock (select count(*) from sales)" in told
    assert re.search(
        r"by        pid \d+, outside of this program \(alembic\), with AccessExclusiveLock; "
        r"idle in transaction for \d\.\d s \(lock table sales in access exclusive mode\)",
        told,
    )
    assert "pg_terminate_backend" in told


def test_a_slow_statement_is_only_slow(server: Server) -> None:
    async def main() -> ServerReport:
        engine, scope = pool_of_three(server.url)
        async with running(scope, *(update(engine, SLOW) for _ in range(4))):
            await until(lambda: scope.waiters and locked_out(engine) == 3)
            quiet = await scope.ask_server()
            assert quiet.cause == "quiet", str(quiet)
            await asyncio.sleep(server_report._LONG_SECONDS + 0.1)
            return await scope.ask_server()

    report = run(main())
    assert report.cause == "slow", str(report)
    assert re.search(
        r"works     (\d × )?update at test_server.py:\d+, update: .*, 1\.\d s Timeout PgSleep \(select pg_sleep",
        str(report),
    )


def test_idle_in_transaction_names_the_line_that_began_it(server: Server) -> None:
    async def main() -> ServerReport:
        engine, scope = pool_of_three(server.url)

        async def forget_to_commit() -> None:
            async with engine.connect() as connection:
                await connection.execute(SELECT)
                await asyncio.sleep(20)

        async with running(scope, forget_to_commit()):
            await until(lambda: scope.holders and scope.holders[0].last_sql)
            await asyncio.sleep(server_report._LONG_SECONDS + 0.1)
            return await scope.ask_server()

    report = run(main())
    assert report.cause == "idle in transaction"
    assert re.search(
        r"idle      forget_to_commit at test_server.py:\d+, .*: await asyncio.sleep\(20\), 1\.\d s in a transaction "
        r"begun at test_server.py:\d+, forget_to_commit: async with engine.connect\(\) as connection: \(select 1\)",
        str(report),
    )


def test_a_lock_that_a_finished_task_has_left_behind(server: Server) -> None:
    async def main() -> tuple[ServerReport, ServerReport]:
        engine, scope = pool_of_three(server.url)

        async def forget_to_unlock() -> None:
            async with engine.begin() as connection:
                await connection.execute(text("select pg_advisory_lock(7, -1)"))

        await asyncio.create_task(forget_to_unlock(), name="forgetful")
        idle = await scope.ask_server()
        other, waiting = pool_of_three(server.url)
        async with running(waiting, update(other, text("select pg_advisory_lock(7, -1)"))):
            await until(lambda: locked_out(other) == 1)
            stopped = await blocked(waiting, 1)
        await engine.dispose()
        return idle, stopped

    idle, stopped = run(main())
    assert idle.cause == "lock left behind", str(idle)
    left = (
        r"a connection that lies in the pool, last taken by forgetful at test_server.py:\d+, "
        r"forget_to_unlock: async with engine.begin"
    )
    assert re.search(r"left      advisory lock \(7, -1\), by " + left, str(idle))
    assert re.search("by        " + left, str(stopped))
    assert "for advisory lock (7, -1)" in str(stopped)


def test_threads_of_a_synchronous_engine(server: Server) -> None:
    """The threads of the loop's executor are all taken by those who wait."""
    engine = create_engine(
        server.url.replace("asyncpg", "psycopg"), pool_size=3, max_overflow=0, pool_timeout=PATIENCE
    )
    scope = PoolScope(engine, "shop")
    release = threading.Event()

    def order_it() -> None:
        with engine.begin() as connection:
            connection.execute(ADVISORY)
            release.wait(PATIENCE)
            with engine.connect():
                pass

    def update_it() -> None:
        with engine.begin() as connection:
            connection.execute(ADVISORY)

    async def main() -> ServerReport:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(3))
        work = [asyncio.create_task(asyncio.to_thread(order_it))]
        await until(lambda: scope.holders and scope.holders[0].last_sql)
        work += [asyncio.create_task(asyncio.to_thread(update_it)) for _ in range(2)]
        await until(lambda: sum(holder.statements for holder in scope.holders) == 2)
        release.set()
        await until(lambda: scope.waiters)
        report = await blocked(scope, 2)
        # The server ends what nobody else can.
        with create_engine(engine.url).connect() as admin:
            admin.execute(
                text("select pg_terminate_backend(:pid)"),
                {"pid": next(it.pid for it in report.sessions if it.asks)},
            )
        await asyncio.gather(*work, return_exceptions=True)
        return report

    report = run(main())
    engine.dispose()
    assert scope.failure is None
    assert report.cause == "deadlock", str(report)
    assert re.search(
        r"they ask  shop at test_server.py:\d+, order_it: with engine.connect", str(report)
    )
    assert re.search(
        r"blocked   2 × at test_server.py:\d+, update_it: connection.execute", str(report)
    )
    assert f"ends      when pool_timeout ({PATIENCE} s) ends it" in str(report)


def test_other_servers_cannot_tell(tmp_path: Any) -> None:
    async def main() -> ServerReport:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}")
        scope = PoolScope(engine, "shop")
        return await scope.ask_server()

    report = run(main())
    assert report.cause == "unknown"
    assert str(report) == (
        "UNKNOWN what the server does for shop: cannot tell, only PostgreSQL says who waits for whom; this is sqlite."
    )


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_server_that_is_gone_is_no_exception(driver: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    make: Callable[..., Any] = create_async_engine if driver == "asyncpg" else create_engine
    scope = PoolScope(make(f"postgresql+{driver}://me@127.0.0.1:{port}/shop"), "shop")
    report = run(scope.ask_server())
    assert report.cause == "unknown"
    assert "no answer." in str(report) and "refused" in str(report).lower()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_server_that_says_nothing_is_not_waited_for(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_SECONDS", 0.3)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        port = deaf.getsockname()[1]
        make: Callable[..., Any] = create_async_engine if driver == "asyncpg" else create_engine
        scope = PoolScope(make(f"postgresql+{driver}://me@127.0.0.1:{port}/shop"), "shop")
        begun = time.perf_counter()
        report = run(scope.ask_server())
        assert time.perf_counter() - begun < 2
    assert str(report) == "UNKNOWN what the server does for shop: no answer within 0.3 s."


def test_asking_leaves_the_pool_as_it_was(server: Server) -> None:
    """Also one that is full: no connection of it is used, none is opened that stays."""

    async def main() -> None:
        engine, scope = pool_of_three(server.url)
        outside = create_async_engine(server.url)

        async def sessions() -> int:
            async with outside.connect() as connection:
                count = text(
                    "select count(*) from pg_stat_activity where backend_type = 'client backend'"
                )
                return (await connection.execute(count)).scalar_one()

        async with running(scope, *(update(engine, SLOW) for _ in range(4))):
            await until(lambda: scope.waiters and locked_out(engine) == 3)
            counts = vars(scope.ledger.counts).copy()
            before = (engine.pool.status(), scope.holders, scope.waiters, await sessions())
            report = await scope.ask_server()
            assert not report.problem
            after = (engine.pool.status(), scope.holders, scope.waiters, await sessions())
            assert before == after and counts == vars(scope.ledger.counts)
            assert engine.pool is scope.pool and len(scope.deadlocks) == 0
        await outside.dispose()

    run(main())
