"""Ways from Python to a database, beside SQLAlchemy over asyncpg, whose pools can all be asked the same questions.

    async with stack.opened(url, 5) as pool:
        async with pool.transaction() as connection:
            await pool.ask(connection)

`url` is the address of a database as SQLAlchemy writes it, with any driver or none; for SQLite the path of a file.
A library is imported when one of its pools is opened, for they are many, and each run of a lesson is a process.
"""

from __future__ import annotations

import atexit
import csv
import gzip
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

from psycopg_pool import AsyncConnectionPool
from sqlalchemy import select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from workshop.keeper import Keeper
from workshop.mariadb import mysql_url
from workshop.shop import DATA, Product

Server = Literal["PostgreSQL", "MySQL", "SQLite"]
_COLUMNS = (
    "sku INTEGER PRIMARY KEY, title TEXT, department TEXT, category TEXT, brand TEXT,"
    " manufacturer_id INTEGER, package_size TEXT, unit_price DECIMAL(10, 2)"
)
_MODELS = "workshop.tortoise_shop"
_BATCH = 1000  # rows
# Every fifth product is copied to where PostgreSQL is not, 18,546 of 92,331, for to load them all takes long. A stream
# is as long everywhere.
_NTH = 5
ROWS = 18_000
_SELECT = f"SELECT * FROM products ORDER BY sku LIMIT {ROWS}"


class Pool(NamedTuple):
    """An open pool.

    `transaction()` is what people write around their work: it takes a connection and begins. `ask` sends a statement
    within it. `statistics()` are the numbers that the library publishes of its pool, by name. `products()` reads the
    table of products in the way that the library offers for many rows; close it when you have enough.
    """

    transaction: Callable[[], AbstractAsyncContextManager[Any]]
    ask: Callable[[Any], Awaitable[Any]]
    statistics: Callable[[], Mapping[str, float]]
    products: Callable[[], AsyncGenerator[Any, None]]


class Stack(NamedTuple):
    """What people use: its name, the server that it needs, and how a pool of some size is opened."""

    name: str
    server: Server
    opened: Callable[[str, int], AbstractAsyncContextManager[Pool]]


def _nothing() -> Mapping[str, float]:
    """No numbers are published."""
    return {}


# SQLAlchemy


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
                select(Product).limit(ROWS).execution_options(yield_per=_BATCH)
            )
            async for product in stream:
                yield product

    def statistics() -> Mapping[str, float]:
        names = ("size", "checkedin", "checkedout", "overflow")
        return {name: getattr(engine.pool, name)() for name in names if hasattr(engine.pool, name)}

    return Pool(transaction, lambda one: one.execute(text("SELECT 1")), statistics, products)


def _sqlalchemy(driver: str) -> Callable[[str, int], AbstractAsyncContextManager[Pool]]:
    @asynccontextmanager
    async def opened(url: str, size: int) -> AsyncIterator[Pool]:
        engine = _engine(driver, url, size)
        yield _pool_of(engine)
        await engine.dispose()

    return opened


@asynccontextmanager
async def _sqlmodel(url: str, size: int) -> AsyncIterator[Pool]:
    from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

    engine = _engine("postgresql+asyncpg", url, size)
    yield _pool_of(engine, SQLModelSession)
    await engine.dispose()


@asynccontextmanager
async def _sqlalchemy_over_psycopg_pool(url: str, size: int) -> AsyncIterator[Pool]:
    async with psycopg_pool(url, size, close_returns=True) as pool:
        engine = create_async_engine(
            "postgresql+psycopg://", poolclass=NullPool, async_creator=pool.getconn
        )
        yield _pool_of(engine)._replace(statistics=pool.get_stats)
        await engine.dispose()


# Drivers that have a pool


def psycopg_pool(url: str, size: int, **options: Any) -> AsyncConnectionPool[Any]:
    """A psycopg_pool of `size` connections, yet to be opened; `options` are its own."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return AsyncConnectionPool(plain, min_size=size, max_size=size, open=False, **options)


@asynccontextmanager
async def _psycopg_pool(url: str, size: int) -> AsyncIterator[Pool]:
    async with psycopg_pool(url, size) as pool:

        async def products() -> AsyncGenerator[Any, None]:
            async with pool.connection() as connection, connection.cursor("products") as cursor:
                await cursor.execute(_SELECT)
                async for row in cursor:
                    yield row

        await pool.wait()
        yield Pool(pool.connection, lambda one: one.execute("SELECT 1"), pool.get_stats, products)


@asynccontextmanager
async def _asyncpg(url: str, size: int) -> AsyncIterator[Pool]:
    import asyncpg

    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    pool = await asyncpg.create_pool(plain, min_size=size, max_size=size)

    @asynccontextmanager
    async def transaction() -> AsyncIterator[Any]:
        async with pool.acquire() as connection, connection.transaction():
            yield connection

    async def products() -> AsyncGenerator[Any, None]:
        async with transaction() as connection:
            async for row in connection.cursor(_SELECT):
                yield row

    def statistics() -> Mapping[str, float]:
        return {"get_size": pool.get_size(), "get_idle_size": pool.get_idle_size()}

    yield Pool(transaction, lambda one: one.execute("SELECT 1"), statistics, products)
    pool.terminate()


def _mysql(name: str) -> Callable[[str, int], AbstractAsyncContextManager[Pool]]:
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
                await cursor.execute(_SELECT)
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


# Other mappers


@asynccontextmanager
async def tortoise(url: str, size: int) -> AsyncIterator[None]:
    """Tortoise ORM with the models of `tortoise_shop`, on PostgreSQL, MySQL or SQLite, to the end of the block."""
    from tortoise import Tortoise

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
    # Closed when the process ends: to close it here would mean to wait ten seconds for each slot that was lost.
    await Tortoise.init(db_url=address, modules={"models": [_MODELS]})
    yield


@asynccontextmanager
async def _tortoise(url: str, size: int) -> AsyncIterator[Pool]:
    from tortoise.transactions import in_transaction

    from workshop import tortoise_shop

    async def products() -> AsyncGenerator[Any, None]:
        async for product in tortoise_shop.Product.all().limit(ROWS):
            yield product

    async with tortoise(url, size):
        yield Pool(in_transaction, lambda one: one.execute_query("SELECT 1"), _nothing, products)


@asynccontextmanager
async def _piccolo(url: str, size: int) -> AsyncIterator[Pool]:
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
        async with await Products.objects().limit(ROWS).batch(batch_size=_BATCH) as batches:
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


STACKS = (
    Stack("SQLAlchemy, asyncpg", "PostgreSQL", _sqlalchemy("postgresql+asyncpg")),
    Stack("SQLAlchemy, psycopg", "PostgreSQL", _sqlalchemy("postgresql+psycopg")),
    Stack("SQLAlchemy, psycopg_pool", "PostgreSQL", _sqlalchemy_over_psycopg_pool),
    Stack("SQLModel, asyncpg", "PostgreSQL", _sqlmodel),
    Stack("asyncpg.Pool", "PostgreSQL", _asyncpg),
    Stack("psycopg_pool", "PostgreSQL", _psycopg_pool),
    Stack("Tortoise, asyncpg", "PostgreSQL", _tortoise),
    Stack("piccolo", "PostgreSQL", _piccolo),
    Stack("SQLAlchemy, aiosqlite", "SQLite", _sqlalchemy("sqlite+aiosqlite")),
    Stack("Tortoise, SQLite", "SQLite", _tortoise),
    Stack("SQLAlchemy, aiomysql", "MySQL", _sqlalchemy("mysql+aiomysql")),
    Stack("SQLAlchemy, asyncmy", "MySQL", _sqlalchemy("mysql+asyncmy")),
    Stack("aiomysql.Pool", "MySQL", _mysql("aiomysql")),
    Stack("asyncmy.Pool", "MySQL", _mysql("asyncmy")),
    Stack("Tortoise, asyncmy", "MySQL", _tortoise),
)


# The shop's products, where PostgreSQL is not


def _products() -> Iterator[list[str | None]]:
    with gzip.open(DATA / "products.csv.gz", "rt", encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines)
        next(rows)
        for row in rows:
            if not int(row[0]) % _NTH:
                yield [value or None for value in row]


def sqlite_shop() -> str:
    """The path of this process's SQLite file with the shop's products; it goes with the process, however that ends."""
    global _kept
    with _making:
        if _kept is None:
            keeper = Keeper(_KEEPER, cwd=Path(tempfile.gettempdir()), stdout=subprocess.PIPE)
            atexit.register(keeper.stop)
            assert keeper.process.stdout is not None
            path = keeper.process.stdout.readline().decode().strip()
            _fill(path)
            _kept = path
    return _kept


def _fill(path: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(f"CREATE TABLE products ({_COLUMNS})")
        connection.execute(
            "CREATE TABLE orders (id INTEGER PRIMARY KEY, household_id INTEGER, status TEXT)"
        )
        connection.executemany("INSERT INTO products VALUES (?, ?, ?, ?, ?, ?, ?, ?)", _products())
    connection.close()


_kept: str | None = None
_making = threading.Lock()

# Keeps a folder as long as its standard input is open, which ends with the parent in any case.
_KEEPER = """
import os, sys, tempfile
with tempfile.TemporaryDirectory(prefix="workshop-sqlite-", dir=".", ignore_cleanup_errors=True) as folder:
    print(os.path.join(os.path.abspath(folder), "shop.db"), flush=True)
    sys.stdin.read()
"""


def mysql_shop() -> str | None:
    """The address of this process's MySQL server, with the shop's products; None where there is none."""
    import pymysql

    url = mysql_url()
    if url is None:
        return None
    arguments = mysql_arguments(url)
    connection = pymysql.connect(database=arguments.pop("db"), **arguments)
    with connection, connection.cursor() as cursor:
        if not cursor.execute("SHOW TABLES LIKE 'products'"):
            cursor.execute(f"CREATE TABLE products ({_COLUMNS})")
            rows = [tuple(row) for row in _products()]
            for first in range(0, len(rows), _BATCH):
                cursor.executemany(
                    "INSERT INTO products VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
                    rows[first : first + _BATCH],
                )
        connection.commit()
    return url
