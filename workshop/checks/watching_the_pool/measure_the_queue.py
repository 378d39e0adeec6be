"""Exercise 08, task 1: three numbers of a pool that are true at each scrape."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from ormscope.lab import Recording
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import evidence
from workshop.checks.lent import Conditions
from workshop.checks.rules import changes_the_pool
from workshop.checks.task import Task
from workshop.checks.unpooled import Unpooled, backends, connects_past_the_pools
from workshop.checks.watching_the_pool.moments import (
    deadlocked,
    set_clocks_apart,
    take_a_connection,
    until,
)
from workshop.checks.watching_the_pool.scrapes import NUMBERS, TOLERANCE, GaveUpError, Look, Scraped

if TYPE_CHECKING:
    from ormscope.lab.picture import Picture

_APART_SECONDS = 0.15  # between the first and the others in line
_NO_AGE = 60.0  # seconds; nobody here waits for so long, or since before the beginning
_AXES = {"checked_out": "checked out", "waiting": "waiting", "oldest_wait": "oldest wait, s"}


@dataclass(kw_only=True)
class Day(Unpooled):
    """The scrapes of a day, and of the night after it.

    `odd` is what was returned instead of a function.
    """

    looks: list[Look]
    odd: Finding | None


async def scrape_a_day(
    metrics: Callable[..., Any],
    conditions: Conditions,
    *,
    pool_size: int,
    max_overflow: int,
    queue: int,
) -> Day:
    """Scrape a pool in all that happens to it in a day, and then one without a limit."""
    engine = create_async_engine(
        conditions.url,
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=None,
        pool_logging_name="shop",
    )
    set_clocks_apart(metrics)
    other = create_async_engine(conditions.url, poolclass=NullPool, pool_logging_name="nightly job")
    async with backends(conditions) as server:
        shop, nightly = Scraped(metrics, engine, server), Scraped(metrics, other, server)
        async with evidence(conditions, engine) as noted:
            with contextlib.suppress(GaveUpError):
                await shop.begin()
                await _day(shop, queue)
        if noted.ended and not shop.gave_up:
            with contextlib.suppress(GaveUpError):
                await _evening(shop)
                await nightly.begin()
                await _night(nightly)
    looks = shop.looks + nightly.looks
    return Day(**vars(noted), backends=server, looks=looks, odd=shop.odd)


async def _day(shop: Scraped, queue: int) -> None:
    """Idle, full, in line, in line while the loop stands still, idle again, deadlocked."""
    scope, capacity = shop.scope, shop.scope.capacity or 0
    await shop.look("idle")
    async with AsyncExitStack() as stack:
        for _ in range(capacity):
            await stack.enter_async_context(shop.engine.connect())
        held = scope.holders[0].since
        await asyncio.sleep(2 * TOLERANCE)
        await shop.look("full", capacity, held=held)
        since, tasks = [], []
        for number in range(queue):
            came = time.perf_counter()
            tasks.append(asyncio.create_task(take_a_connection(shop.engine)))
            await until(lambda: len(scope.waiters) == len(tasks))
            since.append((came, time.perf_counter()))
            if number == 0:
                await asyncio.sleep(_APART_SECONDS)
        try:
            await shop.look("queue", capacity, since, held)
            await shop.look("loop blocked", capacity, since, held, blocked=True)
        finally:
            await stack.aclose()
            await asyncio.gather(*tasks)
    await shop.look("served")
    async with deadlocked(shop.engine, scope) as made:
        since = [(made, time.perf_counter())] * capacity
        await asyncio.sleep(_APART_SECONDS)
        await shop.look("deadlock", capacity, since, made)


async def _evening(shop: Scraped) -> None:
    """A new password: the engine is disposed of while a connection is out, and gets another pool."""
    async with shop.engine.connect():
        await shop.engine.dispose()
    async with shop.engine.connect(), shop.engine.connect():
        await shop.look("dispose()", 2)
    await shop.engine.dispose()


async def _night(nightly: Scraped) -> None:
    """A job whose engine has a NullPool."""
    async with nightly.engine.connect(), nightly.engine.connect(), nightly.engine.connect():
        await nightly.look("NullPool", 3)


def returns_something_else(run: Recording, seen: Day) -> Iterator[Finding]:
    """No function, no dictionary of numbers; or a scrape that left the pool or the scope otherwise than it was."""
    if seen.odd is not None:
        yield seen.odd
    yield from (look.odd for look in seen.looks if look.odd is not None)


def takes_part(run: Recording, seen: Day) -> Iterator[Finding]:
    """A scrape that takes part in what it watches."""
    if len(run.pools) > 2:  # of the shop, and of the nightly job
        yield Finding("needs-a-connection", "Your code made an engine of its own.")
    took = next((look for look in seen.looks if look.took), None)
    if took is not None or any("MissingGreenlet" in request.outcome for request in run.requests):
        when = f" {took.when}" if took is not None else ""
        yield Finding("needs-a-connection", f"The scrape{when} asked for a connection.")


def asks_the_loop(run: Recording, seen: Day) -> Iterator[Finding]:
    """A scrape that needs the event loop, and is there to tell that it stands still."""
    wrong = [look for look in seen.looks if any(map(look.is_wrong, NUMBERS))]
    if any(look.on_the_loop for look in seen.looks):
        told = "What your function returned has to be awaited, and a thread cannot do that."
        yield Finding("asks-the-loop", told)
    stood_still = [look for look in seen.looks if look.moment == "loop blocked"]
    raised = [look for look in seen.looks if look.raised]
    if any(look.hung for look in stood_still) or (raised and raised == stood_still):
        yield Finding("asks-the-loop", "The scrape while the event loop stood still had no answer.")
    if wrong and (wrong == stood_still or seen.left_running):
        yield Finding(
            "asks-the-loop",
            "While the event loop stood still, the scrape told how it had been before.",
        )


def scrape_without_an_end(run: Recording, seen: Day) -> Iterator[Finding]:
    """And so no later one could be made."""
    hung = next((look for look in seen.looks if look.hung), None)
    if hung is not None:
        yield Finding("never-ends", f"The scrape {hung.when} had not ended after a second.")


def wrong_numbers(run: Recording, seen: Day) -> Iterator[Finding]:
    """Numbers that were not true, where each scrape told some, or only lacked a counter."""
    no_counter = [
        look for look in seen.looks if look.raised == "AttributeError" and look.moment == "NullPool"
    ]
    if run.announced - run.completed > len(no_counter):
        return
    told = [look.told for look in seen.looks if look.told is not None and look.moment != "NullPool"]
    if len(told) > 1 and all(numbers == told[0] for numbers in told):
        yield Finding("not-what-was-asked", f"Each scrape told the same as the first: {told[0]}.")
    for number, idea_of in _IDEAS.items():
        if wrong := [look for look in seen.looks if look.is_wrong(number)]:
            yield Finding(
                idea_of(wrong),
                f"The number {number} {wrong[0].when} was {wrong[0].true(number):.3g},"
                f" and your function told {wrong[0].said(number):.6g}.",
            )
    if no_counter:
        yield Finding(
            "every-pool-counts", "The scrape of an engine with a NullPool raised AttributeError."
        )


def _idea_of_waiting(wrong: list[Look]) -> str:
    when = {look.moment for look in wrong}
    if "full" in when and "idle" not in when:
        return "connections-are-no-queue"
    return "history-is-not-now" if "served" in when else "not-what-was-asked"


def _idea_of_oldest_wait(wrong: list[Look]) -> str:
    said = [(look, look.said("oldest_wait")) for look in wrong]
    in_line = [look.is_true_wait(seconds / 1_000) for look, seconds in said if look.waiting]
    if in_line and all(in_line):
        return "not-what-was-asked"  # milliseconds
    if any(abs(seconds) >= _NO_AGE for _, seconds in said):
        return "another-clock"
    if any(seconds < -TOLERANCE for _, seconds in said):
        return "not-what-was-asked"
    first, seconds = said[0]
    if not first.waiting and first.held and abs(seconds - first.held) < TOLERANCE:
        return "hold-is-not-wait"
    if any(not look.waiting or 0 < seconds == look.longest_so_far for look, seconds in said):
        return "history-is-not-now"
    if all(look.youngest - TOLERANCE <= seconds < look.oldest[0] for look, seconds in said):
        return "not-the-oldest"
    return "not-what-was-asked"


def _idea_of_checked_out(wrong: list[Look]) -> str:
    first = {"dispose()": "keeps-the-first-pool", "NullPool": "every-pool-counts"}
    if wrong[0].moment in first:
        return first[wrong[0].moment]
    are_all = all(look.said("checked_out") == look.checkouts for look in wrong)
    return "history-is-not-now" if are_all else "not-what-was-asked"


_IDEAS = {
    "waiting": _idea_of_waiting,
    "oldest_wait": _idea_of_oldest_wait,
    "checked_out": _idea_of_checked_out,
}


def prove(run: Recording, seen: Day) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{len(seen.looks)} scrapes of a pool of {run.pools[0].capacity}, idle, full, blocked, deadlocked and"
        " disposed of, and of one without a limit: each told what was true, and none took a connection."
    )


def plot(before: Recording, after: Recording) -> Picture:
    """What the scrapes of two functions told, on what was true."""
    from workshop.pictures import Told, scrapes_told

    def told(number: str, look: Look) -> Told:
        found = look.told[number] if look.told is not None else None
        return look.moment, look.true(number), found, found is None or look.is_wrong(number)

    return scrapes_told(
        {
            run.title: {
                _AXES[number]: [told(number, look) for look in run.result.looks]
                for number in NUMBERS
            }
            for run in (before, after)
        }
    )


measure_the_queue = Task(
    "08",
    "measure_the_queue",
    "metrics",
    load=scrape_a_day,
    trials=(
        {"pool_size": 3, "max_overflow": 2, "queue": 7},
        {"pool_size": 1, "max_overflow": 1, "queue": 4},
    ),
    rules=(
        returns_something_else,
        changes_the_pool,
        takes_part,
        connects_past_the_pools("needs-a-connection"),
        asks_the_loop,
        scrape_without_an_end,
        wrong_numbers,
    ),
    demands=(),
    proof=prove,
    plot=plot,
    hints=(
        "SQLAlchemy counts connections, and nobody in line has one. What does the scope know of those who wait, and "
        "since when do they?",
        "Which of the three numbers are of this moment, and which are of something that has ended? And whose pool is "
        "it that the engine had when metrics was called?",
        "len(scope.waiters); time.perf_counter() - scope.waiters[0].since, or 0 where nobody waits; and "
        "scope.checked_out, which asks the engine's present pool, of whatever class it is.",
    ),
)
