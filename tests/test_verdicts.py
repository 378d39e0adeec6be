"""Each cause of trouble, reproduced: the verdict gives it its own name, and no other."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import PATIENCE, SELECT, cancelled, price_of, run, until
from leftovers import await_that
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util import await_only

from ormscope import PoolScope, Verdict, proof
from ormscope.loops import watch_of
from workshop.database import Server

ROOT = Path(__file__).parents[1]
SLOW = text("select pg_sleep(2)")


@asynccontextmanager
async def crowd(
    engine: AsyncEngine, scope: PoolScope, *holders: asyncio.Task[Any]
) -> AsyncIterator[None]:
    """Three more tasks that want a connection, while these tasks have all of them."""
    await until(lambda: scope.checked_out == scope.capacity)
    tasks = [asyncio.create_task(price_of(engine)) for _ in range(3)]
    await until(lambda: len(scope.waiters) >= 3)
    yield
    await cancelled(*tasks, *holders)


async def healthy(engine: AsyncEngine, scope: PoolScope) -> Verdict:
    async with engine.connect() as connection:
        await connection.execute(SELECT)
        await asyncio.sleep(0.2)  # held, and nobody wants it
        return scope.verdict()


async def saturated(engine: AsyncEngine, scope: PoolScope) -> Verdict:
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine.sync_engine, "connect")
        def let_it_sleep_too(connection: Any, record: Any) -> None:
            connection.create_function("pg_sleep", 1, time.sleep)

    async def report() -> None:
        async with engine.connect() as connection:
            await connection.execute(SLOW)

    async with crowd(engine, scope, *(asyncio.create_task(report()) for _ in range(2))):
        await asyncio.sleep(0.3)
        return scope.verdict()


async def once_settled(scope: PoolScope) -> Verdict:
    """The verdict once it is more than that the pool is busy: on a slow machine, that takes its time."""
    await asyncio.sleep(0.3)
    await until(lambda: scope.cause() != "saturated")
    return scope.verdict()


async def deadlock(engine: AsyncEngine, scope: PoolScope) -> Verdict:
    meet = asyncio.Barrier(2)

    async def order() -> None:
        async with engine.connect():
            await meet.wait()
            await price_of(engine)

    async with crowd(engine, scope, *(asyncio.create_task(order()) for _ in range(2))):
        return await once_settled(scope)


async def leaked(engine: AsyncEngine, scope: PoolScope) -> Verdict:
    kept = []

    async def forget() -> None:
        kept.append(await engine.connect())

    for _ in range(2):
        await asyncio.create_task(forget())
    try:
        async with crowd(engine, scope):
            return await once_settled(scope)
    finally:
        for connection in kept:
            await connection.close()


async def held_across_a_foreign_await(engine: AsyncEngine, scope: PoolScope) -> Verdict:
    async def ask_somebody_else() -> None:
        async with engine.connect() as connection:
            await connection.execute(SELECT)
            await asyncio.sleep(30)

    async with crowd(engine, scope, *(asyncio.create_task(ask_somebody_else()) for _ in range(2))):
        return await once_settled(scope)


async def unfair(engine: AsyncEngine, scope: PoolScope) -> Verdict:
    async def work_for_ever() -> None:
        async with AsyncSession(engine) as session:
            while True:
                await session.execute(SELECT)
                await session.commit()

    async with crowd(engine, scope, *(asyncio.create_task(work_for_ever()) for _ in range(2))):
        return await once_settled(scope)


async def loop_blocked(engine: AsyncEngine, scope: PoolScope) -> Verdict:
    found: list[Verdict] = []

    async def block() -> None:
        async with engine.connect() as connection, engine.connect():
            await connection.execute(SELECT)
            await crowded.wait()
            asker.start()
            time.sleep(1.5)  # noqa: ASYNC251

    crowded = asyncio.Event()
    asker = threading.Timer(1, lambda: found.append(scope.verdict()))
    blocking = asyncio.create_task(block())
    async with crowd(engine, scope, blocking):
        crowded.set()
        await blocking
    asker.join()
    return found[0]


async def connects_failing(engine: AsyncEngine, scope: PoolScope) -> Verdict:
    """Two attempts fail, and the third task goes on waiting: the pool wakes nobody for that."""

    @event.listens_for(engine.sync_engine, "do_connect")
    def refuse(*about: Any) -> None:
        await_only(asyncio.sleep(0.2))
        raise OSError("nobody is there")

    tasks = [asyncio.create_task(price_of(engine)) for _ in range(3)]
    _, waiting = await asyncio.wait(tasks[:2], return_when=asyncio.ALL_COMPLETED)
    assert not waiting and scope.checked_out == 0 and len(scope.waiters) == 1
    verdict = scope.verdict()
    await cancelled(*tasks)
    return verdict


async def unknown(engine: AsyncEngine, scope: PoolScope) -> Verdict:
    """Connections that were out before anybody looked."""
    scope.close()
    async with engine.connect(), engine.connect():
        scope = PoolScope(engine)
        async with crowd(engine, scope):
            return await once_settled(scope)


CAUSES = (
    healthy,
    saturated,
    deadlock,
    leaked,
    held_across_a_foreign_await,
    unfair,
    loop_blocked,
    connects_failing,
    unknown,
)


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.__name__)
def test_each_cause_gets_its_own_name(
    cause: Callable[[AsyncEngine, PoolScope], Any], url: str
) -> None:
    async def main() -> Verdict:
        engine = create_async_engine(url, pool_size=2, max_overflow=0)
        verdict: Verdict = await cause(engine, PoolScope(engine))
        await engine.dispose()
        return verdict

    verdict = run(main())
    assert verdict.cause == cause.__name__.replace("_", " "), str(verdict)
    report = str(verdict)
    assert verdict.cause.upper() in report and "outside the user's code" not in report
    if verdict.cause not in ("healthy", "saturated"):
        assert re.search(r"(test_verdicts|helpers)\.py:\d+, ", report) and "  fix" in report


def test_a_synchronous_wait_on_the_loop_blocks_it(server: Server) -> None:
    """The holder is a task of the same loop, so it cannot give the connection back."""
    engine = create_engine(
        server.url.replace("asyncpg", "psycopg"), pool_size=1, max_overflow=0, pool_timeout=1.5
    )
    scope, found = PoolScope(engine), []

    async def hold() -> None:
        with engine.connect() as connection:
            connection.execute(SELECT)
            await asyncio.sleep(0.1)

    async def ask() -> None:
        with engine.connect() as connection:
            connection.execute(SELECT)

    async def main() -> None:
        holding = asyncio.create_task(hold())
        await asyncio.sleep(0)
        threading.Timer(1, lambda: found.append(scope.verdict())).start()
        await asyncio.gather(holding, asyncio.create_task(ask()), return_exceptions=True)

    asyncio.run(main())
    engine.dispose()
    assert [verdict.cause for verdict in found] == ["loop blocked"]
    assert found[0].blocked is not None and found[0].blocked.function.endswith("ask")


def test_a_look_of_ours_is_no_blocked_loop(server: Server) -> None:
    """On a busy machine a proof takes long, on the loop as well, and the program has no fault in that."""

    async def main() -> list[Verdict]:
        engine = create_async_engine(server.url, pool_size=2, max_overflow=0)
        scope, found = PoolScope(engine), []

        def ask_and_let_go() -> None:
            found.append(scope.verdict_now())
            looked.append(watch_of(loop).late(time.perf_counter()))
            proof._looking.release()

        async def hold() -> None:
            async with engine.connect() as connection:
                await connection.execute(SELECT)
                await asyncio.Event().wait()

        loop, looked = asyncio.get_running_loop(), []
        async with crowd(engine, scope, *(asyncio.create_task(hold()) for _ in range(2))):
            assert proof._looking.acquire(timeout=5)
            threading.Timer(1, ask_and_let_go).start()
            loop.call_soon(proof.look_for_users, [])
            await until(lambda: bool(looked))
        await engine.dispose()
        assert looked[0] > 0.5, "the loop was not late"
        return found

    (verdict,) = run(main())
    assert verdict.cause != "loop blocked", str(verdict)


def test_who_waits_for_a_lock_in_the_server_is_not_called_moving(server: Server) -> None:
    """The holders are in the middle of a statement, and no client can tell a slow one from one that waits."""
    lock = text("select pg_advisory_xact_lock(4711)")

    async def main() -> list[Verdict]:
        engine = create_async_engine(server.url, pool_size=2, max_overflow=0)
        scope = PoolScope(engine)

        async def update() -> None:
            async with engine.begin() as connection:
                await connection.execute(lock)

        async with create_async_engine(server.url).begin() as other:
            await other.execute(lock)
            async with crowd(engine, scope, *(asyncio.create_task(update()) for _ in range(2))):
                early = scope.verdict()
                await until(lambda: scope.verdict().cause != early.cause)
                return [early, scope.verdict()]

    early, late = run(main())
    assert [early.cause, late.cause] == ["saturated", "unknown"]
    assert "Nothing has come back" in str(late) and "pg_stat_activity" in str(late)


def test_connections_that_were_out_before_come_back(server: Server) -> None:
    """Once they have, everything is known again."""

    async def main() -> str:
        engine = create_async_engine(server.url, pool_size=1, max_overflow=0)
        async with engine.connect():
            scope = PoolScope(engine)
        async with engine.connect() as connection:
            waiting = asyncio.create_task(price_of(engine))
            await until(lambda: scope.waiters)
            await connection.execute(SELECT)
            cause = scope.verdict().cause
        await waiting
        await engine.dispose()
        return cause

    assert run(main()) == "saturated"


def test_a_framework_may_run_the_code_that_waits_in_a_task_of_its_own(server: Server) -> None:
    """The line is that of the task for which the holder waits, as with a streaming response."""

    async def stream() -> None:
        await asyncio.sleep(30)

    async def respond(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            await connection.execute(SELECT)
            await asyncio.wait([asyncio.create_task(stream())])

    def hide(function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as if it stood in an installed package."""
        code = function.__code__.replace(co_filename=pytest.__file__)
        return type(function)(code, globals(), closure=function.__closure__)

    async def main() -> Verdict:
        engine = create_async_engine(server.url, pool_size=1, max_overflow=0)
        scope = PoolScope(engine)
        async with crowd(engine, scope, asyncio.create_task(hide(respond)(engine))):
            return await once_settled(scope)

    verdict = run(main())
    assert verdict.cause == "held across a foreign await"
    (holding,) = verdict.holding
    assert holding.elsewhere is not None and holding.elsewhere.function == "stream", str(verdict)


def test_packages_stand_in_more_than_one_folder(tmp_path: Path) -> None:
    """Debian, the user and `uv run --with` have one beside that of the environment."""
    script = """
import sys
sys.path.append(sys.argv[1] + "/site-packages")
from ormscope.places import is_library
import pytest
print(*(is_library(file) for file in (pytest.__file__, sys.path[-1] + "/a/b.py", sys.argv[1] + "/b.py")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "True True False\n", done.stderr


def test_who_is_cancelled_while_connecting_leaves_the_queue_asleep(server: Server) -> None:
    """There is room in the pool, and SQLAlchemy wakes nobody; that is not called moving either."""

    async def main() -> Verdict:
        engine = create_async_engine(server.url, pool_size=1, max_overflow=0, pool_timeout=None)
        scope = PoolScope(engine)

        @event.listens_for(engine.sync_engine, "do_connect")
        def take_long(*about: Any) -> None:
            await_only(asyncio.sleep(30))

        first = asyncio.create_task(price_of(engine))
        await until(lambda: scope.checked_out == 1)
        second = asyncio.create_task(price_of(engine))
        await until(lambda: scope.waiters)
        await cancelled(first)
        await asyncio.sleep(0.3)
        assert scope.checked_out == 0 and not second.done()
        verdict = scope.verdict()
        await cancelled(second)
        await engine.dispose()
        return verdict

    verdict = run(main())
    assert verdict.cause == "connects failing"
    assert "CancelledError" in str(verdict)


REGISTRIES = {
    "by thread-local": None,
    "by identifier": threading.get_ident,
}
in_a_registry = pytest.mark.parametrize("scopefunc", REGISTRIES.values(), ids=REGISTRIES)


def two_threads(
    server: Server, scopefunc: Callable[[], int] | None
) -> tuple[Engine, PoolScope, scoped_session[Session], threading.Barrier]:
    """A pool for two threads, whose sessions a registry keeps apart, and where they meet."""
    url = server.url.replace("asyncpg", "psycopg")
    engine = create_engine(url, pool_size=2, max_overflow=0, pool_timeout=PATIENCE)
    sessions = scoped_session(sessionmaker(engine), scopefunc)
    return engine, PoolScope(engine), sessions, threading.Barrier(2)


@in_a_registry
def test_all_ask_but_a_registry_has_their_sessions(
    scopefunc: Callable[[], int] | None, server: Server
) -> None:
    """Another thread could give one back by way of the registry, so nothing is proved; nor is the pool called busy."""
    engine, scope, sessions, together = two_threads(server, scopefunc)
    theirs: list[
        weakref.ref[Session]
    ] = []  # else this function could give one back by its variable

    def answer() -> None:
        theirs.append(weakref.ref(sessions()))
        sessions.execute(SELECT)
        together.wait()
        with engine.connect():
            pass
        sessions.remove()

    threads = [threading.Thread(target=answer) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert await_that(lambda: scope.cause() == "unknown", PATIENCE)
    verdict = scope.verdict()
    first = theirs[0]()
    assert first is not None
    first.rollback()
    for thread in threads:
        thread.join()
    assert scope.deadlocks == [] and scope.timeouts == 0
    engine.dispose()
    keeper = "a thread-local variable" if scopefunc is None else "the registry of a scoped session"
    assert "a deadlock, unless somebody gives one back" in str(verdict)
    assert keeper in str(verdict) and "use the connection it holds" in str(verdict)


@in_a_registry
def test_whoever_has_the_registry_is_not_who_holds_the_connection(
    scopefunc: Callable[[], int] | None, server: Server
) -> None:
    """Threads without work hold the connections; this function only has the registry in a variable."""
    engine, scope, sessions, together = two_threads(server, scopefunc)

    def forget() -> None:
        sessions.execute(SELECT)
        together.wait()

    with ThreadPoolExecutor(2) as workers:
        for job in [workers.submit(forget) for _ in range(2)]:
            job.result()
        customer = threading.Thread(target=lambda: engine.connect().close())
        customer.start()
        assert await_that(lambda: scope.waiters, PATIENCE)
        verdicts = []
        for _ in range(8):
            time.sleep(0.25)
            verdicts.append(scope.verdict())
        for job in [workers.submit(forget_no_more, sessions, together) for _ in range(2)]:
            job.result()
        customer.join()
    engine.dispose()
    # At first they have only just used it.
    assert {verdict.cause for verdict in verdicts} <= {"saturated", "unknown"}
    assert "threads of an executor that have nothing to do" in str(verdicts[-1])


def forget_no_more(sessions: scoped_session[Session], together: threading.Barrier) -> None:
    """The next piece of work on each thread, which closes what the last one left."""
    sessions.remove()
    together.wait()
