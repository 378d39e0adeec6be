"""PoolCollector: each metric on pools in a known state, over HTTP while the loop is blocked, and a real Prometheus."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from statistics import mode
from typing import Any, get_args

import pytest
from helpers import PATIENCE, SELECT, cancelled, price_of, run, until
from leftovers import assert_nothing_is_left, await_that
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, StaticPool

from ormscope import LoopScope, PoolScope, verdict
from ormscope.durations import BOUNDS, Durations
from ormscope.metrics import ALERTS, PoolCollector
from workshop.database import Server
from workshop.keeper import free_port
from workshop.mistake import Mistake
from workshop.prometheus import (
    Prometheus,
    Scrape,
    ask,
    firing_of,
    hurried,
    parsed,
)


def registered(*pools: PoolScope, loop: LoopScope | None = None) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=True)  # as prometheus_client.REGISTRY
    registry.register(PoolCollector(*pools, loop=loop))
    return registry


def values(registry: CollectorRegistry, pool: str = "pool") -> dict[str, float]:
    """The values of one pool, read from the exposition: those without further labels, and the causes."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            if sample.labels == {"pool": pool}:
                found[sample.name.removeprefix("sqlalchemy_pool_")] = sample.value
            elif set(sample.labels) == {"pool", "cause"} and sample.labels["pool"] == pool:
                found[sample.labels["cause"]] = sample.value
    return found


def buckets(registry: CollectorRegistry, histogram: str) -> dict[float, float]:
    """How many lasted no longer than each bound."""
    return {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if sample.name == f"sqlalchemy_pool_{histogram}_bucket"
    }


async def hold_and_ask(engine: AsyncEngine, meet: asyncio.Barrier) -> None:
    async with engine.connect() as outer:
        await outer.execute(SELECT)
        await meet.wait()
        await price_of(engine)


# Each metric on a pool in a known state


def test_durations_count_up_to_and_including_a_bound() -> None:
    durations = Durations()
    for seconds in (0.0, 0.005, 0.0051, 1.0, 61.0):
        durations.add(seconds)
    found = dict(zip((*BOUNDS, float("inf")), durations.cumulative(), strict=True))
    assert (found[0.005], found[0.01], found[0.5], found[1.0], found[60.0]) == (2, 3, 3, 4, 4)
    assert found[float("inf")] == durations.count == 5
    assert durations.total == pytest.approx(62.0101)


def test_metrics_of_an_idle_pool(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=2, max_overflow=1)
        registry = registered(PoolScope(engine))
        await asyncio.gather(price_of(engine), price_of(engine))
        found = values(registry)
        assert found.pop("hold_seconds_sum") > 0
        assert found.pop("healthy") == 1
        assert {found.pop(cause) for cause in get_args(verdict.Cause) if cause != "healthy"} == {0}
        assert found == {
            "checked_out": 0,
            "checked_in": 2,
            "capacity": 3,
            "waiting": 0,
            "oldest_hold_seconds": 0,
            "oldest_wait_seconds": 0,
            "timeouts_total": 0,
            "checkouts_total": 2,
            "deadlocks_total": 0,
            "connections_opened_total": 2,
            "connections_closed_total": 0,
            "connects_failed_total": 0,
            "wait_seconds_count": 2,
            "wait_seconds_sum": 0,
            "hold_seconds_count": 2,
        }
        await engine.dispose()
        assert values(registry)["connections_closed_total"] == 2

    run(main())


def test_who_holds_and_who_waits(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=1)
        scope = PoolScope(engine)
        registry = registered(scope)
        async with engine.connect():
            await asyncio.sleep(0.3)
            async with engine.connect():
                waiter = asyncio.create_task(price_of(engine))
                await until(lambda: scope.waiters)
                await asyncio.sleep(0.15)
                found = values(registry)
                assert (found["checked_out"], found["checked_in"], found["waiting"]) == (2, 0, 1)
                assert 0.45 <= found["oldest_hold_seconds"] < PATIENCE
                assert 0.15 <= found["oldest_wait_seconds"] < found["oldest_hold_seconds"] - 0.25
                # A histogram knows only what has ended.
                assert (found["wait_seconds_count"], found["hold_seconds_count"]) == (2, 0)
            await waiter
        found, waits = values(registry), buckets(registry, "wait_seconds")
        assert (found["wait_seconds_count"], found["hold_seconds_count"]) == (3, 3)
        assert (waits[0.1], waits[float("inf")]) == (2, 3)
        assert found["wait_seconds_sum"] >= 0.15
        assert buckets(registry, "hold_seconds")[0.25] <= 2, "the first was held for longer"
        assert found["hold_seconds_sum"] >= 0.45
        await engine.dispose()

    run(main())


def test_timeouts_and_waits_that_were_given_up(url: str) -> None:
    """Both have waited, so both are in the histogram; only one has timed out."""

    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.2)
        scope = PoolScope(engine)
        registry = registered(scope)
        async with engine.connect():
            with pytest.raises(PoolTimeoutError):
                await price_of(engine)
            waiter = asyncio.create_task(price_of(engine))
            await until(lambda: scope.waiters)
            await cancelled(waiter)
        found = values(registry)
        assert (found["timeouts_total"], found["checkouts_total"]) == (1, 1)
        assert (found["wait_seconds_count"], found["waiting"]) == (3, 0)
        assert found["wait_seconds_sum"] >= 0.19
        await engine.dispose()

    run(main())


def test_connects_that_fail(tmp_path: Path) -> None:
    async def main() -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'missing' / 'shop.db'}")
        registry = registered(PoolScope(engine))
        for count in (1, 2):
            with pytest.raises(OperationalError):
                await price_of(engine)
            assert values(registry)["connects_failed_total"] == count
        assert values(registry)["connections_opened_total"] == 0

    run(main())


def test_a_deadlock_in_the_metrics(url: str) -> None:
    """Its cause is 1 as long as it lasts; the counter keeps it."""

    async def main() -> None:
        engine = create_async_engine(url, pool_size=2, max_overflow=0, pool_timeout=None)
        scope, meet = PoolScope(engine), asyncio.Barrier(2)
        registry = registered(scope)
        tasks = [asyncio.create_task(hold_and_ask(engine, meet)) for _ in range(2)]
        await scope.deadlock()
        found = values(registry)
        assert (found["deadlock"], found["healthy"], found["deadlocks_total"]) == (1, 0, 1)
        assert sum(found[cause] for cause in get_args(verdict.Cause)) == 1
        await cancelled(*tasks)
        found = values(registry)
        assert (found["deadlock"], found["healthy"], found["deadlocks_total"]) == (0, 1, 1)
        await engine.dispose()

    run(main())


@asynccontextmanager
async def full(engine: AsyncEngine, scope: PoolScope, nested: bool) -> AsyncIterator[None]:
    """All connections are out and as many tasks wait: in a deadlock, or behind holders that will go on."""
    tasks, meet, go_on = [], asyncio.Barrier(2), asyncio.Event()

    async def hold() -> None:
        async with engine.connect():
            await go_on.wait()

    for _ in range(2):
        tasks.append(asyncio.create_task(hold_and_ask(engine, meet) if nested else hold()))
    await until(lambda: scope.checked_out == 2)
    if not nested:
        tasks += [asyncio.create_task(price_of(engine)) for _ in range(2)]
    await until(lambda: len(scope.waiters) == 2)
    yield
    go_on.set()
    await cancelled(*tasks)


def test_the_articles_two_gauges_cannot_tell_a_deadlock_from_a_busy_pool(url: str) -> None:
    async def main() -> None:
        found = {}
        for nested in (True, False):
            engine = create_async_engine(url, pool_size=2, max_overflow=0, pool_timeout=None)
            scope = PoolScope(engine)
            registry = registered(scope)
            async with full(engine, scope, nested):
                await asyncio.sleep(0.1)  # several of the scope's own looks
                article = (engine.pool.checkedout(), engine.pool.checkedin())
                found[nested] = (article, values(registry))
            await engine.dispose()
        (deadlocked, ours), (busy, theirs) = found[True], found[False]
        assert deadlocked == busy == (2, 0)
        assert ours["waiting"] == theirs["waiting"] == 2
        assert (ours["deadlock"], theirs["deadlock"]) == (1, 0)
        assert (ours["deadlocks_total"], theirs["deadlocks_total"]) == (1, 0)

    run(main())


def test_dispose_gives_the_engine_another_pool(url: str) -> None:
    """The collector follows; a gauge that is bound to the old pool tells nonsense for ever."""

    async def main() -> None:
        engine = create_async_engine(url, pool_size=2, max_overflow=0)
        registry, bound = registered(PoolScope(engine)), engine.pool.checkedout
        async with engine.connect():
            await engine.dispose()
        async with engine.connect(), engine.connect():
            assert values(registry)["checked_out"] == 2
            assert bound() == -1
        found = values(registry)
        assert (found["checked_out"], found["checked_in"]) == (0, 2)
        assert (found["checkouts_total"], found["hold_seconds_count"]) == (3, 3)
        assert found["connections_opened_total"] == 3
        await engine.dispose()

    run(main())


@pytest.mark.parametrize("pool_class", [NullPool, StaticPool])
def test_pools_without_a_queue_lack_some_metrics(url: str, pool_class: type[Any]) -> None:
    async def main() -> None:
        engine = create_async_engine(url, poolclass=pool_class)
        registry = registered(PoolScope(engine))
        async with engine.connect():
            found = values(registry)
            assert found["checked_out"] == 1
            assert not {"checked_in", "capacity"} & set(found)
        found = values(registry)
        assert (found["checked_out"], found["hold_seconds_count"], found["healthy"]) == (0, 1, 1)
        await engine.dispose()

    run(main())


def test_a_pool_without_a_limit_has_no_capacity(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, max_overflow=-1)
        found = values(registered(PoolScope(engine)))
        assert "capacity" not in found and found["checked_in"] == 0
        await engine.dispose()

    run(main())


def test_several_pools_have_a_label_each(server: Server) -> None:
    async def main() -> None:
        orders, reports = (create_async_engine(server.url) for _ in range(2))
        registry = registered(PoolScope(orders, "orders"), PoolScope(reports, "reports"))
        async with orders.connect():
            assert values(registry, "orders")["checked_out"] == 1
            assert values(registry, "reports")["checked_out"] == 0
        with pytest.raises(ValueError, match=r"same name in \['a', 'a'\]"):
            PoolCollector(PoolScope(orders, "a"), PoolScope(reports, "a"))
        for engine in (orders, reports):
            await engine.dispose()

    run(main())


def test_the_exposition_is_one(url: str) -> None:
    """Both formats parse, no name lacks its help, units are base units, counters end in _total."""

    async def main() -> None:
        engine = create_async_engine(url)
        registry = registered(PoolScope(engine), loop=LoopScope())
        await price_of(engine)
        families = list(text_string_to_metric_families(generate_latest(registry).decode()))
        assert len(families) == 16
        again = list(openmetrics_families(openmetrics.generate_latest(registry).decode()))
        assert [family.name for family in again] == [family.name for family in families]
        for family in families:
            assert family.documentation.endswith(".")
            assert re.fullmatch(r"sqlalchemy_pool_[a-z_]+|event_loop_lag_seconds", family.name)
            assert "milli" not in family.name
            if family.type == "counter":
                assert all(sample.name.endswith("_total") for sample in family.samples)
        await engine.dispose()

    run(main())


def test_the_instruments_do_not_need_prometheus_client() -> None:
    """`import ormscope` works where it is not installed, and does not load it where it is."""
    script = "import sys; sys.modules['prometheus_client'] = None; import ormscope"
    subprocess.run([sys.executable, "-c", script], check=True)


# Other threads


def test_a_blocked_loop_is_scraped_while_it_is_blocked(url: str) -> None:
    """Over HTTP, from start_http_server's thread: lag and cause of now."""
    seen: list[Any] = []

    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0)
        scope = PoolScope(engine)
        server, serving = start_http_server(0, "127.0.0.1", registered(scope, loop=LoopScope()))

        def look() -> None:
            time.sleep(0.8)
            seen.append(parsed(ask(server.server_port, timeout=10)))

        async with engine.connect():
            waiter = asyncio.create_task(price_of(engine))
            await until(lambda: scope.waiters)
            looker = threading.Thread(target=look)
            looker.start()
            looker.join()  # blocks the loop until the metrics are read
        await waiter
        await asyncio.sleep(0.1)
        seen.append(parsed(ask(server.server_port)))
        server.shutdown()
        server.server_close()
        serving.join()
        await engine.dispose()

    run(main())
    blocked, after = seen
    assert blocked.cause == "loop blocked"
    assert (blocked["waiting"], blocked["checked_out"]) == (1, 1)
    assert blocked.lag >= 0.75
    assert blocked["oldest_wait_seconds"] >= 0.75
    assert after.cause == "healthy"
    assert after.lag >= 0.75, "the stall can be seen for a while, by whoever scrapes"


def test_two_scrapers_see_the_same_stall() -> None:
    async def main() -> None:
        scope = LoopScope()
        await asyncio.sleep(0.05)
        time.sleep(0.3)  # noqa: ASYNC251
        await asyncio.sleep(0.05)
        assert scope.longest_lag_within(60) >= 0.25
        assert scope.longest_lag_within(60) >= 0.25
        assert scope.longest_lag() >= 0.25, "nor is it taken from longest_lag()"
        assert scope.longest_lag_within(60) >= 0.25
        await asyncio.sleep(0.3)
        assert scope.longest_lag_within(0.2) < 0.25, "but it is over"
        scope.close()

    run(main())


def test_no_false_deadlock_for_who_asks_from_another_thread(url: str) -> None:
    """Tasks that give their only connection back and ask for it anew are never all stuck at once.

    The other thread asks all the time, and the threads are switched as often as can be.
    """
    causes: set[str] = set()
    done = threading.Event()

    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0)
        scope = PoolScope(engine)

        def look() -> None:
            while not done.is_set():
                causes.add(scope.cause())

        async def work() -> None:
            for _ in range(150):
                await price_of(engine)

        looker = threading.Thread(target=look)
        looker.start()
        try:
            await asyncio.gather(*(work() for _ in range(4)))
        finally:
            done.set()
            looker.join()
        await engine.dispose()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        run(main())
    finally:
        sys.setswitchinterval(interval)
    assert "saturated" in causes
    assert "deadlock" not in causes


def test_scraped_while_it_works(server: Server) -> None:
    """Two threads scrape a storm all the time: each exposition is whole, and no counter ever falls."""
    done = threading.Event()
    failures: list[BaseException] = []

    async def main() -> None:
        engine = create_async_engine(server.url, pool_size=5, max_overflow=0)
        registry = registered(PoolScope(engine), loop=LoopScope())

        def look() -> None:
            try:
                last: dict[str, float] = {}
                while not done.is_set():
                    found = values(registry)
                    assert sum(found[cause] for cause in get_args(verdict.Cause)) == 1
                    now = {name: found[name] for name in found if name.endswith(("total", "count"))}
                    assert all(now[name] >= last.get(name, 0) for name in now)
                    last = now
            except BaseException as error:
                failures.append(error)

        lookers = [threading.Thread(target=look) for _ in range(2)]
        for looker in lookers:
            looker.start()
        try:
            for _ in range(3):
                await asyncio.gather(*(price_of(engine) for _ in range(50)))
        finally:
            done.set()
            for looker in lookers:
                looker.join()
        found = values(registry)
        assert (found["checkouts_total"], found["hold_seconds_count"]) == (150, 150)
        await engine.dispose()

    run(main())
    assert failures == []


# The alert rules


def program(name: str) -> str:
    """The path of a program; skip where it is not installed, but never in CI."""
    path = shutil.which(name)
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is not installed, and CI must not go without it")
        pytest.skip(f"{name} is not installed (Debian: apt install prometheus)")
    return path


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program("promtool"), *arguments], capture_output=True, text=True, timeout=60
    )


def test_promtool_takes_the_rules() -> None:
    done = promtool("check", "rules", ALERTS)
    assert done.returncode == 0, done.stderr
    assert "2 rules found" in done.stdout


def outcome_of_tests(rules: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`promtool test rules` on these rules."""
    (folder / "alerts.yml").write_text(rules)
    shutil.copy(Path(__file__).with_name("alerts_test.yml"), folder)
    return promtool("test", "rules", folder / "alerts_test.yml")


def test_the_rules_fire_and_stay_silent_as_they_should(tmp_path: Path) -> None:
    done = outcome_of_tests(ALERTS.read_text(), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('{cause="deadlock"}', '{cause="saturated"}'),  # the busy pool pages
        ("increase(sqlalchemy_pool_deadlocks_total[5m])", "sqlalchemy_pool_deadlocks_total"),
        ("  or increase(sqlalchemy_pool_deadlocks_total[5m]) > 0\n", ""),
        ("        for: 2m\n", ""),  # the hiccup pages
        ("for: 2m", "for: 1m"),  # it still does
        ("sqlalchemy_pool_oldest_wait_seconds > 1", "sqlalchemy_pool_oldest_wait_seconds > 0"),
        ("sqlalchemy_pool_oldest_wait_seconds > 1\n          or ", ""),  # blind to a deadlock
        ("quantile(0.95", "quantile(0.5"),  # blind to one request of ten
    ],
)
def test_a_wrong_rule_fails(right: str, wrong: str, tmp_path: Path) -> None:
    rules = ALERTS.read_text()
    assert rules.count(right) == 1
    done = outcome_of_tests(rules.replace(right, wrong), tmp_path)
    assert done.returncode == 1
    assert "FAILED" in done.stdout + done.stderr


def test_hurried_rules_are_the_same_but_for_their_minutes() -> None:
    rules = ALERTS.read_text()
    quick = hurried(rules, 60)
    assert re.findall(r"\[(\w+)\]", quick) == ["5000ms", "1000ms"]
    assert re.findall(r"^ +for: (\w+)$", quick, re.MULTILINE) == ["2000ms"]
    assert quick.replace("5000ms", "5m").replace("1000ms", "1m").replace("2000ms", "2m") == rules


# A real Prometheus


def start_prometheus(port: int) -> Prometheus:
    program("prometheus")
    return Prometheus([port], hurried(ALERTS.read_text(), 60))


async def nested_order(engine: AsyncEngine) -> None:
    async with engine.connect() as outer:
        await outer.execute(SELECT)
        await price_of(engine)


async def report_again_and_again(engine: AsyncEngine, seconds: float) -> None:
    while True:
        async with engine.connect() as connection:
            await connection.execute(text(f"select pg_sleep({seconds})"))


def fired(prometheus: Prometheus) -> set[tuple[str, str]]:
    """The alerts that have fired, each with its pool."""
    return {(alert, pool) for alert, pool, _ in prometheus.firing()}


def test_prometheus_fires_for_the_starved_and_not_for_the_busy(server: Server) -> None:
    """Three pools whose connections are all out. What the lesson says without Prometheus is the same."""
    expected = {
        "starved": ["ConnectionPoolDeadlock", "ConnectionPoolWait"],
        "busy": [],
        # 30 customers in line, and a connection free each 0.05 s: everybody waits 1.5 s.
        "overloaded": ["ConnectionPoolWait"],
    }
    scrapes = {pool: [] for pool in expected}

    async def scrape(scopes: dict[str, PoolScope]) -> None:
        while True:
            for pool, scope in scopes.items():
                text = generate_latest(registered(scope)).decode()
                scrapes[pool].append(parsed(text, time.monotonic()))
            await asyncio.sleep(0.25)

    async def main() -> set[tuple[str, str]]:
        engines = {
            pool: create_async_engine(server.url, pool_size=10, max_overflow=0, pool_timeout=None)
            for pool in expected
        }
        scopes = {pool: PoolScope(engine, pool) for pool, engine in engines.items()}
        registry = registered(*scopes.values(), loop=LoopScope())
        service, serving = start_http_server(free_port(), "127.0.0.1", registry)
        prometheus = await asyncio.to_thread(start_prometheus, service.server_port)
        work = {
            "starved": (30, nested_order),
            "busy": (13, partial(report_again_and_again, seconds=0.5)),
            "overloaded": (40, partial(report_again_and_again, seconds=0.5)),
        }
        tasks = [
            asyncio.create_task(request(engines[pool]))
            for pool, (count, request) in work.items()
            for _ in range(count)
        ]
        scraping = asyncio.create_task(scrape(scopes))
        try:
            started = time.monotonic()
            while not await asyncio.to_thread(fired, prometheus) >= wanted:
                await asyncio.sleep(0.25)
            # As long again: who is silent now has been evaluated as often as need be.
            await asyncio.sleep(max(time.monotonic() - started, 3))
            (seen,) = await asyncio.to_thread(
                prometheus.query,
                'count_over_time(sqlalchemy_pool_verdict{pool="busy",cause="saturated"}[1h])',
            )
            assert int(seen["value"][1]) >= 12
            for alert in await asyncio.to_thread(prometheus.alerts):
                assert alert["labels"]["severity"] == "page" and alert["labels"]["instance"]
                assert "verdict" in alert["annotations"]["action"], "it says what to do"
            return await asyncio.to_thread(fired, prometheus)
        finally:
            await asyncio.to_thread(prometheus.close)
            service.shutdown()
            service.server_close()
            await asyncio.to_thread(serving.join)
            await cancelled(scraping)
            await cancelled(*tasks)
            for engine in engines.values():
                await engine.dispose()

    wanted = {(alert, pool) for pool, alerts in expected.items() for alert in alerts}
    assert run(main()) == wanted
    assert {pool: sorted(firing_of(scrapes[pool])) for pool in expected} == expected
    for pool in expected:
        assert mode(scrape["checked_out"] for scrape in scrapes[pool]) == 10


@pytest.mark.parametrize(
    ("slow", "alerts"), [(0, []), (1, []), (2, ["ConnectionPoolWait"])], ids="{} of 30".format
)
def test_the_lesson_judges_the_waits_between_two_scrapes(slow: int, alerts: list[str]) -> None:
    """Thirty waits in each quarter of a second, some of them longer than a second; nobody waits at a scrape."""
    scrapes = [
        Scrape(
            second,
            "shop",
            "healthy",
            {
                "sqlalchemy_pool_deadlocks_total": 0,
                "sqlalchemy_pool_oldest_wait_seconds": 0,
                "sqlalchemy_pool_wait_seconds_count": 30 * at,
                "sqlalchemy_pool_waits_within_a_second": (30 - slow) * at,
            },
        )
        for at, second in enumerate(number / 4 for number in range(16))
    ]
    assert sorted(firing_of(scrapes)) == alerts
    assert firing_of(scrapes[:9]) == {}, "a hiccup of two seconds passes"


def test_prometheus_goes_with_who_started_it(
    sandbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that is killed: neither process nor folder is left."""
    program("prometheus")
    monkeypatch.setenv("TMPDIR", str(sandbox / "tmp"))
    script = (
        "import os, signal\n"
        "from workshop.keeper import free_port\n"
        "from workshop.prometheus import Prometheus\n"
        "kept = Prometheus([free_port()], 'groups: []')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL
    assert_nothing_is_left(sandbox / "tmp")


def test_prometheus_finds_its_rules_in_any_folder(
    sandbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("prometheus")
    monkeypatch.setenv("TMPDIR", str(sandbox / "tmp"))
    started = time.monotonic() - 1  # its clock counts in milliseconds, and may be set meanwhile
    always = "groups: [{name: a, rules: [{alert: Always, expr: vector(1), labels: {pool: b}}]}]"
    prometheus = Prometheus([free_port()], always)
    try:
        assert await_that(prometheus.firing, 20)
        ((alert, pool, times),) = prometheus.firing()
        assert (alert, pool) == ("Always", "b")
        assert started <= times[0] <= times[-1] <= time.monotonic()
    finally:
        prometheus.close()
    assert_nothing_is_left(sandbox / "tmp")


def test_prometheus_that_does_not_start_says_so() -> None:
    program("prometheus")
    with pytest.raises(Mistake, match="did not start"):
        Prometheus([free_port()], "groups: [{name: 1, rules: [{expr: '('}]}]")


def test_no_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Mistake, match="no program named prometheus"):
        Prometheus([free_port()], "groups: []")
