"""Advice is tried: what a `fix` line says is done to the program that drew it, and cures it.

Each program stands here twice or more: as it goes wrong, and as the line says; and again for threads. A test runs the
first until the verdict has its cause, compares the line of its report, and runs the others to their end. The advice
on barging, on cancelled connects and on the number of connections is tried in test_kinds.py.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from helpers import PATIENCE, SELECT, price_of, until
from leftovers import await_that
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util.queue import Full

from ormscope import PoolScope, Verdict, proof
from ormscope.verdict import Cause
from workshop.database import Server
from workshop.keeper import free_port

Work = Callable[[], Any]
HELD: Cause = "held across a foreign await"


# What runs the programs, and looks on from outside.


@dataclass
class Outcome:
    """What was said while a program ran, and whether all of it has ended, without an error, and was found healthy."""

    verdicts: list[Verdict]
    ended: bool
    errors: list[BaseException]

    @property
    def verdict(self) -> Verdict:
        return self.verdicts[-1]

    def check_that_it_is_cured(self, *but: Cause) -> None:
        """The program has done its work, and whenever somebody asked, nothing was wrong; `but` may have been said."""
        said = {verdict.cause for verdict in self.verdicts}
        assert said <= {"healthy", "saturated", *but}, "\n".join(map(str, self.verdicts))
        assert self.ended and not self.errors, self.errors
        assert self.verdict.cause == "healthy" and self.verdict.checked_out == 0


class Setting:
    """Where a program runs: as tasks, on a loop in a thread of its own, or as threads."""

    def __init__(self, url: str, threads: bool) -> None:
        self.threads = threads
        self.url = url.replace("asyncpg", "psycopg").replace("+aiosqlite", "") if threads else url
        self.database = make_url(url).get_backend_name()
        self.engines: list[Any] = []
        self.loop: asyncio.AbstractEventLoop | None = None

    def engine(self, size: int, url: str | None = None, **options: Any) -> Any:
        options = {"pool_size": size, "max_overflow": 0, "pool_timeout": PATIENCE, **options}
        make = create_engine if self.threads else create_async_engine
        self.engines.append(make(url or self.url, **options))
        return self.engines[-1]

    def pick(self, for_tasks: Any, for_threads: Any) -> Any:
        return for_threads if self.threads else for_tasks

    def event(self) -> Any:
        return threading.Event() if self.threads else asyncio.Event()

    def set(self, event: Any) -> None:
        """Set an event from outside."""
        if self.loop is None:
            event.set()
        else:
            self.loop.call_soon_threadsafe(event.set)

    def look(
        self,
        scope: PoolScope | Callable[[], PoolScope],
        cause: Cause,
        works: Sequence[Work],
        *,
        customers: Sequence[Work] = (),
        then: Callable[[], object] = lambda: None,
        at_end: Work | None = None,
    ) -> Outcome:
        """Run these until the verdict on the pool has this cause, or the customers (else everybody) have ended.

        `then` lets those go on who wait for it, and everybody has the time to end. Whoever is stuck is freed at last,
        and `at_end` is run where the works did.
        """
        crowd = _Threads(self) if self.threads else _Tasks(self)
        awaited = range(len(works), len(works) + len(customers)) or range(len(works))
        verdicts: list[Verdict] = []
        with crowd.running([*works, *customers], at_end):
            if not isinstance(scope, PoolScope):
                scope = scope()
            deadline = time.monotonic() + PATIENCE
            while not all(map(crowd.has_ended, awaited)) and time.monotonic() < deadline:
                verdicts.append(scope.verdict())
                if verdicts[-1].cause == cause:
                    break
                time.sleep(0.02)
            is_ill = bool(verdicts) and verdicts[-1].cause == cause
            then()
            ended = not is_ill and await_that(crowd.have_all_ended, PATIENCE)
            if not is_ill:
                verdicts.append(scope.verdict())
        return Outcome(verdicts, ended, crowd.errors)


class _Tasks:
    """Works that are tasks, on the loop of a thread of their own."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.tasks: list[asyncio.Task[Any]] = []
        self.errors: list[BaseException] = []
        self._started = threading.Event()

    @contextmanager
    def running(self, works: Sequence[Work], at_end: Work | None) -> Iterator[None]:
        thread = threading.Thread(target=asyncio.run, args=(self._main(works, at_end),))
        thread.start()
        assert self._started.wait(PATIENCE)
        try:
            yield
        finally:
            self.setting.set(self._finish)
            self.setting.loop = None
            thread.join()

    async def _main(self, works: Sequence[Work], at_end: Work | None) -> None:
        self.setting.loop, self._finish = asyncio.get_running_loop(), asyncio.Event()
        self.tasks = [asyncio.create_task(work()) for work in works]
        self._started.set()
        await self._finish.wait()
        for task in self.tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self.tasks, return_exceptions=True):
            if isinstance(outcome, BaseException):
                self.errors.append(outcome)
        if at_end is not None:
            await at_end()
        for engine in self.setting.engines:
            await engine.dispose()

    def has_ended(self, number: int) -> bool:
        return self.tasks[number].done()

    def have_all_ended(self) -> bool:
        return all(task.done() for task in self.tasks)


class _Threads:
    """Works that are threads."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []

    @contextmanager
    def running(self, works: Sequence[Work], at_end: Work | None) -> Iterator[None]:
        self.threads = [threading.Thread(target=self._run, args=(work,)) for work in works]
        for thread in self.threads:
            thread.start()
        try:
            yield
        finally:
            if at_end is not None:
                at_end()
            # A thread cannot be cancelled: one connection more for each pool, until all have what they wait for.
            while not await_that(self.have_all_ended, 0.05):
                for engine in self.setting.engines:
                    with suppress(Full):
                        engine.pool._pool.put(engine.pool._create_connection(), False)
            for engine in self.setting.engines:
                engine.dispose()

    def _run(self, work: Work) -> None:
        try:
            work()
        except BaseException as error:
            self.errors.append(error)

    def has_ended(self, number: int) -> bool:
        return not self.threads[number].is_alive()

    def have_all_ended(self) -> bool:
        return not any(thread.is_alive() for thread in self.threads)


class Gate:
    """Opens once so many hold a connection or stand in line for one: what happens is then nobody's luck."""

    def __init__(self, number: int, *scopes: PoolScope) -> None:
        self.number, self.scopes = number, scopes
        self.was_open = False

    def is_open(self) -> bool:
        here = 0
        for scope in self.scopes:
            holders = len(scope.holders)
            # A thread that gets a connection which is free stands in line for a moment, too.
            here += holders + (len(scope.waiters) if holders == scope.capacity else 0)
        self.was_open = self.was_open or here >= self.number
        return self.was_open

    async def wait(self) -> None:
        await until(self.is_open)

    def wait_in_thread(self) -> None:
        assert await_that(self.is_open, PATIENCE)


@pytest.fixture(params=["tasks", "threads"])
def at(request: pytest.FixtureRequest, url: str) -> Setting:
    """As tasks and as threads, on PostgreSQL and on a SQLite file."""
    return Setting(url, request.param == "threads")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """The scopes of one test are of no concern to the next."""
    yield
    for scope in proof.scopes():
        scope.close()


def fix_of(verdict: object) -> str:
    """What the report says after `fix`."""
    (line,) = [line for line in str(verdict).splitlines() if line.startswith("  fix ")]
    return line.removeprefix("  fix").strip()


def line_of(function: Any, mark: str) -> int:
    """The number of the line of a function's source in which this stands."""
    lines, first = inspect.getsourcelines(function)
    (found,) = [number for number, line in enumerate(lines, first) if mark in line]
    return found


def name_of(function: Any) -> str:
    name: str = function.__name__
    return name


# Who asks for a connection like anybody else: a thread does it as `price_of` does.


def ask_in_thread(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(SELECT)


def customers_of(at: Setting, engine: Any, when: Callable[[], object]) -> list[Work]:
    """Three who ask as soon as that is so."""

    async def customer() -> None:
        await until(when)
        await price_of(engine)

    def customer_in_thread() -> None:
        assert await_that(when, PATIENCE)
        ask_in_thread(engine)

    return [at.pick(customer, customer_in_thread)] * 3


# Deadlocks. Four do the same on a pool of two, and begin when each of them has a connection or waits for one.


def starve(at: Setting, work: Any) -> Outcome:
    engine = at.engine(2)
    scope = PoolScope(engine)
    gate = Gate(4, scope)
    return at.look(scope, "deadlock", [partial(work, engine, gate)] * 4)


def check_that_it_frees(at: Setting, work: Any) -> None:
    # On a busy machine it takes a while until the gate opens, and those at the gate hold their connections.
    starve(at, work).check_that_it_is_cured(HELD)


async def take_two(engine: AsyncEngine, gate: Gate) -> None:
    async with engine.connect() as first:
        await first.execute(SELECT)
        await gate.wait()
        async with engine.connect() as second:
            await second.execute(SELECT)


def take_two_in_thread(engine: Engine, gate: Gate) -> None:
    with engine.connect() as first:
        first.execute(SELECT)
        gate.wait_in_thread()
        with engine.connect() as second:
            second.execute(SELECT)


async def use_one_twice(engine: AsyncEngine, gate: Gate) -> None:
    async with engine.connect() as first:
        await first.execute(SELECT)
        await gate.wait()
        await first.execute(SELECT)


def use_one_twice_in_thread(engine: Engine, gate: Gate) -> None:
    with engine.connect() as first:
        first.execute(SELECT)
        gate.wait_in_thread()
        first.execute(SELECT)


def test_use_the_connection_it_holds(at: Setting) -> None:
    work = at.pick(take_two, take_two_in_thread)
    name, held, asked = name_of(work), line_of(work, "as first"), line_of(work, "as second")
    ill = starve(at, work).verdict
    assert ill.cause == "deadlock"
    assert fix_of(ill) == f"{name}: use the connection it holds (line {held}) also at line {asked}"
    check_that_it_frees(at, at.pick(use_one_twice, use_one_twice_in_thread))


# Another function asks.


async def place_order(engine: AsyncEngine, gate: Gate) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)
        await gate.wait()
        await look_up(engine)


async def look_up(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)


def place_order_in_thread(engine: Engine, gate: Gate) -> None:
    with Session(engine) as session:
        session.execute(SELECT)
        gate.wait_in_thread()
        look_up_in_thread(engine)


def look_up_in_thread(engine: Engine) -> None:
    with Session(engine) as session:
        session.execute(SELECT)


async def hand_it_on(engine: AsyncEngine, gate: Gate) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)
        await gate.wait()
        await look_up_with(session)


async def look_up_with(session: AsyncSession) -> None:
    await session.execute(SELECT)


def hand_it_on_in_thread(engine: Engine, gate: Gate) -> None:
    with Session(engine) as session:
        session.execute(SELECT)
        gate.wait_in_thread()
        look_up_with_in_thread(session)


def look_up_with_in_thread(session: Session) -> None:
    session.execute(SELECT)


async def finish_first(engine: AsyncEngine, gate: Gate) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)
        await gate.wait()
    await look_up(engine)


def finish_first_in_thread(engine: Engine, gate: Gate) -> None:
    with Session(engine) as session:
        session.execute(SELECT)
        gate.wait_in_thread()
    look_up_in_thread(engine)


def test_hand_the_session_on_or_finish_with_it_first(at: Setting) -> None:
    work, asker = at.pick((place_order, look_up), (place_order_in_thread, look_up_in_thread))
    ill = starve(at, work).verdict
    assert ill.cause == "deadlock"
    assert fix_of(ill) == (
        f"hand the session that {name_of(work)} holds on to {name_of(asker)}, or finish with it first"
    )
    check_that_it_frees(at, at.pick(hand_it_on, hand_it_on_in_thread))
    check_that_it_frees(at, at.pick(finish_first, finish_first_in_thread))


async def place_orders(engine: AsyncEngine, gate: Gate) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)
        await gate.wait()
        await asyncio.gather(look_up(engine), look_up(engine))


async def finish_before_tasks(engine: AsyncEngine, gate: Gate) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)
        await gate.wait()
    await asyncio.gather(look_up(engine), look_up(engine))


async def one_after_the_other(engine: AsyncEngine, gate: Gate) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)
        await gate.wait()
        for _ in range(2):
            await look_up_with(session)


def test_finish_before_tasks_of_its_own_run(url: str) -> None:
    """Not "hand it on": a session in a gather is an error, or a wait."""
    at = Setting(url, threads=False)
    ill = starve(at, place_orders).verdict
    assert ill.cause == "deadlock"
    assert fix_of(ill) == (
        "finish with the session that place_orders holds before look_up runs in tasks of its own,"
        " or hand it on to one look_up after the other"
    )
    check_that_it_frees(at, finish_before_tasks)
    check_that_it_frees(at, one_after_the_other)


# A function that calls itself.


async def walk(engine: AsyncEngine, gate: Gate, depth: int = 3) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)
        await gate.wait()
        if depth:
            await walk(engine, gate, depth - 1)


def walk_in_thread(engine: Engine, gate: Gate, depth: int = 3) -> None:
    with Session(engine) as session:
        session.execute(SELECT)
        gate.wait_in_thread()
        if depth:
            walk_in_thread(engine, gate, depth - 1)


async def walk_with_one(engine: AsyncEngine, gate: Gate) -> None:
    async def walk(session: AsyncSession, depth: int = 3) -> None:
        await session.execute(SELECT)
        await gate.wait()
        if depth:
            await walk(session, depth - 1)

    async with AsyncSession(engine) as session:
        await walk(session)


def walk_with_one_in_thread(engine: Engine, gate: Gate) -> None:
    def walk(session: Session, depth: int = 3) -> None:
        session.execute(SELECT)
        gate.wait_in_thread()
        if depth:
            walk(session, depth - 1)

    with Session(engine) as session:
        walk(session)


def test_hand_the_session_on_to_the_next_call(at: Setting) -> None:
    work = at.pick(walk, walk_in_thread)
    ill, name = starve(at, work).verdict, name_of(work)
    assert ill.cause == "deadlock"
    assert fix_of(ill) == f"hand the session that {name} holds on to the {name} that it calls"
    check_that_it_frees(at, at.pick(walk_with_one, walk_with_one_in_thread))


# One connection after another, all at one line.


async def take_all(engine: AsyncEngine, gate: Gate) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(3):
            connection = await stack.enter_async_context(engine.connect())
            await connection.execute(SELECT)
            await gate.wait()


def take_all_in_thread(engine: Engine, gate: Gate) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(engine.connect())
            connection.execute(SELECT)
            gate.wait_in_thread()


async def give_each_back(engine: AsyncEngine, gate: Gate) -> None:
    for _ in range(3):
        async with engine.connect() as connection:
            await connection.execute(SELECT)
            await gate.wait()


def give_each_back_in_thread(engine: Engine, gate: Gate) -> None:
    for _ in range(3):
        with engine.connect() as connection:
            connection.execute(SELECT)
            gate.wait_in_thread()


async def use_one_for_all(engine: AsyncEngine, gate: Gate) -> None:
    async with engine.connect() as connection:
        for _ in range(3):
            await connection.execute(SELECT)
            await gate.wait()


def use_one_for_all_in_thread(engine: Engine, gate: Gate) -> None:
    with engine.connect() as connection:
        for _ in range(3):
            connection.execute(SELECT)
            gate.wait_in_thread()


@pytest.mark.parametrize("number", [1, 4])
def test_give_each_back_before_the_next_is_taken(at: Setting, number: int) -> None:
    """One has all connections of the pool; or two have one each, and that of the next line is the same line."""

    def take(work: Any) -> Outcome:
        engine = at.engine(2)
        scope = PoolScope(engine)
        works = [partial(work, engine, Gate(number, scope))] * number
        return at.look(scope, "deadlock", works)

    work = at.pick(take_all, take_all_in_thread)
    ill, asked = take(work).verdict, line_of(work, "engine.connect()")
    assert ill.cause == "deadlock"
    assert fix_of(ill) == (
        f"{name_of(work)}, line {asked}: give each connection back before the next is taken,"
        " or use one for all of it"
    )
    for cure in (
        at.pick(give_each_back, give_each_back_in_thread),
        at.pick(use_one_for_all, use_one_for_all_in_thread),
    ):
        take(cure).check_that_it_is_cured(HELD)


# Whoever is cancelled, and asks the scope while it still holds its connection, is in line no more.


async def wait_for_another(engine: AsyncEngine, told: list[Verdict], scope: PoolScope) -> None:
    async with engine.connect() as connection:
        await connection.execute(SELECT)
        try:
            await price_of(engine)
        except asyncio.CancelledError:
            told.append(scope.verdict())
            raise


async def finish_before_another(engine: AsyncEngine, told: list[Verdict], scope: PoolScope) -> None:
    async with engine.connect() as connection:
        await connection.execute(SELECT)
    try:
        await price_of(engine)
    except asyncio.CancelledError:
        told.append(scope.verdict())
        raise


def test_finish_before_anybody_asks(url: str) -> None:
    at, told = Setting(url, threads=False), []

    def work(way: Any) -> Outcome:
        engine = at.engine(1)
        scope = PoolScope(engine)
        return at.look(scope, "deadlock", [partial(way, engine, told, scope)])

    assert work(wait_for_another).verdict.cause == "deadlock"
    (verdict,) = told
    assert verdict.cause == "deadlock"
    assert fix_of(verdict) == (
        "let whoever holds a connection finish with it before anybody whom it waits for asks for one"
    )
    work(finish_before_another).check_that_it_is_cured()


# Several pools.


async def hold_one_ask_other(held: AsyncEngine, asked: AsyncEngine, gate: Gate) -> None:
    async with held.connect() as first:
        await first.execute(SELECT)
        await gate.wait()
        async with asked.connect() as second:
            await second.execute(SELECT)


def hold_one_ask_other_in_thread(held: Engine, asked: Engine, gate: Gate) -> None:
    with held.connect() as first:
        first.execute(SELECT)
        gate.wait_in_thread()
        with asked.connect() as second:
            second.execute(SELECT)


def test_one_order_everywhere_or_one_connection_of_one_pool(at: Setting) -> None:
    def work(in_order: bool) -> list[Outcome]:
        orders, audit = at.engine(1), at.engine(1)
        scopes = PoolScope(orders, "orders"), PoolScope(audit, "audit")
        way = at.pick(hold_one_ask_other, hold_one_ask_other_in_thread)
        pairs = [(orders, audit), (orders, audit) if in_order else (audit, orders)]
        looks = []
        for scope in scopes:
            gate = Gate(2, *scopes)
            looks.append(at.look(scope, "deadlock", [partial(way, *pair, gate) for pair in pairs]))
        return looks

    orders, audit = (outcome.verdict for outcome in work(in_order=False))
    assert orders.cause == audit.cause == "deadlock"
    rest = "in one order everywhere, or one connection of one pool for all of it"
    assert fix_of(orders) == f"take connections of orders, audit {rest}"
    assert fix_of(audit) == f"take connections of audit, orders {rest}"
    for cured in work(in_order=True):
        cured.check_that_it_is_cured(HELD)
    # One pool alone, as large as both, is no cure.
    assert starve(at, at.pick(take_two, take_two_in_thread)).verdict.cause == "deadlock"
    check_that_it_frees(at, at.pick(use_one_twice, use_one_twice_in_thread))


def test_a_pool_behind_another_that_is_stuck(at: Setting) -> None:
    """Everybody takes them in one order already; the other pool has a deadlock of its own."""

    def work(way: Any) -> list[Outcome]:
        orders, audit = at.engine(1), at.engine(1)
        scopes = PoolScope(orders, "orders"), PoolScope(audit, "audit")
        both, looks = at.pick(hold_one_ask_other, hold_one_ask_other_in_thread), []
        for scope in scopes:
            gate = Gate(3, *scopes)
            works = [partial(way, audit, gate), *[partial(both, orders, audit, gate)] * 2]
            looks.append(at.look(scope, "deadlock", works))
        return looks

    way = at.pick(take_two, take_two_in_thread)
    orders, audit = (outcome.verdict for outcome in work(way))
    assert orders.cause == audit.cause == "deadlock"
    assert fix_of(orders) == "what the verdict on audit says: orders only waits for it"
    assert fix_of(audit) == (
        f"{name_of(way)}: use the connection it holds (line {line_of(way, 'as first')})"
        f" also at line {line_of(way, 'as second')}"
    )
    for cured in work(at.pick(use_one_twice, use_one_twice_in_thread)):
        cured.check_that_it_is_cured(HELD)


# Sessions that nobody closes, in a pool that others want connections of. They are kept in a list of the module, which
# no function has in hand: whoever had them in hand could close them.

kept: list[Any] = []


async def close_all() -> None:
    while kept:
        await kept.pop().close()


def close_all_in_thread() -> None:
    while kept:
        kept.pop().close()


def lose(at: Setting, work_of: Callable[[Any], Work]) -> Outcome:
    """Two do the work on an engine and end; then others ask for a connection. At last, what they left is closed."""
    engine, done = at.engine(2), at.event()

    async def ask_later() -> None:
        await done.wait()
        await price_of(engine)

    def ask_later_in_thread() -> None:
        done.wait(PATIENCE)
        ask_in_thread(engine)

    return at.look(
        PoolScope(engine),
        "leaked",
        [partial(at.pick(_then, _then_in_thread), work_of(engine), done, 2)],
        customers=[at.pick(ask_later, ask_later_in_thread)] * 3,
        at_end=at.pick(close_all, close_all_in_thread),
    )


async def _then(work: Work, done: asyncio.Event, number: int) -> None:
    """Do the work in so many tasks of its own, and say when they have ended."""
    try:
        await asyncio.gather(*(asyncio.create_task(work()) for _ in range(number)))
    finally:
        done.set()


def _then_in_thread(work: Work, done: threading.Event, number: int) -> None:
    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()


async def keep_it_open(engine: AsyncEngine) -> None:
    session = AsyncSession(engine)
    kept.append(session)
    await session.execute(SELECT)


def keep_it_open_in_thread(engine: Engine) -> None:
    session = Session(engine)
    kept.append(session)
    session.execute(SELECT)


async def close_it(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        kept.append(session)
        await session.execute(SELECT)


def close_it_in_thread(engine: Engine) -> None:
    with Session(engine) as session:
        kept.append(session)
        session.execute(SELECT)


CLOSE = (
    "close the session in the task that opened it (async with, or remove() for a scoped session)"
)


def test_close_the_session_in_the_task_that_opened_it(at: Setting) -> None:
    def work(way: Any) -> Outcome:
        return lose(at, lambda engine: partial(way, engine))

    ill = work(at.pick(keep_it_open, keep_it_open_in_thread)).verdict
    assert ill.cause == "leaked"
    assert fix_of(ill) == CLOSE
    work(at.pick(close_it, close_it_in_thread)).check_that_it_is_cured()


async def use_registry(sessions: Any, remove: bool) -> None:
    await sessions.execute(SELECT)
    kept.append(sessions())
    if remove:
        await sessions.remove()


def use_registry_in_thread(sessions: Any, remove: bool) -> None:
    sessions.execute(SELECT)
    kept.append(sessions())
    if remove:
        sessions.remove()


def test_remove_a_scoped_session(at: Setting) -> None:
    """The registry tells them apart by what is still there when they have ended, as registries for asyncio do."""

    def work(remove: bool) -> Outcome:
        def use(engine: Any) -> Work:
            if at.threads:
                maker = sessionmaker(engine)
                sessions = scoped_session(maker, scopefunc=threading.current_thread)
                return partial(use_registry_in_thread, sessions, remove)
            makers = async_sessionmaker(engine)
            return partial(
                use_registry, async_scoped_session(makers, scopefunc=asyncio.current_task), remove
            )

        return lose(at, use)

    ill = work(remove=False).verdict
    assert ill.cause == "leaked"
    assert fix_of(ill) == CLOSE
    work(remove=True).check_that_it_is_cured()


# Of a module, as they are in a service: whoever had one in hand could close what is in it.
REGISTRIES = {
    "by thread-local": scoped_session(sessionmaker()),
    "by identifier": scoped_session(sessionmaker(), threading.get_ident),
}


@pytest.mark.parametrize("which", list(REGISTRIES))
def test_remove_the_session_of_a_thread_that_lives_on(server: Server, which: str) -> None:
    """Its next piece of work may use it again, so nobody says that it is lost; nor that the database is slow."""

    def starve(remove: bool) -> tuple[bool, Verdict]:
        engine = create_engine(
            server.url.replace("asyncpg", "psycopg"),
            pool_size=2,
            max_overflow=0,
            pool_timeout=PATIENCE,
        )
        scope, together = PoolScope(engine), threading.Barrier(2)
        REGISTRIES[which].configure(bind=engine)

        def work() -> None:
            REGISTRIES[which].execute(SELECT)
            together.wait(PATIENCE)
            if remove:
                REGISTRIES[which].remove()

        def close() -> None:
            together.wait(PATIENCE)
            REGISTRIES[which].remove()

        customer = threading.Thread(target=ask_in_thread, args=(engine,))
        with ThreadPoolExecutor(2) as workers:
            for job in [workers.submit(work) for _ in range(2)]:
                job.result()
            customer.start()
            if not remove:
                assert await_that(lambda: scope.cause() == "unknown", PATIENCE)
            else:
                customer.join(PATIENCE)
            starves, verdict = customer.is_alive(), scope.verdict()
            for job in [workers.submit(close) for _ in range(2)]:
                job.result()
        customer.join(PATIENCE)
        engine.dispose()
        return starves, verdict

    starves, ill = starve(remove=False)
    assert starves and "2 of them are held by threads of an executor" in str(ill), str(ill)
    assert fix_of(ill) == (
        "close the session where the thread's work ends (with, or remove() for a scoped session)"
    )
    starves, well = starve(remove=True)
    assert not starves and well.cause == "healthy", str(well)


# Something else is awaited with a connection in hand: here, what comes only when others were served.


async def pay(engine: AsyncEngine, asked: list[None], answer: asyncio.Event) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)
        asked.append(None)
        await answer.wait()
        await session.execute(SELECT)


def pay_in_thread(engine: Engine, asked: list[None], answer: threading.Event) -> None:
    with Session(engine) as session:
        session.execute(SELECT)
        asked.append(None)
        answer.wait(PATIENCE)
        session.execute(SELECT)


async def commit_before(engine: AsyncEngine, asked: list[None], answer: asyncio.Event) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)
        await session.commit()
        asked.append(None)
        await answer.wait()
        await session.execute(SELECT)


def commit_before_in_thread(engine: Engine, asked: list[None], answer: threading.Event) -> None:
    with Session(engine) as session:
        session.execute(SELECT)
        session.commit()
        asked.append(None)
        answer.wait(PATIENCE)
        session.execute(SELECT)


async def leave_before(engine: AsyncEngine, asked: list[None], answer: asyncio.Event) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)
    asked.append(None)
    await answer.wait()
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)


def leave_before_in_thread(engine: Engine, asked: list[None], answer: threading.Event) -> None:
    with Session(engine) as session:
        session.execute(SELECT)
    asked.append(None)
    answer.wait(PATIENCE)
    with Session(engine) as session:
        session.execute(SELECT)


async def commit_a_connection(
    engine: AsyncEngine, asked: list[None], answer: asyncio.Event
) -> None:
    async with engine.connect() as connection:
        await connection.execute(SELECT)
        await connection.commit()
        asked.append(None)
        await answer.wait()


def commit_a_connection_in_thread(
    engine: Engine, asked: list[None], answer: threading.Event
) -> None:
    with engine.connect() as connection:
        connection.execute(SELECT)
        connection.commit()
        asked.append(None)
        answer.wait(PATIENCE)


async def leave_a_connection(engine: AsyncEngine, asked: list[None], answer: asyncio.Event) -> None:
    async with engine.connect() as connection:
        await connection.execute(SELECT)
        await connection.commit()
    asked.append(None)
    await answer.wait()


def leave_a_connection_in_thread(
    engine: Engine, asked: list[None], answer: threading.Event
) -> None:
    with engine.connect() as connection:
        connection.execute(SELECT)
        connection.commit()
    asked.append(None)
    answer.wait(PATIENCE)


def test_give_the_connection_back_before_something_else_is_awaited(at: Setting) -> None:
    def work(way: Any) -> Outcome:
        engine = at.engine(2)
        asked, answer = [], at.event()
        return at.look(
            PoolScope(engine),
            HELD,
            [partial(way, engine, asked, answer)] * 2,
            customers=customers_of(at, engine, lambda: len(asked) == 2),
            then=lambda: at.set(answer),
        )

    for ill, *cures in (
        (
            at.pick(pay, pay_in_thread),
            at.pick(commit_before, commit_before_in_thread),
            at.pick(leave_before, leave_before_in_thread),
        ),
        (
            at.pick(commit_a_connection, commit_a_connection_in_thread),
            at.pick(leave_a_connection, leave_a_connection_in_thread),
        ),
    ):
        verdict = work(ill).verdict
        assert verdict.cause == HELD
        assert fix_of(verdict) == (
            f"give the connection back before {name_of(ill)}, line {line_of(ill, 'answer.wait')}:"
            " commit the session, or leave the block"
        )
        for cure in cures:
            work(cure).check_that_it_is_cured()


# The loop is blocked by a report whose statement waits until the test lets it: what takes long in real life.


class Report:
    """A statement that takes until `finish()`, for whoever asks for it, over engines of its own."""

    def __init__(self, url: str) -> None:
        synchronous = url.replace("asyncpg", "psycopg").replace("+aiosqlite", "")
        self.engine = create_engine(synchronous, pool_size=1)
        self.asynchronous = create_async_engine(url, pool_size=1)
        self.statement = text(
            "begin immediate"
            if make_url(url).get_backend_name() == "sqlite"
            else "select pg_advisory_xact_lock(1905)"
        )
        self._connection = self.engine.connect()
        self._connection.execute(self.statement)

    def finish(self) -> None:
        self._connection.close()


async def report_in_the_loop(report: Report, begin: Work) -> None:
    await begin()
    read_report(report)


def read_report(report: Report) -> None:
    with report.engine.connect() as connection:
        connection.execute(report.statement)


async def report_asynchronously(report: Report, begin: Work) -> None:
    await begin()
    async with report.asynchronous.connect() as connection:
        await connection.execute(report.statement)
    await report.asynchronous.dispose()


async def report_in_a_thread(report: Report, begin: Work) -> None:
    await begin()
    await asyncio.to_thread(read_report, report)


def test_await_an_asynchronous_driver_or_send_the_call_to_a_thread(url: str) -> None:
    """It begins when one customer has the connection and the others wait; none can go on before it lets the loop go."""
    at = Setting(url, threads=False)

    def work(way: Any) -> Outcome:
        engine, report, begun = at.engine(1), Report(url), asyncio.Event()
        scope = PoolScope(engine)
        gate = Gate(4, scope)

        async def begin() -> None:
            await gate.wait()
            begun.set()

        async def customer() -> None:
            async with engine.connect() as connection:
                await begun.wait()
                await connection.execute(SELECT)

        outcome = at.look(
            scope,
            "loop blocked",
            [partial(way, report, begin)],
            customers=[customer] * 4,
            then=report.finish,
        )
        report.engine.dispose()
        return outcome

    ill = work(report_in_the_loop).verdict
    assert ill.cause == "loop blocked"
    place = f"read_report, line {line_of(read_report, 'connection.execute')}"
    assert fix_of(ill) == (
        f"await an asynchronous driver in {place}, or send the call to a thread (asyncio.to_thread)"
    )
    for cure in (report_asynchronously, report_in_a_thread):
        work(cure).check_that_it_is_cured(HELD)


# Connects that fail.


class Door:
    """A port of this machine behind which the server is, while it is open."""

    def __init__(self, server: Server) -> None:
        self.port = free_port()
        self._behind = make_url(server.url).port
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None

    def url(self, url: str) -> str:
        return make_url(url).set(port=self.port).render_as_string(hide_password=False)

    def open(self) -> None:
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))
        self._thread.start()
        assert self._ready.wait(PATIENCE)

    def close(self) -> None:
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._finish.set)
            self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._finish = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._forward, "127.0.0.1", self.port)
        self._ready.set()
        await self._finish.wait()
        server.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._behind)
        with suppress(ConnectionError):
            await asyncio.gather(_copy(reader, back), _copy(there, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@pytest.fixture
def door(server: Server) -> Iterator[Door]:
    door = Door(server)
    yield door
    door.close()


@pytest.fixture(params=["tasks", "threads"])
def on_server(request: pytest.FixtureRequest, server: Server) -> Setting:
    """As tasks and as threads, on PostgreSQL."""
    return Setting(server.url, request.param == "threads")


LOOK_AT_THE_SERVER = (
    "look at the server: its address, whether it runs, whether max_connections is reached"
)


def ask_at_once(at: Setting, scope: PoolScope, engine: Any, number: int) -> Outcome:
    """So many have a connection each at the same time, if they get one."""
    gate = Gate(number, scope)
    work = partial(at.pick(use_one_twice, use_one_twice_in_thread), engine, gate)
    return at.look(scope, "connects failing", [work] * number)


def test_look_whether_the_server_runs_or_at_its_address(on_server: Setting, door: Door) -> None:
    at = on_server
    engine = at.engine(8, door.url(at.url))
    scope = PoolScope(engine)
    ill = ask_at_once(at, scope, engine, 1)
    assert ill.verdict.cause == "connects failing"
    assert fix_of(ill.verdict) == LOOK_AT_THE_SERVER
    right = at.engine(8)
    ask_at_once(at, PoolScope(right), right, 2).check_that_it_is_cured(HELD)
    door.open()
    # What has failed is remembered until as many attempts, and one more, have gone well.
    assert not ask_at_once(at, PoolScope(engine), engine, 8).errors
    ask_at_once(at, scope, engine, 2).check_that_it_is_cured(HELD)


def test_look_whether_max_connections_is_reached(server: Server) -> None:
    others: list[Any] = []
    try:
        with suppress(psycopg.OperationalError):
            while True:
                others.append(psycopg.connect(server.url.replace("+asyncpg", "")))
        for threads in (False, True):
            at = Setting(server.url, threads)
            engine = at.engine(2)
            ill = ask_at_once(at, PoolScope(engine), engine, 1).verdict
            assert ill.cause == "connects failing" and "too many clients" in str(ill)
            assert fix_of(ill) == LOOK_AT_THE_SERVER
    finally:
        for other in others:
            other.close()
    for threads in (False, True):
        at = Setting(server.url, threads)
        engine = at.engine(2)
        ask_at_once(at, PoolScope(engine), engine, 2).check_that_it_is_cured(HELD)


@pytest.mark.parametrize("threads", [False, True], ids=["tasks", "threads"])
def test_look_at_the_file(threads: bool, tmp_path: Path) -> None:
    at = Setting(f"sqlite+aiosqlite:///{tmp_path / 'not yet' / 'shop.db'}", threads)
    engine = at.engine(2)
    scope = PoolScope(engine)
    ill = ask_at_once(at, scope, engine, 1).verdict
    assert ill.cause == "connects failing"
    assert fix_of(ill) == (
        "look at the file: whether its path is right, its folder there, and the rights to it"
    )
    (tmp_path / "not yet").mkdir()
    assert not ask_at_once(at, PoolScope(engine), engine, 2).errors
    ask_at_once(at, scope, engine, 2).check_that_it_is_cured(HELD)


# What cannot be known.


def test_create_the_scope_where_the_engine_is_created(at: Setting) -> None:
    """The same deadlock, and a scope that has seen who took the connections names it."""

    def work(early: bool) -> Outcome:
        engine, begun = at.engine(2), at.event()
        scope = PoolScope(engine) if early else None

        def scope_of_it() -> PoolScope:
            assert await_that(lambda: len(has) == 2, PATIENCE)
            made = scope or PoolScope(engine)
            at.set(begun)
            return made

        has: list[None] = []
        works = [partial(at.pick(take_two_once, take_two_once_in_thread), engine, has, begun)] * 2
        return at.look(scope_of_it, "deadlock" if early else "unknown", works)

    ill = work(early=False).verdict
    assert ill.cause == "unknown"
    assert fix_of(ill) == "create the PoolScope where the engine is created"
    known = work(early=True).verdict
    assert known.cause == "deadlock"
    way = at.pick(take_two_once, take_two_once_in_thread)
    assert f"(line {line_of(way, 'as first')})" in fix_of(known)


async def take_two_once(engine: AsyncEngine, has: list[None], begun: asyncio.Event) -> None:
    async with engine.connect() as first:
        await first.execute(SELECT)
        has.append(None)
        await begun.wait()
        async with engine.connect() as second:
            await second.execute(SELECT)


def take_two_once_in_thread(engine: Engine, has: list[None], begun: threading.Event) -> None:
    with engine.connect() as first:
        first.execute(SELECT)
        has.append(None)
        begun.wait(PATIENCE)
        with engine.connect() as second:
            second.execute(SELECT)


async def run_slow(slow: str, engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text(slow))


def run_slow_in_thread(slow: str, engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text(slow))


def begun(scope: PoolScope) -> bool:
    """Whether both have begun with their statements, or have done them already."""
    return scope.checkouts >= 2 and all(holder.last_sql for holder in scope.holders)


def as_tasks_and_as_threads(trial: Callable[[bool], None]) -> None:
    """Both at once: before it is said that nothing has come back for seconds, seconds pass."""
    with ThreadPoolExecutor(2) as both:
        list(both.map(trial, (False, True)))


def test_ask_the_server(server: Server) -> None:
    """Both that the line names tell which statement it is; and with a fast one, it is over."""
    as_tasks_and_as_threads(
        lambda threads: ask_about_a_slow_statement(Setting(server.url, threads))
    )


def ask_about_a_slow_statement(at: Setting) -> None:
    reports, rows, slow = [], [], at.pick("select pg_sleep(30)", "select pg_sleep(31)")

    def work(way: Any) -> Outcome:
        engine = at.engine(2)
        scope = PoolScope(engine)

        def ask_for_it() -> None:
            verdict = scope.verdict()
            if verdict.cause != "unknown":
                return
            _, query = fix_of(verdict).split("or ", 1)
            reports.append(asyncio.run(scope.ask_server()))
            with psycopg.connect(re.sub(r"\+\w+", "", at.url)) as connection:
                rows.extend(connection.execute(query).fetchall())
                connection.execute(
                    "select pg_cancel_backend(pid) from pg_stat_activity where query = %s", [slow]
                )

        return at.look(
            scope,
            "unknown",
            [partial(way, engine)] * 2,
            customers=customers_of(at, engine, lambda: begun(scope)),
            then=ask_for_it,
        )

    way = at.pick(run_slow, run_slow_in_thread)
    ill = work(partial(way, slow)).verdict
    assert ill.cause == "unknown"
    assert fix_of(ill) == (
        "await scope.ask_server(), or SELECT state, wait_event_type, query FROM pg_stat_activity"
    )
    (report,) = reports
    assert report.cause == "slow" and slow in str(report)
    assert fix_of(report) == (
        f"make the statement in {name_of(way)}, line {line_of(way, 'connection.execute')} shorter:"
        " look at its plan with EXPLAIN (ANALYZE)"
    )
    assert ("active", "Timeout", slow) in rows
    work(at.pick(price_of, ask_in_thread)).check_that_it_is_cured()


def test_look_at_what_the_holders_execute(tmp_path: Path) -> None:
    """A SQLite file has no server that could be asked; what is executed is known."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}"
    as_tasks_and_as_threads(lambda threads: look_at_a_slow_statement(Setting(url, threads)))


def look_at_a_slow_statement(at: Setting) -> None:
    go_on, slow = threading.Event(), "select pg_sleep(30)"

    def work(way: Any) -> Outcome:
        engine = at.engine(2)

        @event.listens_for(getattr(engine, "sync_engine", engine), "connect")
        def let_it_sleep_too(connection: Any, record: Any) -> None:
            connection.create_function("pg_sleep", 1, lambda _: go_on.wait(PATIENCE))

        scope = PoolScope(engine)
        return at.look(
            scope,
            "unknown",
            [partial(way, engine)] * 2,
            customers=customers_of(at, engine, lambda: begun(scope)),
            then=go_on.set,
        )

    ill = work(partial(at.pick(run_slow, run_slow_in_thread), slow)).verdict
    assert ill.cause == "unknown"
    assert fix_of(ill) == f"look at what the holders execute: {slow}"
    work(at.pick(price_of, ask_in_thread)).check_that_it_is_cured()
