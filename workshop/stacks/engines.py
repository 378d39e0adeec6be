"""SQLAlchemy's own pools, over each driver, and SQLModel, which uses them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from sqlalchemy import select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from workshop.shop import Product
from workshop.stacks.drivers import psycopg_pool
from workshop.stacks.pool import BATCH, ROWS, Pool


def _engine(driver: str, url: str, size: int) -> AsyncEngine:
    if driver == "sqlite+aiosqlite":
        return create_async_engine(URL.create(driver, database=url), pool_size=size, max_overflow=0)
    return create_async_engine(make_url(url).set(drivername=driver), pool_size=size, max_overflow=0)


def _pool_of(
    engine: AsyncEngine, session: Callable[[AsyncEngine], AsyncSession] = AsyncSession
) -> Pool:
    @asynccontextmanager
    async def transaction() -> AsyncIterator[AsyncSession]:
        async with session(engine) as one, one.begin():
            yield one

    async def products() -> AsyncGenerator[Product, None]:
        async with session(engine) as one:
            stream = await one.stream_scalars(
                select(Product).limit(ROWS).execution_options(yield_per=BATCH)
            )
            async for product in stream:
                yield product

    def statistics() -> Mapping[str, float]:
        names = ("size", "checkedin", "checkedout", "overflow")
        return {name: getattr(engine.pool, name)() for name in names if hasattr(engine.pool, name)}

    return Pool(transaction, lambda one: one.execute(text("SELECT 1")), statistics, products)


def sqlalchemy(driver: str) -> Callable[[str, int], AbstractAsyncContextManager[Pool]]:
    @asynccontextmanager
    async def opened(url: str, size: int) -> AsyncIterator[Pool]:
        engine = _engine(driver, url, size)
        try:
            yield _pool_of(engine)
        finally:
            await engine.dispose()  # a file's threads would keep the process

    return opened


@asynccontextmanager
async def sqlmodel(url: str, size: int) -> AsyncIterator[Pool]:
    from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

    engine = _engine("postgresql+asyncpg", url, size)
    yield _pool_of(engine, SQLModelSession)
    await engine.dispose()


@asynccontextmanager
async def sqlalchemy_over_psycopg_pool(url: str, size: int) -> AsyncIterator[Pool]:
    async with psycopg_pool(url, size, close_returns=True) as pool:
        engine = create_async_engine(
            "postgresql+psycopg://", poolclass=NullPool, async_creator=pool.getconn
        )
        yield _pool_of(engine)._replace(statistics=pool.get_stats)
        await engine.dispose()
