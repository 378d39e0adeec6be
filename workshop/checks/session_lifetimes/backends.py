"""The server's own list of connections: those that are in no pool, and those that wait for another's lock."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import asyncpg
import psutil
import psycopg
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from ormscope.lab import Recording
from workshop.checks.catalogue import Finding
from workshop.checks.session_lifetimes.calls import Seen, pause

_LOOK_SECONDS = 0.02
_LIST = """
    SELECT pid, client_port, application_name AS name,
        coalesce(wait_event IN ('transactionid', 'tuple'), false) AS waits
    FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


@dataclass
class Backends:
    """What was seen of this process's connections in the server.

    `past_the_pool` is the most at once that are neither the engine's nor the check's, and `waiting` tells for each
    look how many of the engine's waited for a row that another transaction had locked.
    """

    past_the_pool: int = 0
    waiting: list[int] = field(default_factory=list)


@asynccontextmanager
async def backends(engine: AsyncEngine, **settings: str) -> AsyncIterator[Backends]:
    """Look at the server's list from here to the end of the block; the engine must not have connected yet.

    `settings` are the server's, for the engine's connections.
    """
    event.listen(engine.sync_engine, "do_connect", partial(_mark, settings))
    noted = Backends()
    connection = await asyncpg.connect(_dsn(engine), **_settings())
    watching = asyncio.create_task(_watch(connection, noted), name="the check")
    try:
        yield noted
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        connection.terminate()


def of_the_check(engine: AsyncEngine, size: int) -> asyncpg.Pool:
    """Connections of the check's own, which look as other processes would."""
    return asyncpg.create_pool(_dsn(engine), min_size=size, max_size=size, **_settings())


def blocking_one(engine: AsyncEngine) -> psycopg.Connection:
    """A connection of the check's own for code that cannot await; each statement stands for itself."""
    return psycopg.connect(_dsn(engine), autocommit=True, application_name=_name())


def _dsn(engine: AsyncEngine) -> str:
    return engine.url.set(drivername="postgresql").render_as_string(hide_password=False)


def _name() -> str:
    return f"exercise 06, {os.getpid()}"


def _settings(**more: str) -> dict[str, Any]:
    return {"server_settings": {"application_name": _name(), **more}}


def _mark(
    settings: dict[str, str],
    dialect: Any,
    record: Any,
    arguments: Any,
    parameters: dict[str, Any],
) -> None:
    parameters.update(_settings(**settings))


async def _watch(connection: asyncpg.Connection, noted: Backends) -> None:
    strangers = set[
        int
    ]()  # of the look before: a connection that is just being made has no name yet
    is_ours: dict[
        int, bool
    ] = {}  # by the number of the server's process; others may use the server, too
    while True:
        rows = await connection.fetch(_LIST)
        before, strangers = strangers, {row["pid"] for row in rows if row["name"] != _name()}
        if strangers - is_ours.keys():
            ports = {each.laddr.port for each in psutil.Process().net_connections("tcp")}
            for row in rows:
                is_ours.setdefault(row["pid"], row["client_port"] in ports)
        past = sum(is_ours[number] for number in strangers & before)
        noted.past_the_pool = max(noted.past_the_pool, past)
        noted.waiting.append(sum(row["waits"] for row in rows if row["name"] == _name()))
        await pause(_LOOK_SECONDS)


def past_the_pool(run: Recording, seen: Seen) -> Iterator[Finding]:
    """Connections that the learner's code made for itself, without an engine."""
    if seen.past_the_pool:
        yield Finding(
            "another-pool",
            "Connections of your code belong to no pool; the server's own list had"
            f" {seen.past_the_pool} of them at once.",
        )
