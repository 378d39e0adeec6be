"""What a check notes in the process in which the learner's code runs, beside what `observe` sees from outside."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_cursor
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

from ormscope.places import is_user_code, place
from ormscope.stacks import is_sleeping, sleeping_frames
from workshop.checks.lent import Conditions

_LOOK_SECONDS = 0.02
_SECONDS_TO_LEAVE = 1.0  # for tasks that are cancelled
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
    tasks the code left behind, and `collections` how many full garbage collections there were.
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
    collections: int = 0


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
    before = [_settings(engine) for engine in engines]

    def count(phase: str, info: dict[str, int]) -> None:
        noted.collections += phase == "start" and info["generation"] == 2

    gc.callbacks.append(count)
    known = asyncio.all_tasks()
    watcher = asyncio.create_task(_watch(noted), name="the check")
    try:
        async with asyncio.timeout(conditions.load_seconds):
            yield noted
            noted.left_running = len(asyncio.all_tasks() - known - {watcher})
    except TimeoutError:
        noted.ended = False
    finally:
        watcher.cancel()
        gc.callbacks.remove(count)
        noted.tampered = before != [_settings(engine) for engine in engines]
        noted.left_checked_out = sum(cast(QueuePool, pool).checkedout() for pool in pools)
        left = asyncio.all_tasks() - known - {watcher}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=_SECONDS_TO_LEAVE)


def _settings(engine: AsyncEngine) -> list[object]:
    """What tells a pool that was changed or exchanged from the one that was lent."""
    pool = engine.pool
    numbers = [getattr(pool, name, None) for name in ("_max_overflow", "_timeout", "_pre_ping")]
    classes = type(pool).__mro__
    functions = [vars(base).get(name) for base in classes for name in _POOL_FUNCTIONS]
    own = [vars(pool).get(name) for name in _POOL_FUNCTIONS]  # PoolScope's own, or somebody's
    return [id(pool), numbers, classes, functions, own]


async def _watch(noted: Evidence) -> None:
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        sleep_at, queue_at, sharing = [], [], 0
        for task in asyncio.all_tasks():
            if not is_sleeping(task):
                continue
            frames = sleeping_frames(task)
            callers = [
                frame for frame in frames if not frame.f_code.co_filename.startswith(_ASYNCIO)
            ]
            if not callers or callers[-1] is frames[-1]:
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
        if len(sleep_at) > noted.sleepers:
            noted.sleepers, noted.sleeps_at = len(sleep_at), max(sleep_at)
        if len(queue_at) > noted.queuers:
            noted.queuers, noted.queues_at = len(queue_at), max(queue_at)
        noted.sharers = max(noted.sharers, sharing)
