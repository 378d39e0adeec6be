"""A service in a process of its own that gets a signal: `python signalled_service.py URL STATE SERVER`.

It says "ready" on its standard output once it is, or is about to be, in that state.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

import ormscope
from ormscope import LoopScope, PoolScope


async def order(engine: AsyncEngine, meet: asyncio.Barrier) -> None:
    async with engine.connect() as outer:
        await outer.execute(text("select 1"))
        await meet.wait()
        async with engine.connect() as inner:
            await inner.execute(text("select 2"))


def blocked_in_sleep() -> None:
    time.sleep(3600)


def blocked_in_c() -> None:
    """In a call that a signal does not interrupt, and Python's handlers do not get a turn."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    library.pthread_mutex_init(mutex, None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


async def into(state: str, engine: AsyncEngine, scope: PoolScope) -> list[asyncio.Task[Any]]:
    """Bring the service into a state; returns the tasks that stay."""
    if state == "deadlocked":
        meet = asyncio.Barrier(2)
        tasks = [asyncio.create_task(order(engine, meet), name=f"order {n}") for n in range(2)]
        await scope.deadlock()
        print("ready", flush=True)
        return tasks
    print("ready", flush=True)
    if state != "idle":
        asyncio.get_running_loop().call_soon({"sleep": blocked_in_sleep, "c": blocked_in_c}[state])
    return []


@contextlib.asynccontextmanager
async def lifespan(url: str, state: str) -> AsyncIterator[None]:
    engine = create_async_engine(url, pool_size=2, max_overflow=0, pool_timeout=None)
    scope = PoolScope(engine, "shop", loop=LoopScope())
    tasks = await into(state, engine, scope)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await engine.dispose()
    print("shut down", flush=True)


async def plain(url: str, state: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with lifespan(url, state):
        await stop.wait()


def main(url: str, state: str, server: str) -> None:
    if server == "asyncio":  # called before the loop starts
        ormscope.report_on_signal()
        asyncio.run(plain(url, state))
    elif server == "a running loop":

        async def first() -> None:
            ormscope.report_on_signal()
            await plain(url, state)

        asyncio.run(first())
    elif server == "another thread":
        thread = threading.Thread(target=ormscope.report_on_signal)
        thread.start()
        thread.join()
        asyncio.run(plain(url, state))
    elif server == "uvloop":
        import uvloop

        ormscope.report_on_signal()
        uvloop.run(plain(url, state))
    else:
        import uvicorn
        from fastapi import FastAPI

        @contextlib.asynccontextmanager
        async def around(_: FastAPI) -> AsyncIterator[None]:
            ormscope.report_on_signal()
            async with lifespan(url, state):
                yield

        uvicorn.run(FastAPI(lifespan=around), port=0, log_level="warning", loop="asyncio")


if __name__ == "__main__":
    main(*sys.argv[1:])
