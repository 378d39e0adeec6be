"""What most tests of the instruments do: run a coroutine, wait for a condition, ask a pool for a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

SELECT = text("select 1")
PATIENCE = 60  # seconds; only a broken instrument takes so long


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a test's coroutine, but not for ever."""
    return asyncio.run(asyncio.wait_for(main, PATIENCE))


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
