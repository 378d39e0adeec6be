"""Ways from Python to a database, beside SQLAlchemy over asyncpg, whose pools can all be asked the same questions.

    async with stack.opened(url, 5) as pool:
        async with pool.transaction() as connection:
            await pool.ask(connection)

`url` is the address of a database as SQLAlchemy writes it, with any driver or none; for SQLite the path of a file.
A library is imported when one of its pools is opened, for they are many, and each run of a lesson is a process.
"""

from workshop.stacks.drivers import (
    asyncpg_pool,
    mysql_arguments,
    mysql_pool,
    psycopg_pool,
    psycopg_pool_alone,
)
from workshop.stacks.engines import sqlalchemy, sqlalchemy_over_psycopg_pool, sqlmodel
from workshop.stacks.mappers import piccolo, tortoise, tortoise_pool
from workshop.stacks.pool import Pool, Stack
from workshop.stacks.shops import mysql_shop, sqlite_shop

__all__ = [
    "STACKS",
    "Pool",
    "Stack",
    "mysql_arguments",
    "mysql_shop",
    "psycopg_pool",
    "sqlite_shop",
    "tortoise",
]

STACKS = (
    Stack("SQLAlchemy, asyncpg", "PostgreSQL", sqlalchemy("postgresql+asyncpg")),
    Stack("SQLAlchemy, psycopg", "PostgreSQL", sqlalchemy("postgresql+psycopg")),
    Stack("SQLAlchemy, psycopg_pool", "PostgreSQL", sqlalchemy_over_psycopg_pool),
    Stack("SQLModel, asyncpg", "PostgreSQL", sqlmodel),
    Stack("asyncpg.Pool", "PostgreSQL", asyncpg_pool),
    Stack("psycopg_pool", "PostgreSQL", psycopg_pool_alone),
    Stack("Tortoise, asyncpg", "PostgreSQL", tortoise_pool),
    Stack("piccolo", "PostgreSQL", piccolo),
    Stack("SQLAlchemy, aiosqlite", "SQLite", sqlalchemy("sqlite+aiosqlite")),
    Stack("Tortoise, SQLite", "SQLite", tortoise_pool),
    Stack("SQLAlchemy, aiomysql", "MySQL", sqlalchemy("mysql+aiomysql")),
    Stack("SQLAlchemy, asyncmy", "MySQL", sqlalchemy("mysql+asyncmy")),
    Stack("aiomysql.Pool", "MySQL", mysql_pool("aiomysql")),
    Stack("asyncmy.Pool", "MySQL", mysql_pool("asyncmy")),
    Stack("Tortoise, asyncmy", "MySQL", tortoise_pool),
)
