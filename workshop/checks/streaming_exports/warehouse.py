"""The warehouse of exercise 04, task 3: it takes deliveries, slowly, and meanwhile the shop goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, event, insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from workshop.checks.memory import Reading
from workshop.shop import Order

BATCH = 500
SMALL = 100  # of orders in a batch: many calls
_API_SECONDS = 0.02  # that the API takes for a batch, and
_CUSTOMERS_SECONDS = 0.06  # more at most, until the customers have done what they want
_CUSTOMERS = "customers"
_AT_ONCE = 20


class Warehouse:
    """The slow API of somebody else; while it takes a batch, customers cancel some of `orders` and place new ones.

    `batches` are the numbers of all orders that were delivered, and `cancelled` has for each order that was cancelled
    how many batches there were by then; `placed` are the new ones, and `archived` the rows of those that were
    delivered. `held` says whether the job had a connection during a delivery, and `at_once` how many deliveries were
    under way at the same time, at most. `refused` are the batches that came after `refuses` was set.
    """

    def __init__(
        self, engine: AsyncEngine, orders: list[int], household: int, reading: Reading
    ) -> None:
        self.batches: list[list[int]] = []
        self.cancelled: dict[int, int] = {}
        self.placed: set[int] = set()
        self.archived: set[int] = set()
        self.held = False
        self.at_once = 0
        self.refuses = False
        self.refused: list[list[int]] = []
        self._engine = engine
        self._orders = orders
        self._household = household
        self._reading = reading
        # At least two full batches are still to come when the last order is cancelled.
        self._busy_for = len(orders) // BATCH - 2
        self._meanwhile: list[asyncio.Task[None]] = []
        self._under_way = 0
        self._holding: set[ConnectionPoolEntry] = set()
        event.listen(engine.sync_engine, "checkout", self._checked_out)
        event.listen(engine.sync_engine, "checkin", self._checked_in)

    async def deliver(self, batch: Any) -> None:
        """Take a batch: orders, rows that have their number first or as `id`, or just the numbers."""
        numbers = [_number(order) for order in batch]
        if self.refuses:
            self.refused.append(numbers)
            raise ConnectionError("the warehouse does not answer")
        self.batches.append(numbers)
        self.held = self.held or bool(self._holding)
        self._under_way += 1
        self.at_once = max(self.at_once, self._under_way)
        try:
            if len(self.batches) <= self._busy_for:
                served = asyncio.Event()
                task = asyncio.create_task(self._shop_goes_on(served), name=_CUSTOMERS)
                self._meanwhile.append(task)
                # An event has no owner: to await the task would make a circle with a job that holds on.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_CUSTOMERS_SECONDS):
                        await served.wait()
            await asyncio.sleep(_API_SECONDS)
        finally:
            self._under_way -= 1

    async def close(self) -> None:
        """Wait until the last customer has left."""
        await asyncio.gather(*self._meanwhile)

    async def _shop_goes_on(self, served: asyncio.Event) -> None:
        try:
            async with self._engine.begin() as connection:
                delivered = [number for batch in self.batches for number in batch]
                known, gone = {*self._orders}, {*delivered, *self.cancelled}
                left = [number for number in self._orders if number not in gone]
                cancelled = left[:_AT_ONCE] + left[-_AT_ONCE:]
                archived = [number for number in delivered if number in known][-_AT_ONCE:]
                await connection.execute(delete(Order).where(Order.id.in_(cancelled + archived)))
                new = [{"household_id": self._household}] * _AT_ONCE
                placed = await connection.scalars(insert(Order).returning(Order.id), new)
                self.placed |= {*placed}
        except PoolTimeoutError:
            return  # the job held what they waited for, and that is noted
        except DBAPIError:
            if self._reading.late_reads:
                return  # the job read on by a connection that was theirs by then, and that is noted
            raise
        self.archived |= {*archived}
        self.cancelled |= dict.fromkeys(cancelled, len(self.batches))
        served.set()

    def _checked_out(self, connection: Any, entry: ConnectionPoolEntry, proxy: Any) -> None:
        task = asyncio.current_task()
        if task is not None and task.get_name() != _CUSTOMERS:
            self._holding.add(entry)
            self.held = self.held or self._under_way > 0

    def _checked_in(self, connection: Any, entry: ConnectionPoolEntry) -> None:
        self._holding.discard(entry)


def _number(order: Any) -> int:
    number = order if isinstance(order, int) else getattr(order, "id", None)
    if number is None:
        number = order["id"] if isinstance(order, Mapping) else order[0]
    if not isinstance(number, int):
        raise TypeError(f"deliver was handed {order!r}; wanted are orders, or their numbers")
    return number
