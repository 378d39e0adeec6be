"""PoolInstruments, read by OpenTelemetry's own SDK: the conventions' names, under a real load."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from helpers import SELECT, cancelled, price_of, run, until
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from ormscope import LoopScope, PoolScope, verdict
from ormscope.otel import CAUSE, INSTRUMENTS, POOL, STATE, PoolInstruments
from workshop.database import Server

# https://opentelemetry.io/docs/specs/semconv/db/database-metrics/, as of 1.40: instrument, unit.
CONVENTIONS = {
    "db.client.connection.count": ("up-down counter", "{connection}"),
    "db.client.connection.idle.max": ("up-down counter", "{connection}"),
    "db.client.connection.max": ("up-down counter", "{connection}"),
    "db.client.connection.pending_requests": ("up-down counter", "{request}"),
    "db.client.connection.timeouts": ("counter", "{timeout}"),
}


class Reader:
    """A metric reader of the SDK, and the provider whose instruments it reads."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader], shutdown_on_exit=False)

    def metrics(self) -> dict[str, Any]:
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        return {
            metric.name: metric
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def points(self, name: str) -> dict[frozenset[tuple[str, str]], float]:
        metric = self.metrics().get(name)
        found = [] if metric is None else metric.data.data_points
        return {frozenset(point.attributes.items()): point.value for point in found}

    def value(self, name: str, pool: str = "pool", **state: str) -> float | None:
        attributes = {POOL: pool} | {
            {"state": STATE, "cause": CAUSE}[key]: value for key, value in state.items()
        }
        return self.points(name).get(frozenset(attributes.items()))


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.provider.shutdown()


def test_names_units_and_kinds(reader: Reader, url: str) -> None:
    assert {
        name: (given.kind, given.unit)
        for name, given in INSTRUMENTS.items()
        if not name.startswith("ormscope.")
    } == CONVENTIONS

    async def main() -> None:
        engine = create_async_engine(url)
        PoolInstruments(PoolScope(engine), loop=LoopScope(), meter_provider=reader.provider)
        await price_of(engine)
        found = reader.metrics()
        assert set(found) == {*INSTRUMENTS, "ormscope.loop.lag"}
        for name, given in INSTRUMENTS.items():
            data = found[name].data
            if given.kind == "gauge":
                assert not hasattr(data, "is_monotonic"), name
            else:
                assert data.is_monotonic == (given.kind == "counter"), name
            assert (found[name].unit, found[name].description) == (given.unit, given.about)
        await engine.dispose()

    run(main())


def test_a_pool_under_load(reader: Reader, server: Server) -> None:
    """Thirty at work with three connections, read while they are."""

    async def main() -> None:
        engine = create_async_engine(server.url, pool_size=2, max_overflow=1)
        scope = PoolScope(engine, "orders")
        PoolInstruments(scope, meter_provider=reader.provider)
        go_on = asyncio.Event()

        async def hold() -> None:
            async with engine.connect() as connection:
                await connection.execute(SELECT)
                await go_on.wait()

        tasks = [asyncio.create_task(hold()) for _ in range(30)]
        await until(lambda: len(scope.holders) == 3 and len(scope.waiters) == 27)

        def value(name: str, **state: str) -> float | None:
            return reader.value(name, "orders", **state)

        assert value("db.client.connection.count", state="used") == 3
        assert value("db.client.connection.count", state="idle") == 0
        assert value("db.client.connection.max") == 3
        assert value("db.client.connection.idle.max") == 2
        assert value("db.client.connection.pending_requests") == 27
        assert value("db.client.connection.timeouts") == 0
        assert value("ormscope.pool.oldest_use")
        assert value("ormscope.pool.oldest_wait")
        assert value("ormscope.pool.requests") == 3
        go_on.set()
        await asyncio.gather(*tasks)
        assert value("db.client.connection.count", state="used") == 0
        assert value("db.client.connection.count", state="idle") == 2
        assert value("db.client.connection.pending_requests") == 0
        assert value("ormscope.pool.requests") == value("ormscope.pool.returned") == 30
        assert value("ormscope.pool.waited") == pytest.approx(scope.waits.total)
        assert value("ormscope.pool.used") == pytest.approx(scope.holds.total)
        assert scope.waits.total > 0 and scope.holds.total > 0
        assert value("ormscope.pool.opened") == 3
        assert value("ormscope.pool.closed") == 1
        await engine.dispose()

    run(main())


def test_connects_that_fail_are_counted(reader: Reader) -> None:
    async def main() -> None:
        engine = create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/nothing")
        PoolInstruments(PoolScope(engine, "nowhere"), meter_provider=reader.provider)
        for _ in range(3):
            with pytest.raises(OSError):
                await engine.connect()
        assert reader.value("ormscope.pool.connects_failed", "nowhere") == 3
        assert reader.value("ormscope.pool.opened", "nowhere") == 0
        await engine.dispose()

    run(main())


def test_a_storm_read_by_another_thread_all_the_time(
    reader: Reader, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """No counter ever falls, and no callback fails: the SDK would log that."""
    done, failures = threading.Event(), []

    async def main() -> None:
        engine = create_async_engine(server.url, pool_size=5, max_overflow=0)
        PoolInstruments(PoolScope(engine), loop=LoopScope(), meter_provider=reader.provider)

        def look() -> None:
            last = {}
            try:
                while not done.is_set():
                    for name, given in INSTRUMENTS.items():
                        if given.kind == "counter":
                            now = reader.value(name) or 0
                            assert now >= last.get(name, 0), name
                            last[name] = now
            except BaseException as error:
                failures.append(error)

        looker = threading.Thread(target=look)
        looker.start()
        try:
            for _ in range(3):
                await asyncio.gather(*(price_of(engine) for _ in range(50)))
        finally:
            done.set()
            looker.join()
        assert reader.value("ormscope.pool.requests") == 150
        await engine.dispose()

    with caplog.at_level(logging.WARNING):
        run(main())
    assert failures == []
    assert caplog.records == []


async def hold_and_ask(engine: AsyncEngine, meet: asyncio.Barrier) -> None:
    async with engine.connect() as outer:
        await outer.execute(SELECT)
        await meet.wait()
        await price_of(engine)


def test_a_deadlock_and_timeouts(reader: Reader, url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=2, max_overflow=0, pool_timeout=None)
        scope, meet = PoolScope(engine), asyncio.Barrier(2)
        PoolInstruments(scope, meter_provider=reader.provider)
        tasks = [asyncio.create_task(hold_and_ask(engine, meet)) for _ in range(2)]
        await scope.deadlock()
        causes = {
            cause: reader.value("ormscope.pool.verdict", cause=cause)
            for cause in get_args(verdict.Cause)
        }
        assert causes.pop("deadlock") == 1
        assert set(causes.values()) == {0}
        assert reader.value("ormscope.pool.deadlocks") == 1
        await cancelled(*tasks)
        assert reader.value("ormscope.pool.verdict", cause="deadlock") == 0
        await engine.dispose()

        short = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.2)
        PoolInstruments(PoolScope(short, "short"), meter_provider=reader.provider)
        async with short.connect():
            with pytest.raises(PoolTimeoutError):
                await price_of(short)
        assert reader.value("db.client.connection.timeouts", "short") == 1
        assert reader.value("db.client.connection.timeouts") == 0
        await short.dispose()

    run(main())


def test_a_pool_without_a_limit_has_no_maximum(reader: Reader, server: Server) -> None:
    async def main() -> None:
        engine = create_async_engine(server.url, poolclass=NullPool)
        PoolInstruments(PoolScope(engine), meter_provider=reader.provider)
        async with engine.connect():
            assert reader.value("db.client.connection.count", state="used") == 1
            assert reader.value("db.client.connection.count", state="idle") is None
            assert reader.points("db.client.connection.max") == {}
            assert reader.points("db.client.connection.idle.max") == {}
        unlimited = create_async_engine(server.url, pool_size=4, max_overflow=-1)
        PoolInstruments(PoolScope(unlimited, "unlimited"), meter_provider=reader.provider)
        assert reader.points("db.client.connection.max") == {}
        assert reader.value("db.client.connection.idle.max", "unlimited") == 4
        await unlimited.dispose()

    run(main())


def test_read_while_the_loop_is_blocked(reader: Reader, server: Server) -> None:
    read: list[float | None] = []

    async def main() -> None:
        engine = create_async_engine(server.url, pool_size=1, max_overflow=0)
        PoolInstruments(PoolScope(engine), loop=LoopScope(), meter_provider=reader.provider)
        await asyncio.sleep(0.05)
        async with engine.connect() as connection:
            await connection.execute(text("select 1"))
            looked = threading.Event()

            def look() -> None:
                time.sleep(0.3)
                read.append(reader.value("db.client.connection.count", state="used"))
                read.extend(reader.points("ormscope.loop.lag").values())
                looked.set()

            threading.Thread(target=look).start()
            looked.wait()
        await engine.dispose()

    run(main())
    used, lag = read
    assert used == 1
    assert lag is not None and lag >= 0.25


def test_the_names_must_differ_also_between_two_of_one_provider(reader: Reader) -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(ValueError, match="two pools have the same name"):
        PoolInstruments(PoolScope(engine), PoolScope(engine), meter_provider=reader.provider)
    first = PoolInstruments(PoolScope(engine), meter_provider=reader.provider)
    with pytest.raises(ValueError, match="two pools have the same name"):
        PoolInstruments(PoolScope(engine), meter_provider=reader.provider)
    other = Reader()
    PoolInstruments(PoolScope(engine), meter_provider=other.provider)
    other.provider.shutdown()
    first.close()
    first.close()
    PoolInstruments(PoolScope(engine), meter_provider=reader.provider)
    assert reader.value("db.client.connection.pending_requests") == 0


def test_after_close_nothing_is_published(
    reader: Reader, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        engine = create_async_engine(server.url)
        instruments = PoolInstruments(
            PoolScope(engine), loop=LoopScope(), meter_provider=reader.provider
        )
        assert reader.points("db.client.connection.count")
        instruments.close()
        for name in (*INSTRUMENTS, "ormscope.loop.lag"):
            assert reader.points(name) == {}
        await engine.dispose()

    with caplog.at_level(logging.WARNING):
        run(main())
    assert caplog.records == []
