"""What PostgreSQL and the pool know only together: whose statement waits for whose lock, and whether that can end.

A task has a lock in the server and waits for a connection, while all the connections wait for its lock: the pool sees
statements, the server an idle transaction. The scope knows who has which backend, `pg_blocking_pids` which backend
blocks which. Both are joined here, over a connection outside of the pool that is closed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Engine, event
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import greenlet_spawn

from ormscope import internals, proof
from ormscope.backends import Backends, joined, look, pid_of, rows
from ormscope.hooks import logger
from ormscope.server_limits import LIMITS, SETTINGS
from ormscope.server_proof import Deadlock, Suspicion, might_be_stuck, suspect
from ormscope.server_report import ServerReport, Session, cause_of
from ormscope.verdict import time_limits

if TYPE_CHECKING:
    from ormscope.pool import PoolScope

__all__ = ["ServerReport", "ask"]

_SECONDS = 5.0  # that asking may take, the connect included
_PAUSE = 0.05  # seconds between the two looks of a proof
_LATE = 0.5  # seconds that another thread's loop may be late
_ATTEMPTS = 4  # at a proof: a driver may wake at any moment, only to wait on

_Result = TypeVar("_Result")
_Wait = Callable[[Coroutine[Any, Any, Any]], Any]


async def ask(scope: PoolScope) -> ServerReport:
    """Ask the server about a pool. Raises nothing: what goes wrong is the report's `problem`."""
    dialect, problem = scope.engine.dialect, ""
    try:
        if dialect.name != "postgresql":
            raise _CannotTell(f"only PostgreSQL says who waits for whom; this is {dialect.name}")
        if "server" in scope.lacking:
            raise _CannotTell(f"{scope.lacking['server']} is gone")
        if scope.failure:
            raise _CannotTell(f"this PoolScope has stepped aside ({scope.failure})")
        async with asyncio.timeout(_SECONDS):
            if dialect.is_async:
                return await greenlet_spawn(_ask, scope, await_only)
            return await _in_thread(lambda: _ask(scope, asyncio.run))
    except _CannotTell as reason:
        problem = f"cannot tell, {reason}."
    except TimeoutError:
        problem = f"no answer within {_SECONDS:g} s."
    except Exception as error:
        logger.debug("the server could not be asked", exc_info=True)
        problem = f"no answer. {type(error).__qualname__}: {' '.join(str(error).split())}"
    return ServerReport(pool=scope.name, cause="unknown", problem=problem)


class _CannotTell(Exception):
    """Why the server's answers would be of no use."""


async def _in_thread(work: Callable[[], _Result]) -> _Result:
    """Work in a thread of its own: those of `asyncio.to_thread` may all be waiting for the pool."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_Result | Exception] = loop.create_future()

    def run() -> None:
        outcome: _Result | Exception
        try:
            outcome = work()
        except Exception as error:
            outcome = error
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(lambda: None if done.done() else done.set_result(outcome))

    threading.Thread(target=run, name="ormscope server", daemon=True).start()
    outcome = await done
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@dataclass
class _Answer:
    """What the server said last, and what was proved of it, with the server's limits that may end that."""

    seen: Backends
    proved: list[tuple[Deadlock, tuple[str, ...]]] = field(default_factory=list)


def _ask(scope: PoolScope, wait: _Wait) -> ServerReport:
    """Look at the server, and again where it looks like a deadlock, over a connection of our own."""
    with _connection_like(scope) as connection:
        begun_with = {scope.engine: _limits_of(connection)}
        answer = _Answer(look(connection, scope))
        for _ in range(0 if "proof" in scope.lacking else _ATTEMPTS):
            seen = answer.seen
            suspicion = wait(_in_thread(partial(suspect, seen)))
            if suspicion is None:
                if not might_be_stuck(scope, seen):
                    break
                wait(asyncio.sleep(_PAUSE))
                answer.seen = look(connection, scope)
                continue
            # Other engines may give their connections other limits.
            for other in {seen.scopes[pid] for it in suspicion.deadlocks for pid in it.pids}:
                if other.engine not in begun_with:
                    limits = wait(_in_thread(partial(_limits_from_a_thread, other)))
                    begun_with[other.engine] = limits
            wait(asyncio.sleep(_PAUSE))
            answer.seen = look(connection, scope)
            prove = partial(_prove, suspicion, answer.seen, begun_with)
            loop = suspicion.other_loop
            answer.proved = prove() if loop is None else wait(_on(loop, prove))
            if answer.proved:
                break
        return _report(scope, answer)


def _prove(
    suspicion: Suspicion, again: Backends, begun_with: dict[Engine, dict[str, str]]
) -> list[tuple[Deadlock, tuple[str, ...]]]:
    """What is proved by a second look, told to the scopes while nothing can move."""
    proved = [(it, it.limits(again, begun_with)) for it in suspicion.proved(again)]
    for deadlock, limits in proved:
        is_unmoved = partial(suspicion.is_unmoved, deadlock.stuck)
        proof.declare(deadlock.stuck, is_unmoved, deadlock.in_server, limits)
    return proved


async def _on(loop: asyncio.AbstractEventLoop, work: Callable[[], list[_Result]]) -> list[_Result]:
    """What work finds on the loop of another thread; nothing where that loop does not come round."""
    outcome: Future[list[_Result]] = Future()

    def run() -> None:
        if outcome.set_running_or_notify_cancel():  # else nobody waits any more
            try:
                outcome.set_result(work())
            except Exception as error:
                outcome.set_exception(error)

    try:
        loop.call_soon_threadsafe(run)
    except RuntimeError:
        if not loop.is_closed():
            raise
        return []
    found = asyncio.wrap_future(outcome)
    done, _ = await asyncio.wait({found}, timeout=_LATE)
    if not done and outcome.cancel():  # what has begun is waited for
        return []
    return await found


@contextlib.contextmanager
def _connection_like(scope: PoolScope) -> Iterator[Any]:
    """A connection as the scope's engine opens them, but outside of its pool; closed at the end."""
    pool = scope.pool
    own = NullPool(internals.creator_of(pool), dialect=scope.engine.dialect)
    # What the program does with each new connection may set its role, or the time limits that end a wait.
    event.listen(own, "connect", lambda *about: pool.dispatch.connect(*about))
    connection = own.connect()
    try:
        yield connection
    except BaseException:
        connection.invalidate()  # closes it, for which the driver has a time limit
        raise
    connection.close()


def _limits_of(connection: Any) -> dict[str, str]:
    ((pid, *values),) = rows(connection, SETTINGS)
    if pid != pid_of(connection):
        raise _CannotTell("a proxy (PgBouncer?) or the driver hides which connection is whose")
    limits = {name: value for name, value in zip(LIMITS, values, strict=True) if value}
    seconds = internals.command_timeout_of(connection.driver_connection)
    return limits if seconds is None else {**limits, "command_timeout": f"{seconds:g} s"}


def _limits_from_a_thread(scope: PoolScope) -> dict[str, str]:
    """The limits that connections of another engine begin with, asked in a thread of its own."""

    def limits() -> dict[str, str]:
        with _connection_like(scope) as connection:
            return _limits_of(connection)

    return asyncio.run(greenlet_spawn(limits)) if scope.engine.dialect.is_async else limits()


def _report(scope: PoolScope, answer: _Answer) -> ServerReport:
    seen = answer.seen
    pids: set[int] = set()
    ends: list[str] = []
    above: list[str] = []
    for deadlock, limits in answer.proved:
        if scope.pool not in deadlock.stuck.about:
            continue
        pids = deadlock.pids
        timers, waking = proof.timers_of(deadlock.stuck, proof.waits_of(proof.scopes()))
        ends = [*limits, *time_limits(timers)]
        above = [f"{limit}, whose task may cancel one of them," for limit in time_limits(waking)]
    sessions: dict[int, Session] = {}
    unseen = [pid for pid, holder in seen.holders.items() if holder.pool is scope.pool]
    unseen += [pid for pid, session in seen.sessions.items() if session.left]
    while unseen:
        pid = unseen.pop(0)
        if pid not in sessions:
            sessions[pid] = replace(joined(seen, pid), stuck=pid in pids)
            unseen += sessions[pid].blockers
    known = tuple(sessions.values())
    limit = "no limit" if scope.capacity is None else scope.capacity
    return ServerReport(
        pool=scope.name,
        cause=cause_of(known, bool(ends)),
        state=f"{scope.checked_out} of {limit} checked out, {len(scope.waiters)} waiting",
        sessions=known,
        ends=tuple(ends),
        above=tuple(above),
        timeout=scope.timeout,
    )
