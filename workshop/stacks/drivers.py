"""Drivers that have a pool of their own: asyncpg, psycopg_pool, aiomysql and asyncmy."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from typing import Any

from psycopg_pool import AsyncConnectionPool
from sqlalchemy.engine import make_url

from workshop.stacks.pool import SELECT, Pool


def psycopg_pool(url: str, size: int, **options: Any) -> AsyncConnectionPool[Any]:
    """A psycopg_pool of `size` connections, yet to be opened; `options` are its own."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return AsyncConnectionPool(plain, min_size=size, max_size=size, open=False, **options)


@asynccontextmanager
async def psycopg_pool_alone(url: str, size: int) -> AsyncIterator[Pool]:
    async with psycopg_pool(url, size) as pool:

        async def products() -> AsyncGenerator[Any, None]:
            async with pool.connection() as connection, connection.cursor("products") as cursor:
                await cursor.execute(SELECT)
                async for row in cursor:
                    yield row

        await pool.wait()
        yield Pool(pool.connection, lambda one: one.execute("SELECT 1"), pool.get_stats, products)


@asynccontextmanager
async def asyncpg_pool(url: str, size: int) -> AsyncIterator[Pool]:
    import asyncpg

    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    pool = await asyncpg.create_pool(plain, min_size=size, max_size=size)

    @asynccontextmanager
    async def transaction() -> AsyncIterator[Any]:
        async with pool.acquire() as connection, connection.transaction():
            yield connection

    async def products() -> AsyncGenerator[Any, None]:
        async with transaction() as connection:
            async for row in connection.cursor(SELECT):
                yield row

    def statistics() -> Mapping[str, float]:
        return {"get_size": pool.get_size(), "get_idle_size": pool.get_idle_size()}

    yield Pool(transaction, lambda one: one.execute("SELECT 1"), statistics, products)
    pool.terminate()


def mysql_pool(name: str) -> Callable[[str, int], AbstractAsyncContextManager[Pool]]:
    @asynccontextmanager
    async def opened(url: str, size: int) -> AsyncIterator[Pool]:
        library = import_module(name)
        cursors = import_module(f"{name}.cursors")
        pool = await library.create_pool(**mysql_arguments(url), minsize=size, maxsize=size)

        @asynccontextmanager
        async def transaction() -> AsyncIterator[Any]:
            async with pool.acquire() as connection:
                # Without a rollback: the pool closes a connection that comes back in the middle of a transaction.
                await connection.begin()
                yield connection
                await connection.commit()

        async def products() -> AsyncGenerator[Any, None]:
            async with pool.acquire() as one, one.cursor(cursors.SSCursor) as cursor:
                await cursor.execute(SELECT)
                while row := await cursor.fetchone():
                    yield row

        def statistics() -> Mapping[str, float]:
            return {"size": pool.size, "freesize": pool.freesize}

        yield Pool(transaction, lambda one: one.query("SELECT 1"), statistics, products)
        pool.terminate()

    return opened


def mysql_arguments(url: str) -> dict[str, Any]:
    """An address, as the arguments that aiomysql and asyncmy take."""
    parts = make_url(url)
    return {
        "host": parts.host,
        "port": parts.port or 3306,
        "user": parts.username,
        "password": parts.password,
        "db": parts.database,
    }
