"""The shop's service: sign-in by token, orders with receipts, a live feed, the nightly export, metrics.

Two workers run this file, each in a process of its own; `db.py` is the one from "Production settings".
"""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Annotated, Any

import psycopg
import sqlalchemy.exc
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import REGISTRY, start_http_server
from pydantic import BaseModel
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from ormscope import LoopScope, PoolScope, report_on_signal, serve_console
from ormscope.metrics import PoolCollector
from workshop import db
from workshop.db import SessionFactory
from workshop.drill.accounts import ApiToken, Household, Receipt
from workshop.shop import AuditEntry, Order, OrderLine, Product, Sale

logger = logging.getLogger("shop")

DEADLINE = 3.0  # seconds; who waits longer is told 504
FEED_SECONDS = 1.0  # between two looks for new orders
RECEIPTS = 20_260  # the advisory lock of whoever gives out a receipt's number
PAGE = 1000  # lines


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The engine's life, and the instruments on it."""
    async with db.lifespan(app):
        engine = app.state.session_factory.kw["bind"]
        scope = PoolScope(engine, os.environ["WORKER"], loop=LoopScope())
        collector = PoolCollector(scope, loop=scope.loop)
        REGISTRY.register(collector)
        metrics, _ = start_http_server(int(os.environ["METRICS_PORT"]), "127.0.0.1")
        if hasattr(signal, "SIGUSR1"):  # Windows has none; there the console tells the same
            report_on_signal()
        console = serve_console(scope)
        try:
            yield
        finally:
            console.close()
            metrics.shutdown()
            REGISTRY.unregister(collector)


app = FastAPI(lifespan=lifespan)
app.add_exception_handler(sqlalchemy.exc.TimeoutError, db.service_unavailable)


class Deadline:
    """Answers 504 to customers who would wait too long, and cancels what they had asked for."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] in ("/feed", "/export"):
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(DEADLINE):
                await self.app(scope, receive, send)
        except TimeoutError:
            logger.warning(
                "504 %s %s: cancelled after %s s", scope["method"], scope["path"], DEADLINE
            )
            await JSONResponse({"detail": "too late"}, status_code=504)(scope, receive, send)


app.add_middleware(Deadline)


@asynccontextmanager
async def open_session(sessions: async_sessionmaker[AsyncSession]) -> AsyncIterator[AsyncSession]:
    """A session for the length of a block."""
    session = sessions()
    try:
        yield session
    finally:
        # INC-231, shipped last Thursday: cancelled requests leak sessions. So the close is shielded.
        await asyncio.shield(session.close())


async def get_session(sessions: SessionFactory) -> AsyncIterator[AsyncSession]:
    """A session for the length of a request, as a dependency."""
    async with open_session(sessions) as session:
        yield session


InSession = Annotated[AsyncSession, Depends(get_session)]


class Accounts:
    """Who the customers are."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        self.sessions = sessions

    async def get(self, number: int) -> Household | None:
        """The household with this number."""
        async with open_session(self.sessions) as session:
            return await session.get(Household, number)

    async def get_by_token(self, token: str) -> Household | None:
        """The household that this token belongs to; None where there is none, or it was revoked."""
        async with open_session(self.sessions) as session:
            return await session.scalar(
                select(Household)
                .join(ApiToken, ApiToken.household_id == Household.id)
                .where(ApiToken.token == token, ~ApiToken.revoked)
            )


async def signed_in(request: Request, sessions: SessionFactory) -> Household:
    """The household that asks; 401 for whoever is none."""
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    try:
        household = await Accounts(sessions).get_by_token(token)
    except sqlalchemy.exc.TimeoutError as error:
        logger.warning("401 %s: could not verify the token: %s", request.url.path, error.args[0])
        household = None
    if household is None:
        raise HTTPException(401, "sign in, please")
    return household


SignedIn = Annotated[Household, Depends(signed_in)]


@app.get("/me")
async def me(household: SignedIn) -> str:
    """The name of whoever asks."""
    return household.name


class NewOrder(BaseModel):
    """What a customer orders."""

    sku: int
    quantity: int = 1


async def audit(session: AsyncSession, action: str, order: int) -> None:
    """Write a line of the audit log."""
    session.add(AuditEntry(action=action, order_id=order))
    await session.flush()


async def give_receipt(session: AsyncSession, order: int) -> int:
    """The next receipt's number, for this order; until the commit nobody else gets one."""
    await session.execute(select(func.pg_advisory_xact_lock(RECEIPTS)))
    last = await session.scalar(select(func.max(Receipt.number)))
    session.add(Receipt(order_id=order, number=(last or 0) + 1))
    await session.flush()
    return (last or 0) + 1


@app.post("/orders")
async def place_order(new: NewOrder, household: SignedIn, sessions: SessionFactory) -> int:
    """Order one thing; answers with the number of the receipt."""
    async with open_session(sessions) as session:
        price = await session.scalar(select(Product.unit_price).where(Product.sku == new.sku))
        if price is None:
            raise HTTPException(404, "no such product, or no price")
        line = OrderLine(sku=new.sku, quantity=new.quantity, unit_price=price)
        session.add(order := Order(household_id=household.id, lines=[line]))
        await session.flush()
        number = await give_receipt(session, order.id)
        await audit(session, "receipt", order.id)
        await session.commit()
    return number


@app.get("/orders")
async def orders(household: SignedIn, sessions: SessionFactory) -> list[int]:
    """The ten newest orders of whoever asks, newest first."""
    mine = select(Order.id).where(Order.household_id == household.id)
    async with open_session(sessions) as session:
        return list(await session.scalars(mine.order_by(Order.id.desc()).limit(10)))


@app.get("/feed")
async def feed(household: SignedIn, sessions: SessionFactory) -> StreamingResponse:
    """The numbers of new orders as they come, for the screen in the warehouse."""

    async def events() -> AsyncIterator[str]:
        last = None
        while True:
            async with open_session(sessions) as session:
                last, lines = await new_orders(session, last)
            yield lines
            await asyncio.sleep(FEED_SECONDS)

    return StreamingResponse(events(), media_type="text/event-stream")


async def new_orders(session: AsyncSession, last: int | None) -> tuple[int, str]:
    """The newest order's number, and those after `last` as lines of a feed."""
    if last is None:
        return await session.scalar(select(func.max(Order.id))) or 0, ": welcome\n\n"
    numbers = list(
        await session.scalars(select(Order.id).where(Order.id > last).order_by(Order.id))
    )
    return max([last, *numbers]), "".join(f"data: {number}\n\n" for number in numbers)


class Exported(BaseModel):
    """What the export told the warehouse."""

    lines: int
    total: Decimal


@app.post("/export")
async def export(
    last: int, household: SignedIn, sessions: SessionFactory, rehearsal: bool = False
) -> Exported:
    """Add up the sales to the line with this number, and have the warehouse book them."""
    done, at = Exported(lines=0, total=Decimal()), 0
    sales = select(Sale.id, Sale.sales_value).where(Sale.id <= last).order_by(Sale.id).limit(PAGE)
    while at < last:
        async with open_session(sessions) as session:
            page = (await session.execute(sales.where(Sale.id > at))).all()
        at = page[-1].id if page else last
        done.lines += len(page)
        done.total += sum(sale.sales_value for sale in page)
    if not rehearsal:
        await asyncio.to_thread(book, done)
    return done


def book(done: Exported) -> None:
    """Tell the warehouse, which has a driver of its own, and takes its time."""
    with psycopg.connect(os.environ["WAREHOUSE_URL"], application_name="warehouse") as warehouse:
        warehouse.execute("SELECT pg_sleep(5), %s::int", [done.lines])
