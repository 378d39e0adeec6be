"""What the checks lend to the learner's code: a database, engines, and households whose orders nobody else touches."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

import psutil
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from ormscope.lab import Recording
from workshop.shop import AuditEntry, Order, OrderLine

POOL_TIMEOUT = 3.0  # seconds; longer than a right answer has to wait
# To count so far takes so many seconds where the limits of the checks were set.
_SAMPLE = range(200_000)
_SAMPLE_SECONDS = 0.012
_SLOWEST = 4


def slowness() -> int:
    """How many times as long everything takes on this machine now, slow or busy as it is; 1 to 4.

    A limit in seconds that tells right from wrong on one machine would refuse what is right on another.
    """
    began = time.perf_counter()
    for _ in _SAMPLE:
        pass
    slow = round((time.perf_counter() - began) / _SAMPLE_SECONDS)
    load, _, _ = psutil.getloadavg()
    busy: int = math.ceil(load / (psutil.cpu_count() or 1))  # would run, on each core
    return min(max(slow, busy, 1), _SLOWEST)


@dataclass(frozen=True)
class Conditions:
    """Under what a load runs: the database's URL, when it is cancelled, and how slow the machine is (see above)."""

    url: str
    load_seconds: float
    slowness: int = 1

    def engine(self, capacity: int, name: str = "shop", **settings: str) -> AsyncEngine:
        """An engine as the exercises lend it; `settings` are the server's, for its connections."""
        return create_async_engine(
            self.url,
            pool_size=capacity,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT * self.slowness,
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
