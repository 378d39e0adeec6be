"""Services for the console to look at: `python console_services.py KIND URL`; each ends with its standard input.

starved: hold-and-wait.  busy: many tasks, each for a moment.  blocked: a synchronous call in a task.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ormscope import LoopScope, PoolScope, serve_console


async def price_of(orders: AsyncEngine, product: int) -> None:
    async with orders.connect() as connection:
        await connection.execute(text("select price from (select 1 as price) as it"))


async def check_out(orders: AsyncEngine, product: int, meet: asyncio.Barrier) -> None:
    async with orders.connect() as connection:
        await connection.execute(text("select 'an order [bold]' as made"))
        await meet.wait()
        await price_of(orders, product)


async def starved(orders: AsyncEngine, reports: AsyncEngine) -> None:
    meet = asyncio.Barrier(4)
    tasks = [
        asyncio.create_task(check_out(orders, n, meet), name=f"POST /orders/{n}") for n in range(4)
    ]
    await asyncio.sleep(0.1)
    tasks += [
        asyncio.create_task(price_of(orders, n), name=f"GET /price/{n}") for n in range(4, 12)
    ]
    async with reports.connect() as connection:
        await connection.execute(text("select count(*) from pg_stat_activity"))
        await asyncio.gather(*tasks)


async def slow(orders: AsyncEngine) -> None:
    while True:
        async with orders.connect() as connection:
            await connection.execute(text("select pg_sleep(0.05)"))


async def busy(orders: AsyncEngine, reports: AsyncEngine) -> None:
    await asyncio.gather(*(slow(orders) for _ in range(12)))


def print_invoice() -> None:
    time.sleep(3600)


async def blocked(orders: AsyncEngine, reports: AsyncEngine) -> None:
    waiting = [asyncio.create_task(price_of(orders, n)) for n in range(6)]

    async def render() -> None:
        async with orders.connect() as connection:
            await connection.execute(text("select 1"))
            print_invoice()

    await asyncio.gather(render(), *waiting)


async def main(kind: str, url: str) -> None:
    loop = LoopScope()
    orders = create_async_engine(url, pool_size=4, max_overflow=0, pool_timeout=3600)
    reports = create_async_engine(url, pool_size=2, max_overflow=0)
    scopes = PoolScope(orders, "orders", loop=loop), PoolScope(reports, "reports", loop=loop)
    console = serve_console()
    print(console.address, flush=True)
    await {"starved": starved, "busy": busy, "blocked": blocked}[kind](orders, reports)
    assert scopes


def end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    asyncio.run(main(*sys.argv[1:]))
