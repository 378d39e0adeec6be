"""A web service of a lesson, served on this machine as it would be at work."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import httpx
import uvicorn
from fastapi import FastAPI

# uvicorn and httpx import these where they are first needed. That is on the loop, and would count as a stall of it.
for _module in (
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
    "uvicorn.lifespan.on",
    "httpcore",
    "anyio._backends._asyncio",
):
    importlib.import_module(_module)

_PATIENCE = 30.0  # seconds; longer than any check or lesson waits for an answer


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Serve `app` with uvicorn, on a free port of 127.0.0.1, to the end of the block; yields a client of it.

    Answers still open at the end are cut off after a second.
    """
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_level="critical",
        timeout_keep_alive=60,  # seconds: so that it is the client who closes first, as httpx does after 5
        timeout_graceful_shutdown=1,
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
        # Without `verify=False` it reads the certificates of all authorities, and keeps the loop meanwhile.
        async with httpx.AsyncClient(
            base_url=url, timeout=_PATIENCE, limits=limits, verify=False
        ) as client:
            yield client
    finally:
        server.should_exit = True
        await running


class Answer(NamedTuple):
    """What a client asked, and when (`time.monotonic()`); for how many seconds it waited, and the HTTP status."""

    request: str
    asked: float
    waited: float
    status: int


async def clients(
    browser: httpx.AsyncClient, count: int, seconds: float, requests: Sequence[str]
) -> list[Answer]:
    """So many clients of the service that `browser` is a client of; each asks one thing after another.

    `requests` are such as "GET /bananas"; each client begins at another of them, and starts no request after
    `seconds`. (httpx looks through all connections of a client for each request: with 200, it would take far
    longer than the service. So each of these has one plain connection of its own.)
    """
    answers: list[Answer] = []
    end = time.monotonic() + seconds
    host, port = browser.base_url.host, browser.base_url.port

    async def client(number: int) -> None:
        turn, writer = number, None
        while (asked := time.monotonic()) < end:
            if writer is None:
                reader, writer = await asyncio.open_connection(host, port, limit=2**20)
            request = requests[turn % len(requests)]
            writer.write(f"{request} HTTP/1.1\r\nHost: shop\r\nContent-Length: 0\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            await reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))
            answers.append(Answer(request, asked, time.monotonic() - asked, int(head.split()[1])))
            turn += 1
            if answers[-1].status == 500:  # after an error that nobody has handled, uvicorn closes
                writer.close()
                writer = None
        if writer is not None:
            writer.close()

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(client(number))
    return answers
