"""What the checks lend to the learner's code: a database, engines, and households whose orders nobody else touches."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from ormscope.lab import Recording
from workshop.shop import AuditEntry, Order, OrderLine

# In seconds; longer than a right answer has to wait, also where the machine is busy.
POOL_TIMEOUT = 3.0


@dataclass(frozen=True)
class Conditions:
    """Under what a load runs: the database's URL, and the seconds after which it is cancelled."""

    url: str
    load_seconds: float

    def engine(self, capacity: int, name: str = "shop", **settings: str) -> AsyncEngine:
        """An engine as the exercises lend it; `settings` are the server's, for its connections."""
        return create_async_engine(
            self.url,
            pool_size=capacity,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT,
            pool_logging_name=name,
            connect_args={"server_settings": settings},
        )


def connections(run: Recording) -> str:
    """How many connections the first of the engines had, in words."""
    capacity = run.pools[0].capacity
    return f"{capacity} connection{'s' * (capacity != 1)}"


def own_households() -> range:
    """Household numbers that no other process uses: the customers of one load."""
    first = 1_000_000_000 + os.getpid() % 100_000 * 10_000
    return range(first, first + 10_000)


async def forget_orders(connection: AsyncConnection, customers: range) -> None:
    """Delete the orders of these households, with all that belongs to them, and commit."""
    ours = Order.household_id.between(customers[0], customers[-1])
    orders = select(Order.id).where(ours)
    for table in (OrderLine, AuditEntry):
        await connection.execute(delete(table).where(table.order_id.in_(orders)))
    await connection.execute(delete(Order).where(ours))
    await connection.commit()
