"""The checks of exercise 06: a payment, a page that stays open, a report in parallel, and workers beside customers."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import asyncpg
from sqlalchemy import delete, event, func, insert, select
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    async_sessionmaker,
    close_all_sessions,
)
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from ormscope.lab import Recording, storm
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import engine_of, forget_orders, own_households
from workshop.checks.pool_rules import wrong_use_of_pools
from workshop.checks.task import Finding, Task
from workshop.shop import ExportJob, Order, Sale

# Which call of the learner's function is at work; the tasks that a call starts inherit it.
_call: ContextVar[int | None] = ContextVar("call", default=None)
_IN_USE = "exercise 06: in use"
_READ_TOO_LATE = ("MissingGreenlet", "DetachedInstanceError")


class Holds:
    """Which call has which connections of an engine.

    `most` is the most that one call had at once, `shared` says whether a connection was used by two tasks at the
    same time, and `late` whether a call in `ended` had one, or took one, after its end.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.ended: set[int] = set()
        self.most = 0
        self.shared = False
        self.late = False
        self._by: dict[ConnectionPoolEntry, int | None] = {}
        event.listen(engine.sync_engine, "checkout", self._checked_out)
        event.listen(engine.sync_engine, "checkin", self._checked_in)
        event.listen(engine.sync_engine, "before_cursor_execute", self._begins)
        event.listen(engine.sync_engine, "after_cursor_execute", self._ends)
        event.listen(engine.sync_engine, "handle_error", self._fails)

    def count(self, call: int | None) -> int:
        """How many connections a call has now."""
        return sum(one == call for one in self._by.values())

    def end(self, call: int) -> None:
        """Note that a call has ended."""
        self.ended.add(call)
        self.late = self.late or self.count(call) > 0

    def _checked_out(self, connection: Any, entry: ConnectionPoolEntry, proxy: Any) -> None:
        call = self._by[entry] = _call.get()
        self.late = self.late or call in self.ended
        if call is not None:
            self.most = max(self.most, self.count(call))

    def _checked_in(self, connection: Any, entry: ConnectionPoolEntry) -> None:
        self._by.pop(entry, None)
        entry.info.pop(_IN_USE, None)

    def _begins(self, connection: Any, *rest: Any) -> None:
        self.shared = self.shared or connection.info.get(_IN_USE, False)
        connection.info[_IN_USE] = True

    def _ends(self, connection: Any, *rest: Any) -> None:
        connection.info[_IN_USE] = False

    def _fails(self, context: Any) -> None:
        if context.connection is not None and not context.connection.closed:
            context.connection.info[_IN_USE] = False


async def _close_sessions(noted: Evidence) -> None:
    """One that was left open would lock its rows against what follows; one that is still in use closes itself."""
    if noted.ended and not noted.left_running:
        await close_all_sessions()


def _called(call: int) -> None:
    """From here on, the task and those that it starts are at work for this call."""
    _call.set(call)


def _dsn(engine: AsyncEngine) -> str:
    """For connections that no instrument sees: those of other processes."""
    return engine.url.set(drivername="postgresql").render_as_string(hide_password=False)


def _one_at_a_time(run: Recording, tasks: int) -> Finding | None:
    """Where a load stands before a lock, it may not come to its end at all, although it moves."""
    if run.completed and run.result["queuers"] > tasks // 2 and not run.result["ended"]:
        return Finding("one-at-a-time", f"Nearly all calls stood before {run.result['queues_at']}.")
    return None


def _read_too_late(run: Recording) -> Finding | None:
    names = [one.outcome.rpartition(".")[2] for one in run.requests]
    found = next((name for name in _READ_TOO_LATE if name in names), None)
    if found is not None:
        return Finding("expired-objects", f"Reading an attribute of an order raised {found}.")
    return None


# pay_without_a_connection

_PROVIDER_SECONDS = 0.15


class DeclinedError(Exception):
    """The provider does not pay."""


class Provider:
    """The payment provider: somebody else, and slow. While it works it looks as another process would.

    `charged` counts the payments of each order, `seen` the statuses that orders had meanwhile, and `held` says
    whether a call had a connection then.
    """

    def __init__(
        self, holds: Holds, database: asyncpg.Pool, owed: dict[int, int], declined: set[int]
    ) -> None:
        self.charged: Counter[int] = Counter()
        self.seen: Counter[str] = Counter()
        self.held = False
        self._holds = holds
        self._database = database
        self._owed = owed
        self._declined = declined

    async def __call__(self, number: Any, household: Any) -> None:
        """Pay an order."""
        if self._owed.get(number) != household:
            raise ValueError(
                f"provider({number!r}, {household!r}): there is no such order of such a household"
            )
        call = _call.get()
        self._look(call)
        found = "SELECT status FROM orders WHERE id = $1"
        self.seen[await self._database.fetchval(found, number)] += 1
        # Neither a sleep nor an event: those are looked for in the learner's code.
        loop = asyncio.get_running_loop()
        answered = loop.create_future()
        timers = [
            loop.call_later(_PROVIDER_SECONDS / 2, self._look, call),
            loop.call_later(_PROVIDER_SECONDS, answered.set_result, None),
        ]
        try:
            await answered
        finally:  # who is cancelled may use a connection again
            for one in timers:
                one.cancel()
        self._look(call)
        if number in self._declined:
            raise DeclinedError(f"order {number}: card declined")
        self.charged[number] += 1

    def _look(self, call: int | None) -> None:
        self.held = self.held or self._holds.count(call) > 0


async def pay_orders(
    pay: Callable[..., Any], url: str, *, orders: int, capacity: int
) -> dict[str, Any]:
    """Pay so many orders, each of them twice at once, and some that nobody owes; what was paid, and what was noted."""
    engine, customers = engine_of(url, capacity), own_households()
    ours = Order.household_id.between(customers[0], customers[-1])
    found = select(Order.id, Order.household_id, Order.status).where(ours).order_by(Order.id)
    made = [
        {"household_id": customers[one], "status": status}
        for one, status in enumerate(["new"] * orders + ["cancelled", "paid"] * 2)
    ]
    async with engine.begin() as connection:
        await connection.execute(insert(Order), made)
        before = (await connection.execute(found)).all()
    await engine.dispose()
    new = [one.id for one in before if one.status == "new"]
    not_owed = [one.id for one in before if one.status != "new"]
    clicks = [number for number in new for _ in range(2)] + not_owed
    declined, told = {*new[::6]}, set[int]()
    holds, written = Holds(engine), Counter[str]()
    event.listen(engine.sync_engine, "before_cursor_execute", partial(_note_paid, written))
    async with asyncpg.create_pool(_dsn(engine), min_size=2, max_size=2) as others:
        owed = {one.id: one.household_id for one in before}
        provider = Provider(holds, others, owed, declined)

        async def click(number: int) -> None:
            _called(number)
            try:
                await pay(sessions, clicks[number], provider)
            except DeclinedError:
                told.add(clicks[number])

        async with evidence(engine) as noted:
            sessions = async_sessionmaker(engine)
            await storm(click, len(clicks))
    await _close_sessions(noted)
    await engine.dispose()
    async with engine.connect() as connection:
        after = {one.id: one.status for one in await connection.execute(found)}
        await forget_orders(connection, customers)
    accepted = [one for one in new if one not in declined]
    right = {one for one in accepted if after[one] == "paid" and provider.charged[one] == 1}
    right |= {one for one in declined if after[one] == "new" and one in told}
    right |= {one for one in not_owed if not provider.charged[one]}
    return dataclasses.asdict(noted) | {
        "held": provider.held,
        "orders": len(new),
        "accepted": len(accepted),
        "charged": sum(provider.charged[one] > 0 for one in accepted),
        "twice": sum(provider.charged[one] > 1 for one in new),
        "not_owed": sum(provider.charged[one] > 0 for one in not_owed),
        "seen": dict(provider.seen),
        "paid": sum(after[one] == "paid" for one in accepted),
        "paid_in_vain": sum(after[one] == "paid" for one in declined),
        "open_again": sum(after[one] == "new" for one in declined),
        "declined": len(declined),
        "told": len(told),
        "written": written["paid"],
        "done": sum(clicks[one] in right for one in range(len(clicks))),
    }


def _note_paid(
    written: Counter[str], connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any
) -> None:
    written["paid"] += statement.startswith("UPDATE") and "paid" in f"{statement}{parameters}"


def judge_payments(run: Recording) -> Finding | None:
    """What is wrong with how orders were paid."""
    seen = run.result
    finding = (
        (None if seen["held"] else _one_at_a_time(run, run.announced))
        or wrong_use_of_pools(run, lent=1, done=seen["done"])
        or _read_too_late(run)
    )
    if finding is not None:
        return finding
    if run.pools[1:]:
        return Finding("another-pool", "Your code made an engine of its own.")
    if seen["held"]:
        return Finding(
            "holds-while-it-waits", "While the provider was asked, the call had a connection."
        )
    if run.completed < run.announced or not seen["ended"]:
        return None
    return _wrong_payments(seen)


def _wrong_payments(seen: dict[str, Any]) -> Finding | None:
    """What is wrong with what was paid."""
    if seen["not_owed"]:
        return Finding(
            "asks-before-it-looks", "Orders were charged that were cancelled, or paid already."
        )
    if seen["seen"].get("new"):
        return Finding(
            "claims-nothing",
            'While the provider was asked, the status in the database was still "new":'
            " any other process would have asked, too.",
        )
    if seen["twice"]:
        return Finding("claim-that-races", "Some orders were charged twice.")
    if seen["seen"].get("paid"):
        return Finding(
            "paid-before-the-money",
            'While the provider was still working, the order\'s status was "paid" already.',
        )
    if seen["paid_in_vain"]:
        return Finding(
            "paid-before-the-money", 'Orders whose payment was declined have the status "paid".'
        )
    if seen["charged"] < seen["accepted"]:
        return Finding(
            "success-without-work",
            f"Of {seen['accepted']} orders that could be paid, {seen['charged']} were charged.",
        )
    if seen["paid"] < seen["accepted"]:
        return Finding(
            "forgets-to-commit" if seen["written"] else "changes-a-detached-object",
            f'{seen["accepted"]} orders were charged, and {seen["paid"]} have the status "paid".',
        )
    if seen["open_again"] < seen["declined"]:
        return Finding(
            "claim-that-stays",
            f'Of {seen["declined"]} orders whose payment was declined, {seen["open_again"]} are "new" again.',
        )
    if seen["told"] < seen["declined"]:
        return Finding(
            "swallows-the-timeout",
            f"{seen['declined']} payments were declined, and {seen['told']} calls said so.",
        )
    return None


def prove_payments(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.result['paid']} of {run.result['accepted']} orders charged once and paid, {run.result['declined']}"
        f" declined, with {run.pools[0].capacity} connection{'s' * (run.pools[0].capacity != 1)},"
        " and none of them held while the provider worked."
        for run in runs
    )


pay_without_a_connection = Task(
    "06",
    "pay_without_a_connection",
    "pay",
    load=pay_orders,
    trials=({"orders": 30, "capacity": 4}, {"orders": 12, "capacity": 1}),
    judge=judge_payments,
    proof=prove_payments,
    hints=(
        "Without the connection the lock on the row is gone. What else could tell all other calls, also those in other "
        "processes, that this order is being paid?",
        'Three short steps: write "paying" and commit, ask the provider, write what came of it and commit. How does '
        "the first step make sure that only one call succeeds in it?",
        'update(Order).where(Order.id == number, Order.status == "new").values(status="paying")'
        ".returning(Order.household_id) gives a row to one call and None to all others. And in except: back to "
        '"new", and raise.',
    ),
)


# follow_an_order

_STATUSES = ("new", "packed", "sent")
_SLOW_TABS = 3
_LOOKS = 5
_LOOK_SECONDS = 0.01
_SETTLE_SECONDS = 0.15
_PHASE_SECONDS = 2.5  # for those who time out; all others have settled long before
_STRANGER_SECONDS = 0.3


class NotingSession(Session):
    """A session that notes in `info["noted"]` when it begins anew after it was closed."""

    def close(self) -> None:
        """As always."""
        self.info["closed"] = True
        super().close()


def _note_reopened(session: Session, *rest: Any) -> None:
    session.info["noted"]["reopened"] += session.info.get("closed", False)


class News:
    """Tells the pages that their orders have changed; nothing is missed between two waits."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._version = 0
        self._told: Counter[int] = Counter()

    async def changed(self, number: int) -> None:
        """Wait until something about this order has changed since the last time."""
        if self._told[number] == self._version:
            self._waiting[number] = asyncio.get_running_loop().create_future()
            await self._waiting[number]
        self._told[number] = self._version

    def tell(self) -> None:
        """All orders have changed."""
        self._version += 1
        for one in self._waiting.values():
            if not one.done():
                one.set_result(None)

    def is_awaited(self, number: int) -> bool:
        """Whether somebody waits for news of this order."""
        return number in self._waiting and not self._waiting[number].done()


class Tab:
    """A browser's tab that asks an application for the page of one order, and keeps it open.

    `events` are those that it has read; a slow tab reads one and no more, and `is_blocked` then says that the
    application stands in a write to it. `status` is that of the answer.
    """

    def __init__(self, order: int, is_slow: bool = False) -> None:
        self.order = order
        self.is_slow = is_slow
        self.status: int | None = None
        self.events: list[str] = []
        self.is_open = True
        self.is_blocked = False
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._has_asked = False

    async def visit(self, app: Any) -> None:
        """Ask, and read until one of the two ends it."""
        path = f"/orders/{self.order}"
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},  # as uvicorn says
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"shop"), (b"accept", b"text/event-stream")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        try:
            await app(scope, self._receive, self._send)
        finally:
            self.is_open = False

    def close(self) -> None:
        """The customer closes it."""
        if not self._closed.done():
            self._closed.set_result(None)

    async def _receive(self) -> dict[str, Any]:
        if not self._has_asked:
            self._has_asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.shield(self._closed)
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)
        for line in message.get("body", b"").decode().splitlines():
            if line.startswith("data:"):
                if self.is_slow and self.events:
                    self.is_blocked = True
                    await asyncio.shield(self._closed)
                self.events.append(line.removeprefix("data:").strip())


async def open_tabs(
    shop: Callable[..., Any], url: str, *, tabs: int, capacity: int
) -> dict[str, Any]:
    """Let so many customers follow their orders at once; what they read, and what was noted."""
    engine, customers, seen = engine_of(url, capacity), own_households(), Counter[str]()
    async with engine.begin() as connection:
        made = [{"household_id": customers[one]} for one in range(tabs)]
        orders = list(await connection.scalars(insert(Order).returning(Order.id), made))
    await engine.dispose()
    # The slow ones come last: where a page holds its connection, also quick ones are seen to.
    pages = [Tab(one, number >= tabs - _SLOW_TABS) for number, one in enumerate(orders)]
    stranger = Tab(2**31 - 1 - os.getpid())
    holds, news, apps = Holds(engine), News(), list[Any]()
    event.listen(NotingSession, "after_begin", _note_reopened)

    async def make(number: int) -> None:
        app = shop(sessions, news.changed)
        if not callable(app):
            raise TypeError(f"shop returned {app!r}; asked for was the application")
        apps.append(app)

    async def visit(number: int) -> None:
        _called(number)
        await pages[number].visit(apps[0])

    async with evidence(engine) as noted:
        sessions = async_sessionmaker(
            engine, sync_session_class=NotingSession, info={"noted": seen}
        )
        if (await storm(make, 1))["ok"]:
            day = asyncio.create_task(_let_orders_change(engine, pages, news, holds, seen))
            try:
                await storm(visit, tabs)
                await day
            finally:
                day.cancel()
            asyncio.get_running_loop().call_later(_STRANGER_SECONDS, stranger.close)
            await storm(lambda _: stranger.visit(apps[0]), 1)
    await _close_sessions(noted)
    await engine.dispose()
    async with engine.connect() as connection:
        await forget_orders(connection, customers)
    quick = [one for one in pages if not one.is_slow]
    return dataclasses.asdict(noted) | {
        "idle_held": seen["idle"],
        "slow_held": seen["slow"],
        "reopened": seen["reopened"],
        "begun": sum(one.events[:1] == ["new"] for one in pages),
        "quick": len(quick),
        "kept_up": sum(tuple(dict.fromkeys(one.events)) == _STATUSES for one in quick),
        "strangers_status": stranger.status,
    }


async def _let_orders_change(
    engine: AsyncEngine, pages: Sequence[Tab], news: News, holds: Holds, seen: Counter[str]
) -> None:
    """Change all orders, step by step, and look after each step who holds a connection while he only waits."""
    connection = await asyncpg.connect(_dsn(engine))
    try:
        for status in _STATUSES:
            if status != _STATUSES[0]:
                change = "UPDATE orders SET status = $1 WHERE id = ANY($2)"
                await connection.execute(change, status, [one.order for one in pages])
                news.tell()
            await _settled(pages, status, news)
            held = {*range(len(pages))}
            for _ in range(_LOOKS):
                held = {one for one in held if pages[one].is_open and holds.count(one)}
                await asyncio.sleep(_LOOK_SECONDS)
            seen["slow"] += sum(pages[one].is_blocked for one in held)
            seen["idle"] += sum(not pages[one].is_blocked for one in held)
    finally:
        await connection.close()
        for one in pages:
            one.close()


async def _settled(pages: Sequence[Tab], status: str, news: News) -> None:
    """Wait until each page that is open has nothing more to do, or has at least shown the status for a while."""
    loop = asyncio.get_running_loop()
    deadline, shown_until = loop.time() + _PHASE_SECONDS, None
    while loop.time() < min(deadline, shown_until or deadline):
        open_ones = [one for one in pages if one.is_open]
        if all(one.is_blocked or news.is_awaited(one.order) for one in open_ones):
            return
        shown = all(one.is_blocked or one.events[-1:] == [status] for one in open_ones)
        if shown and shown_until is None:
            shown_until = loop.time() + _SETTLE_SECONDS
        await asyncio.sleep(_LOOK_SECONDS)


def judge_pages(run: Recording) -> Finding | None:
    """What is wrong with how orders are followed."""
    seen = run.result
    if not seen["tampered"] and not run.pools[1:]:
        if seen["idle_held"]:
            return Finding(
                "closed-session-opens-again" if seen["reopened"] else "as-long-as-the-response",
                "Pages that only waited for news had a connection checked out.",
            )
        if seen["slow_held"]:
            return Finding(
                "holds-while-they-read",
                "Pages whose customer read slowly had a connection checked out.",
            )
    # To sleep between two looks is no mistake here.
    awake = dataclasses.replace(run, result=seen | {"sleepers": 0})
    if (finding := wrong_use_of_pools(awake, lent=1, done=seen["begun"])) is not None:
        return finding
    if run.pools[1:]:
        return Finding("another-pool", "Your code made an engine of its own.")
    if seen["strangers_status"] == 200:
        return Finding(
            "status-comes-first", "An order that does not exist was answered with the status 200."
        )
    if run.completed < run.announced or not seen["ended"]:
        return None
    if seen["begun"] and seen["kept_up"] < seen["quick"]:
        return Finding(
            "reads-once",
            f"The orders were {', then '.join(_STATUSES)}; of {seen['quick']} pages that were read,"
            f" {seen['kept_up']} showed this.",
        )
    if not seen["begun"] or seen["strangers_status"] != 404:
        return Finding(
            "success-without-work",
            f"{seen['begun']} pages showed their order, and an order that does not exist was answered with"
            f" the status {seen['strangers_status']}.",
        )
    return None


def prove_pages(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.announced - 2} pages open with {run.pools[0].capacity} connection"
        f"{'s' * (run.pools[0].capacity != 1)}, each change shown, and none held while they waited."
        for run in runs
    )


follow_an_order = Task(
    "06",
    "follow_an_order",
    "shop",
    load=open_tabs,
    trials=({"tabs": 16, "capacity": 4}, {"tabs": 8, "capacity": 1}),
    judge=judge_pages,
    proof=prove_pages,
    hints=(
        "When does the code behind the `yield` of a dependency run: when follow returns, or when the last event has "
        "been sent?",
        "What needs the database here? A look whether the order exists, and a look at its status for each event. "
        "Give each look a session of its own.",
        "Leave the dependency out. In follow and in events: async with Session() as session, read, end the block; "
        "and only then return, yield, or wait.",
    ),
)


# ask_in_parallel

_AT_ONCE = 3
_SESSION_SHARED = "https://sqlalche.me/e/21/isce"
_NO_PRODUCT = 2**40  # more than the column's type can hold: the query fails


async def show_reports(
    report: Callable[..., Any], url: str, *, calls: int, capacity: int, products: int
) -> dict[str, Any]:
    """Show so many reports at once, some of which must fail; how many were right, and what was noted."""
    engine = engine_of(url, capacity)
    sold = select(Sale.sku, func.sum(Sale.quantity)).group_by(Sale.sku).order_by(Sale.sku)
    async with engine.connect() as connection:
        some = {sku: int(count) for sku, count in await connection.execute(sold.limit(400))}
    await engine.dispose()
    numbers, holds, shown, told = list(some), Holds(engine), dict[int, Any](), set[int]()
    failing = {*range(3, calls, 5)}

    async def show(number: int) -> None:
        _called(number)
        asked = _asked(numbers, number, products)
        if number in failing:
            asked.insert(2, _NO_PRODUCT)
        try:
            shown[number] = await report(sessions, asked)
        except Exception as error:  # whatever it makes of a query that failed, it says so
            if (timeout := _timeout_in(error)) is not None:
                raise timeout from None
            if number not in failing:
                raise
            told.add(number)
        finally:
            holds.end(number)

    async with evidence(engine) as noted:
        sessions = async_sessionmaker(engine)
        await storm(show, calls)
    await engine.dispose()
    right = sum(
        shown.get(number) == {one: some[one] for one in _asked(numbers, number, products)}
        for number in range(calls)
        if number not in failing
    )
    return dataclasses.asdict(noted) | {
        "right": right,
        "asked": calls - len(failing),
        "failing": len(failing),
        "told": len(told),
        "most": holds.most,
        "shared": holds.shared,
        "late": holds.late,
        "errors": [text for one in shown.values() for text in _errors_in(one)],
    }


def _asked(numbers: Sequence[int], number: int, products: int) -> list[int]:
    return [numbers[(number * 7 + one * 3) % len(numbers)] for one in range(products)]


def _timeout_in(error: BaseException) -> BaseException | None:
    """The pool's timeout that an exception is, or has in it."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_timeout_in, error.exceptions)), None)
    return error if isinstance(error, PoolTimeoutError) else None


def _errors_in(report: Any) -> list[str]:
    values = report.values() if isinstance(report, dict) else ()
    return [str(one) for one in values if isinstance(one, BaseException)]


def judge_reports(run: Recording) -> Finding | None:
    """What is wrong with how reports were put together."""
    seen = run.result
    errors = [*seen["errors"], *(one.error for one in run.requests)]
    if seen["shared"] or any(_SESSION_SHARED in one for one in errors):
        return Finding(
            "one-session-many-tasks", "Several tasks wanted to use one connection at the same time."
        )
    if seen["late"] or (seen["left_running"] and seen["told"]):
        return Finding(
            "gather-leaves-the-others",
            "A query failed, the call raised, and other queries of the same call were still at work.",
        )
    if seen["errors"]:
        return Finding(
            "errors-among-results", "Among the numbers that calls returned there were exceptions."
        )
    finding = _one_at_a_time(run, run.announced) or wrong_use_of_pools(
        run, lent=1, done=seen["right"] + seen["told"]
    )
    if finding is not None:
        return finding
    if run.pools[1:]:
        return Finding("another-pool", "Your code made an engine of its own.")
    if seen["most"] > _AT_ONCE:
        return Finding(
            "takes-the-whole-pool", f"One call had more than {_AT_ONCE} connections at once."
        )
    if run.completed < run.announced or not seen["ended"]:
        return None
    if seen["told"] < seen["failing"]:
        return Finding(
            "errors-among-results",
            f"{seen['failing']} calls had a query that failed, and {seen['told']} of them raised.",
        )
    if seen["right"] < seen["asked"]:
        return Finding(
            "success-without-work",
            f"{run.completed} calls ended without an error; of {seen['asked']} that could succeed,"
            f" {seen['right']} returned what was asked for.",
        )
    return None


def prove_reports(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.result['right']} of {run.result['asked']} reports right with {run.pools[0].capacity} connection"
        f"{'s' * (run.pools[0].capacity != 1)}, at most {_AT_ONCE} for one call; {run.result['failing']} failed as they"
        " should, and left nothing behind."
        for run in runs
    )


ask_in_parallel = Task(
    "06",
    "ask_in_parallel",
    "report",
    load=show_reports,
    trials=(
        {"calls": 20, "capacity": 6, "products": 8},
        {"calls": 10, "capacity": 1, "products": 6},
    ),
    judge=judge_reports,
    proof=prove_reports,
    hints=(
        "How many tasks use the session at the same moment, and for how many is a session made?",
        "Before you give each task a session: who counts the connections of one call then, and what do the other tasks "
        "do when one fails? Do they have to be tasks at all?",
        "One statement: select(Sale.sku, func.sum(Sale.quantity)).where(Sale.sku.in_(skus)).group_by(Sale.sku).",
    ),
)


# let_others_in

_TURNS = 4  # that customers may have to wait, in units of the capacity; fair is one or two


class Turns:
    """What workers and customers do with a pool, counted in the workers' turns: the connections that they take.

    `exports` counts how often each job was exported, `most` the most that one worker exported in one transaction,
    and `waited` are the turns that passed between a customer's question and his connection.
    """

    def __init__(self, engine: AsyncEngine, jobs: int) -> None:
        self.exports: Counter[int] = Counter()
        self.most = 0
        self.waited: list[int] = []
        self.customers_come = asyncio.Event()
        self._come_after = jobs // 10
        self._turns = 0
        self._unfinished: Counter[int | None] = Counter()
        event.listen(engine.sync_engine, "checkout", self._checked_out)
        event.listen(engine.sync_engine, "commit", self._ends)
        event.listen(engine.sync_engine, "rollback", self._ends)

    def export(self, number: int) -> None:
        """What the learner's code is lent: write the file of a job."""
        call = _call.get()
        self.exports[number] += 1
        self._unfinished[call] += 1
        self.most = max(self.most, self._unfinished[call])
        if self.exports.total() >= self._come_after:
            self.customers_come.set()

    async def ask(self, engine: AsyncEngine) -> None:
        """What a customer does."""
        asked = self._turns
        async with engine.connect():
            self.waited.append(self._turns - asked)

    def _checked_out(self, *_: Any) -> None:
        self._turns += _call.get() is not None

    def _ends(self, connection: Any) -> None:
        self._unfinished[_call.get()] = 0


async def work_and_ask(
    work_through: Callable[..., Any], url: str, *, workers: int, customers: int, jobs: int
) -> dict[str, Any]:
    """Let so many workers, one for each connection, do jobs while customers come; who waited, and what was noted."""
    engine = engine_of(url, workers)
    ours = f"exercise 06, {os.getpid()}"
    all_of_them = ExportJob.kind.in_([ours, f"{ours}, not asked for"])
    columns = select(ExportJob.id, ExportJob.kind, ExportJob.status).where(all_of_them)
    made = [
        {"kind": kind, "status": status}
        for kind, status, count in (
            (ours, "queued", jobs),
            (ours, "failed", 10),
            (f"{ours}, not asked for", "queued", 10),
        )
        for _ in range(count)
    ]
    async with engine.begin() as connection:
        await connection.execute(insert(ExportJob), made)
        before = {one.id: one for one in await connection.execute(columns)}
    # All connections are there from the beginning: to make one takes longer than a job.
    await asyncio.gather(*(_touch(engine) for _ in range(workers)))
    turns = Turns(engine, jobs)
    left = workers

    async def work_or_ask(number: int) -> None:
        nonlocal left
        if number < workers:
            _called(number)
            try:
                await work_through(sessions, ours, turns.export)
            finally:
                left -= 1
                if not left:
                    turns.customers_come.set()
        else:
            # In a task of its own: who waits for an event is taken for one of the learner's.
            await arrival
            await turns.ask(engine)

    async with evidence(engine) as noted:
        sessions = async_sessionmaker(engine)
        arrival = asyncio.create_task(turns.customers_come.wait(), name="the check")
        await storm(work_or_ask, workers + customers)
    await _close_sessions(noted)
    await engine.dispose()
    async with engine.begin() as connection:
        after = {one.id: one for one in await connection.execute(columns)}
        await connection.execute(delete(ExportJob).where(all_of_them))
    asked = {one.id for one in before.values() if (one.kind, one.status) == (ours, "queued")}
    return dataclasses.asdict(noted) | {
        "workers": workers,
        "asked": len(asked),
        "done": sum(one in after and after[one].status == "done" for one in asked),
        "exported": len(asked & turns.exports.keys()),
        "twice": sum(count > 1 for count in turns.exports.values()),
        "touched": sum(after.get(one) != before[one] for one in before.keys() - asked)
        + len(turns.exports.keys() - asked),
        "most": turns.most,
        "customers": customers,
        "served": len(turns.waited),
        "waited": max(turns.waited, default=0),
    }


async def _touch(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(select(func.pg_sleep(0.02)))


def judge_workers(run: Recording) -> Finding | None:
    """What is wrong with how workers did their jobs beside customers."""
    seen = run.result
    awake = dataclasses.replace(run, result=seen | {"sleepers": 0})
    wrong_pool = wrong_use_of_pools(awake, lent=1, done=run.completed)
    if wrong_pool is not None and (seen["tampered"] or run.pools[1:]):
        return wrong_pool
    if run.pools[1:]:
        return Finding("another-pool", "Your code made an engine of its own.")
    if seen["exported"] and not seen["done"]:
        return Finding("forgets-to-commit", "Jobs were exported, and none of them is done.")
    if seen["twice"]:
        return Finding("claim-that-races", "Some jobs were exported twice.")
    if seen["most"] > 1:
        return Finding(
            "one-transaction-for-all", "A worker exported several jobs before it committed."
        )
    if seen["sleepers"] > seen["workers"] // 4:
        return Finding("waits-by-the-clock", f"The workers slept in {seen['sleeps_at']}.")
    if seen["exported"] and seen["queuers"] > seen["workers"] // 2:
        return Finding("one-at-a-time", f"Nearly all workers stood before {seen['queues_at']}.")
    if wrong_pool is not None:
        return wrong_pool
    if seen["waited"] > _TURNS * seen["workers"] or run.pools[0].timeouts:
        return Finding(
            "overtakes-the-queue",
            f"While customers waited, connections came back again and again, more than {_TURNS} times as many as"
            " there are, and workers took them.",
        )
    if run.completed < run.announced or not seen["ended"]:
        return None
    if seen["touched"]:
        return Finding("more-than-asked", "Jobs were changed, or exported, that nobody asked for.")
    if seen["exported"] < seen["asked"]:
        return Finding(
            "part-of-the-rows", f"Of {seen['asked']} jobs, {seen['exported']} were exported."
        )
    if seen["done"] < seen["asked"]:
        return Finding(
            "forgets-to-commit", f"{seen['asked']} jobs were exported, and {seen['done']} are done."
        )
    return None


def prove_workers(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.result['done']} of {run.result['asked']} jobs done once by {run.result['workers']} workers on"
        f" {run.pools[0].capacity} connections, and {run.result['served']} of {run.result['customers']} customers"
        " served between them."
        for run in runs
    )


let_others_in = Task(
    "06",
    "let_others_in",
    "work_through",
    load=work_and_ask,
    trials=(
        {"workers": 8, "customers": 10, "jobs": 72},
        {"workers": 3, "customers": 6, "jobs": 36},
    ),
    judge=judge_workers,
    proof=prove_workers,
    hints=(
        "Each commit does give the connection back. Who is the first to ask for one after that, and in which step of "
        "the event loop?",
        "Whoever waits in the queue is woken by the commit, and needs one step of the event loop to take the "
        "connection. How can the worker let that step pass before it asks again, without the clock?",
        "await asyncio.sleep(0) after the commit; or async with Session() inside of the loop, for each job.",
    ),
)
