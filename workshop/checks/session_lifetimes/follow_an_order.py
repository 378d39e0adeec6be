"""Exercise 06, task 2: a page that stays open, and a session that stays open with it."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg
from sqlalchemy import event, insert
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session
from starlette.exceptions import HTTPException

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Work, evidence
from workshop.checks.lent import Conditions, connections, forget_orders, own_households
from workshop.checks.rules import (
    LEFT_OVER,
    deadlock,
    one_at_a_time,
    one_session_many_tasks,
    retries,
    swallows_the_timeout,
)
from workshop.checks.session_lifetimes.browser import News, Tab
from workshop.checks.session_lifetimes.calls import (
    Holds,
    close_sessions,
    current_call,
    pause,
    raise_own,
    unless_raised,
)
from workshop.checks.task import Task
from workshop.checks.unpooled import NO_OTHER_CONNECTIONS, Unpooled, backends, of_the_check
from workshop.shop import Order

_STATUSES = ("new", "packed", "sent")
_SLOW_TABS = (1, 1, 0)  # how many events they read
_LATE_TABS = 2
_LOOK_SECONDS = 0.01
_LOOKS = 5
_QUIET_SECONDS = 0.6  # in which nothing changes, and a page has nothing to ask
_SETTLE_SECONDS = 0.15
_PHASE_SECONDS = 1.5  # for those who time out; all others have settled long before
_SECONDS_TO_LEAVE = 0.05  # for what a page still does, or has cancelled when it was closed
_MOST_SHOWN = 60
_RIGHT_BEGINNING = f"began with {_STATUSES[0]!r}"


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
    stranger = Tab(2**31 - 1 - os.getpid())
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
                    _let_orders_change(others, pages, early, news, holds, found)
                )
                try:
                    await storm(partial(visit, pages), tabs)
                    await day
                finally:
                    day.cancel()
                await asyncio.gather(
                    storm(partial(visit, [stranger]), 1),
                    *(tab.visit(apps[0]) for tab in late),
                    _close_when_settled([*late, stranger], news),
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
        done=began.count(_RIGHT_BEGINNING),
        began=began,
        kept_up=[tuple(dict.fromkeys(page.events)) == _STATUSES for page in quick],
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
) -> None:
    """Change all orders, step by step, and look after each step what pages do that only wait.

    The early ones are closed after the first step.
    """
    try:
        for status in _STATUSES:
            if status != _STATUSES[0]:
                change = "UPDATE orders SET status = $1 WHERE id = ANY($2)"
                await others.execute(change, status, [page.order for page in pages])
                news.tell()
            await _settled(pages, status, news)
            held = {*range(len(pages))}
            for _ in range(_LOOKS):
                held = {call for call in held if pages[call].is_open and holds.count(call)}
                await asyncio.sleep(_LOOK_SECONDS)
            found["slow"] += sum(pages[call].is_blocked for call in held)
            found["idle"] += sum(not pages[call].is_blocked for call in held)
            if status == _STATUSES[0]:
                asked = Counter(holds.statements)
                await asyncio.sleep(_QUIET_SECONDS)
                asked = Counter(holds.statements) - asked
                found["questions"] = max(asked.values(), default=0)
            for page in early:
                page.close()
    finally:
        for page in pages:
            page.close()


async def _close_when_settled(pages: Sequence[Tab], news: News) -> None:
    await _settled(pages, _STATUSES[-1], news)
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
    """A connection that nobody needs until something changes, or somebody has read; or a look again and again."""
    if seen.found["idle"]:
        yield Finding(
            "closed-session-opens-again" if seen.found["reopened"] else "as-long-as-the-response",
            "Pages that only waited for news had a connection checked out.",
        )
    if seen.found["slow"]:
        told = "Pages whose customer read slowly had a connection checked out."
        yield Finding("holds-while-they-read", told)

    if seen.found["questions"] > 1:
        yield Finding(
            "asks-all-the-time",
            f"While nothing changed, a page asked the database {seen.found['questions']} times"
            f" within {_QUIET_SECONDS:g} s.",
        )


def demands(run: Recording, seen: Pages) -> Iterator[Finding]:
    """A page shows each change of its order, and where there is no order the answer is 404."""
    if seen.strangers_status == 200 and seen.found["too late"]:
        yield Finding(
            "status-comes-first",
            "An order that does not exist was answered with the status 200,"
            " and an HTTPException was raised after that.",
        )

    if others := [began for began in seen.began if began != _RIGHT_BEGINNING]:
        yield Finding(
            "not-what-was-asked",
            f'{len(seen.began)} pages were opened when their orders were "new", and {seen.done} began with that;'
            f' another {others[0]}. The task wants "data: new" and an empty line.',
        )
    if not all(seen.kept_up):
        yield Finding(
            "reads-once",
            f"The orders were {', then '.join(_STATUSES)}; of {len(seen.kept_up)} pages that were read,"
            f" {sum(seen.kept_up)} showed this.",
        )
    if stale := [status for status in seen.late if status != _STATUSES[-1]]:
        yield Finding(
            "remembers-for-others",
            f'A page that was opened when its order was "{_STATUSES[-1]}" began with {stale[0]!r}.',
        )
    if seen.strangers_status != 404:
        yield Finding(
            "not-what-was-asked",
            f"An order that does not exist was answered with the status {seen.strangers_status};"
            " the task wants 404.",
        )


def prove(run: Recording, seen: Pages) -> str:
    """What a run of a right answer has shown."""
    pages = f"{run.announced - 2} pages open with {connections(run)}"
    return f"{pages}, each change shown, and none held while they waited."


follow_an_order = Task(
    "06",
    "follow_an_order",
    "shop",
    load=open_tabs,
    trials=({"tabs": 16, "capacity": 4}, {"tabs": 8, "capacity": 1}),
    # To sleep between two looks is no mistake here.
    rules=unless_raised(
        *NO_OTHER_CONNECTIONS,
        holds_while_it_waits,
        one_session_many_tasks,
        one_at_a_time,
        swallows_the_timeout,
        retries,
        deadlock,
        *LEFT_OVER,
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
