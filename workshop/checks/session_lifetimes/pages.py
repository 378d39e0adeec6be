"""Pages that are open while their orders change, for exercise 06, task 2."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg
from sqlalchemy import event, insert
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session
from starlette.exceptions import HTTPException

from ormscope.lab import storm
from workshop.checks.calls import (
    Holds,
    close_sessions,
    current_call,
    pause,
    raise_own,
)
from workshop.checks.evidence import Work, evidence
from workshop.checks.lent import Conditions, forget_orders, own_households
from workshop.checks.session_lifetimes.browser import News, Tab
from workshop.checks.unpooled import Unpooled, backends, of_the_check
from workshop.shop import Order

STATUSES = ("new", "packed", "sent")
_SLOW_TABS = (1, 1, 0)  # how many events they read
_LATE_TABS = 2
_LOOK_SECONDS = 0.01
_LOOKS = 5
_HOLD_SECONDS = 0.15  # that a page has one and the same checkout; a query is over long before
QUIET_SECONDS = 0.6  # in which nothing changes, and a page has nothing to ask
_SETTLE_SECONDS = 0.15
_PHASE_SECONDS = 1.5  # for those who time out; all others have settled long before
_SECONDS_TO_LEAVE = 0.05  # for what a page still does, or has cancelled when it was closed
_MOST_SHOWN = 60
RIGHT_BEGINNING = f"began with {STATUSES[0]!r}"


@dataclass(kw_only=True)
class Pages(Work, Unpooled):
    """What the pages showed: how each that was read `began`, and whether each that was read quickly has `kept_up`.

    `found` counts pages that had a connection when they were "idle" or their customer "slow", sessions that "reopened"
    after they were closed, the "questions" of a page while nothing happened, and a status that was raised "too late".
    `late` is what pages began with that were opened at the end, and `strangers_status` the answer for an order that
    does not exist.
    """

    began: list[str]
    kept_up: list[bool]
    found: Counter[str]
    late: list[str]
    strangers_status: int | None


class ReopeningSession(Session):
    """A session that notes in its `info` that it was closed: it may begin anew."""

    def close(self) -> None:
        """As always."""
        self.info["closed"] = True
        super().close()


async def open_tabs(
    shop: Callable[..., Any], conditions: Conditions, *, tabs: int, capacity: int
) -> Pages:
    """Let so many customers follow their orders at once."""
    engine, customers, found = conditions.engine(capacity), own_households(), Counter[str]()
    stranger, phase = Tab(2**31 - 1 - os.getpid()), _PHASE_SECONDS * conditions.slowness
    holds, news, apps = Holds(engine), News(), list[Any]()

    def note_reopened(session: Session, *_: Any) -> None:
        found["reopened"] += session.info.get("closed", False)

    event.listen(ReopeningSession, "after_begin", note_reopened)

    async def make(number: int) -> None:
        app = shop(sessions, news.changed)
        if not callable(app):
            raise TypeError(f"shop returned {app!r}; the task wants the application")
        apps.append(app)

    async def visit(tabs: Sequence[Tab], number: int) -> None:
        current_call.set(number)
        try:
            await tabs[number].visit(apps[0])
        except Exception as error:
            if tabs[number] is not stranger or not isinstance(
                error.__cause__ or error, HTTPException
            ):
                raise_own(error)
            found["too late"] += 1

    async with backends(conditions) as server, of_the_check(conditions, 1) as others:
        async with engine.begin() as connection:
            made = [{"household_id": household} for household in customers[:tabs]]
            orders = list(await connection.scalars(insert(Order).returning(Order.id), made))
        await engine.dispose()
        # The slow ones come last: where a page holds its connection, also quick ones are seen to.
        most_read = [None] * (tabs - len(_SLOW_TABS)) + [*_SLOW_TABS]
        pages = list(map(Tab, orders, most_read))
        # These are opened when the first pages have been closed, and their orders have changed since.
        early, late = pages[:_LATE_TABS], [Tab(order) for order in orders[:_LATE_TABS]]
        async with evidence(conditions, engine) as noted:
            sessions = async_sessionmaker(engine, sync_session_class=ReopeningSession)
            if (await storm(make, 1))["ok"]:
                day = asyncio.create_task(
                    _let_orders_change(others, pages, early, news, holds, found, phase)
                )
                try:
                    await storm(partial(visit, pages), tabs)
                    await day
                finally:
                    day.cancel()
                await asyncio.gather(
                    storm(partial(visit, [stranger]), 1),
                    *(tab.visit(apps[0]) for tab in late),
                    _close_when_settled([*late, stranger], news, phase),
                    return_exceptions=True,
                )
                await pause(_SECONDS_TO_LEAVE)
    await close_sessions(noted)
    await engine.dispose()
    async with engine.connect() as connection:
        await forget_orders(connection, customers)
    began = [_beginning(page) for page in pages if page.most_read != 0]
    quick = [page for page in pages if page.most_read is None and page not in early]
    return Pages(
        **vars(noted),
        backends=server,
        done=began.count(RIGHT_BEGINNING),
        began=began,
        kept_up=[tuple(dict.fromkeys(page.events)) == STATUSES for page in quick],
        found=found,
        late=[tab.events[0] for tab in late if tab.events],
        strangers_status=stranger.status,
    )


def _beginning(page: Tab) -> str:
    """What a page showed first, in words."""
    if page.status != 200:
        return f"was answered with the status {page.status}"
    if page.events:
        return f"began with {page.events[0][:_MOST_SHOWN]!r}"
    return f"sent {page.unread[:_MOST_SHOWN]!r}" if page.unread else "sent nothing"


async def _let_orders_change(
    others: asyncpg.Pool,
    pages: Sequence[Tab],
    early: Sequence[Tab],
    news: News,
    holds: Holds,
    found: Counter[str],
    phase: float,
) -> None:
    """Change all orders, step by step, and look after each step what pages do that only wait.

    The early ones are closed after the first step.
    """
    try:
        for status in STATUSES:
            if status != STATUSES[0]:
                change = "UPDATE orders SET status = $1 WHERE id = ANY($2)"
                await others.execute(change, status, [page.order for page in pages])
                news.tell()
            await _settled(pages, status, news, phase)
            held = {call: holds.checkouts(call) for call in range(len(pages))}
            for _ in range(_LOOKS):
                await asyncio.sleep(_HOLD_SECONDS / _LOOKS)
                held = {
                    call: same
                    for call in held
                    if pages[call].is_open and (same := held[call] & holds.checkouts(call))
                }
            found["slow"] += sum(pages[call].is_blocked for call in held)
            found["idle"] += sum(not pages[call].is_blocked for call in held)
            if status == STATUSES[0]:
                asked = Counter(holds.statements)
                await asyncio.sleep(QUIET_SECONDS)
                asked = Counter(holds.statements) - asked
                found["questions"] = max(asked.values(), default=0)
            for page in early:
                page.close()
    finally:
        for page in pages:
            page.close()


async def _close_when_settled(pages: Sequence[Tab], news: News, phase: float) -> None:
    await _settled(pages, STATUSES[-1], news, phase)
    for page in pages:
        page.close()


async def _settled(pages: Sequence[Tab], status: str, news: News, phase: float) -> None:
    """Wait, for `phase` seconds at most, until each open page has no more to do, or has shown the status for long."""
    loop = asyncio.get_running_loop()
    deadline, shown_until = loop.time() + phase, None
    while loop.time() < min(deadline, shown_until or deadline):
        still_open = [page for page in pages if page.is_open]
        if all(page.is_blocked or news.is_awaited(page.order) for page in still_open):
            return
        shown = all(page.is_blocked or page.events[-1:] == [status] for page in still_open)
        if shown and shown_until is None:
            shown_until = loop.time() + _SETTLE_SECONDS
        await asyncio.sleep(_LOOK_SECONDS)
