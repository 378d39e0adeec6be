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
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session
from starlette.exceptions import HTTPException

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
from workshop.checks.session_lifetimes.calls import (
    Holds,
    Seen,
    close_sessions,
    current_call,
    is_own,
    pause,
    to_be_told,
    unless_raised,
)
from workshop.checks.task import Task, Trials
from workshop.checks.unheard import is_learners
from workshop.checks.unpooled import backends, connects_past_the_pools, of_the_check
from workshop.shop import Order

_STATUSES = ("new", "packed", "sent")
_SLOW_TABS = (1, 1, 0)  # how many events they read
_LATE_TABS = 2
_LOOKS = 5
_LOOK_SECONDS = 0.01
_MOST_QUESTIONS = 3  # of one page in the time of the looks, while nothing happens
_SETTLE_SECONDS = 0.15
_PHASE_SECONDS = 1.5  # for those who time out; all others have settled long before
_LATE_SECONDS = 1.0
_SECONDS_TO_LEAVE = 0.05  # for what a page still does, or has cancelled when it was closed
_MOST_SHOWN = 60


@dataclass(kw_only=True)
class Pages(Work, Seen):
    """What the pages showed; `done` is how many of the `openers` began with their order as it was.

    `instead` tells what another did. `idle_held` and `slow_held` is how often a page had a connection while it waited
    for news, or for a customer who reads slowly, `reopened` how often a session began anew after it was closed, and
    `questions` the most that a page asked the database while nothing happened. Of so many `quick` readers, `kept_up`
    saw each change; `late` is what pages began with that were opened at the end. `strangers_status` is the answer for
    an order that does not exist, and `raised_too_late` says whether a status was raised when another had gone out.
    """

    idle_held: int
    slow_held: int
    reopened: int
    questions: int
    openers: int
    instead: str
    quick: int
    kept_up: int
    late: list[str]
    strangers_status: int | None
    raised_too_late: bool


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
    stranger = Tab(2**31 - 1 - os.getpid())
    holds, news, apps = Holds(engine), News(), list[Any]()
    raised = too_late = False
    event.listen(ReopeningSession, "after_begin", _note_reopened)

    async def make(number: int) -> None:
        app = shop(sessions, news.changed)
        if not callable(app):
            raise TypeError(f"shop returned {app!r}; asked for was the application")
        apps.append(app)

    async def visit(number: int) -> None:
        nonlocal raised
        current_call.set(number)
        try:
            await pages[number].visit(apps[0])
        except Exception as error:
            raised = raised or is_own(to_be_told(error))
            _leave_the_framework_out(error)
            raise

    async def visit_of_a_stranger(number: int) -> None:
        nonlocal raised, too_late
        try:
            await stranger.visit(apps[0])
        except Exception as error:
            if too_late := isinstance(error.__cause__ or error, HTTPException):
                return
            raised = raised or is_own(to_be_told(error))
            _leave_the_framework_out(error)
            raise

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
            sessions = async_sessionmaker(
                engine, sync_session_class=ReopeningSession, info={"found": found}
            )
            if (await storm(make, 1))["ok"]:
                day = asyncio.create_task(
                    _let_orders_change(others, pages, early, news, holds, found)
                )
                try:
                    await storm(visit, tabs)
                    await day
                finally:
                    day.cancel()
                await asyncio.gather(
                    storm(visit_of_a_stranger, 1),
                    *(tab.visit(apps[0]) for tab in late),
                    *(_close_in_time(tab, news) for tab in (*late, stranger)),
                    return_exceptions=True,
                )
                await pause(_SECONDS_TO_LEAVE)
    await close_sessions(noted)
    await engine.dispose()
    async with engine.connect() as connection:
        await forget_orders(connection, customers)
    openers = [page for page in pages if page.most_read != 0]
    quick = [page for page in pages if page.most_read is None and page not in early]
    return Pages(
        **vars(noted),
        backends=server,
        raised=raised,
        done=sum(page.events[:1] == ["new"] for page in openers),
        openers=len(openers),
        instead=next((_shown(page) for page in openers if page.events[:1] != ["new"]), ""),
        idle_held=found["idle"],
        slow_held=found["slow"],
        reopened=found["reopened"],
        questions=found["questions"],
        quick=len(quick),
        kept_up=sum(tuple(dict.fromkeys(page.events)) == _STATUSES for page in quick),
        late=[tab.events[0] for tab in late if tab.events],
        strangers_status=stranger.status,
        raised_too_late=too_late,
    )


def _shown(page: Tab) -> str:
    """What a page showed first."""
    if page.status != 200:
        return f"was answered with the status {page.status}"
    if page.events:
        return f"began with {page.events[0][:_MOST_SHOWN]!r}"
    return f"sent {page.unread[:_MOST_SHOWN]!r}" if page.unread else "sent nothing"


def _leave_the_framework_out(error: Exception) -> None:
    """Of its traceback, as far as it leads to the learner's code."""
    trace = error.__traceback__
    while trace is not None and not is_learners(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    error.__traceback__ = trace or error.__traceback__


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
            held, asked = {*range(len(pages))}, Counter(holds.statements)
            for _ in range(_LOOKS):
                held = {call for call in held if pages[call].is_open and holds.count(call)}
                await asyncio.sleep(_LOOK_SECONDS)
            found["slow"] += sum(pages[call].is_blocked for call in held)
            found["idle"] += sum(not pages[call].is_blocked for call in held)
            asked = Counter(holds.statements) - asked
            found["questions"] = max(found["questions"], *asked.values(), 0)
            for page in early:
                page.close()
    finally:
        for page in pages:
            page.close()


async def _close_in_time(tab: Tab, news: News) -> None:
    """Close a tab whose page waits for news; one that does not, after a while."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _LATE_SECONDS
    while tab.is_open and loop.time() < deadline:
        if tab.events and news.is_awaited(tab.order):
            deadline = min(deadline, loop.time() + _SECONDS_TO_LEAVE)
        await pause(_LOOK_SECONDS)
    tab.close()


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


def asks_all_the_time(run: Recording, seen: Pages) -> Iterator[Finding]:
    """Pages that look, instead of waiting for news."""
    if seen.questions > _MOST_QUESTIONS:
        yield Finding(
            "asks-all-the-time",
            f"While nothing changed, a page asked the database {seen.questions} times"
            f" within {_LOOKS * _LOOK_SECONDS:g} s.",
        )


def status_comes_first(run: Recording, seen: Pages) -> Iterator[Finding]:
    """Who does not look before the first byte cannot say 404 any more."""
    if seen.strangers_status == 200 and seen.raised_too_late:
        yield Finding(
            "status-comes-first",
            "An order that does not exist was answered with the status 200,"
            " and an HTTPException was raised after that.",
        )


def demands(run: Recording, seen: Pages) -> Iterator[Finding]:
    """A page shows each change of its order, and where there is no order the answer is 404."""
    if seen.done < seen.openers:
        yield Finding(
            "not-what-was-asked",
            f'{seen.openers} pages were opened when their orders were "new", and {seen.done} began with that;'
            f' another {seen.instead}. Asked for was "data: new" and an empty line.',
        )
    if seen.kept_up < seen.quick:
        yield Finding(
            "reads-once",
            f"The orders were {', then '.join(_STATUSES)}; of {seen.quick} pages that were read,"
            f" {seen.kept_up} showed this.",
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
            " asked for was 404.",
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
    rules=unless_raised(
        *ENGINES,
        another_pool,
        connects_past_the_pools("another-pool"),
        holds_while_it_waits,
        one_session_many_tasks,
        one_at_a_time,
        swallows_the_timeout,
        retries,
        deadlock,
        *LEFT_OVER,
        status_comes_first,
        asks_all_the_time,
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
