"""A web service of a lesson, served on this machine as it would be at work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn
from fastapi import FastAPI

_PATIENCE = 10.0  # seconds; long for any answer on this machine


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Serve `app` with uvicorn, on a free port of 127.0.0.1, to the end of the block; yields a client of it.

    Answers still open at the end are cut off after a second.
    """
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    try:
        while not server.started:
            if running.done():
                raise RuntimeError(f"uvicorn did not start: {running.exception()}")
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE, limits=limits) as client:
            yield client
    finally:
        server.should_exit = True
        await running
