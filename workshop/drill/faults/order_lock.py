"""The receipts and their audit, as they were when the incident began."""

from fastapi import HTTPException
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from workshop.db import SessionFactory
from workshop.drill.service import NewOrder, SignedIn, app, give_receipt, open_session
from workshop.shop import AuditEntry, Order, OrderLine, Product


async def audit(sessions: async_sessionmaker[AsyncSession], action: str) -> None:
    """Write a line of the audit log, which stays there even where the order is taken back."""
    async with open_session(sessions) as session:
        session.add(AuditEntry(action=action))
        await session.commit()


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
        await audit(sessions, f"receipt {number}")
        await session.commit()
    return number
