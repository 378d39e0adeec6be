"""Connections to the server that belong to no pool, as asyncpg.connect() makes them.

Two ways to see them: the server's own list knows how many there are at once, whatever driver made them; the socket of
each that connects in Python knows the learner's line, and misses none that is closed at once.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import asyncpg
import psutil
import psycopg
import sqlalchemy
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.engine.default import DefaultDialect

import workshop
from ormscope.lab import Recording
from ormscope.places import place
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import THE_CHECK, Evidence
from workshop.checks.lent import Conditions
from workshop.checks.rules import ENGINES, Rule, another_pool
from workshop.checks.unheard import is_learners

_LOOK_SECONDS = 0.02
_PORT = 5432  # PostgreSQL's own
_NAME = f"a check, {os.getpid()}"
_LIST = """
    SELECT pid, client_port, application_name AS name,
        coalesce(wait_event IN ('transactionid', 'tuple'), false) AS waits
    FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""
# An engine connects, or `database_url()` looks whether the server is there.
_NOT_THEIRS = tuple(
    os.path.join(os.path.dirname(package.__file__ or ""), "") for package in (sqlalchemy, workshop)
)


@dataclass
class Backends:
    """What was seen of this process's connections to the server.

    `at_once` is the most in its list that belong to no engine and not to the check, `opened` how many the learner's
    code was seen to open, and `opened_at` where; `threads` are those in which any was begun. `waiting` tells for each
    look at the list how many of the engines' waited for a row that another transaction had locked.
    """

    at_once: int = 0
    opened: int = 0
    opened_at: str = ""
    threads: set[int] = field(default_factory=set)
    waiting: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        told = ["Connections of your code belong to no pool."]
        if self.opened:
            told.append(f"{self.opened_at}, opened {self.opened} of them.")
        if self.at_once:
            told.append(f"The server's own list had {self.at_once} at once.")
        return " ".join(told)


@dataclass(kw_only=True)
class Unpooled(Evidence):
    """The evidence of code that is to use the pools that it was lent, and no other connections."""

    backends: Backends


@asynccontextmanager
async def backends(conditions: Conditions) -> AsyncIterator[Backends]:
    """Look for connections in no pool, from here to the end of the block; no engine must have connected yet."""
    noted = Backends()
    event.listen(DefaultDialect, "do_connect", _mark)
    _hear(noted, make_url(conditions.url).port or _PORT)
    connection = await asyncpg.connect(_dsn(conditions), **_SETTINGS)
    watching = asyncio.create_task(_watch(connection, noted), name=THE_CHECK)
    try:
        yield noted
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        connection.terminate()
        event.remove(DefaultDialect, "do_connect", _mark)


@asynccontextmanager
async def of_the_check(conditions: Conditions, size: int) -> AsyncIterator[asyncpg.Pool]:
    """Connections of the check's own, which look as other processes would."""
    pool = await asyncpg.create_pool(_dsn(conditions), min_size=size, max_size=size, **_SETTINGS)
    try:
        yield pool
    finally:
        pool.terminate()  # close() would wait for what was cancelled while it had one


async def of_this_process(connection: asyncpg.Connection) -> int:
    """How many connections of this process the server's own list has, without the check's own."""
    ports = {each.laddr.port for each in psutil.Process().net_connections("tcp")}
    rows = await connection.fetch(_LIST)
    return sum(row["client_port"] in ports and row["name"] != _NAME for row in rows)


def blocking_one(conditions: Conditions) -> psycopg.Connection:
    """A connection of the check's own for code that cannot await; each statement stands for itself."""
    return psycopg.connect(_dsn(conditions), autocommit=True, application_name=_NAME)


_SETTINGS: dict[str, Any] = {"server_settings": {"application_name": _NAME}}


def _dsn(conditions: Conditions) -> str:
    return make_url(conditions.url).set(drivername="postgresql").render_as_string(False)


def _mark(dialect: Any, record: Any, arguments: Any, parameters: dict[str, Any]) -> None:
    """Give each connection of an engine the check's name, whoever made the engine: those it tells otherwise."""
    if dialect.driver == "asyncpg":
        parameters = parameters.setdefault("server_settings", {})
    parameters["application_name"] = _NAME


def _hear(noted: Backends, port: int) -> None:
    """Note who connects to the server, until the process ends: a hook cannot be taken away."""

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and _port(arguments[1]) == port:
            noted.threads.add(threading.get_ident())
            frame = _opens(sys._getframe(1))
            if frame is not None:
                noted.opened += 1
                noted.opened_at = place((frame.f_code, frame.f_lineno)).short

    sys.addaudithook(hear)


def _port(address: Any) -> int | None:
    return address[1] if isinstance(address, tuple) else None


def _opens(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of the learner's that connects by no engine; of a pool of another kind there may be none."""
    while frame is not None and not frame.f_code.co_filename.startswith(_NOT_THEIRS):
        # At the bottom of each stack is the module that runs the check.
        if is_learners(frame.f_code.co_filename) and frame.f_code.co_name != "<module>":
            return frame
        frame = frame.f_back
    return None


async def _watch(connection: asyncpg.Connection, noted: Backends) -> None:
    strangers: set[int] = set()  # of the look before: what is just being made has no name yet
    is_ours: dict[int, bool] = {}  # by the number of the server's process: others use it as well
    while True:
        rows = await connection.fetch(_LIST)
        before, strangers = strangers, {row["pid"] for row in rows if row["name"] != _NAME}
        if strangers - is_ours.keys():
            ports = {each.laddr.port for each in psutil.Process().net_connections("tcp")}
            for row in rows:
                is_ours.setdefault(row["pid"], row["client_port"] in ports)
        past = sum(is_ours[number] for number in strangers & before)
        noted.at_once = max(noted.at_once, past)
        noted.waiting.append(sum(row["waits"] for row in rows if row["name"] == _NAME))
        await asyncio.sleep(_LOOK_SECONDS)


def connects_past_the_pools(misconception: str) -> Rule[Unpooled]:
    """For tasks that need no connection but those that are lent."""

    def rule(run: Recording, seen: Unpooled) -> Iterator[Finding]:
        if seen.backends.opened or seen.backends.at_once:
            yield Finding(misconception, str(seen.backends))

    return rule


def connects_without_a_limit(run: Recording, seen: Unpooled) -> Iterator[Finding]:
    """Again and again, which nothing limits; one that is kept, or a few in a pool of another kind, have a limit."""
    if max(seen.backends.opened, seen.backends.at_once) > run.announced // 2:
        yield Finding("engine-per-call", str(seen.backends))


NO_OTHER_CONNECTIONS: tuple[Rule[Unpooled], ...] = (
    *ENGINES,
    another_pool,
    connects_past_the_pools("another-pool"),
)
"""For tasks that lend pools and allow no other connections."""
