"""The shop: its models agree with its tables, and its tables with the published data."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, inspect, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import selectinload
from sqlalchemy.pool import NullPool

from workshop import shop
from workshop.database import Server, start_server
from workshop.mistake import Mistake
from workshop.shop import AuditEntry, ExportJob, Order, OrderLine, Product, Sale

# The sum of sales_value in the file, to the cent.
TOTAL = Decimal("702397.13")


def with_session(url: str, work: Callable[[AsyncSession], Awaitable[Any]]) -> Any:
    """Run `work` in a session on a loop of its own; nothing that it does is committed."""

    async def run() -> Any:
        engine = create_async_engine(url, poolclass=NullPool)
        async with AsyncSession(engine) as session:
            return await work(session)

    return asyncio.run(run())


@pytest.fixture
def url(server: Server) -> str:
    """The shop."""
    return server.url


def test_import_has_no_side_effect_and_needs_only_sqlalchemy() -> None:
    """Models can be imported anywhere: nothing is started, no driver is loaded."""
    program = (
        "import sys, threading, workshop.shop; "
        "assert threading.active_count() == 1; "
        "bad = {'asyncpg', 'aiosqlite', 'psutil', 'platformdirs', 'matplotlib'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=shop.DATA.parent)


def test_all_rows_are_there(url: str) -> None:
    """The loader loses no row and no cent, and marks what it made."""

    async def work(session: AsyncSession) -> None:
        assert await session.scalar(select(func.count()).select_from(Product)) == 92_331
        assert await session.scalar(select(func.count()).select_from(Sale)) == 232_066
        assert await session.scalar(select(func.count(Product.unit_price))) == 92_331 - 24_074
        assert await session.scalar(select(func.count(Product.title))) == 92_331 - 528
        total = await session.scalar(select(func.sum(Sale.sales_value)))
        assert round(Decimal(total or 0), 2) == TOTAL
        marker = await session.scalar(select(shop.ShopMarker.fingerprint))
        assert marker == shop.fingerprint()

    with_session(url, work)


def test_values_have_python_types(url: str) -> None:
    """The first line of the file comes back as a model with a product."""

    async def work(session: AsyncSession) -> None:
        sale = await session.get_one(Sale, 1, options=[selectinload(Sale.product)])
        assert (sale.basket_id, sale.household_id, sale.sku) == (31198570044, 900, 1095275)
        assert sale.sales_value == Decimal("0.50")
        assert sale.sold_at.isoformat(" ") == "2017-01-01 11:53:26"
        assert sale.product is not None and sale.product.sku == sale.sku
        found = await session.scalar(
            select(Sale.id).where(Sale.sold_at == sale.sold_at, Sale.sku == sale.sku)
        )
        assert found == 1

    with_session(url, work)


def test_relationships_go_both_ways(url: str) -> None:
    """Product and sales, order and lines, order and audit entries know each other."""

    async def work(session: AsyncSession) -> None:
        product = await session.get_one(Product, 1095275, options=[selectinload(Product.sales)])
        assert len(product.sales) > 1
        assert all(sale.product is product for sale in product.sales)

        order = Order(household_id=900)
        order.lines.append(OrderLine(product=product, unit_price=Decimal("0.50")))
        order.audit_entries.append(AuditEntry(action="order placed"))
        job = ExportJob(kind="sales")
        session.add_all([order, job])
        await session.flush()
        assert (order.status, order.lines[0].order_id, order.lines[0].sku) == (
            "new",
            order.id,
            product.sku,
        )
        assert order.audit_entries[0].order is order
        # Read back with the INSERT; asking for it later would need an await.
        assert order.created_at is not None
        assert (job.status, job.rows_done, job.finished_at) == ("queued", 0, None)

    with_session(url, work)


def test_tables_are_what_the_models_say(url: str) -> None:
    """Each table has the columns of its model, and each index and foreign key is there."""

    async def work(session: AsyncSession) -> None:
        def compare(connection: Any) -> None:
            there = inspect(connection)
            for table in shop.Base.metadata.tables.values():
                assert {c["name"] for c in there.get_columns(table.name)} == set(
                    table.columns.keys()
                )
                assert {i["name"] for i in there.get_indexes(table.name)} == {
                    i.name for i in table.indexes
                }
                assert {k["referred_table"] for k in there.get_foreign_keys(table.name)} == {
                    k.referred_table.name for k in table.foreign_key_constraints
                }

        await (await session.connection()).run_sync(lambda sync: compare(sync))

    with_session(url, work)


def test_new_sales_must_name_a_product(server: Server) -> None:
    """The foreign key holds for what is new, though nine products of the past are unknown."""

    async def work(session: AsyncSession) -> None:
        unknown = (
            select(func.count())
            .select_from(Sale)
            .outerjoin(Product, Product.sku == Sale.sku)
            .where(Product.sku.is_(None))
        )
        assert await session.scalar(unknown) == 537
        sale = (await session.scalars(select(Sale).limit(1))).one()
        with pytest.raises(IntegrityError, match="sales_sku_fkey"):
            await session.execute(text("UPDATE sales SET sku = 1 WHERE id = :id"), {"id": sale.id})

    with_session(server.url, work)


def test_nothing_is_left_for_autovacuum() -> None:
    """A fresh server does not start to vacuum while somebody measures; the planner knows all."""

    async def work(session: AsyncSession) -> None:
        statement = text(
            "SELECT pg_class.relname, n_ins_since_vacuum, n_mod_since_analyze, reltuples"
            " FROM pg_stat_user_tables JOIN pg_class ON pg_class.oid = relid"
            " WHERE pg_class.relname IN ('products', 'sales') ORDER BY 1"
        )
        rows = [tuple(row) for row in await session.execute(statement)]
        assert rows == [("products", 0, 0, 92_331), ("sales", 0, 0, 232_066)]

    fresh = start_server()
    with_session(fresh.url, work)
    fresh.stop()


def test_scale_repeats_the_sales(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scale=2 has each sales line twice and each product once, in a template of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(sandbox / "cache"))
    doubled = start_server(scale=2)

    async def work(session: AsyncSession) -> None:
        assert await session.scalar(select(func.count()).select_from(Product)) == 92_331
        assert await session.scalar(select(func.count()).select_from(Sale)) == 2 * 232_066

    try:
        with_session(doubled.url, work)
    finally:
        doubled.stop()
    (template,) = (sandbox / "cache" / "sqlalchemy-under-load").iterdir()
    assert template.name.endswith("-x2")


def test_damaged_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is not the published one is named before anything is loaded."""
    for path in shop.DATA.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(shop, "DATA", tmp_path)
    shop.check_data()
    damaged = tmp_path / "sales.csv.gz"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(Mistake, match=r"sales\.csv\.gz is damaged.*git checkout"):
        shop.check_data()
    damaged.unlink()
    with pytest.raises(Mistake, match=r"missing: there is no .*sales\.csv\.gz"):
        shop.check_data()
