"""Exercise 08, task 1: the engine of a service, on a day with a crowd, slow statements, a lock and a restart."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import asyncpg
from sqlalchemy import TextClause, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import QueuePool

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import Conditions, own_households
from workshop.checks.task import Task
from workshop.checks.unpooled import of_the_check

_SIZE = 5
_NAME = "shop"
_POOL_TIMEOUT = 0.5  # seconds
_SLACK = 0.9  # no clock is early, but some are coarse
_LOAD_SECONDS = 8.0  # of which a right answer needs two
_PATIENCE = 2.5  # seconds, until a wait counts as one without an end
_TINY = re.compile(r"\dms")  # of a limit, in the server's words
_CANCELED, _LOCKED = "57014", "55P03"  # SQLSTATE: query_canceled, lock_not_available
_DEFAULT_NAMES = {"", "asyncpg"}

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


_WANTED = Limits("1s", "500ms")


@dataclass(kw_only=True)
class Day(Evidence):
    """What was seen of an engine in use: each group of requests, with how they ended.

    `returned` is the type of what the function returned, where that is no AsyncEngine, and `in_line` are those who
    wanted a connection and kept it. `names` are what the server calls the connections, `first_limits` what it
    allowed them when they were new, and `later_limits` when they had been used before.
    """

    returned: str = ""
    in_line: list[Wait] = field(default_factory=list)
    statements: list[Wait] = field(default_factory=list)
    locks: list[Wait] = field(default_factory=list)
    customers: list[Wait] = field(default_factory=list)
    pool_timeout: float = 0.0
    names: set[str] = field(default_factory=set)
    first_limits: set[Limits] = field(default_factory=set)
    later_limits: set[Limits] = field(default_factory=set)


async def use_for_a_day(
    make_engine: Callable[[str], Any], conditions: Conditions, *, crowd: int, customers: int
) -> Day:
    """A crowd that holds all connections; slow statements beside a locked row; and customers after a restart."""
    made: list[Any] = []

    async def start(number: int) -> None:
        made.append(make_engine(conditions.url))

    async with of_the_check(conditions, 1) as others, evidence(conditions) as noted:
        await storm(start, 1)
        day = Day()
        if made and not isinstance(engine := made[0], AsyncEngine):
            day.returned = type(engine).__name__
        elif made:
            try:
                day.pool_timeout = _line_of(engine)
                async with others.acquire() as colleague:
                    pids = await _hold_all(engine, day, crowd)
                    await _be_slow(engine, day, colleague)
                    await _end_connections(colleague, pids)
                    day.customers += await _ask(engine, [_SHORT] * customers)
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
        day.in_line.append(wait := await _waited(connection.start()))
        undecided -= 1
        if not undecided:
            all_decided.set()
        if wait.end == "ok":
            try:
                day.customers.append(await _waited(look(connection)))
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
            statements = [_LONG] * (_SIZE - len(locks)) + [text(lock) for lock in locks]
            waits = await _ask(engine, statements, before=day.later_limits)
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
    engine: AsyncEngine, statements: Sequence[TextClause], before: set[Limits] | None = None
) -> list[Wait]:
    """Send all statements at once, each from a request of its own; what the limit was `before` is put there."""
    waits: list[Wait] = [Wait("waits", 0.0)] * len(statements)

    async def served(statement: TextClause) -> None:
        async with engine.connect() as connection:
            if before is not None:
                before.add(await _limits(connection))
            await connection.execute(statement)

    async def asks(number: int) -> None:
        waits[number] = await _waited(served(statements[number]))

    await storm(asks, len(statements))
    return waits


async def _limits(connection: AsyncConnection) -> Limits:
    return Limits(*(await connection.execute(_LIMITS)).one())


async def _waited(work: Coroutine[Any, Any, Any]) -> Wait:
    """Let a request have its way, as long as anybody would wait for it; raises what is no answer to the question."""
    began = time.perf_counter()
    task = asyncio.ensure_future(work)
    await asyncio.wait([task], timeout=_PATIENCE)
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
        if state in (_CANCELED, _LOCKED):
            return Wait(state, seconds)
        if error.connection_invalidated:
            return Wait("lost", seconds)
    raise error


def demands(run: Recording, seen: Day) -> Iterator[Finding]:
    """Each sentence of the task's text; what explains most comes first."""
    if seen.returned:
        told = f"make_engine(url) returned no AsyncEngine but {seen.returned}."
        yield Finding("not-what-was-asked", told)
        return
    yield from _of_quick_statements(seen)
    yield from _of_the_pool(seen)
    yield from _of_the_server(seen)
    if lost := sum(wait.end == "lost" for wait in seen.customers):
        yield Finding(
            "the-pool-would-know",
            f"The server had ended all connections, and then {len(seen.customers)} customers came: {lost} of them"
            " were handed a dead one, and got the error.",
        )
    yield from _of_customers(seen)
    if seen.names & _DEFAULT_NAMES:
        yield Finding(
            "everybody-is-nobody",
            f"In pg_stat_activity the connections of your engine are called {_quoted(seen.names)}.",
        )
    if seen.names != {_NAME}:
        yield Finding(
            "not-what-was-asked",
            f'In pg_stat_activity your connections are called {_quoted(seen.names)}; the task wants "{_NAME}".',
        )


def _of_quick_statements(seen: Day) -> Iterator[Finding]:
    """What the server ends though it is quick: also what the driver asks when it opens a connection."""
    quick = [*seen.customers, *(wait for wait in seen.in_line if wait.end == _CANCELED)]
    ended = sum(wait.end == _CANCELED for wait in quick)
    tiny = {limit for limits in seen.first_limits for limit in limits if _TINY.fullmatch(limit)}
    if ended or tiny:
        told = f"The server ended {ended} of {len(quick)} quick statements."
        if tiny:
            told = f"{told} It says of your connections: a limit of {' and '.join(sorted(tiny))}."
        yield Finding("a-number-is-in-seconds", told)


def _of_the_pool(seen: Day) -> Iterator[Finding]:
    """How many connections there are, and how long others wait for one."""
    held = sum(wait.end == "ok" for wait in seen.in_line)
    asked = f"{len(seen.in_line)} customers wanted a connection at the same time, and kept it."
    if held > _SIZE:
        told = f"{asked} {held} had one, and the task allows {_SIZE}."
        yield Finding("size-is-not-the-limit", told)
    left_out = [wait for wait in seen.in_line if wait.end != "ok"]
    if endless := sum(wait.end == "waits" for wait in left_out):
        yield Finding(
            "everybody-is-patient",
            f"{asked} {held} had one, and {endless} still stood in line after {_PATIENCE:g} s.",
        )
    if held < _SIZE:
        told = f"{asked} Only {held} got one; the task wants {_SIZE}."
        yield Finding("not-what-was-asked", told)
    for wait in left_out:
        if wait.end != "refused" or wait.seconds < _POOL_TIMEOUT * _SLACK:
            told = f"Somebody in line for a connection {_ended(wait)}; the task wants TimeoutError"
            yield Finding("not-what-was-asked", f"{told} after {_POOL_TIMEOUT:g} s.")
    if seen.pool_timeout > _POOL_TIMEOUT:
        told = f"Your pool lets people wait for {seen.pool_timeout:g} s; the task wants {_POOL_TIMEOUT:g} s."
        yield Finding("not-what-was-asked", told)


def _of_the_server(seen: Day) -> Iterator[Finding]:
    """What becomes of slow statements, and of those that wait for a lock."""
    slow = f"{len(seen.statements)} customers sent a statement that takes 30 s."
    locked = f"{len(seen.locks)} customers wanted to lock a row that a colleague had locked."
    for told, waits in ((slow, seen.statements), (locked, seen.locks)):
        endless = [wait for wait in waits if wait.end == "waits"]
        first, later = _of_statements(seen.first_limits), _of_statements(seen.later_limits)
        if endless and later == {"0"} != first:
            limits = ", ".join(sorted(first))
            yield Finding(
                "once-set-is-set",
                f"{told} After {_PATIENCE:g} s nothing had ended it. The server's statement_timeout was {limits}"
                " when your connections were new, and 0 when they came from the pool again.",
            )
        if given_up := [wait for wait in waits if wait.end == "given up"]:
            seconds = max(wait.seconds for wait in given_up)
            yield Finding(
                "whoever-leaves-ends-it",
                f"{told} After {seconds:.1f} s it was your client that gave up, not the server.",
            )
        if endless and waits is seen.statements:
            told = f"{told} After {_PATIENCE:g} s it was still at work, and had its connection."
            yield Finding("somebody-presses-ctrl-c", told)
        limited_as_work = [wait for wait in waits if wait.end == _CANCELED]
        if waits is seen.locks and (endless or limited_as_work):
            until = "they still waited" if endless else "statement_timeout ended them"
            seconds = _PATIENCE if endless else min(wait.seconds for wait in limited_as_work)
            told = (
                f"{told} After {seconds:.1f} s {until}, with {len(waits)} of {_SIZE} connections."
            )
            yield Finding("a-lock-is-no-line", told)
    for other in seen.later_limits - {_WANTED}:
        yield Finding(
            "not-what-was-asked",
            f"The server says of a connection: statement_timeout {other.statement}, lock_timeout {other.lock}; the"
            f" task wants {_WANTED.statement} and {_WANTED.lock}.",
        )
    for wait in (*seen.statements, *seen.locks):
        if wait.end not in (_CANCELED, _LOCKED):
            told = f"A statement that takes too long {_ended(wait)}; the task wants the server to end it."
            yield Finding("not-what-was-asked", told)


def _of_statements(limits: set[Limits]) -> set[str]:
    return {limit.statement for limit in limits}


def _of_customers(seen: Day) -> Iterator[Finding]:
    for wait in seen.customers:
        if wait.end != "ok":
            told = f"A customer with a quick statement {_ended(wait)}; the task wants them served."
            yield Finding("not-what-was-asked", told)


def _ended(wait: Wait) -> str:
    how = {
        "ok": "was served",
        "refused": "got TimeoutError from the pool",
        "given up": "got TimeoutError from the client",
        "lost": "lost the connection",
        "waits": "was still waiting",
        _CANCELED: "was ended by the server's statement_timeout",
        _LOCKED: "was ended by the server's lock_timeout",
    }
    return f"{how[wait.end]} after {wait.seconds:.2f} s"


def _quoted(names: set[str]) -> str:
    return " and ".join(f'"{name}"' for name in sorted(names))


def prove(run: Recording, seen: Day) -> str:
    """What a run of a right answer has shown."""
    held = sum(wait.end == "ok" for wait in seen.in_line)
    return (
        f"{len(seen.in_line)} customers at once: {held} had a connection, {len(seen.in_line) - held} were told to come"
        f" back. {len(seen.statements)} statements without an end and {len(seen.locks)} waits for a lock: ended by"
        " the server.\n"
        "All connections ended from outside: 0 of the customers after it noticed. The server knows all of them as"
        f" {_quoted(seen.names)}."
    )


give_it_limits: Task[Day] = Task(
    "08",
    "give_it_limits",
    "make_engine",
    load=use_for_a_day,
    trials=({"crowd": 12, "customers": 20},),
    rules=(),
    demands=(demands,),
    proof=prove,
    load_seconds=_LOAD_SECONDS,
    hints=(
        "Two of the limits, and what happens to dead connections, are arguments of create_async_engine. The others are"
        " the server's: who tells it, and when?",
        "The pool: pool_size, max_overflow, pool_timeout, pool_pre_ping. The server:"
        ' connect_args={"server_settings": {...}}, which asyncpg sends when it connects. Its values are text.',
        'In server_settings a number without a unit is in milliseconds: "lock_timeout": "500ms",'
        ' "statement_timeout": "1s". And "application_name" goes there, too.',
    ),
)
