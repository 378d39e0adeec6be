"""The shop: its tables as typed models, and the loader of its data.

Importing this module has no side effect and needs nothing but SQLAlchemy.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
from datetime import datetime
from decimal import Decimal
from pathlib import Path

from sqlalchemy import (
    BigInteger,
    ForeignKey,
    MetaData,
    Numeric,
    Table,
    func,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import AddConstraint, CreateIndex, CreateTable, DropConstraint, DropIndex

from workshop.mistake import Mistake

# data/ stands beside the packages in the checkout
DATA = Path(__file__).resolve().parent.parent / "data"


class Base(DeclarativeBase):
    """What all tables of the shop have in common: named constraints."""

    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "fk": "%(table_name)s_%(column_0_name)s_fkey",
            "ix": "%(table_name)s_%(column_0_name)s_idx",
        }
    )


class Product(Base):
    """One product of the range, whether it was ever sold or not."""

    __tablename__ = "products"

    sku: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    title: Mapped[str | None]
    department: Mapped[str]
    category: Mapped[str | None]
    brand: Mapped[str]
    manufacturer_id: Mapped[int]
    package_size: Mapped[str | None]
    unit_price: Mapped[Decimal | None] = mapped_column(Numeric(10, 2))

    sales: Mapped[list[Sale]] = relationship(back_populates="product")

    def __repr__(self) -> str:
        return f"Product({self.sku}, {self.title!r})"


class Sale(Base):
    """One line of a till receipt: so many of one product, in one basket."""

    __tablename__ = "sales"

    id: Mapped[int] = mapped_column(primary_key=True)
    # basket numbers begin at 31 billion
    basket_id: Mapped[int] = mapped_column(BigInteger)
    household_id: Mapped[int]
    store_id: Mapped[int]
    # Nine products (537 lines) are sold that the published table of products does not know. The
    # constraint is therefore not valid for the past; PostgreSQL checks it for all that is new.
    sku: Mapped[int] = mapped_column(
        ForeignKey("products.sku", postgresql_not_valid=True), index=True
    )
    quantity: Mapped[int]
    sales_value: Mapped[Decimal] = mapped_column(Numeric(10, 2))
    retail_disc: Mapped[Decimal] = mapped_column(Numeric(10, 2))
    coupon_disc: Mapped[Decimal] = mapped_column(Numeric(10, 2))
    sold_at: Mapped[datetime]

    product: Mapped[Product | None] = relationship(back_populates="sales")

    def __repr__(self) -> str:
        return f"Sale({self.id}, sku={self.sku}, quantity={self.quantity})"


class Order(Base):
    """An order that a household places; the lessons make these."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    household_id: Mapped[int]
    status: Mapped[str] = mapped_column(default="new")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    lines: Mapped[list[OrderLine]] = relationship(
        back_populates="order", cascade="all, delete-orphan"
    )
    audit_entries: Mapped[list[AuditEntry]] = relationship(back_populates="order")

    def __repr__(self) -> str:
        return f"Order({self.id}, {self.status!r})"


class OrderLine(Base):
    """One product of an order, at the price of that moment."""

    __tablename__ = "order_lines"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"), index=True)
    sku: Mapped[int] = mapped_column(ForeignKey("products.sku"))
    quantity: Mapped[int] = mapped_column(default=1)
    unit_price: Mapped[Decimal] = mapped_column(Numeric(10, 2))

    order: Mapped[Order] = relationship(back_populates="lines")
    product: Mapped[Product] = relationship()

    def __repr__(self) -> str:
        return f"OrderLine({self.id}, sku={self.sku}, quantity={self.quantity})"


class ExportJob(Base):
    """A long-running export, and how far it has come."""

    __tablename__ = "export_jobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    status: Mapped[str] = mapped_column(default="queued")
    rows_done: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]

    def __repr__(self) -> str:
        return f"ExportJob({self.id}, {self.kind!r}, {self.status!r})"


class AuditEntry(Base):
    """One line of the audit log: who did what, perhaps to which order."""

    __tablename__ = "audit_log"

    id: Mapped[int] = mapped_column(primary_key=True)
    action: Mapped[str]
    detail: Mapped[str | None]
    order_id: Mapped[int | None] = mapped_column(ForeignKey("orders.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    order: Mapped[Order | None] = relationship(back_populates="audit_entries")

    def __repr__(self) -> str:
        return f"AuditEntry({self.id}, {self.action!r})"


class ShopMarker(Base):
    """Says that the shop's tables in this database are ours, and which edition of them."""

    __tablename__ = "sqlalchemy_under_load_shop"

    fingerprint: Mapped[str] = mapped_column(primary_key=True)
    loaded_at: Mapped[datetime] = mapped_column(server_default=func.now())


# One loader at a time in one database; any number will do, as long as all loaders use the same.
ADVISORY_LOCK = 7_311_982
# Seconds to wait for a server that may not be there at all.
CONNECT_PATIENCE = 10
LOADED = (Base.metadata.tables["products"], Base.metadata.tables["sales"])
# All tables of the database and whether they are where ours would be: who uses it may have a schema.
TABLES = text(
    "SELECT tablename, schemaname = current_schema() FROM pg_tables"
    " WHERE schemaname <> 'information_schema' AND schemaname !~ '^pg_' ORDER BY tablename"
)
NAMED = 5  # of the tables that are in the way


def checksums() -> dict[str, str]:
    """The SHA-256 that each data file must have, by file name."""
    path = DATA / "SHA256SUMS"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise Mistake(
            f"The shop's data is missing: there is no {path}. Clone the workshop again."
        ) from None
    return {name: digest for digest, name in (line.split() for line in lines)}


def check_data() -> None:
    """Raise Mistake if a data file is missing or is not the one that was published."""
    for name, digest in checksums().items():
        path = DATA / name
        if not path.is_file():
            raise Mistake(f"The shop's data is missing: there is no {path}. Clone it again.")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise Mistake(
                f"{path} is damaged: its checksum is not the one in SHA256SUMS. "
                f"Restore it with `git checkout -- data`."
            )


def fingerprint(scale: int = 1) -> str:
    """Names this edition of the shop: its tables, its data and how often sales are repeated."""
    parts = [str(CreateTable(table)) for table in Base.metadata.sorted_tables]
    parts += [f"{name} {digest}" for name, digest in sorted(checksums().items())]
    return f"{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}-x{scale}"


async def prepare(url: str, *, scale: int = 1) -> str:
    """Make and load the shop in the database at `url`, unless it is there already.

    Returns what the database is, for example "PostgreSQL 16.14".

    All of it is one transaction: a loader that is killed leaves nothing. `scale` repeats each
    sales line so many times. Raises Mistake if the database has tables and the shop is not among
    them, or is another edition of it.
    """
    engine = create_async_engine(
        url, poolclass=NullPool, connect_args={"timeout": CONNECT_PATIENCE}
    )
    async with engine.connect() as connection:
        version = ".".join(map(str, connection.dialect.server_version_info or ()))
        name = f"PostgreSQL {version}"
        await connection.execute(select(func.pg_advisory_xact_lock(ADVISORY_LOCK)))
        if await _is_loaded(connection, scale):
            return name
        check_data()
        await connection.run_sync(Base.metadata.create_all)
        for table in LOADED:
            await _load(connection, table, scale if table.name == "sales" else 1)
        await connection.execute(
            Base.metadata.tables[ShopMarker.__tablename__].insert(),
            {"fingerprint": fingerprint(scale)},
        )
        await connection.commit()
        # Only now: VACUUM refuses a transaction. It leaves autovacuum nothing to do while
        # somebody measures, and the planner knows the tables.
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        if (connection.dialect.server_version_info or ()) >= (15,):
            # Else the loader's own counts arrive after the VACUUM, and undo what it noted.
            await connection.exec_driver_sql("SELECT pg_stat_force_next_flush()")
        names = ", ".join(table.name for table in LOADED)
        await connection.exec_driver_sql(f"VACUUM (ANALYZE) {names}")
    return name


async def _is_loaded(connection: AsyncConnection, scale: int) -> bool:
    """Whether this edition of the shop is there; Mistake if anything else is there without it."""
    place = f"{connection.engine.url.database} at {connection.engine.url.host}"
    there = (await connection.execute(TABLES)).all()
    ours = sorted({name for name, is_here in there if is_here} & set(Base.metadata.tables))
    if ShopMarker.__tablename__ not in ours:
        if not there:
            return False
        names = ", ".join(name for name, _ in there[:NAMED])
        more = f" and {len(there) - NAMED} more" if len(there) > NAMED else ""
        raise Mistake(
            f"DATABASE_URL names {place}, which has tables that are not the workshop's ({names}{more}). "
            f"Nothing was touched. Name an empty database, or unset DATABASE_URL for a server of your own."
        )
    found = await connection.scalar(select(ShopMarker.fingerprint))
    if found != fingerprint(scale) or len(ours) < len(Base.metadata.tables):
        raise Mistake(
            f"DATABASE_URL names {place}, which holds another edition of the shop ({found}, and "
            f"{fingerprint(scale)} is wanted), or a part of it. Name an empty database, "
            f"or drop these tables: {', '.join(ours)}."
        )
    return True


async def _load(connection: AsyncConnection, table: Table, times: int) -> None:
    """Append the table's data file to the empty table, `times` times over."""
    path = DATA / f"{table.name}.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        columns = next(csv.reader(lines))
    # Constraints that do not hold for the past, and indexes, come after the rows: that is faster.
    later = table.foreign_key_constraints
    for constraint in later:
        await connection.execute(DropConstraint(constraint, isolate_from_table=False))
    for index in table.indexes:
        await connection.execute(DropIndex(index))
    driver = (await connection.get_raw_connection()).driver_connection
    assert driver is not None
    for _ in range(times):
        # CSV as PostgreSQL reads it: an empty field is NULL.
        with gzip.open(path) as rows:
            await driver.copy_to_table(
                table.name, source=rows, columns=columns, format="csv", header=True
            )
    for index in table.indexes:
        await connection.execute(CreateIndex(index))
    for constraint in later:
        await connection.execute(AddConstraint(constraint, isolate_from_table=False))
