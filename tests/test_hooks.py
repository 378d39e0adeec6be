"""What stands between an engine and its users: it costs the application nothing, whatever fails in it."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import weakref
from collections import Counter
from typing import Any

import pytest
from helpers import SELECT, price_of, run, until
from sqlalchemy import create_engine, event
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool, StaticPool

from ormscope import PoolScope, proof
from ormscope.ledger import Ledger
from workshop.database import Server

ASKED = {"settings", "held", "queue", "pools_in_demand", "is_exhausted"}
# What the hooks call.
TOLD = [
    name
    for name, value in vars(Ledger).items()
    if callable(value) and name[0] != "_" and name not in ASKED
]


def ask_in_thread(engine: Any) -> None:
    with engine.connect() as connection:
        connection.execute(SELECT)


@pytest.fixture
def logged() -> Any:
    """The records of ormscope's logger."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("ormscope").addHandler(handler)
    yield records
    logging.getLogger("ormscope").removeHandler(handler)


def fail(*about: Any, **more: Any) -> None:
    raise ZeroDivisionError("the instrument's own")


def refuse(*about: Any) -> None:
    raise OSError("nobody is there")


def check_that_it_stepped_aside(scope: PoolScope, logged: list[logging.LogRecord]) -> None:
    assert scope.failure == "ZeroDivisionError: the instrument's own"
    assert len(logged) == 1 and "stepped aside" in logged[0].getMessage()
    assert logged[0].exc_info is not None
    verdict = scope.verdict()
    assert verdict.cause == "unknown" and "stepped aside" in str(verdict)


@pytest.mark.parametrize("name", TOLD)
def test_whatever_raises_in_a_ledger_no_request_fails(
    name: str, server: Server, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    async def main() -> None:
        engine = create_async_engine(server.url, pool_size=2, max_overflow=0, pool_timeout=20)
        scope = PoolScope(engine, samples=True)
        calls = Counter[str]()

        def fails(*about: Any, **more: Any) -> None:
            calls[name] += 1
            fail()

        monkeypatch.setattr(Ledger, name, fails)
        await asyncio.gather(*(price_of(engine) for _ in range(8)))  # six of them wait
        await engine.dispose()
        event.listen(engine.sync_engine, "do_connect", refuse)
        with pytest.raises(OSError, match="nobody is there"):
            await price_of(engine)
        event.remove(engine.sync_engine, "do_connect", refuse)
        assert calls[name] == 1, "and then it is not asked any more"
        check_that_it_stepped_aside(scope, logged)
        monkeypatch.undo()
        await price_of(engine)
        assert engine.pool.checkedout() == 0
        await engine.dispose()

    run(main())


@pytest.mark.parametrize("name", ["queued", "acquired", "released", "statement_ends"])
def test_threads_do_not_suffer_either(
    name: str, server: Server, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    engine = create_engine(server.url.replace("asyncpg", "psycopg"), pool_size=2, max_overflow=0)
    scope, errors = PoolScope(engine), []
    monkeypatch.setattr(Ledger, name, fail)

    def work() -> None:
        try:
            for _ in range(5):
                ask_in_thread(engine)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    check_that_it_stepped_aside(scope, logged)
    engine.dispose()


def test_a_look_that_fails_on_the_loop_steps_aside(
    url: str, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0)
        scope = PoolScope(engine)
        monkeypatch.setattr("ormscope.proof._suspect", fail)
        async with engine.connect():
            waiting = asyncio.create_task(price_of(engine))
            await asyncio.sleep(0.2)
        await waiting
        check_that_it_stepped_aside(scope, logged)
        await engine.dispose()

    run(main())


def test_deadlock_returns_when_the_scope_steps_aside_or_is_closed(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url)
        scope = PoolScope(engine)
        asked = asyncio.create_task(scope.deadlock())
        await asyncio.sleep(0)
        scope.close()
        assert await asked is None
        assert await scope.deadlock() is None
        await engine.dispose()

    run(main())


@pytest.mark.parametrize("late", [False, True], ids=["closed early", "attached late"])
def test_attaching_and_closing_while_connections_are_opened(server: Server, late: bool) -> None:
    """To change SQLAlchemy's listeners while they are called would make the attempt fail."""

    async def main() -> Counter[str]:
        outcomes: Counter[str] = Counter()
        for number in range(20):
            engine = create_async_engine(server.url, pool_size=5)
            scope = None if late else PoolScope(engine)
            tasks = [asyncio.create_task(price_of(engine)) for _ in range(5)]
            await asyncio.sleep(0.003 * number)
            if scope is None:
                scope = PoolScope(engine)
            else:
                scope.close()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                outcomes["ok" if outcome is None else repr(outcome)] += 1
            scope.close()
            await engine.dispose()
        return outcomes

    assert run(main()) == {"ok": 100}


def test_scopes_on_one_engine_are_closed_in_any_order(url: str) -> None:
    async def main() -> None:
        for first_out in (0, 1, 2):
            engine = create_async_engine(url)
            before = (dict(vars(engine.pool)), dict(vars(engine.dialect)))
            scopes = [PoolScope(engine, str(number)) for number in range(3)]
            closed = scopes.pop(first_out)
            closed.close()
            async with engine.connect() as connection:
                await connection.execute(SELECT)
                assert [len(scope.holders) for scope in scopes] == [1, 1]
                assert closed.holders == [] and closed.checkouts == 0
                assert (await connection.get_raw_connection()).info == {}
            for scope in scopes:
                scope.close()
            after = (dict(vars(engine.pool)), dict(vars(engine.dialect)))
            assert {**after[0], "_overflow": 0} == {**before[0], "_overflow": 0}
            assert after[1].keys() == before[1].keys() | (after[1].keys() - {"do_execute"})
            gone = [weakref.ref(scope) for scope in (*scopes, closed)]
            del scopes, closed, scope
            gc.collect()
            assert [reference() for reference in gone] == [None] * 3
            await engine.dispose()

    run(main())


def test_what_somebody_else_put_on_the_pool_stays(url: str) -> None:
    async def main() -> None:
        engine, calls = create_async_engine(url), []
        own = engine.pool.connect

        def counted() -> Any:
            calls.append(1)
            return own()

        engine.pool.connect = counted  # type: ignore[method-assign]
        scope = PoolScope(engine)
        await price_of(engine)
        assert (len(calls), scope.checkouts) == (1, 1)
        scope.close()
        assert engine.pool.connect is counted
        await engine.dispose()

    run(main())


def test_a_clone_of_the_engine_is_watched_too(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0)
        clone = engine.execution_options(isolation_level="SERIALIZABLE")
        scope = PoolScope(clone)
        async with engine.connect() as connection:
            await connection.execute(SELECT)
            assert [holder.last_sql for holder in scope.holders] == ["select 1"]
            waiting = asyncio.create_task(price_of(clone))
            await until(lambda: scope.waiters)
        await waiting
        await clone.dispose()  # gives both a new pool
        await price_of(engine)
        assert scope.checkouts == 3
        await engine.dispose()

    run(main())


@pytest.mark.parametrize("pool", [NullPool, StaticPool])
def test_pools_that_do_not_pool_are_never_called_starved(url: str, pool: Any) -> None:
    async def main() -> None:
        engine = create_async_engine(url, poolclass=pool)
        scope = PoolScope(engine)
        async with engine.connect() as outer:
            await outer.execute(SELECT)
            if pool is NullPool:
                await price_of(engine)
        assert scope.verdict().cause == "healthy"
        assert (scope.capacity, scope.waiters, scope.deadlocks) == (None, [], [])
        assert "no limit" in str(scope.verdict())
        await engine.dispose()

    run(main())


def test_holders_are_exact_under_threads(server: Server) -> None:
    """Also where the interpreter changes threads at every chance."""
    engine = create_engine(server.url.replace("asyncpg", "psycopg"), pool_size=3, max_overflow=2)
    scope, errors, before = PoolScope(engine), [], sys.getswitchinterval()

    def work() -> None:
        try:
            for _ in range(60):
                with engine.connect() as connection:
                    (record,) = [
                        record
                        for record, holder in list(scope.ledger.holders.items())
                        if holder.owner.subject is threading.current_thread()
                    ]
                    assert record.dbapi_connection is connection.connection.dbapi_connection
                    assert len(scope.holders) <= 5
        except Exception as error:
            errors.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert errors == []
    assert (scope.holders, scope.waiters, scope.checked_out) == ([], [], 0)
    assert scope.checkouts == scope.holds.count == 720
    assert scope.ledger._held_by == {} and scope.ledger._queue_lengths.total() == 0
    engine.dispose()


def test_nothing_is_kept_of_what_is_over(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=2, max_overflow=1, pool_timeout=0.05)
        scope = PoolScope(engine)
        for _ in range(30):
            outcomes = await asyncio.gather(
                *(price_of(engine) for _ in range(20)), return_exceptions=True
            )
            assert {type(outcome) for outcome in outcomes} <= {type(None), PoolTimeoutError}
        ledger = scope.ledger
        assert ledger.samples is None
        with pytest.raises(ValueError, match="samples=True"):
            _ = scope.samples

        def nobody_is_remembered() -> bool:
            gc.collect()
            return not ledger.timed_out

        # A loop lets go of a timer that was cancelled later, and so does a look.
        await until(nobody_is_remembered)
        assert (ledger.holders, ledger.waiters) == ({}, {})
        assert len(ledger.attempts) <= 100 and len(ledger.last_taken) <= 3
        await engine.dispose()

    run(main())


def test_who_keeps_a_timeout_does_not_keep_the_task(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.01)
        scope = PoolScope(engine)
        async with engine.connect():
            customers = [asyncio.create_task(price_of(engine)) for _ in range(3)]
            outcomes = await asyncio.gather(*customers, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {PoolTimeoutError}
        ended = [weakref.ref(customer) for customer in customers]
        customers.clear()

        def all_are_gone() -> bool:
            gc.collect()
            return not any(customer() for customer in ended)

        await until(all_are_gone)
        assert scope.timeouts == len(outcomes)
        await engine.dispose()

    run(main())


def test_a_connect_that_fails_in_a_listener_counts_once(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0)
        scope = PoolScope(engine)

        event.listen(engine.sync_engine, "do_connect", refuse)
        for _ in range(3):
            with pytest.raises(OSError):
                await price_of(engine)
        assert scope.connects_failed == 3
        await engine.dispose()

    run(main())


def test_scopes_come_and_go_while_another_thread_asks_for_all() -> None:
    """A thread that proves a deadlock of one engine lists all scopes, while others are made and closed."""
    over, failures = threading.Event(), []
    kept = [PoolScope(create_engine("sqlite://")) for _ in range(50)]

    def ask() -> None:
        try:
            while not over.is_set():
                proof.scopes()
        except RuntimeError as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        asking.start()
        for _ in range(300):
            PoolScope(create_engine("sqlite://")).close()
    finally:
        sys.setswitchinterval(interval)
        over.set()
        asking.join()
    assert not failures
    assert set(kept) <= set(proof.scopes())
    for scope in kept:
        scope.close()
    assert not set(kept) & set(proof.scopes())
