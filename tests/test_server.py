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
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import PATIENCE, SELECT, cancelled, run, until
from sqlalchemy import TextClause, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ormscope import PoolScope, Verdict, internals, proof, server_limits, server_report
from ormscope import server as asking
from ormscope.lab.waits_picture import draw_waits
from ormscope.server import ServerReport
from workshop.database import Server

SLOW = text("select pg_sleep(20)")
ADVISORY = text("select pg_advisory_xact_lock(-4711)")
ROW = text("update products set title = title where sku = (select min(sku) from products)")


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scopes of one test are of no concern to the next; a machine that is busy may take its time to answer."""
    monkeypatch.setattr(asking, "_SECONDS", PATIENCE)
    yield
    for scope in proof.scopes():
        scope.close()


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
    (scope,) = [each for each in proof.scopes() if each.engine is engine.sync_engine]
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
        assert scope.cause() == "deadlock" and scope.deadlock_count == 1, str(scope.verdict())
        told = str(scope.verdict())
        assert re.search(r"in server 2 at test_server.py:\d+, update_it: connection.execute", told)
        # The server ends what nobody else can.
        with create_engine(engine.url).connect() as admin:
            admin.execute(
                text("select pg_terminate_backend(:pid)"),
                {"pid": next(it.pid for it in report.sessions if it.asks)},
            )
        await asyncio.gather(*work, return_exceptions=True)
        assert scope.proof is None
        return report

    report = run(main())
    assert scope.verdict().cause == "healthy"
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


# What the scope knows afterwards.

TABLE = text("lock table sales in access exclusive mode")


@asynccontextmanager
async def deadlocked(
    engine: AsyncEngine, scope: PoolScope, *work: Coroutine[Any, Any, Any]
) -> AsyncIterator[ServerReport]:
    """The first of three has a lock and waits for the pool, the others wait for the lock; yields what was told."""
    first, *others = work
    async with running(scope, first):
        await until(lambda: scope.holders and scope.holders[0].last_sql)
        async with running(scope, *others):
            await until(lambda: scope.waiters and locked_out(engine) == len(others))
            yield await blocked(scope, len(others))


def at_work(engine: AsyncEngine, lock: TextClause) -> list[Coroutine[Any, Any, Any]]:
    return [order(engine, lock), update(engine, lock), update(engine, lock)]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("lock", [ADVISORY, ROW, TABLE], ids=["advisory", "row", "table"])
def test_the_verdict_knows_what_was_proved_until_it_is_broken(
    server: Server, driver: str, lock: TextClause, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> tuple[str, str]:
        engine, scope = pool_of_three(server.url.replace("asyncpg", driver))
        assert scope.cause() == "healthy"
        waiting = asyncio.create_task(scope.deadlock())
        async with deadlocked(engine, scope, *at_work(engine, lock)) as report:
            assert report.cause == "deadlock", str(report)
            assert scope.cause() == scope.verdict().cause == scope.verdict_now().cause == "deadlock"
            assert await waiting is scope.deadlocks[0] is await scope.deadlock()
            again = await blocked(scope, 2)
            assert again.cause == "deadlock" and scope.deadlock_count == 1, str(again)
            told = str(scope.verdict())
        assert scope.cause() == scope.verdict().cause == "healthy"
        assert scope.proof is None and scope.deadlock_count == len(scope.deadlocks) == 1
        return told, str(scope.deadlocks[0])

    told, first = run(main())
    assert told == first and caplog.messages.count(told) == 1
    lines = told.splitlines()
    assert lines[0] == "DEADLOCK in shop (hold-and-wait): 3 of 3 checked out, 1 waiting"
    assert lines[1] == (
        "Every connection is held by a task that waits for another one, or in the server for a lock that such a task "
        "has."
    )
    assert re.search(r"held      2 at test_server.py:\d+, update: async with engine.begin", told)
    assert re.search(r"\n            1 at test_server.py:\d+, order: async with engine.begin", told)
    assert re.search(r"they ask  1 at test_server.py:\d+, order: async with engine.connect", told)
    assert re.search(r"in server 2 at test_server.py:\d+, update: await connection.execute", told)
    assert lines[-2] == f"  ends      {server_limits.NEVER}"
    assert re.fullmatch(
        r"  fix       order: use the connection .* \(line \d+\) also at line \d+", lines[-1]
    )
    assert "formula" not in told


def test_a_statement_that_ends_breaks_it_though_no_connection_comes_back(server: Server) -> None:
    """The server is told to end one of the statements, and its task goes on in a savepoint."""

    async def main() -> None:
        engine, scope = pool_of_three(server.url)
        outside = create_async_engine(server.url)
        went_on = asyncio.Event()

        async def try_it(lock: TextClause) -> None:
            async with engine.begin() as connection:
                with pytest.raises(DBAPIError):
                    async with connection.begin_nested():
                        await connection.execute(lock)
                went_on.set()
                await asyncio.sleep(PATIENCE)

        work = order(engine, ADVISORY), update(engine, ADVISORY), try_it(ADVISORY)
        async with deadlocked(engine, scope, *work) as report:
            assert report.cause == scope.cause() == "deadlock"
            (pid,) = [it.pid for it in report.sessions if it.place.function == "try_it"]
            async with outside.connect() as connection:
                await connection.execute(text("select pg_cancel_backend(:pid)"), {"pid": pid})
            await went_on.wait()
            assert scope.checked_out == 3 and scope.proof is None
            assert "deadlock" not in scope.cause()
            assert (await blocked(scope, 1)).cause == "blocked"
        await outside.dispose()

    run(main())


def test_two_deadlocks_are_two(server: Server) -> None:
    """Of two pools that have nothing to do with each other; one of them begins its connections with a limit."""

    async def main() -> None:
        shop, of_shop = pool_of_three(server.url)
        limits = {"server_settings": {"lock_timeout": "61s"}}
        stock, _ = pool_of_three(server.url, connect_args=limits)
        of_stock = next(it for it in proof.scopes() if it.engine is stock.sync_engine)
        of_stock.name = "stock"
        other = text("select pg_advisory_xact_lock(4712)")
        async with (
            deadlocked(stock, of_stock, *at_work(stock, other)) as first,
            deadlocked(shop, of_shop, *at_work(shop, ADVISORY)) as second,
        ):
            assert first.cause == of_stock.cause() == "deadlock until a timer", str(first)
            assert second.cause == of_shop.cause() == "deadlock", str(second)
            assert "4712" not in str(second) and len(second.sessions) == 3
            assert of_shop.proof is not of_stock.proof
            assert of_shop.deadlock_count == 1 and of_stock.deadlock_count == 0
            of_shop.proof = of_stock.proof = None
            # Who asks about one of them learns of both, with the limits of each.
            await blocked(of_shop, 2)
            assert of_shop.cause() == "deadlock"
            assert of_stock.cause() == "deadlock until a timer"
            assert "lock_timeout (61s)" in str(of_stock.verdict())
            assert "lock_timeout (" not in str(of_shop.verdict())

    run(main())


def test_two_scopes_of_one_engine_both_know(server: Server) -> None:
    async def main() -> None:
        engine = create_async_engine(server.url, pool_size=3, max_overflow=0, pool_timeout=None)
        scope, other = PoolScope(engine, "shop"), PoolScope(engine, "shop again")

        async def first() -> None:
            async with engine.begin() as connection:
                await connection.execute(ADVISORY)
                await until(lambda: sum(it.statements for it in scope.holders) == 2)
                async with engine.connect():
                    pass

        async with running(scope, first()):
            await until(lambda: scope.holders and scope.holders[0].last_sql)
            async with running(scope, update(engine, ADVISORY), update(engine, ADVISORY)):
                await until(lambda: scope.waiters)
                report = await blocked(scope, 2)
                assert report.cause == scope.cause() == other.cause() == "deadlock", str(report)
                for verdict in (scope.verdict(), other.verdict()):
                    assert re.search(r"in server 2 at test_server.py:\d+, update", str(verdict))
        assert scope.proof is other.proof is None
        assert scope.cause() == other.cause() == "healthy"

    run(main())


def test_a_circle_within_the_server_is_the_servers_to_end(server: Server) -> None:
    async def main() -> None:
        # It waits so long before it looks.
        patient = {"server_settings": {"deadlock_timeout": "60s"}}
        engine, scope = pool_of_three(server.url, connect_args=patient)
        meet = asyncio.Barrier(3)

        async def crosswise(first: int, second: int) -> None:
            lock = "select pg_advisory_xact_lock(:number)"
            async with engine.begin() as connection:
                await connection.execute(text(lock), {"number": first})
                await meet.wait()
                await connection.execute(text(lock), {"number": second})

        async def behind() -> None:
            async with engine.begin() as connection:
                await meet.wait()  # else it might have the lock before they do
                await until(lambda: locked_out(engine) == 2)
                await connection.execute(text("select pg_advisory_xact_lock(1)"))

        work = [crosswise(1, 2), crosswise(2, 1), behind(), update(engine, SELECT)]
        async with running(scope, *work):
            await until(lambda: scope.waiters and locked_out(engine) == 3)
            report = await blocked(scope, 3)
            assert report.cause == "blocked", str(report)
            assert scope.proof is None

    run(main())


# What may end it.


async def verdict_on(
    url: str, *first: str, prepare: Callable[[AsyncEngine], object] | None = None, **options: Any
) -> tuple[str, Verdict]:
    """The report and the verdict on a deadlock one of whose statements came after these."""
    engine, scope = pool_of_three(url, **options)
    if prepare is not None:
        prepare(engine)

    async def prepared() -> None:
        async with engine.begin() as connection:
            for statement in first:
                await connection.execute(text(statement))
            await connection.execute(ADVISORY)

    work = order(engine, ADVISORY), update(engine, ADVISORY), prepared()
    async with deadlocked(engine, scope, *work) as report:
        verdict = scope.verdict()
        assert report.cause == verdict.cause, str(report)
        assert scope.deadlock_count == (verdict.cause == "deadlock")
        return str(report), verdict


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(
    "statement, words",
    [
        ("SET lock_timeout = '61s'", "lock_timeout (61s, if"),
        ("set session statement_timeout to 61000", "statement_timeout (61000, if"),
        ("SET LOCAL lock_timeout TO '61s'", "lock_timeout (61s, if"),
        ("select set_config('lock_timeout', '61s', false)", "lock_timeout (if"),
    ],
)
def test_a_time_limit_that_a_statement_sets(
    server: Server, driver: str, statement: str, words: str
) -> None:
    report, verdict = run(verdict_on(server.url.replace("asyncpg", driver), statement))
    assert verdict.cause == "deadlock until a timer", report
    assert f"ends      when {words}" in report and f"ends      when {words}" in str(verdict)


def test_a_limit_that_only_others_have_set_counts_for_them_alone(server: Server) -> None:
    """SET LOCAL ends with the transaction, SET not; what sets no limit ends nothing."""

    async def once(engine: AsyncEngine, statement: str) -> None:
        async with engine.begin() as connection:
            await connection.execute(text(statement))

    async def main(statement: str) -> Verdict:
        engine, scope = pool_of_three(server.url)
        await once(engine, statement)
        async with deadlocked(engine, scope, *at_work(engine, ADVISORY)):
            return scope.verdict()

    assert run(main("set local lock_timeout = '61s'")).cause == "deadlock"
    assert run(main("set lock_timeout = 0")).cause == "deadlock"
    # The first connection is that of the task that waits for the pool: a limit on statements does not concern it.
    assert run(main("set lock_timeout = '61s'")).cause == "deadlock"
    verdict = run(main("set idle_in_transaction_session_timeout = '61s'"))
    assert verdict.cause == "deadlock until a timer"
    assert "idle_in_transaction_session_timeout (61s, if" in str(verdict)


def test_what_was_set_before_anybody_looked_is_not_known(server: Server) -> None:
    async def main() -> tuple[ServerReport, Verdict]:
        engine = create_async_engine(server.url, pool_size=3, max_overflow=0, pool_timeout=None)
        async with engine.connect() as connection:
            await connection.execute(text("set lock_timeout = '61s'"))
            await connection.commit()
        scope = PoolScope(engine, "shop")
        async with deadlocked(engine, scope, *at_work(engine, ADVISORY)) as report:
            return report, scope.verdict()

    report, verdict = run(main())
    assert report.cause == verdict.cause == "deadlock until a timer", str(report)
    assert f"ends      when {server_limits.UNSEEN} ends it" in str(report)
    assert f"ends      when {server_limits.UNSEEN} ends it" in str(verdict)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_a_time_limit_of_whoever_waits_in_the_server(server: Server, driver: str) -> None:
    async def main() -> tuple[str, Verdict]:
        engine, scope = pool_of_three(server.url.replace("asyncpg", driver))

        async def hurry() -> None:
            async with asyncio.timeout(61):
                await update(engine, ADVISORY)

        work = order(engine, ADVISORY), update(engine, ADVISORY), hurry()
        async with deadlocked(engine, scope, *work) as report:
            return str(report), scope.verdict()

    report, verdict = run(main())
    assert verdict.cause == "deadlock until a timer", report
    assert re.search(r"ends      when a time limit in hurry, line \d+ ends it", report)
    assert re.search(r"ends      when a time limit in hurry, line \d+ ends it", str(verdict))


def test_a_time_limit_of_the_driver(server: Server) -> None:
    report, verdict = run(verdict_on(server.url, connect_args={"command_timeout": 61}))
    assert verdict.cause == "deadlock until a timer", report
    words = (
        "ends      when command_timeout (61 s) or a time limit set outside the user's code ends it"
    )
    assert words in report and words in str(verdict)


def test_a_time_limit_of_the_driver_on_a_loop_that_does_not_tell(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(internals, "timers", lambda loop: None)  # as with uvloop
    monkeypatch.setattr(internals, "ready_handles", lambda loop: None)
    report, verdict = run(verdict_on(server.url, connect_args={"command_timeout": 61}))
    assert verdict.cause == "deadlock until a timer", report
    assert "ends      when command_timeout (61 s) ends it" in report


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_asked_from_the_loop_of_another_thread(server: Server, driver: str) -> None:
    """As from a debugger's console: the second look is on the loop where it might move."""

    async def main() -> None:
        engine, scope = pool_of_three(server.url.replace("asyncpg", driver))
        async with deadlocked(engine, scope, *at_work(engine, ADVISORY)):
            scope.proof = None
            report = await asyncio.to_thread(asyncio.run, blocked(scope, 2))
            assert report.cause == scope.cause() == "deadlock", str(report)

    run(main())


def test_asked_from_another_thread_about_a_loop_that_is_blocked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> ServerReport:
        engine, scope = pool_of_three(server.url)
        async with deadlocked(engine, scope, *at_work(engine, ADVISORY)):
            scope.proof = None
            with ThreadPoolExecutor(1) as threads:
                report = threads.submit(asyncio.run, scope.ask_server()).result(PATIENCE)
            assert scope.proof is None
            return report

    monkeypatch.setattr(asking, "_ATTEMPTS", 1)
    assert run(main()).cause == "blocked"


def test_the_picture_of_a_deadlock_says_who_waits_in_the_server(server: Server) -> None:
    verdict = run(verdict_on(server.url))[1]
    recording = SimpleNamespace(deadlocks=[verdict], title="")
    told = draw_waits(recording).alternative  # type: ignore[arg-type]
    assert "wait for one more of the same pool, 2 of them in the server for a lock;" in told


def test_a_time_limit_above_is_told_and_the_deadlock_counted(server: Server) -> None:
    async def main() -> tuple[str, Verdict]:
        engine, scope = pool_of_three(server.url)

        async def hurry() -> None:
            task = asyncio.create_task(update(engine, ADVISORY), name="update")
            try:
                await asyncio.wait({task}, timeout=61)
            finally:
                await cancelled(task)

        work = order(engine, ADVISORY), update(engine, ADVISORY), hurry()
        async with deadlocked(engine, scope, *work) as report:
            assert scope.deadlock_count == 1
            return str(report), scope.verdict()

    report, verdict = run(main())
    assert verdict.cause == "deadlock", report
    assert re.search(
        r"ends      when a time limit in hurry, line \d+, whose task may cancel one of them, ends",
        report,
    )
    assert re.search(
        r"ends      when hurry, line \d+, which awaits it with a time limit, may cancel it; no time limit of the",
        str(verdict),
    )


class Counter:
    count = 0

    def more(self, connection: Any, record: Any, proxy: Any) -> None:
        self.count += 1


def count(connection: Any, record: Any, proxy: Any) -> None:
    Counter.count += 1


def set_a_limit(connection: Any, record: Any, proxy: Any) -> None:
    connection.cursor().execute("set lock_timeout = '61s'")


def set_it_in_a_function(*about: Any) -> None:
    (lambda: set_a_limit(*about))()


@pytest.mark.parametrize(
    "listener, may_set",
    [
        (count, False),
        (Counter().more, False),
        (set_a_limit, True),
        (set_it_in_a_function, True),
        (partial(set_a_limit), True),
    ],
)
def test_a_listener_to_checkouts_may_set_a_time_limit(
    server: Server, listener: Callable[..., None], may_set: bool
) -> None:
    def listen(engine: AsyncEngine) -> None:
        event.listen(engine.sync_engine, "checkout", listener)

    report, verdict = run(verdict_on(server.url, prepare=listen))
    assert (verdict.cause == "deadlock until a timer") is may_set, report
    assert (server_limits.UNSEEN_AT_CHECKOUT in str(verdict)) is may_set


@pytest.mark.parametrize(
    "statement, parameters, names",
    [
        ("select 1", [], []),
        ("select job_timeout from jobs", [], []),
        ("set lock_timeout = 0", [], []),
        ("SET LOCAL lock_timeout TO DEFAULT", [], []),
        ("set lock_timeout to '0ms'", [], []),
        ("SHOW lock_timeout", [], []),
        ("RESET lock_timeout", [], []),
        ("select set_config('app.user', 'Ada', true)", [], []),
        ("SELECT set_config($1, $2, $3)", ["app.user", "Ada", True], []),
        ("SELECT set_config($1, $2, $3)", ["LOCK_TIMEOUT", "5s", True], ["lock_timeout"]),
        ("Set Lock_Timeout='5s'; set statement_timeout = 0", [], ["lock_timeout"]),
        ("set lock_timeout = 5000", [], ["lock_timeout"]),
        (
            "set local transaction_timeout to '5s'; set idle_session_timeout=1",
            [],
            ["idle_session_timeout", "transaction_timeout"],
        ),
        ("do $$ begin perform set_config('lock_timeout', '5s', false); end $$", [], ["lock_timeout"]),
    ],
)  # fmt: skip
def test_which_statements_may_set_a_time_limit(
    statement: str, parameters: list[Any], names: list[str]
) -> None:
    found = server_limits.settings_in(statement, parameters)
    assert sorted(setting.name for setting in found) == names
