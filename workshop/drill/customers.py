"""Who may sign in: the tables of the drill, filled."""

from __future__ import annotations

import asyncio

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from workshop.drill.accounts import ApiToken, Household, metadata
from workshop.drill.load import MOST_CLIENTS, REVOKED


def register(url: str) -> None:
    """Make the tables in a database with the shop in it, and a household with a token for each customer.

    Synchronous, for a notebook's cell, where an event loop is running.
    """
    import threading

    thread = threading.Thread(target=asyncio.run, args=(_register(url),))
    thread.start()
    thread.join()


async def _register(url: str) -> None:
    engine = create_async_engine(url, poolclass=NullPool)
    numbers = range(MOST_CLIENTS + 1)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        await connection.execute(
            insert(Household), [{"id": number, "name": f"household {number}"} for number in numbers]
        )
        tokens = [{"token": f"token-{n}", "household_id": n, "revoked": False} for n in numbers]
        tokens[-1] |= {"token": REVOKED, "revoked": True}
        await connection.execute(insert(ApiToken), tokens)
