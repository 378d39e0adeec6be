"""Exercise 06, task 2: a page that stays open, and a session that stays open with it."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
from sqlalchemy import event, insert
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import Session

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Work, evidence
from workshop.checks.lent import Conditions, connections, forget_orders, own_households
from workshop.checks.rules import (
    ENGINES,
    LEFT_OVER,
    another_pool,
    deadlock,
    one_at_a_time,
    one_session_many_tasks,
    retries,
    swallows_the_timeout,
)
from workshop.checks.session_lifetimes.browser import News, Tab
from workshop.checks.session_lifetimes.calls import Holds, close_sessions, current_call, dsn
from workshop.checks.task import Task, Trials
from workshop.shop import Order

_STATUSES = ("new", "packed", "sent")
_SLOW_TABS = 3
_LOOKS = 5
_LOOK_SECONDS = 0.01
_SETTLE_SECONDS = 0.15
_PHASE_SECONDS = 2.5  # for those who time out; all others have settled long before
_STRANGER_SECONDS = 0.3


@dataclass(kw_only=True)
class Pages(Work):
    """What the pages showed; `done` is how many began with their order as it was.

    `idle_held` and `slow_held` is how often a page had a connection while it waited for news, or for a customer who
    reads slowly, and `reopened` how often a session began anew after it was closed. Of so many `quick` readers,
    `kept_up` saw each change. `strangers_status` is the answer for an order that does not exist.
    """

    idle_held: int
    slow_held: int
    reopened: int
    quick: int
    kept_up: int
    strangers_status: int | None


class ReopeningSession(Session):
    """A session that notes in `info["found"]` when it begins anew after it was closed."""

    def close(self) -> None:
        """As always."""
        self.info["closed"] = True
        super().close()


def _note_reopened(session: Session, *rest: Any) -> None:
    session.info["found"]["reopened"] += session.info.get("closed", False)


async def open_tabs(
    shop: Callable[..., Any], conditions: Conditions, *, tabs: int, capacity: int
) -> Pages:
    """Let so many customers follow their orders at once."""
    engine, customers, found = conditions.engine(capacity), own_households(), Counter[str]()
    async with engine.begin() as connection:
        made = [{"household_id": household} for household in customers[:tabs]]
        orders = list(await connection.scalars(insert(Order).returning(Order.id), made))
    await engine.dispose()
    # The slow ones come last: where a page holds its connection, also quick ones are seen to.
    pages = [Tab(order, number >= tabs - _SLOW_TABS) for number, order in enumerate(orders)]
    stranger = Tab(2**31 - 1 - os.getpid())
    holds, news, apps = Holds(engine), News(), list[Any]()
    event.listen(ReopeningSession, "after_begin", _note_reopened)

    async def make(number: int) -> None:
        app = shop(sessions, news.changed)
        if not callable(app):
            raise TypeError(f"shop returned {app!r}; asked for was the application")
        apps.append(app)

    async def visit(number: int) -> None:
        current_call.set(number)
        await pages[number].visit(apps[0])

    async with evidence(conditions, engine) as noted:
        sessions = async_sessionmaker(
            engine, sync_session_class=ReopeningSession, info={"found": found}
        )
        if (await storm(make, 1))["ok"]:
            day = asyncio.create_task(_let_orders_change(engine, pages, news, holds, found))
            try:
                await storm(visit, tabs)
                await day
            finally:
                day.cancel()
            asyncio.get_running_loop().call_later(_STRANGER_SECONDS, stranger.close)
            await storm(lambda _: stranger.visit(apps[0]), 1)
    await close_sessions(noted)
    await engine.dispose()
    async with engine.connect() as connection:
        await forget_orders(connection, customers)
    quick = [page for page in pages if not page.is_slow]
    return Pages(
        **vars(noted),
        done=sum(page.events[:1] == ["new"] for page in pages),
        idle_held=found["idle"],
        slow_held=found["slow"],
        reopened=found["reopened"],
        quick=len(quick),
        kept_up=sum(tuple(dict.fromkeys(page.events)) == _STATUSES for page in quick),
        strangers_status=stranger.status,
    )


async def _let_orders_change(
    engine: AsyncEngine, pages: Sequence[Tab], news: News, holds: Holds, found: Counter[str]
) -> None:
    """Change all orders, step by step, and look after each step who holds a connection while they only wait."""
    connection = await asyncpg.connect(dsn(engine))
    try:
        for status in _STATUSES:
            if status != _STATUSES[0]:
                change = "UPDATE orders SET status = $1 WHERE id = ANY($2)"
                await connection.execute(change, status, [page.order for page in pages])
                news.tell()
            await _settled(pages, status, news)
            held = {*range(len(pages))}
            for _ in range(_LOOKS):
                held = {call for call in held if pages[call].is_open and holds.count(call)}
                await asyncio.sleep(_LOOK_SECONDS)
            found["slow"] += sum(pages[call].is_blocked for call in held)
            found["idle"] += sum(not pages[call].is_blocked for call in held)
    finally:
        await connection.close()
        for page in pages:
            page.close()


async def _settled(pages: Sequence[Tab], status: str, news: News) -> None:
    """Wait until each page that is open has nothing more to do, or has at least shown the status for a while."""
    loop = asyncio.get_running_loop()
    deadline, shown_until = loop.time() + _PHASE_SECONDS, None
    while loop.time() < min(deadline, shown_until or deadline):
        still_open = [page for page in pages if page.is_open]
        if all(page.is_blocked or news.is_awaited(page.order) for page in still_open):
            return
        shown = all(page.is_blocked or page.events[-1:] == [status] for page in still_open)
        if shown and shown_until is None:
            shown_until = loop.time() + _SETTLE_SECONDS
        await asyncio.sleep(_LOOK_SECONDS)


def holds_while_it_waits(run: Recording, seen: Pages) -> Iterator[Finding]:
    """A connection that nobody needs until something changes, or somebody has read."""
    if seen.idle_held:
        yield Finding(
            "closed-session-opens-again" if seen.reopened else "as-long-as-the-response",
            "Pages that only waited for news had a connection checked out.",
        )
    if seen.slow_held:
        yield Finding(
            "holds-while-they-read",
            "Pages whose customer read slowly had a connection checked out.",
        )


def status_comes_first(run: Recording, seen: Pages) -> Iterator[Finding]:
    """Who does not look before the first byte cannot say 404 any more."""
    if seen.strangers_status == 200:
        yield Finding(
            "status-comes-first", "An order that does not exist was answered with the status 200."
        )


def demands(run: Recording, seen: Pages) -> Iterator[Finding]:
    """A page shows each change of its order, and where there is no order the answer is 404."""
    if seen.done and seen.kept_up < seen.quick:
        yield Finding(
            "reads-once",
            f"The orders were {', then '.join(_STATUSES)}; of {seen.quick} pages that were read,"
            f" {seen.kept_up} showed this.",
        )
    if not seen.done or seen.strangers_status != 404:
        yield Finding(
            "success-without-work",
            f"{seen.done} pages showed their order, and an order that does not exist was answered with"
            f" the status {seen.strangers_status}.",
        )


def prove(trials: Trials[Pages]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.announced - 2} pages open with {connections(run)}, each change shown, and none held while they waited."
        for run, _ in trials
    )


follow_an_order = Task(
    "06",
    "follow_an_order",
    "shop",
    load=open_tabs,
    trials=({"tabs": 16, "capacity": 4}, {"tabs": 8, "capacity": 1}),
    # To sleep between two looks is no mistake here.
    rules=(
        *ENGINES,
        another_pool,
        holds_while_it_waits,
        one_session_many_tasks,
        one_at_a_time,
        swallows_the_timeout,
        retries,
        deadlock,
        *LEFT_OVER,
        status_comes_first,
    ),
    demands=(demands,),
    proof=prove,
    hints=(
        "When does the code behind the `yield` of a dependency run: when follow returns, or when the last event has "
        "been sent?",
        "What needs the database here? A look whether the order exists, and a look at its status for each event. "
        "Give each look a session of its own.",
        "Leave the dependency out. In follow and in events: async with Session() as session, read, end the block; "
        "and only then return, yield, or wait.",
    ),
)
