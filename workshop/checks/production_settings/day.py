"""A day of the engine of exercise 09, task 1: a crowd, slow statements, a locked row and a restart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import asyncpg
from sqlalchemy import TextClause, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import QueuePool

from ormscope.lab import storm
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import Conditions, own_households
from workshop.checks.unpooled import of_the_check

SIZE = 5
LOAD_SECONDS = 8.0  # of which a right answer needs two
_PATIENCE = 2.5  # seconds, until a wait counts as one without an end
CANCELED, LOCKED = "57014", "55P03"  # SQLSTATE: query_canceled, lock_not_available
_LOOK = text("SELECT pg_backend_pid(), current_setting('application_name') AS name")
_LIMITS = text("SELECT current_setting('statement_timeout'), current_setting('lock_timeout')")
_SHORT = text("SELECT pg_sleep(0.01)")
_LONG = text("SELECT pg_sleep(30)")
_ORDER = "INSERT INTO orders (household_id, status) VALUES ($1, 'new')"
_LOCK = "SELECT id FROM orders WHERE household_id = {} FOR UPDATE"
_WAIT_FOR_LOCKS = 2


class Wait(NamedTuple):
    """How a request ended, and after how many seconds.

    "ok"; "refused" by the pool; "given up" by the client; "lost", for its connection was dead; "waits", where the
    check has ended it; or the SQLSTATE with which the server has ended it.
    """

    end: str
    seconds: float


class Limits(NamedTuple):
    """What the server allows a connection, in its words: "0" is no limit."""

    statement: str
    lock: str


@dataclass(kw_only=True)
class Day(Evidence):
    """What was seen of an engine in use: each group of requests, with how they ended.

    `returned` is the type of what the function returned, where that is no AsyncEngine, and `in_line` are those who
    wanted a connection and kept it. `names` are what the server calls the connections, `first_limits` what it
    allowed them when they were new, and `later_limits` when they had been used before.
    """

    slowness: int = 1
    returned: str = ""
    in_line: list[Wait] = field(default_factory=list)
    statements: list[Wait] = field(default_factory=list)
    locks: list[Wait] = field(default_factory=list)
    customers: list[Wait] = field(default_factory=list)
    pool_timeout: float = 0.0
    names: set[str] = field(default_factory=set)
    first_limits: set[Limits] = field(default_factory=set)
    later_limits: set[Limits] = field(default_factory=set)

    @property
    def patience(self) -> float:
        """After how many seconds a wait counts as one without an end."""
        return _PATIENCE * self.slowness


async def use_for_a_day(
    make_engine: Callable[[str], Any], conditions: Conditions, *, crowd: int, customers: int
) -> Day:
    """A crowd that holds all connections; slow statements beside a locked row; and customers after a restart."""
    made: list[Any] = []

    async def start(number: int) -> None:
        made.append(make_engine(conditions.url))

    async with of_the_check(conditions, 1) as others, evidence(conditions) as noted:
        await storm(start, 1)
        day = Day(slowness=conditions.slowness)
        if made and not isinstance(engine := made[0], AsyncEngine):
            day.returned = type(engine).__name__
        elif made:
            try:
                day.pool_timeout = _line_of(engine)
                async with others.acquire() as colleague:
                    pids = await _hold_all(engine, day, crowd)
                    await _be_slow(engine, day, colleague)
                    await _end_connections(colleague, pids)
                    day.customers += await _ask(engine, [_SHORT] * customers, day.patience)
            finally:
                await engine.dispose()
    vars(day).update(vars(noted))
    return day


def _line_of(engine: AsyncEngine) -> float:
    """For how many seconds its pool lets people wait; 0 where there is no line."""
    return engine.pool.timeout() if isinstance(engine.pool, QueuePool) else 0.0


async def _hold_all(engine: AsyncEngine, day: Day, crowd: int) -> set[int]:
    """So many ask for a connection; whoever gets one keeps it while others wait. Returns the server's processes."""
    pids: set[int] = set()
    all_decided, undecided = asyncio.Event(), crowd

    async def look(connection: AsyncConnection) -> None:
        pid, name = (await connection.execute(_LOOK)).one()
        pids.add(pid)
        day.names.add(name)
        day.first_limits.add(await _limits(connection))

    async def asks(number: int) -> None:
        nonlocal undecided
        connection = engine.connect()
        day.in_line.append(wait := await _waited(connection.start(), day.patience))
        undecided -= 1
        if not undecided:
            all_decided.set()
        if wait.end == "ok":
            try:
                day.customers.append(await _waited(look(connection), day.patience))
                await all_decided.wait()
            finally:
                await connection.close()

    await storm(asks, crowd)
    return pids


async def _be_slow(engine: AsyncEngine, day: Day, colleague: asyncpg.Connection) -> None:
    """Statements that take too long, and some that wait for a row that a colleague has locked."""
    # A row for each: lock_timeout is for a single wait, and who stands second in line for a row has two of them.
    rows = own_households()[:_WAIT_FOR_LOCKS]
    locks = [_LOCK.format(row) for row in rows]
    await colleague.executemany(_ORDER, [(row,) for row in rows])
    try:
        async with colleague.transaction():
            for lock in locks:
                await colleague.execute(lock)
            statements = [_LONG] * (SIZE - len(locks)) + [text(lock) for lock in locks]
            waits = await _ask(engine, statements, day.patience, before=day.later_limits)
    finally:
        await colleague.execute("DELETE FROM orders WHERE household_id = ANY ($1::int[])", rows)
    day.statements, day.locks = waits[: -len(locks)], waits[-len(locks) :]


async def _end_connections(colleague: asyncpg.Connection, pids: set[int]) -> None:
    """As a restart does: whatever the pool has is dead now, and nobody has told it."""
    await colleague.execute("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) pid", pids)
    alive = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY ($1::int[])"
    while await colleague.fetchval(alive, pids):  # noqa: ASYNC110  # the server tells nobody
        await asyncio.sleep(0.01)


async def _ask(
    engine: AsyncEngine,
    statements: Sequence[TextClause],
    patience: float,
    before: set[Limits] | None = None,
) -> list[Wait]:
    """Send all statements at once, each from a request of its own; what the limit was `before` is put there."""
    waits: list[Wait] = [Wait("waits", 0.0)] * len(statements)

    async def served(statement: TextClause) -> None:
        async with engine.connect() as connection:
            if before is not None:
                before.add(await _limits(connection))
            await connection.execute(statement)

    async def asks(number: int) -> None:
        waits[number] = await _waited(served(statements[number]), patience)

    await storm(asks, len(statements))
    return waits


async def _limits(connection: AsyncConnection) -> Limits:
    return Limits(*(await connection.execute(_LIMITS)).one())


async def _waited(work: Coroutine[Any, Any, Any], patience: float) -> Wait:
    """Let a request have its way, as long as anybody would wait for it; raises what is no answer to the question."""
    began = time.perf_counter()
    task = asyncio.ensure_future(work)
    await asyncio.wait([task], timeout=patience)
    seconds = time.perf_counter() - began
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
        return Wait("waits", seconds)
    error = task.exception()
    if error is None:
        return Wait("ok", seconds)
    if isinstance(error, PoolTimeoutError):
        return Wait("refused", seconds)
    if isinstance(error, TimeoutError):
        return Wait("given up", seconds)
    if isinstance(error, DBAPIError):
        state = getattr(error.orig, "sqlstate", None)
        if state in (CANCELED, LOCKED):
            return Wait(state, seconds)
        if error.connection_invalidated:
            return Wait("lost", seconds)
    raise error
