"""What a check notes in the process in which the learner's code runs, beside what `observe` sees from outside."""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from sqlalchemy import Connection, Engine, event
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_cursor
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

from ormscope import PoolScope, Verdict
from ormscope.places import is_user_code, place
from ormscope.stacks import is_sleeping, sleeping_frames
from workshop.checks.lent import POOL_TIMEOUT, Conditions
from workshop.checks.unheard import Unheard, is_learners

THE_CHECK = "the check"
"""The name of a task that is not the learner's: nobody asks what it waits for."""
_LOOK_SECONDS = 0.02
_MOST_OF_THE_LOOP = 0.1  # of its time, for looking: with hundreds in line a look takes longer
_CROWD_SECONDS = 0.5  # between two looks at who holds and who waits
_SECONDS_TO_LEAVE = 1.0  # for tasks that are cancelled
_WRITES = re.compile(r"\s*(insert|update|delete|with\b.*\b(insert|update|delete))\b", re.I | re.S)
_ASYNCIO = os.path.dirname(asyncio.__file__)
_QUEUES = {
    function.__code__
    for function in (asyncio.Lock.acquire, asyncio.Semaphore.acquire, asyncio.Event.wait)
}
_POOL_FUNCTIONS = ("connect", "_do_get", "_do_return_conn", "_inc_overflow", "_create_connection")
# The driver's adapter lets one task at a time use a connection; whoever stands here shares it with another.
_SHARING = {
    (asyncio.Lock.acquire.__code__, function.__code__)
    for function in (
        AsyncAdapt_asyncpg_cursor._prepare_and_execute,
        AsyncAdapt_asyncpg_cursor._executemany,
    )
}


@dataclass(kw_only=True)
class Evidence:
    """What was noted while the learner's code ran; each task adds what it looks for besides.

    `lent` is how many engines the code was lent, the first of the recording's pools, and `ended` says whether it
    came to an end in time. `sleepers` and `queuers` are the most tasks at once that slept by the clock, or stood
    before a lock or semaphore of the learner's own, and `sleeps_at` and `queues_at` where; `sharers` those that
    wanted a connection which another task was just using. `tampered` says whether a pool that was lent to the code
    came back changed, `left_checked_out` how many of their connections did not come back, `left_running` how many
    tasks the code left behind.

    `crowd` is the last verdict on a lent pool at which somebody had waited for a third of the pool's timeout;
    `standing` where the learner's tasks stood when the load was cancelled, with how many stood there. `committed` and
    `rolled_back` are the transactions of the lent engines that had written something, by their end.
    """

    lent: int = 0
    ended: bool = True
    sleepers: int = 0
    sleeps_at: str = ""
    queuers: int = 0
    queues_at: str = ""
    sharers: int = 0
    tampered: bool = False
    left_checked_out: int = 0
    left_running: int = 0
    crowd: Verdict | None = None
    standing: Counter[str] = field(default_factory=Counter)
    committed: int = 0
    rolled_back: int = 0
    unheard: Unheard = field(default_factory=Unheard)


@dataclass(kw_only=True)
class Work(Evidence):
    """The evidence of calls that are counted: `done` is how many of them did all that was asked of them."""

    done: int


@asynccontextmanager
async def evidence(conditions: Conditions, *engines: AsyncEngine) -> AsyncIterator[Evidence]:
    """Note what happens from here to the end of the block; `engines` are those that the learner's code is lent.

    What has not ended in time is cancelled, and so is whatever the learner's code has left running: it would meet the
    check's own work in the database.
    """
    noted = Evidence(lent=len(engines))
    pools = [engine.pool for engine in engines]
    scopes = [PoolScope(engine) for engine in engines]
    end = ExitStack()
    for engine in engines:
        end.enter_context(_transactions(engine, noted))
    before = [_settings(engine) for engine in engines]

    known = asyncio.all_tasks()
    watcher = asyncio.create_task(_watch(noted, scopes, conditions), name=THE_CHECK)
    try:
        async with asyncio.timeout(conditions.load_seconds):
            yield noted
            left = asyncio.all_tasks() - known - {watcher}
            noted.left_running = sum(not _is_out_of_work(task) for task in left)
    except TimeoutError:
        noted.ended = False
    finally:
        watcher.cancel()
        noted.tampered = before != [_settings(engine) for engine in engines]
        noted.left_checked_out = sum(cast(QueuePool, pool).checkedout() for pool in pools)
        left = asyncio.all_tasks() - known - {watcher}
        for task in left:
            if not _is_closing(task):
                task.cancel()
        if left:
            await asyncio.wait(left, timeout=_SECONDS_TO_LEAVE)
        end.close()
        for scope in scopes:
            scope.close()


@contextmanager
def _transactions(engine: AsyncEngine | Engine, noted: Evidence) -> Iterator[None]:
    """Count how the transactions end that have written something; those of the check itself come later."""
    # Weakly: else whoever looks for the users of a connection would find this, and the engine's listeners above it.
    have_written: weakref.WeakSet[Connection] = weakref.WeakSet()

    def statement(connection: Connection, _cursor: Any, statement: str, *_about: Any) -> None:
        if _WRITES.match(statement):
            have_written.add(connection)

    def commit(connection: Connection) -> None:
        noted.committed += connection in have_written
        have_written.discard(connection)

    def rollback(connection: Connection) -> None:
        noted.rolled_back += connection in have_written
        have_written.discard(connection)

    target = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    listeners: dict[str, Callable[..., None]] = {
        "before_cursor_execute": statement,
        "commit": commit,
        "rollback": rollback,
    }
    for name, listener in listeners.items():
        event.listen(target, name, listener)
    try:
        yield
    finally:
        for name, listener in listeners.items():
            event.remove(target, name, listener)


def _is_closing(task: asyncio.Task[Any]) -> bool:
    """Whether SQLAlchemy ends a session in it, shielded: if it were cancelled, the connection would stay out."""
    frame = getattr(task.get_coro(), "cr_frame", None)
    return frame is not None and frame.f_globals.get("__name__", "").startswith("sqlalchemy.")


def _is_out_of_work(task: asyncio.Task[Any]) -> bool:
    """Whether it is a worker that has emptied its queue: whoever gave it work has waited for that."""
    return is_sleeping(task) and sleeping_frames(task)[-1].f_code is asyncio.Queue.get.__code__


def _settings(engine: AsyncEngine) -> list[object]:
    """What tells a pool that was changed or exchanged from the one that was lent."""
    pool = engine.pool
    numbers = [getattr(pool, name, None) for name in ("_max_overflow", "_timeout", "_pre_ping")]
    classes = type(pool).__mro__
    functions = [vars(base).get(name) for base in classes for name in _POOL_FUNCTIONS]
    own = [vars(pool).get(name) for name in _POOL_FUNCTIONS]  # PoolScope's own, or somebody's
    return [id(pool), numbers, classes, functions, own]


async def _watch(noted: Evidence, scopes: Sequence[PoolScope], conditions: Conditions) -> None:
    looked_at = 0.0

    def look() -> None:
        nonlocal looked_at
        _look_at_tasks(noted)
        now = time.perf_counter()
        if now - looked_at > _CROWD_SECONDS:
            looked_at = now
            for scope in scopes:
                waiters = scope.waiters
                if waiters and now - waiters[0].since > POOL_TIMEOUT / 3:
                    noted.crowd = scope.verdict_now()

    # Not longer: in the end they all stand where they are cancelled.
    await look_often(look, time.perf_counter() + conditions.load_seconds - _LOOK_SECONDS)


async def look_often(look: Callable[[], None], end: float = math.inf) -> None:
    """Call a function fifty times a second, or more seldom if it takes its time, until `end` on `time.perf_counter`."""
    spent = 0.0
    while True:
        await asyncio.sleep(max(_LOOK_SECONDS, spent / _MOST_OF_THE_LOOP))
        start = time.perf_counter()
        if start > end:
            return
        look()
        spent = time.perf_counter() - start


def _look_at_tasks(noted: Evidence) -> None:
    sleep_at, queue_at, sharing = [], [], 0
    standing: Counter[str] = Counter()
    for task in asyncio.all_tasks():
        if task.get_name() == THE_CHECK or not is_sleeping(task):
            continue
        frames = sleeping_frames(task)
        callers = [frame for frame in frames if not frame.f_code.co_filename.startswith(_ASYNCIO)]
        if not callers:
            continue
        own = [frame for frame in callers if is_learners(frame.f_code.co_filename)]
        if own:
            standing[place((own[-1].f_code, own[-1].f_lineno)).short] += 1
        if callers[-1] is frames[-1]:
            continue
        innermost, caller = frames[-1].f_code, callers[-1]
        if not is_user_code(caller.f_code.co_filename):
            sharing += (innermost, caller.f_code) in _SHARING
            continue
        where = place((caller.f_code, caller.f_lineno)).short
        if innermost is asyncio.sleep.__code__:
            sleep_at.append(where)
        elif innermost in _QUEUES:
            queue_at.append(where)
    noted.standing = standing
    if len(sleep_at) > noted.sleepers:
        noted.sleepers, noted.sleeps_at = len(sleep_at), max(sleep_at)
    if len(queue_at) > noted.queuers:
        noted.queuers, noted.queues_at = len(queue_at), max(queue_at)
    noted.sharers = max(noted.sharers, sharing)
