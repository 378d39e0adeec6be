"""One of several workers of a service: `python fleet_worker.py URL STATE FIRST WORKERS`.

It serves its metrics as ormscope's README says, on the first free port of so many, and prints that port. On "go" it
gets into its state, on "say" it prints what its scopes see, and with its standard input it ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from ormscope import LoopScope, PoolScope
from ormscope.metrics import PoolCollector

README = Path(__file__).parents[1] / "ormscope" / "README.md"


async def ask_again_and_again(engine: AsyncEngine, query: str) -> None:
    while True:
        try:
            async with engine.connect() as connection:
                await connection.execute(text(query))
        except (SQLAlchemyError, OSError):
            await asyncio.sleep(0.1)  # as an impatient customer


async def hold(engine: AsyncEngine) -> None:
    async with engine.connect():
        await asyncio.Event().wait()


async def starved(url: str) -> list[PoolScope]:
    """A deadlock of two, and three in line behind it."""
    orders = create_async_engine(url, pool_size=2, max_overflow=0, pool_timeout=None)
    scope = PoolScope(orders, "orders")
    meet = asyncio.Barrier(2)

    async def nested() -> None:
        async with orders.connect() as connection:
            await connection.execute(text("select 1"))
            await meet.wait()
            await ask_again_and_again(orders, "select 2")

    start(*(nested() for _ in range(2)), *(hold(orders) for _ in range(3)))
    return [scope]


async def busy(url: str) -> list[PoolScope]:
    """A pool that is in use, one whose waiters give up, and one without a server."""
    orders = create_async_engine(url, pool_size=2, max_overflow=0)
    mail = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.2)
    reports = create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/nothing")
    scopes = [PoolScope(orders, "orders"), PoolScope(mail, "mail"), PoolScope(reports, "reports")]
    start(*(ask_again_and_again(orders, "select pg_sleep(0.06)") for _ in range(6)))
    start(hold(mail), *(ask_again_and_again(mail, "select 1") for _ in range(2)))
    start(ask_again_and_again(reports, "select 1"))
    return scopes


async def blocked(url: str) -> list[PoolScope]:
    """Somebody's synchronous call, for an hour."""
    orders = create_async_engine(url, pool_size=2, max_overflow=0)
    scope = PoolScope(orders, "orders")

    async def render() -> None:
        async with orders.connect():
            time.sleep(3600)  # noqa: ASYNC251

    start(render())
    return [scope]


tasks: list[asyncio.Task[Any]] = []
go = asyncio.Event()


def start(*works: Any) -> None:
    async def when_told(work: Any) -> None:
        await go.wait()
        await work

    tasks.extend(asyncio.create_task(when_told(work)) for work in works)


def obey(scopes: list[PoolScope], loop: asyncio.AbstractEventLoop) -> None:
    for command in map(str.strip, sys.stdin):
        if command == "go":
            loop.call_soon_threadsafe(go.set)
        else:
            seen = {
                scope.name: {"waiting": len(scope.waiters), "cause": scope.cause()}
                for scope in scopes
            }
            print(json.dumps(seen), flush=True)
    os._exit(0)


async def main(url: str, state: str, first: str, workers: str) -> None:
    loop_scope = LoopScope()
    scopes = await {"starved": starved, "busy": busy, "blocked": blocked}[state](url)
    for scope in scopes:
        scope.loop = loop_scope
    registry = CollectorRegistry(auto_describe=True)
    registry.register(PoolCollector(*scopes, loop=loop_scope))
    names: dict[str, Any] = {"registry": registry, "start_http_server": start_http_server}
    page = README.read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(def serve_metrics.*?)^```$", page, re.M | re.S)
    exec(code, names)
    port, _ = names["serve_metrics"](int(first), int(workers))
    print(port, flush=True)
    threading.Thread(target=obey, args=(scopes, asyncio.get_running_loop()), daemon=True).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
