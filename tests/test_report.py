"""PoolScope.report(): everything that is held and waited for, as text that a person can read."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from helpers import PATIENCE, SELECT, cancelled, price_of, run, until
from sqlalchemy import create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from ormscope import LoopScope, PoolScope
from ormscope.console_state import state_of
from ormscope.ledger import Holder
from ormscope.owners import Owner
from ormscope.report import _seconds
from workshop.database import Server

FORGOTTEN: list[Any] = []  # where nobody looks
MOST_LINES, MOST_CHARACTERS = 90, 260


async def hold_and_ask(engine: AsyncEngine, meet: asyncio.Barrier) -> None:
    async with engine.connect() as outer:
        await outer.execute(SELECT)
        await meet.wait()
        await price_of(engine)


def entry(report: str, title: str, about: str) -> str:
    """The entry of a section of the report that says something, with its details."""
    _, _, section = report.partition(f"\n{title} by\n")
    lines = section.splitlines()
    (number,) = [number for number, line in enumerate(lines) if about in line]
    while not lines[number].startswith("  ") or lines[number].startswith("   "):
        number -= 1
    after = number + 1
    while after < len(lines) and lines[after].startswith("      "):
        after += 1
    return "\n".join(lines[number:after])


def test_an_idle_pool(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=2, max_overflow=1)
        scope = PoolScope(engine, "orders")
        await price_of(engine)
        lines = scope.report().splitlines()
        assert lines[0] == "POOL orders: 0 of 3 checked out, 0 waiting"
        assert lines[1] == "  now     longest hold none, longest wait none"
        assert "so far  1 checkouts, 0 timeouts, 0 deadlocks, 0 failed connects" in lines[2]
        assert lines[3:] == [str(scope.verdict())]
        await engine.dispose()

    run(main())


def test_a_deadlock_behind_which_three_thousand_wait(url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(url, pool_size=3, max_overflow=0, pool_timeout=None)
        scope, meet = PoolScope(engine, "orders"), asyncio.Barrier(3)
        tasks = [
            asyncio.create_task(hold_and_ask(engine, meet), name=f"order {n}") for n in range(3)
        ]
        await scope.deadlock()
        tasks += [asyncio.create_task(price_of(engine), name=f"price {n:,}") for n in range(3_000)]
        await until(lambda: len(scope.waiters) == 3_003)
        report = scope.report()
        lines = report.splitlines()
        assert len(lines) < MOST_LINES
        assert max(map(len, lines)) < MOST_CHARACTERS
        assert lines[0] == "POOL orders: 3 of 3 checked out, 3,003 waiting"
        assert str(scope.verdict()) in report
        assert report.count("\nHELD by\n") == report.count("\nWAITING by\n") == 1
        held = entry(report, "HELD", "hold_and_ask: async with")
        assert {f"order {n}" in held for n in range(3)} == {True}
        assert "last SQL: select 1" in held
        assert "waits for a connection of orders, at price_of, line" in held
        waiting = entry(report, "WAITING", "3,000 (price 0 and 2,999 more)")
        assert "helpers.py:" in waiting and "price_of: async with engine.connect()" in waiting
        asking = entry(report, "WAITING", "called by hold_and_ask, line")
        assert "3 (order " in asking and "and 2 more)" in asking
        await cancelled(*tasks)
        await engine.dispose()

    run(main())


WRAPPER = """
async def fetch(engine, query):
    async with engine.connect() as connection:
        return await connection.scalar(query)

async def middleware(call):
    return await call()
"""


def test_the_line_is_the_programs_own_and_not_that_of_a_library_it_calls(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ormscope.places._SITE_PACKAGES", (f"{tmp_path}{os.sep}",))
    library: dict[str, Any] = {}
    exec(compile(WRAPPER, str(tmp_path / "wrapper.py"), "exec"), library)

    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=None)
        scope = PoolScope(engine)

        async def place_order() -> None:
            async with engine.connect():
                await library["fetch"](engine, SELECT)

        task = asyncio.create_task(library["middleware"](place_order))
        verdict = await scope.deadlock()
        assert verdict is not None
        report = scope.report()
        for text_of_it in (report, str(verdict)):
            assert "wrapper.py" not in text_of_it and "fetch, line" not in text_of_it, text_of_it
        held, _, waiting = report.partition("HELD by")[2].partition("WAITING by")
        assert "place_order: async with engine.connect():" in held
        assert 'await library["fetch"](engine, SELECT)' in waiting
        assert "middleware" not in report
        await cancelled(task)
        await engine.dispose()

    run(main())


def test_as_many_lines_as_a_person_reads(url: str) -> None:
    """Forty that hold and forty that wait, each at a line of its own."""

    def ways(count: int) -> list[Callable[[AsyncEngine, asyncio.Event], Coroutine[Any, Any, None]]]:
        made: dict[str, Any] = {}
        for number in range(count):
            # An import of this text's own line would be the same place for all.
            source = (
                f"async def way_{number}(engine, go_on):\n"
                "    async with engine.connect():\n"
                "        await go_on.wait()\n"
            )
            exec(compile(source, f"/shop/way_{number}.py", "exec"), made)
        return [made[f"way_{number}"] for number in range(count)]

    async def main() -> None:
        engine = create_async_engine(url, pool_size=40, max_overflow=0, pool_timeout=None)
        scope, go_on = PoolScope(engine), asyncio.Event()
        tasks = [asyncio.create_task(way(engine, go_on)) for way in ways(80)]
        await until(lambda: len(scope.holders) == len(scope.waiters) == 40)
        report = scope.report()
        assert report.count("  and 28 more, at 28 other places") == 2
        assert len(report.splitlines()) < 60 + MOST_LINES, "the verdict's own lines are forty"
        go_on.set()
        await asyncio.gather(*tasks)
        await engine.dispose()

    run(main())


def test_what_each_holder_does(server: Server) -> None:
    async def main() -> None:
        engine = create_async_engine(server.url, pool_size=4, max_overflow=0)
        scope, lock = PoolScope(engine), asyncio.Lock()

        async def asks_the_database() -> None:
            async with engine.connect() as connection:
                await connection.execute(text("select\n  pg_sleep(60) -- " + 300 * "x"))

        async def waits_for_a_lock() -> None:
            async with engine.connect() as connection:
                await connection.execute(SELECT)
                async with lock:
                    pass

        async def forgets_it() -> None:
            FORGOTTEN.append(await engine.connect())

        async def has_the_lock() -> None:
            async with lock:
                await asyncio.sleep(PATIENCE)

        tasks = [asyncio.create_task(has_the_lock(), name="keeper")]
        await until(lock.locked)
        tasks += [
            asyncio.create_task(asks_the_database(), name="slow"),
            asyncio.create_task(waits_for_a_lock(), name="locked out"),
        ]
        await asyncio.create_task(forgets_it(), name="forgetful")
        await until(lambda: "that keeper has" in scope.report())
        await until(lambda: "pg_sleep" in scope.report())
        report = scope.report()
        slow = entry(report, "HELD", "slow for")
        assert "last SQL: select pg_sleep(60) -- xxx" in slow and slow.count("x…") == 1
        assert "waits for the database" in slow
        assert max(map(len, slow.splitlines())) < MOST_CHARACTERS
        locked_out = entry(report, "HELD", "locked out for")
        assert "for a lock that keeper has, not for the database, at " in locked_out
        assert "nobody is left to give it back" in entry(report, "HELD", "forgetful for")
        await FORGOTTEN.pop().close()
        await cancelled(*tasks)
        await engine.dispose()

    run(main())


def test_who_is_inside_of_another_lock_has_not_this_one(server: Server) -> None:
    async def main() -> None:
        engine = create_async_engine(server.url)
        scope, lock, another = PoolScope(engine), asyncio.Lock(), asyncio.Lock()

        async def waits_for_it() -> None:
            async with engine.connect() as connection:
                await connection.execute(SELECT)
                async with lock:
                    pass

        async def is_in_another() -> None:
            async with another:
                await asyncio.sleep(PATIENCE)

        await lock.acquire()  # without a block: nobody can see whose it is
        tasks = [asyncio.create_task(is_in_another()), asyncio.create_task(waits_for_it())]
        await until(lambda: "for a lock" in scope.report())
        assert "for a lock, not for the database" in scope.report()
        await cancelled(*tasks)
        await engine.dispose()

    run(main())


def test_timeouts_and_the_longest_wait(server: Server) -> None:
    async def main() -> None:
        engine = create_async_engine(server.url, pool_size=1, max_overflow=0, pool_timeout=0.2)
        scope = PoolScope(engine)
        async with engine.connect():
            with pytest.raises(PoolTimeoutError):
                await price_of(engine)
        assert " 1 timeouts, " in scope.report()
        assert f"longest wait that ended {scope.longest_wait:.2f} s" in scope.report()
        await engine.dispose()

    run(main())


def test_from_another_thread_while_the_loop_is_blocked(server: Server) -> None:
    seen: list[str] = []

    async def main() -> None:
        engine = create_async_engine(server.url, pool_size=1, max_overflow=0)
        scope = PoolScope(engine, loop=LoopScope())
        looked = threading.Event()

        def look() -> None:
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline and not (seen and "LOOP BLOCKED" in seen[-1]):
                seen.append(scope.report())
            looked.set()

        async with engine.connect() as connection:
            await connection.execute(SELECT)
            waiter = asyncio.create_task(price_of(engine), name="in line")
            await until(lambda: scope.waiters)
            threading.Thread(target=look).start()
            looked.wait(PATIENCE)
        await waiter
        await engine.dispose()

    run(main())
    report = seen[-1]
    assert "LOOP BLOCKED" in report and "looked.wait(PATIENCE)" in report
    assert "in line for " in entry(report, "WAITING", "in line for")
    (loop,) = [line for line in report.splitlines() if line.startswith("  loop ")]
    assert float(loop.split()[1]) >= 0.4


class Vanishing:
    """An attribute that another thread sets to None once it has been read so often."""

    def __init__(self, value: Any, reads: int) -> None:
        self.value, self.left = value, reads

    def __get__(self, owner: Any, _class: type) -> Any:
        self.left -= 1
        return self.value if self.left >= 0 else None

    def __set__(self, owner: Any, value: Any) -> None: ...


@pytest.mark.parametrize("of, name", [(Owner, "subject"), (Holder, "users"), (PoolScope, "proof")])
def test_what_is_gone_at_the_next_look(
    of: type, name: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another thread looks, the loop goes on: a task ends, a connection is used, a proof is withdrawn."""

    async def main() -> None:
        engine = create_async_engine(server.url, pool_size=2, max_overflow=0)
        scope, meet = PoolScope(engine), asyncio.Barrier(2)
        stuck = [asyncio.create_task(hold_and_ask(engine, meet)) for _ in range(2)]
        await until(lambda: scope.deadlocks)
        values = {"subject": stuck[0], "users": (Owner(stuck[0]),), "proof": scope.proof}
        for reads in range(1000):
            vanishing = Vanishing(values[name], reads)
            with monkeypatch.context() as patched:
                patched.setattr(of, name, vanishing, raising=False)
                scope.verdict()
                scope.report()
                state_of([scope], (), None)
            assert scope.failure is None, f"gone after {reads} reads"
            if vanishing.left > 0:
                break
        assert 3 < reads < 1000
        await cancelled(*stuck)
        await engine.dispose()

    run(main())


def test_threads(server: Server) -> None:
    engine = create_engine(
        server.url.replace("+asyncpg", "+psycopg"), pool_size=1, max_overflow=0, pool_timeout=None
    )
    scope = PoolScope(engine)

    def waits() -> None:
        with engine.connect():
            pass

    with engine.connect() as connection:
        connection.execute(SELECT)
        thread = threading.Thread(target=waits, name="a worker")
        thread.start()
        deadline = time.monotonic() + PATIENCE
        while not scope.waiters and time.monotonic() < deadline:
            time.sleep(0.01)
        report = scope.report()
    thread.join()
    assert "MainThread for" in entry(report, "HELD", "test_threads: with engine.connect()")
    assert "a worker for" in entry(report, "WAITING", "waits: with engine.connect()")
    engine.dispose()


def test_no_limit(server: Server) -> None:
    async def main() -> None:
        engine = create_async_engine(server.url, poolclass=NullPool)
        scope = PoolScope(engine)
        async with engine.connect():
            assert scope.report().startswith("POOL pool: 1 of no limit checked out, 0 waiting\n")

    run(main())


def test_it_never_raises(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_async_engine(server.url)
    scope = PoolScope(engine, "orders")

    def fails() -> None:
        raise LookupError("of the instrument")

    monkeypatch.setattr(scope, "verdict", fails)
    with caplog.at_level(logging.ERROR, "ormscope"):
        assert scope.report() == (
            "POOL orders: the report failed (LookupError: of the instrument); the log has its traceback."
        )
    assert caplog.records[0].exc_info is not None


def test_a_scope_that_is_closed_or_has_stepped_aside(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        engine = create_async_engine(server.url)
        closed = PoolScope(engine)
        closed.close()
        assert "  This PoolScope is closed and watches nothing any more." in closed.report()

        def fails(*about: object) -> None:
            raise LookupError("of the instrument")

        failed = PoolScope(engine)
        monkeypatch.setattr(failed.ledger, "acquired", fails)
        await price_of(engine)
        assert "LookupError: of the instrument" in failed.report()
        await engine.dispose()

    run(main())


@pytest.mark.parametrize(
    "seconds, words",
    [(None, "none"), (0.004, "0.00 s"), (59.9, "59.90 s"), (90, "1.5 min"), (5400, "1.5 h")],
)
def test_times_in_words(seconds: float | None, words: str) -> None:
    assert _seconds(seconds) == words
