"""Mappers that are not SQLAlchemy: Tortoise ORM and piccolo."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.engine import make_url

from workshop.stacks.pool import BATCH, ROWS, Pool

_MODELS = "workshop.tortoise_shop"


def _nothing() -> Mapping[str, float]:
    """No numbers are published."""
    return {}


@asynccontextmanager
async def tortoise(url: str, size: int) -> AsyncIterator[None]:
    """Tortoise ORM with the models of `tortoise_shop`, on PostgreSQL, MySQL or SQLite, to the end of the block."""
    from tortoise import Tortoise
    from tortoise.connection import get_connections

    if "://" not in url:
        address = f"sqlite://{url}"
    else:
        server = "mysql" if url.startswith("mysql") else "asyncpg"
        address = (
            make_url(url)
            .set(drivername=server)
            .update_query_dict({"minsize": str(size), "maxsize": str(size)})
            .render_as_string(hide_password=False)
        )
    await Tortoise.init(db_url=address, modules={"models": [_MODELS]})
    try:
        yield
    finally:
        # Where a slot was lost, to close the pool would mean to wait for it, for ten seconds. A file has no pool, and
        # a thread of its own: it has to be closed, or the process does not end.
        for connection in get_connections().all():
            if pool := getattr(connection, "_pool", None):
                pool.terminate()
        await Tortoise.close_connections()


@asynccontextmanager
async def tortoise_pool(url: str, size: int) -> AsyncIterator[Pool]:
    from tortoise.transactions import in_transaction

    from workshop import tortoise_shop

    async def products() -> AsyncGenerator[Any, None]:
        async for product in tortoise_shop.Product.all().limit(ROWS):
            yield product

    async with tortoise(url, size):
        yield Pool(in_transaction, lambda one: one.execute_query("SELECT 1"), _nothing, products)


@asynccontextmanager
async def piccolo(url: str, size: int) -> AsyncIterator[Pool]:
    from piccolo.columns import Integer, Numeric, Text
    from piccolo.engine.postgres import PostgresEngine
    from piccolo.table import Table

    parts = make_url(url)
    engine = PostgresEngine(
        {
            "host": parts.host,
            "port": parts.port,
            "user": parts.username,
            "password": parts.password,
            "database": parts.database,
        }
    )

    class Products(Table, db=engine, tablename="products"):
        sku = Integer(primary_key=True)
        title = Text(null=True)
        department = Text()
        category = Text(null=True)
        brand = Text()
        manufacturer_id = Integer()
        package_size = Text(null=True)
        unit_price = Numeric(digits=(10, 2), null=True)

    async def products() -> AsyncGenerator[Any, None]:
        async with await Products.objects().limit(ROWS).batch(batch_size=BATCH) as batches:
            async for batch in batches:
                for product in batch:
                    yield product

    def statistics() -> Mapping[str, float]:
        pool = engine.pool
        assert pool is not None
        return {"pool.get_size": pool.get_size(), "pool.get_idle_size": pool.get_idle_size()}

    await engine.start_connection_pool(min_size=size, max_size=size)
    yield Pool(
        engine.transaction, lambda one: one.connection.execute("SELECT 1"), statistics, products
    )
    pool = engine.pool
    assert pool is not None
    pool.terminate()
