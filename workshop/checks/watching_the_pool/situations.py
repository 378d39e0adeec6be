"""The situations of exercise 08, task 2: what happens to pools, and what their metrics tell meanwhile."""

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

_IMPATIENT = 0.05  # seconds; the pool_timeout that breaks deadlocks between two scrapes

SITUATIONS = {
    "idle": MOMENTS["idle"],
    "full": MOMENTS["full"],
    "held for long": "while all connections had been out for longer than customers bear to wait, and nobody waited",
    "busy": "while all connections were out and each customer was served before the next scrape",
    "long report": "while a report had all connections and others waited, for less than they bear",
    "hiccup": "when customers had waited for too long in all scrapes but the first",
    "hiccup, over": "when customers had waited for too long, and were served long before the last scrape",
    "two hiccups": "when customers had waited for too long at the first scrape and at the last, and nobody between",
    "just bearable": "when customers had waited for exactly as long as they bear",
    "stuck": "while nothing moved, and the first in line had waited for too long in every scrape",
    "overloaded": "while the line moved, and the first in it had waited for too long in every scrape",
    "new deadlock": "when a deadlock had just been proved",
    "deadlock": "in a deadlock that was proved a moment before the first scrape",
    "old deadlock": "in a deadlock that was there long before the first scrape",
    "deadlock, over": "when a deadlock that was proved before the first scrape was over at the last",
    "timeouts": "when a few customers had timed out behind a report, which was over",
    "timed-out deadlocks": "while pool_timeout broke one deadlock after another, each between two scrapes",
    "broken at first": "when pool_timeout had broken a deadlock between the first two scrapes",
    "broken at last": "when pool_timeout had broken a deadlock between the last two scrapes",
    "yesterday's deadlocks": "when nothing happened, after the deadlocks of yesterday",
    "restart": "when the process had been started anew, and nothing else happened",
    "restart, deadlock": "when the process had been started anew, and had another deadlock",
    "restart, as many": "when the process had been started anew, and had had as many deadlocks as before",
    "restart, at once": "when the process had been started anew, and had had a deadlock before the next scrape",
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


async def patient(
    url: str, capacity: int, queue: int, bearable: float, count: int
) -> dict[str, Scrapes]:
    """What happens to a pool without a timeout, in so many scrapes of each situation."""
    found: dict[str, Scrapes] = {}
    shop = Watched(url, "shop", capacity, None)
    found["idle"] = shop.scrapes(count)
    found["busy"] = []
    for _ in range(count):
        await shop.come(capacity + queue)
        found["busy"].append(shop.scrape())
        await shop.leave(capacity + queue)
    await shop.come(capacity)
    found["full"] = shop.scrapes(count)
    await until(lambda: shop.scrape()["oldest_hold_seconds"] > bearable)
    found["held for long"] = shop.scrapes(count)
    await shop.come(queue)
    found["long report"] = shop.scrapes(count)
    await shop.waited(1.5 * bearable)  # the mean of all scrapes is too long as well
    found["stuck"] = shop.scrapes(count)
    found["hiccup"] = [found["long report"][-1], *found["stuck"][1:]]
    found["overloaded"] = [shop.scrape()]
    for _ in range(count - 1):
        await shop.come(1)
        await shop.leave(1)
        found["overloaded"].append(shop.scrape())
    found["just bearable"] = found["overloaded"]
    await shop.leave(capacity + queue)
    over = shop.scrapes(count - 2)
    found["hiccup, over"] = found["overloaded"][-2:] + over
    await shop.come(capacity + 1)
    await shop.waited(bearable)
    found["two hiccups"] = [found["overloaded"][-1], *over, shop.scrape()]
    await shop.leave(capacity + 1)
    found["new deadlock"] = [shop.scrape()]
    async with deadlocked(shop.engine, shop.scope):
        found["deadlock"] = shop.scrapes(count)
        found["new deadlock"] += found["deadlock"][1:]
        await shop.waited(bearable)
        found["old deadlock"] = shop.scrapes(count)
    found["deadlock, over"] = found["old deadlock"][:-1] + shop.scrapes(1)
    await shop.close()
    return found


async def impatient(url: str, capacity: int, count: int) -> dict[str, Scrapes]:
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
    found["timeouts"] += shop.scrapes(count - 2)
    before = shop.scrape()
    await _broken_deadlock(shop)
    calm = shop.scrapes(count - 1)
    found["broken at first"] = [before, *calm]
    found["timed-out deadlocks"] = [before, calm[0]]
    for _ in range(count - 2):
        await _broken_deadlock(shop)
        found["timed-out deadlocks"].append(shop.scrape())
    found["broken at last"] = [*calm, found["timed-out deadlocks"][2]]
    yesterday = found["yesterday's deadlocks"] = shop.scrapes(count)
    await shop.close()
    anew = Watched(url, "anew", capacity, _IMPATIENT)
    fresh = anew.scrapes(count)
    found["restart"] = yesterday[: count // 2] + fresh[count // 2 :]
    await _broken_deadlock(anew)
    last = anew.scrape()
    found["restart, deadlock"] = [*yesterday[:2], *fresh[3:], last]
    found["restart, as many"] = [calm[0], *fresh[2:], last]
    found["restart, at once"] = [*yesterday[1:], last]
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
    counts = [scrape["deadlocks_total"] for scrape in scrapes]
    # A counter that has fallen began at 0 in between: what it shows has happened since.
    proved = any(after > (before if after >= before else 0) for before, after in pairwise(counts))
    late = all(scrape["oldest_wait_seconds"] > bearable for scrape in scrapes)
    return proved or late or scrapes[-1]["verdict"] == "deadlock"
