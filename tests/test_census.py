"""SessionCensus on the real server: each culprit is named, alone, and without it the objects go."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import joinedload, selectinload

from ormscope import SessionCensus
from workshop.database import Server
from workshop.shop import AuditEntry, Product, Sale

ROWS = 500
BANANAS = 1082185
SALES = select(Sale).order_by(Sale.id).limit(ROWS)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Objects go when their last reference goes, and not by chance."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def run(server: Server) -> Callable[[Callable[[AsyncSession], Coroutine[Any, Any, None]]], None]:
    """Run a test's coroutine with a session, and leave nothing."""

    def run(main: Callable[[AsyncSession], Coroutine[Any, Any, None]]) -> None:
        async def with_session() -> None:
            engine = create_async_engine(server.url)
            async with AsyncSession(engine) as session:
                await main(session)
            await engine.dispose()

        asyncio.run(with_session())

    return run


def culprits(session: Any = None) -> list[tuple[int, str, str]]:
    return [(one.count, one.name, one.kind) for one in SessionCensus(session).keepers]


def test_a_clean_stream_leaves_nothing(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        result = await session.stream_scalars(SALES.execution_options(yield_per=100))
        async for part in result.partitions():
            census = SessionCensus(session)
            assert census.alive == {"Sale": len(part)}
        del part
        assert str(SessionCensus(session)) == "0 objects alive"

    run(main)


def test_a_list(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        kept = (await session.scalars(SALES)).all()
        census = SessionCensus(session)
        assert census.alive == {"Sale": ROWS}
        assert culprits(session) == [(ROWS, "Sale", "variable")]
        assert "500 Sale: variable kept (a list) in main, line " in str(census)
        del kept
        assert not SessionCensus(session).alive

    run(main)


def test_a_list_within_an_object_that_a_function_further_up_holds(run: Any) -> None:
    class Report:
        def __init__(self) -> None:
            self.lines: dict[str, list[Any]] = {"sold": []}

    async def fill(session: AsyncSession, report: Report) -> None:
        report.lines["sold"] += (await session.scalars(SALES)).all()

    async def main(session: AsyncSession) -> None:
        mine = Report()
        await fill(session, mine)
        (keeper,) = SessionCensus(session).keepers
        assert (keeper.count, keeper.kind) == (ROWS, "variable")
        assert keeper.where.startswith("mine in main, line ")
        del mine
        assert not SessionCensus(session).alive

    run(main)


def test_a_variable_of_a_task_that_sleeps(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        go_on = asyncio.Event()

        async def hold() -> None:
            mine = (await session.scalars(SALES)).all()
            await go_on.wait()
            del mine

        task = asyncio.create_task(hold())
        while not SessionCensus(session).alive:
            await asyncio.sleep(0.02)
        (keeper,) = SessionCensus(session).keepers
        assert (keeper.count, keeper.kind) == (ROWS, "variable")
        assert keeper.where.startswith("mine (a list) in hold, line ")
        go_on.set()
        await task
        assert not SessionCensus(session).alive

    run(main)


def test_modified_objects(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        async for sale in await session.stream_scalars(SALES.execution_options(yield_per=100)):
            sale.quantity += 0
            sale.quantity = sale.quantity + 1
        del sale
        assert culprits(session) == [(ROWS, "Sale", "modified")]
        await session.flush()
        assert not SessionCensus(session).alive
        await session.rollback()

    run(main)


def test_new_objects(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        session.add_all(AuditEntry(action="looked") for _ in range(ROWS))
        assert culprits(session) == [(ROWS, "AuditEntry", "new")]
        await session.flush()
        assert not SessionCensus(session).alive

    run(main)


def test_deleted_objects(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        session.add_all(AuditEntry(action="looked") for _ in range(10))
        await session.flush()
        for entry in await session.scalars(select(AuditEntry).limit(10)):
            await session.delete(entry)
        del entry
        assert culprits(session) == [(10, "AuditEntry", "deleted")]
        await session.flush()
        assert not SessionCensus(session).alive
        await session.rollback()

    run(main)


def test_a_loaded_collection_on_a_living_parent(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        load = select(Product).where(Product.sku == BANANAS).options(selectinload(Product.sales))
        bananas = await session.scalar(load)
        assert bananas is not None
        sales = len(bananas.sales)
        census = SessionCensus(session)
        assert {(one.name, one.kind) for one in census.keepers} == {
            ("Product", "variable"),
            ("Sale", "collection"),
        }
        (held,) = (one for one in census.keepers if one.name == "Sale")
        assert held.count == sales
        assert held.where.startswith(
            "Product.sales, whose owner is kept by variable bananas in main, line "
        )
        del bananas
        assert not SessionCensus(session).alive

    run(main)


def test_a_cycle(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        load = (
            select(Product)
            .where(Product.sku == BANANAS)
            .options(selectinload(Product.sales).options(joinedload(Sale.product)))
        )
        assert (await session.scalar(load)) is not None
        census = SessionCensus(session)
        assert census.alive["Sale"] > ROWS
        assert {one.kind for one in census.keepers} == {"cycle"}
        gc.collect()
        assert not SessionCensus(session).alive

    run(main)


def test_a_result_that_was_not_read_to_its_end(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        unread = await session.scalars(SALES)
        next(iter(unread))
        assert {kind for _, _, kind in culprits(session)} == {"result"}
        assert SessionCensus(session).alive == {"Sale": ROWS}
        unread.close()
        del unread
        assert not SessionCensus(session).alive

    run(main)


def test_a_kept_traceback(run: Any) -> None:
    async def fail(session: AsyncSession) -> None:
        sales = (await session.scalars(SALES)).all()
        raise LookupError(f"{len(sales)} and not one more")

    async def main(session: AsyncSession) -> None:
        errors = []
        try:
            await fail(session)
        except LookupError as error:
            errors.append(error)
        (keeper,) = SessionCensus(session).keepers
        assert (keeper.count, keeper.kind) == (ROWS, "traceback")
        assert "fail, line" in keeper.where
        errors.clear()
        assert not SessionCensus(session).alive

    run(main)


def test_a_scoped_session_that_nobody_removed(server: Server) -> None:
    async def main() -> None:
        engine = create_async_engine(server.url)
        scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)

        async def request() -> None:
            for entry in range(10):
                scoped.add(AuditEntry(action=f"looked {entry}"))

        tasks = [asyncio.create_task(request()) for _ in range(5)]
        await asyncio.gather(*tasks)
        census = SessionCensus()
        assert census.sessions == 5
        assert [(one.count, one.kind) for one in census.keepers] == [(50, "scoped registry")]
        assert "5 scoped sessions kept for tasks that have ended" in str(census)
        for session in scoped.registry.registry.values():
            await session.close()
        scoped.registry.registry.clear()
        census = SessionCensus()
        assert (census.alive, census.sessions) == ({}, 0)
        await engine.dispose()

    asyncio.run(main())


async def sold(session: AsyncSession) -> AsyncIterator[list[Sale]]:
    page = list(await session.scalars(SALES))
    yield page


def test_a_generator_that_was_left_half_read(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        pages = sold(session)
        await anext(pages)
        (keeper,) = SessionCensus(session).keepers
        assert (keeper.count, keeper.kind) == (ROWS, "variable")
        assert keeper.where.startswith("page (a list) in sold, line ")
        await pages.aclose()
        assert not SessionCensus(session).alive

    run(main)


def test_a_census_keeps_nothing_alive(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        kept = (await session.scalars(SALES)).all()
        census = [SessionCensus(session) for _ in range(2)]
        del kept
        assert census[0].alive == {"Sale": ROWS}
        assert not SessionCensus(session).alive

    run(main)


CELLS = (
    "import gc; gc.disable(); from ormscope import SessionCensus; from workshop.shop import Product",
    "[Product(sku=n) for n in range(5)]",
    "print('CENSUS', [(k.count, k.kind) for k in SessionCensus().keepers])",
    "kept = [Product(sku=n) for n in range(7)]",
    "%xdel _2",
    "print('CENSUS', [(k.count, k.kind, k.where) for k in SessionCensus().keepers])",
)
NOTEBOOK = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in {CELLS!r}:
    shell.run_cell(cell, store_history=True)
"""


def test_jupyters_out() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "IPYTHONDIR": os.devnull, "PYTHONWARNINGS": "ignore"},
    )
    shown = [line for line in done.stdout.splitlines() if line.startswith("CENSUS")]
    assert shown == [
        "CENSUS [(5, 'output')]",
        "CENSUS [(7, 'variable', 'kept (a list) of the notebook')]",
    ], done.stdout + done.stderr
