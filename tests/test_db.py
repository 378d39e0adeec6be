"""workshop/db.py, the file that people take home: under 200 clients, with a restart of the server in between.

    PYTHONPATH=. python tests/test_db.py --seconds 30

is the same load for longer, and prints what it counted.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import inspect
import re
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest
import sqlalchemy
from alembic import command
from alembic.config import Config
from fastapi import FastAPI
from helpers import run
from pydantic import BaseModel, ValidationError
from sqlalchemy import create_engine, exc, func, select, text
from sqlalchemy.pool import NullPool

from workshop import db
from workshop.database import Restart, Server, start_server
from workshop.service import Answer, clients, serving
from workshop.shop import Order, Product

BANANAS = 1082185
CLIENTS = 200
PAUSE = 1.0  # seconds for which the server is gone
HOUSEHOLD = -8  # nobody's, so that the orders of this load can be told


def shop_service() -> FastAPI:
    app = FastAPI(lifespan=db.lifespan)
    app.add_exception_handler(exc.TimeoutError, db.service_unavailable)

    @app.get("/bananas")
    async def bananas(session_factory: db.SessionFactory) -> str:
        async with session_factory() as session:
            price = select(Product.unit_price).where(Product.sku == BANANAS)
            return str(await session.scalar(price))

    @app.post("/orders")
    async def place_order(session_factory: db.SessionFactory) -> int:
        async with session_factory.begin() as session:
            session.add(order := Order(household_id=HOUSEHOLD))
        return order.id

    @app.get("/slow")
    async def slow(session_factory: db.SessionFactory) -> None:
        async with session_factory() as session:
            await session.execute(text("SELECT pg_sleep(2)"))

    return app


@dataclass
class Load:
    """What 200 clients got from the service, and what was left of it."""

    answers: list[Answer]
    restart: Restart
    orders: int
    checked_out: int
    connections_left: int

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status != 200]

    @property
    def confirmed(self) -> int:
        """How many orders the clients were told to be placed."""
        return sum(
            answer.status == 200 and answer.request.startswith("POST") for answer in self.answers
        )

    @property
    def failed_later(self) -> list[Answer]:
        """The failures of requests that were not yet in flight when the server went."""
        return [answer for answer in self.failed if answer.asked > self.restart.down]

    def __str__(self) -> str:
        later = sum(answer.asked > self.restart.up for answer in self.answers)
        return (
            f"{len(self.answers)} requests, {later} of them after the restart, which took "
            f"{self.restart.up - self.restart.down:.1f} s; by status "
            f"{dict(Counter(answer.status for answer in self.answers))}; failed and asked after the server had gone: "
            f"{len(self.failed_later)}; left: {self.checked_out} checked out, {self.connections_left} connections"
        )


async def under_load(server: Server, seconds: float) -> Load:
    app = shop_service()
    requests = ["POST /orders", "GET /bananas", "GET /bananas", "GET /bananas"]

    async def restart() -> Restart:
        await asyncio.sleep(seconds / 3)
        return await asyncio.to_thread(server.restart, PAUSE)

    async with serving(app) as browser:
        answers, restarted = await asyncio.gather(
            clients(browser, CLIENTS, seconds, requests), restart()
        )
        factory = app.state.session_factory
        checked_out = factory.kw["bind"].pool.checkedout()
        async with factory() as session:
            ours = select(func.count(Order.id)).where(Order.household_id == HOUSEHOLD)
            orders = await session.scalar(ours)
    return Load(answers, restarted, orders, checked_out, await connections(server))


async def connections(server: Server) -> int:
    """How many connections the server has from the service, as it says itself."""
    connection = await asyncpg.connect(server.url.replace("+asyncpg", ""))
    try:
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shop'"
        return int(await connection.fetchval(query))
    finally:
        await connection.close()


def measured(seconds: float) -> Load:
    """A server of its own, for others would miss theirs."""
    server = start_server()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DATABASE_URL", server.url)
            return asyncio.run(under_load(server, seconds))
    finally:
        server.stop()


# The file under load


@pytest.fixture(scope="module")
def load() -> Load:
    return measured(6)


def test_a_restart_costs_only_what_was_in_flight(load: Load) -> None:
    """Nobody fails who asked after the server had gone, nor who stood in line: only who held a connection."""
    assert load.failed_later == [], str(load)
    assert len(load.failed) <= db.Settings.model_fields["pool_size"].default, str(load)
    assert {answer.status for answer in load.failed} <= {500}


def test_it_goes_on_after_the_restart(load: Load) -> None:
    later = [answer for answer in load.answers if answer.asked > load.restart.up]
    assert load.restart.up - load.restart.down >= PAUSE
    assert len(later) > CLIENTS / 10, str(load)  # a busy machine serves fewer


def test_each_order_that_was_confirmed_is_there(load: Load) -> None:
    """One that failed may have been committed all the same: nobody heard the answer."""
    assert load.confirmed > 0
    assert load.confirmed <= load.orders <= load.confirmed + len(load.failed)


def test_nothing_is_left_of_it(load: Load) -> None:
    assert (load.checked_out, load.connections_left) == (0, 0)


# Its parts


@pytest.fixture
def settings(server: Server) -> db.Settings:
    return db.Settings(database_url=server.url)


def test_it_can_be_taken_home() -> None:
    """It imports nothing of ours, and says in its first lines what it needs."""
    tree = ast.parse(inspect.getsource(db))
    found = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    foreign = {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names)
    assert foreign == {"asyncpg", "fastapi", "pydantic", "sqlalchemy"}


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="database_url"):
        db.Settings.from_environment()
    monkeypatch.setenv("DATABASE_URL", "postgresql+asyncpg://shop:secret@db/shop")
    monkeypatch.setenv("POOL_SIZE", "7")
    monkeypatch.setenv("BEHIND_PGBOUNCER", "yes")
    found = db.Settings.from_environment()
    assert (found.pool_size, found.behind_pgbouncer, found.pool_timeout) == (7, True, 10.0)
    assert "secret" not in repr(found)
    monkeypatch.setenv("POOL_SIZE", "many")
    with pytest.raises(ValidationError, match="pool_size"):
        db.Settings.from_environment()


def test_the_server_has_its_settings(settings: db.Settings) -> None:
    async def shown() -> dict[str, str]:
        engine = db.make_engine(settings)
        async with engine.connect() as connection:
            names = db.server_settings(settings)
            found = {name: str(await connection.scalar(text(f"SHOW {name}"))) for name in names}
        await engine.dispose()
        return found

    found = run(shown())
    # The server writes 60s as 1min.
    assert found == db.server_settings(settings) | {"idle_in_transaction_session_timeout": "1min"}
    assert found["statement_timeout"] == "10s"


def test_the_limits_strike_in_their_order(settings: db.Settings) -> None:
    def seconds(value: str) -> float:
        return float(value.removesuffix("s"))

    assert (
        seconds(settings.lock_timeout)
        < seconds(settings.statement_timeout)
        < settings.tcp_user_timeout
        < settings.command_timeout
        < seconds(settings.idle_in_transaction_session_timeout)
    )
    assert settings.connect_patience < settings.pool_timeout


@pytest.mark.skipif(sys.platform != "linux", reason="the names differ from system to system")
def test_the_socket_notices_a_dead_network(settings: db.Settings) -> None:
    async def options() -> dict[str, int]:
        engine = db.make_engine(settings)
        async with engine.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            transport = driver._transport.get_extra_info("socket")
            names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            found = {
                name: transport.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in names
            }
            found["SO_KEEPALIVE"] = transport.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        await engine.dispose()
        return found

    assert run(options()) == {
        "TCP_KEEPIDLE": 30,
        "TCP_KEEPINTVL": 10,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": 12_000,
        "SO_KEEPALIVE": 1,
    }


def test_connecting_gives_up_after_its_patience() -> None:
    """Nobody listens there: the last attempt's own error, after so many seconds."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"postgresql+asyncpg://shop@127.0.0.1:{taken.getsockname()[1]}/shop"
        settings = db.Settings(database_url=url, connect_patience=0.5)

        async def connect() -> float:
            engine, start = db.make_engine(settings), time.monotonic()
            with pytest.raises(ConnectionRefusedError):
                await engine.connect()
            return time.monotonic() - start

        assert 0.5 <= run(connect()) < 5


def test_who_waits_in_vain_is_told_to_come_back(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", server.url)
    monkeypatch.setenv("POOL_SIZE", "1")
    monkeypatch.setenv("POOL_TIMEOUT", "0.3")

    async def statuses() -> list[tuple[int, str | None]]:
        async with serving(shop_service()) as browser:
            first = asyncio.create_task(browser.get("/slow"))
            await asyncio.sleep(0.5)
            answers = [await browser.get("/bananas"), await first]
        return [(answer.status_code, answer.headers.get("retry-after")) for answer in answers]

    assert run(statuses()) == [(503, "1"), (200, None)]


def test_its_own_example_works(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines at the top of the file, as they stand there."""
    assert db.__doc__ is not None
    lines = "    " + db.__doc__.partition("\n\n    ")[2]
    example = re.sub(r"^ {4}", "", lines, flags=re.MULTILINE)
    monkeypatch.setitem(sys.modules, "db", db)
    monkeypatch.setenv("DATABASE_URL", server.url)

    class NewOrder(BaseModel):
        household_id: int

    names = {"FastAPI": FastAPI, "sqlalchemy": sqlalchemy, "NewOrder": NewOrder, "Order": Order}
    exec(example, names)

    async def order() -> int:
        async with serving(names["app"]) as browser:
            answer = await browser.post("/orders", json={"household_id": HOUSEHOLD})
        assert answer.status_code == 200
        return int(answer.text)

    assert run(order()) > 0


# The migrations beside it


def test_a_migration_behind_a_reader_gives_up_and_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = start_server()
    monkeypatch.setenv("MIGRATION_URL", url := server.url.replace("asyncpg", "psycopg"))
    monkeypatch.setenv("LOCK_TIMEOUT", "300ms")
    config = Config()
    config.set_main_option("script_location", str(Path(db.__file__).with_name("migrations")))
    engine = create_engine(url, poolclass=NullPool)
    is_there = text(
        "SELECT count(*) FROM information_schema.columns WHERE table_name = 'products' AND column_name = 'origin'"
    )
    with engine.connect() as reader:
        reader.execute(select(Product.sku).limit(1))
        with pytest.raises(exc.OperationalError, match="lock timeout"):
            command.upgrade(config, "head")
        assert reader.scalar(is_there) == 0
    command.upgrade(config, "head")
    with engine.connect() as reader:
        assert reader.scalar(is_there) == 1
        others = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'migration'")
        assert reader.scalar(others) == 0
    command.downgrade(config, "base")
    with engine.connect() as reader:
        assert reader.scalar(is_there) == 0
    server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=30)
    load = measured(parser.parse_args().seconds)
    print(load)
    sys.exit(bool(load.failed_later or load.checked_out or load.connections_left))
