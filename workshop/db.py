"""The database of a FastAPI service on PostgreSQL: one engine per process, one transaction where you see it.

Copy this file into your service. It needs FastAPI, SQLAlchemy 2.0.56 (or 2.1.7) and asyncpg 0.32, or later ones,
and nothing else. The lesson "Production settings" shows for each value what happens without it.

    from db import SessionFactory, lifespan, service_unavailable

    app = FastAPI(lifespan=lifespan)
    app.add_exception_handler(sqlalchemy.exc.TimeoutError, service_unavailable)

    @app.post("/orders")
    async def place_order(order: NewOrder, session_factory: SessionFactory) -> int:
        async with session_factory.begin() as session:  # the first SQL takes a connection
            session.add(row := Order(household_id=order.household_id))
        return row.id  # committed, and the connection given back, before the answer is sent
"""

import asyncio
import os
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

import asyncpg
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)


class Settings(BaseModel, frozen=True):
    """What an operator may change without a new release. Numbers are seconds, unless a name says otherwise.

    From the quickest to the slowest: each limit is longer than the ones that should strike before it.
    """

    # postgresql+asyncpg://user:password@host:5432/database; append ?ssl=verify-full where a network lies between
    database_url: str = Field(repr=False)
    # What the service is called in pg_stat_activity and in the server's log.
    application_name: str = "shop"

    # The pool. pods × workers × pool_size has to fit into the server; for the size, measure λ · W (lesson 06).
    pool_size: int = 10
    # How long a request stands in line; shorter than the patience of whoever called. In a rush some wait many
    # times longer than most, for the pool lets newcomers pass.
    pool_timeout: float = 10.0
    # The age at which a connection is replaced; below what firewalls and balancers on the way allow.
    pool_recycle: float = 1800.0

    # Reaching the server: for one attempt, and for all attempts while it starts anew.
    connect_timeout: float = 3.0
    connect_patience: float = 5.0

    # What the server allows; in its own units. A migration or a report needs others: give it an engine of its own.
    lock_timeout: str = "3s"
    statement_timeout: str = "10s"
    idle_in_transaction_session_timeout: str = "60s"

    # For the day when the server says nothing at all, not even that a packet has arrived (Linux only); longer than
    # a statement may last, for a server that is busy does not read.
    tcp_user_timeout: float = 12.0
    # What the client waits for an answer; asyncpg waits once more as long for its request to cancel to be heard.
    command_timeout: float = 15.0
    # When nothing is in flight, the kernel asks: how long until the first probe, between probes, and how many.
    tcp_keepalives_idle: int = 30
    tcp_keepalives_interval: int = 10
    tcp_keepalives_count: int = 3

    # Set it where PgBouncer (in transaction mode) stands before the server.
    behind_pgbouncer: bool = False

    @classmethod
    def from_environment(cls) -> "Settings":
        """DATABASE_URL, and APPLICATION_NAME, POOL_SIZE and so on where a default does not fit.

        Raises ValidationError, which names the variable, where one is missing or not of its type.
        """
        names = {name: name.upper() for name in cls.model_fields}
        given = {name: os.environ[key] for name, key in names.items() if key in os.environ}
        return cls.model_validate(given)


def make_engine(settings: Settings) -> AsyncEngine:
    """A new engine with its pool: make one in each process, on the event loop that will use it."""
    connect_args: dict[str, Any] = {
        # SQLAlchemy calls this in place of asyncpg.connect, with the arguments that it would have given that.
        "async_creator_fn": partial(connect, settings),
        "timeout": settings.connect_timeout,
        "command_timeout": settings.command_timeout,
        "server_settings": server_settings(settings),
    }
    if settings.behind_pgbouncer:
        # The next transaction may run on another connection of the server, which knows no name from this one.
        connect_args |= {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": str,  # "": the unnamed statement, which the next one replaces
        }
    return create_async_engine(
        settings.database_url,
        pool_size=settings.pool_size,
        max_overflow=0,  # what is opened for a rush and closed after it costs the server most when it has least
        pool_timeout=settings.pool_timeout,
        pool_recycle=settings.pool_recycle,
        pool_pre_ping=True,  # three short round trips; a dead connection is replaced, not handed out
        connect_args=connect_args,
    )


def server_settings(settings: Settings) -> dict[str, str]:
    """What is set on the server for each of our connections, before any limit of its role.

    `lock_timeout` is for one wait at a time: whoever is second in line for a row waits twice.
    PgBouncer refuses all but the name; there, set the rest for the role: ALTER ROLE shop SET lock_timeout = '3s'.
    """
    name = {"application_name": settings.application_name}
    if settings.behind_pgbouncer:
        return name
    return name | {
        "lock_timeout": settings.lock_timeout,
        "statement_timeout": settings.statement_timeout,
        "idle_in_transaction_session_timeout": settings.idle_in_transaction_session_timeout,
        # The server's end of the line: else it keeps the locks of a client that has vanished for two hours.
        "tcp_keepalives_idle": str(settings.tcp_keepalives_idle),
        "tcp_keepalives_interval": str(settings.tcp_keepalives_interval),
        "tcp_keepalives_count": str(settings.tcp_keepalives_count),
    }


async def connect(settings: Settings, *args: Any, **options: Any) -> Any:
    """Connect, with patience while the server starts, and with a socket that notices a dead network.

    Nothing has been asked of the server yet, so that trying again is safe; a statement is never tried again.
    Raises what the last attempt raised, after `connect_patience` seconds.
    """
    deadline = time.monotonic() + settings.connect_patience
    while True:
        try:
            connection = await asyncpg.connect(*args, **options)
            break
        except (OSError, asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(random.uniform(0.1, 0.3))  # not all processes at the same moment
    # asyncpg has no argument for it, nor a public name for its transport.
    keep_alive(connection._transport.get_extra_info("socket"), settings)
    return connection


def keep_alive(connected: Any, settings: Settings) -> None:
    """Let the kernel look after the connection; what a platform lacks stays at its default."""
    if connected.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {
        "TCP_KEEPIDLE": settings.tcp_keepalives_idle,
        "TCP_KEEPINTVL": settings.tcp_keepalives_interval,
        "TCP_KEEPCNT": settings.tcp_keepalives_count,
        "TCP_USER_TIMEOUT": round(settings.tcp_user_timeout * 1000),
    }.items():
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The engine's life is that of the process: `FastAPI(lifespan=lifespan)`."""
    engine = make_engine(Settings.from_environment())
    # expire_on_commit=False: what was loaded stays readable after the commit, when no SQL may be sent any more.
    app.state.session_factory = async_sessionmaker(engine, expire_on_commit=False)
    try:
        yield
    finally:
        # Says goodbye, so that the server does not log each connection as lost.
        await engine.dispose()


def get_session_factory(request: Request) -> async_sessionmaker[AsyncSession]:
    """The factory that `lifespan` made. In tests: `app.dependency_overrides[get_session_factory] = ...`."""
    factory: async_sessionmaker[AsyncSession] = request.app.state.session_factory
    return factory


# The endpoint opens the session itself, so that the transaction ends where it is read to end: before the answer
# is sent. A session from a dependency with `yield` lives until after that.
SessionFactory = Annotated[async_sessionmaker[AsyncSession], Depends(get_session_factory)]


async def service_unavailable(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that stood in line for `pool_timeout`: come back later."""
    return JSONResponse({"detail": "too busy"}, status_code=503, headers={"Retry-After": "1"})
