"""What most tests of the instruments do: run a coroutine, wait for a condition, ask a pool for a connection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

SELECT = text("select 1")
PATIENCE = 60  # seconds; only a broken instrument takes so long


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a test's coroutine, but not for ever.

    The watchdog stands outside of asyncio: a PoolScope would name a time limit of asyncio's, which ends a deadlock.
    """

    async def watched() -> Any:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        watchdog = threading.Timer(PATIENCE, loop.call_soon_threadsafe, (task.cancel,))
        watchdog.start()
        try:
            return await main
        finally:
            watchdog.cancel()

    return asyncio.run(watched())


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true, but not for ever."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


async def cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def price_of(engine: AsyncEngine) -> None:
    """The smallest use of a connection."""
    async with engine.connect() as connection:
        await connection.execute(SELECT)
