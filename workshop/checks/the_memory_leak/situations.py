"""The situations of exercise 03, task 1: each is a way in which a program keeps objects alive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import joinedload, selectinload

from workshop.shop import AuditEntry, Product, Sale

BANANAS = 1082185
Sessions = async_sessionmaker[AsyncSession]


@asynccontextmanager
async def _variable(sessions: Sessions, count: int) -> AsyncIterator[None]:
    async with sessions() as session:
        kept = (await session.scalars(select(Product).order_by(Product.sku).limit(count))).all()
        yield
        del kept


@asynccontextmanager
async def _modified(sessions: Sessions, count: int) -> AsyncIterator[None]:
    async with sessions() as session:
        for sale in await session.scalars(select(Sale).order_by(Sale.id).limit(count)):
            sale.quantity += 1
        del sale
        yield


@asynccontextmanager
async def _new(sessions: Sessions, count: int) -> AsyncIterator[None]:
    async with sessions() as session:
        session.add_all(AuditEntry(action=f"looked at {number}") for number in range(count))
        yield


@asynccontextmanager
async def _collection(sessions: Sessions, count: int) -> AsyncIterator[None]:
    first = select(Sale.id).where(Sale.sku == BANANAS).order_by(Sale.id).limit(count)
    some = selectinload(Product.sales.and_(Sale.id.in_(first)))
    async with sessions() as session:
        bananas = await session.scalar(select(Product).where(Product.sku == BANANAS).options(some))
        yield
        del bananas


@asynccontextmanager
async def _cycle(sessions: Sessions, count: int) -> AsyncIterator[None]:
    first = select(Sale.id).where(Sale.sku == BANANAS).order_by(Sale.id).limit(count)
    some = selectinload(Product.sales.and_(Sale.id.in_(first))).options(joinedload(Sale.product))
    async with sessions() as session:
        await session.scalar(select(Product).where(Product.sku == BANANAS).options(some))
        yield


@asynccontextmanager
async def _result(sessions: Sessions, count: int) -> AsyncIterator[None]:
    async with sessions() as session:
        unread = await session.scalars(select(Sale).order_by(Sale.id).limit(count))
        next(iter(unread))
        yield
        unread.close()


async def _fail(session: AsyncSession, count: int) -> None:
    sales = (await session.scalars(select(Sale).order_by(Sale.id).limit(count))).all()
    raise LookupError(f"no line after number {len(sales)}")


@asynccontextmanager
async def _traceback(sessions: Sessions, count: int) -> AsyncIterator[None]:
    errors = []
    async with sessions() as session:
        try:
            await _fail(session, count)
        except LookupError as error:
            errors.append(error)
        yield
        errors.clear()


@asynccontextmanager
async def _scoped_registry(sessions: Sessions, count: int, each: int = 1) -> AsyncIterator[None]:
    scoped = async_scoped_session(sessions, scopefunc=asyncio.current_task)

    async def request() -> None:
        scoped().add_all(AuditEntry(action="looked") for _ in range(each))

    await asyncio.gather(*(asyncio.create_task(request()) for _ in range(count)))
    yield
    for session in scoped.registry.registry.values():
        await session.close()
    scoped.registry.registry.clear()


def _idle_sessions(sessions: Sessions, count: int) -> AbstractAsyncContextManager[None]:
    return _scoped_registry(sessions, count, each=0)


@asynccontextmanager
async def _nothing(sessions: Sessions, count: int) -> AsyncIterator[None]:
    async with sessions() as session:
        await session.scalars(select(Sale).order_by(Sale.id).limit(count))
    yield


Keep = Callable[[Sessions, int], AbstractAsyncContextManager[None]]

KEEPERS: dict[str, Keep] = {
    "variable": _variable,
    "modified": _modified,
    "new": _new,
    "collection": _collection,
    "cycle": _cycle,
    "result": _result,
    "traceback": _traceback,
    "scoped registry": _scoped_registry,
    "idle sessions": _idle_sessions,
    "nothing": _nothing,
}
"""What keeps so many objects alive from the beginning of a block to its end, by the name of its kind."""
NOTHING_ALIVE = ("idle sessions", "nothing")
