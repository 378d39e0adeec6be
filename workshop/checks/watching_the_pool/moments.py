"""What happens to a pool while it is watched: waits, and deadlocks from their beginning to their end."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from ormscope import PoolScope
from workshop.checks.answer import replace_names
from workshop.checks.unheard import is_learners

_POLL_SECONDS = 0.001
_APART_CLOCKS = 1e6  # seconds between the zeros of two clocks


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true."""
    while not condition():  # noqa: ASYNC110 (no event tells it)
        await asyncio.sleep(_POLL_SECONDS)


async def take_a_connection(engine: AsyncEngine) -> None:
    """Ask for one, and give it back at once."""
    async with engine.connect():
        pass


async def hold_and_ask(engine: AsyncEngine, meet: asyncio.Barrier) -> None:
    """Ask for a second connection when all others have their first."""
    async with engine.connect():
        await meet.wait()
        await take_a_connection(engine)


@asynccontextmanager
async def deadlocked(engine: AsyncEngine, scope: PoolScope) -> AsyncIterator[float]:
    """A deadlock from the beginning of the block to its end; yields when it was made, on `time.perf_counter()`."""
    capacity = scope.capacity or 0
    meet, made = asyncio.Barrier(capacity), time.perf_counter()
    tasks = [asyncio.create_task(hold_and_ask(engine, meet)) for _ in range(capacity)]
    try:
        await scope.deadlock()
        yield made
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


MOMENTS = {
    "idle": "while nobody used the pool",
    "full": "while all connections were out and nobody waited",
    "queue": "while tasks waited in line",
    "loop blocked": "while the event loop stood still",
    "served": "when all of them had been served",
    "deadlock": "in a deadlock",
    "dispose()": "after dispose()",
    "NullPool": "of an engine with a NullPool",
}
"""The moments of a day, in the words that the learner reads."""


def set_clocks_apart(answer: Callable[..., Any]) -> None:
    """Let the learner's code see other clocks with other zeros, as on Windows; on Linux two are that of `since`."""
    monotonic = time.monotonic

    def apart() -> float:
        is_theirs = is_learners(sys._getframe(1).f_code.co_filename)
        return monotonic() + is_theirs * _APART_CLOCKS

    time.monotonic = asyncio.get_running_loop().time = apart  # type: ignore[method-assign]
    replace_names(answer, monotonic, apart)
