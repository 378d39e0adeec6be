"""The situations of exercise 07, task 2: what happens to pools, and what their metrics tell meanwhile."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import create_async_engine

from ormscope import PoolScope
from ormscope.metrics import PoolCollector
from workshop.checks.watching_the_pool.moments import (
    MOMENTS,
    deadlocked,
    hold_and_ask,
    take_a_connection,
    until,
)

_SCRAPES = 6  # in each of the situations
_IMPATIENT = 0.05  # seconds; the pool_timeout that breaks deadlocks between two scrapes

SITUATIONS = {
    "idle": MOMENTS["idle"],
    "full": MOMENTS["full"],
    "long report": "while a report had all connections and others waited, for less than they bear",
    "busy": "while all connections were out and each customer was served before the next scrape",
    "hiccup": "when customers had waited for too long in all scrapes but the first",
    "hiccup, over": "when customers had waited for too long, and were served long before the last scrape",
    "overloaded": "while the first in line had waited for too long in every scrape",
    "new deadlock": "when a deadlock had just been proved",
    "deadlock": "in a deadlock that was proved a moment before the first scrape",
    "old deadlock": "in a deadlock that was there long before the first scrape",
    "timeouts": "when a few customers had timed out behind a report, which was over",
    "timed-out deadlocks": "while pool_timeout broke one deadlock after another, each between two scrapes",
    "yesterday's deadlocks": "when nothing happened, after the deadlocks of yesterday",
    "restart": "when the process had been started anew, and nothing else happened",
    "restart, deadlock": "when the process had been started anew, and had another deadlock",
}

Scrapes = list[dict[str, Any]]


class Watched:
    """A pool and what its PoolCollector tells; customers keep their connection until they are let go."""

    def __init__(self, url: str, name: str, capacity: int, timeout: float | None) -> None:
        self.engine = create_async_engine(
            url,
            pool_size=capacity,
            max_overflow=0,
            pool_timeout=timeout,
            pool_logging_name=name,
        )
        self.scope = PoolScope(self.engine, "shop")
        self._collector = PoolCollector(self.scope)
        self._go = asyncio.Semaphore(0)
        self._present = self._inside = 0
        self._tasks: list[asyncio.Task[None]] = []

    def scrape(self) -> dict[str, Any]:
        """What a Prometheus would read at this moment, without the histograms' buckets."""
        numbers: dict[str, Any] = {}
        for metric in self._collector.collect():
            for sample in metric.samples:
                if "cause" not in sample.labels and "le" not in sample.labels:
                    numbers[sample.name.removeprefix("sqlalchemy_pool_")] = sample.value
                elif "cause" in sample.labels and sample.value:
                    numbers["verdict"] = sample.labels["cause"]
        return numbers

    def scrapes(self, count: int) -> Scrapes:
        """Several in a row."""
        return [self.scrape() for _ in range(count)]

    async def come(self, customers: int) -> None:
        """So many customers more; those for whom there is no connection are in line now."""
        self._present += customers
        self._tasks += [asyncio.create_task(self._stay()) for _ in range(customers)]
        await self._settled()

    async def leave(self, customers: int) -> None:
        """Let so many of them go, the first first; those in line take their places."""
        for _ in range(customers):
            self._go.release()
        wanted = self._present - customers
        await until(lambda: self._present == wanted)
        await self._settled()

    async def waited(self, seconds: float) -> None:
        """Until the first in line has waited for longer than that."""
        await until(lambda: self.scrape()["oldest_wait_seconds"] > seconds)

    async def close(self) -> None:
        """Let everybody go."""
        await self.leave(self._present)
        await asyncio.gather(*self._tasks)
        await self.engine.dispose()

    async def _stay(self) -> None:
        async with self.engine.connect():
            self._inside += 1
            await self._go.acquire()
            self._inside -= 1
        self._present -= 1

    async def _settled(self) -> None:
        await until(lambda: self._inside + len(self.scope.waiters) == self._present)


async def patient(url: str, capacity: int, queue: int, bearable: float) -> dict[str, Scrapes]:
    """What happens to a pool without a timeout."""
    found: dict[str, Scrapes] = {}
    shop = Watched(url, "shop", capacity, None)
    found["idle"] = shop.scrapes(_SCRAPES)
    await shop.come(capacity)
    found["full"] = shop.scrapes(_SCRAPES)
    await shop.come(queue)
    found["long report"] = shop.scrapes(_SCRAPES)
    await shop.leave(capacity + queue)
    found["busy"] = []
    for _ in range(_SCRAPES):
        await shop.come(capacity + queue)
        found["busy"].append(shop.scrape())
        await shop.leave(capacity + queue)
    found["hiccup"] = [shop.scrape()]
    await shop.come(capacity + queue)
    await shop.waited(1.5 * bearable)  # the mean of all six is too long as well
    found["hiccup"] += shop.scrapes(_SCRAPES - 1)
    found["hiccup, over"] = found["hiccup"][-2:]
    found["overloaded"] = [shop.scrape()]
    for _ in range(_SCRAPES - 1):
        await shop.come(1)
        await shop.leave(1)
        found["overloaded"].append(shop.scrape())
    await shop.leave(capacity + queue)
    found["hiccup, over"] += shop.scrapes(_SCRAPES - 2)
    found["new deadlock"] = [shop.scrape()]
    async with deadlocked(shop.engine, shop.scope):
        found["deadlock"] = shop.scrapes(_SCRAPES)
        found["new deadlock"] += found["deadlock"][1:]
        await shop.waited(bearable)
        found["old deadlock"] = shop.scrapes(_SCRAPES)
    await shop.close()
    return found


async def impatient(url: str, capacity: int) -> dict[str, Scrapes]:
    """What happens to a pool whose timeout is short, and to its process when that is started anew."""
    found: dict[str, Scrapes] = {}
    shop = Watched(url, "hasty", capacity, _IMPATIENT)
    found["timeouts"] = shop.scrapes(2)
    await shop.come(capacity)
    ended = await asyncio.gather(
        *(take_a_connection(shop.engine) for _ in range(3)), return_exceptions=True
    )
    assert all(isinstance(error, PoolTimeoutError) for error in ended), ended
    await shop.leave(capacity)
    found["timeouts"] += shop.scrapes(_SCRAPES - 2)
    found["timed-out deadlocks"] = [shop.scrape()]
    for _ in range(_SCRAPES - 1):
        await _broken_deadlock(shop)
        found["timed-out deadlocks"].append(shop.scrape())
    found["yesterday's deadlocks"] = shop.scrapes(_SCRAPES)
    await shop.close()
    anew = Watched(url, "anew", capacity, _IMPATIENT)
    calm = anew.scrapes(_SCRAPES // 2)
    found["restart"] = found["yesterday's deadlocks"][: _SCRAPES // 2] + calm
    await _broken_deadlock(anew)
    found["restart, deadlock"] = [*found["yesterday's deadlocks"][:2], *calm[:2], *anew.scrapes(2)]
    await anew.close()
    return found


async def _broken_deadlock(shop: Watched) -> None:
    """A deadlock that the timeout breaks, once it is proved: on a busy machine it may break some before that."""
    capacity, proved = shop.scope.capacity or 0, shop.scope.deadlock_count
    while shop.scope.deadlock_count == proved:
        meet = asyncio.Barrier(capacity)
        ended = await asyncio.gather(
            *(hold_and_ask(shop.engine, meet) for _ in range(capacity)), return_exceptions=True
        )
        assert any(isinstance(error, PoolTimeoutError) for error in ended), ended


def needs_somebody(scrapes: Scrapes, bearable: float) -> bool:
    """What the exercise asks for: a deadlock since the first scrape or now, or too long a wait in all of them."""
    proved = any(
        after["deadlocks_total"] > before["deadlocks_total"] for before, after in pairwise(scrapes)
    )
    late = all(scrape["oldest_wait_seconds"] > bearable for scrape in scrapes)
    return proved or late or scrapes[-1]["verdict"] == "deadlock"
