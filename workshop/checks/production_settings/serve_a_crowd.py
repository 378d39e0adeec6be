"""Exercise 08, task 2: a service with a crowd before it, a colleague who locks its rows, and an end."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg
import httpx
from fastapi import FastAPI
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ormscope import PoolScope, Verdict
from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import THE_CHECK, Evidence, evidence
from workshop.checks.lent import Conditions, connections, own_households
from workshop.checks.rules import (
    engine_per_call,
    expired_objects,
    own_pools,
    who_holds_and_waits,
)
from workshop.checks.task import Task
from workshop.checks.unpooled import of_the_check, of_this_process
from workshop.service import serving

if TYPE_CHECKING:
    from ormscope.lab.picture import Picture

_SIZE = 5
_SKU = 1082185
_AFTER_THEM = 0.1  # seconds, until those who have come first have what they wait with
_ANSWERS = (DBAPIError, PoolTimeoutError, TimeoutError)  # for whoever wants what is locked
_PATIENCE = 3.5  # seconds, until a customer counts as one without an answer
_PATIENCE_AT_LOCKS = 2.0  # the same where a lock is in the way
_SUSPICIOUS = 1.0  # seconds in line, after which it is asked who holds and who waits
_LOAD_SECONDS = 8.0  # of which a right answer needs two
_OK, _ERROR = 200, 500
_CALL = "x-call"
_GOODBYE = 0.5  # seconds, in which a connection that was closed is gone from the server's list
_ORDERS = """
    SELECT household_id, status, array_agg((sku, quantity, unit_price)::text) AS lines
    FROM orders JOIN order_lines ON order_id = orders.id
    WHERE household_id = ANY ($1::int[]) GROUP BY orders.id
"""


@dataclass(kw_only=True)
class Service(Evidence):
    """What was seen of a service.

    `returned` is the type of what the function returned, where that is no FastAPI. Of `orders` customers who
    ordered, and `payments` who paid after that, so many were `unanswered` and so many `refused`, with a status that
    is no 200. Of the others, so many read their answer `too_early`: at that moment nothing was to be seen in the
    database; and `wrong` orders are not there at the end as they should be, `missing` of them not at all; `unpaid`
    are payments of which that holds.

    Of `payers` whose orders a colleague had locked, so many were `stuck`, and of `bystanders` so many `blocked`.
    `left` are the connections that the server still had when the service had ended; `in_line` is the last verdict on
    its pool at which somebody had waited for a second.
    """

    returned: str = ""
    orders: int = 0
    payments: int = 0
    unanswered: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    too_early: int = 0
    wrong: int = 0
    missing: int = 0
    unpaid: int = 0
    payers: int = _SIZE
    stuck: int = 0
    bystanders: int = 0
    blocked: int = 0
    left: int = 0
    in_line: Verdict | None = None


class _Watched:
    """An application, and what others see in the database when it answers."""

    def __init__(self, app: Any, others: asyncpg.Pool, seen: Service) -> None:
        self._app = app
        self._others = others
        self._seen = seen
        self.errors: dict[int, Exception] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = int(dict(scope["headers"])[_CALL.encode()])
        status, body = 0, b""

        async def watched_send(message: Any) -> None:
            nonlocal status, body
            status = message.get("status", status)
            body += message.get("body", b"")
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            if status == _OK and is_last and not await self._is_done(scope["path"], body):
                self._seen.too_early += 1
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception as error:
            self.errors[call] = error
            raise

    async def _is_done(self, path: str, body: bytes) -> bool:
        if path.endswith("/pay"):
            number = int(path.split("/")[2])
            found = "SELECT status = 'paid' FROM orders WHERE id = $1"
            return bool(await self._others.fetchval(found, number))
        try:
            number = int(json.loads(body))
        except (TypeError, ValueError):
            return True  # no number: that is another fault, and the client sees it
        return bool(await self._others.fetchval("SELECT id FROM orders WHERE id = $1", number))


class _Answer(NamedTuple):
    status: int
    body: bytes


class _Customers:
    """The customers of a service, each with one request on a connection of its own."""

    def __init__(self, base_url: httpx.URL, watched: _Watched, seen: Service) -> None:
        self._address = base_url.host, base_url.port
        self._watched = watched
        self._seen = seen
        self._calls = 0

    async def post(self, path: str, patience: float = _PATIENCE) -> _Answer | None:
        """The answer, or None where there is none in time; raises what the service has raised."""
        self._calls += 1
        call = self._calls
        try:
            async with asyncio.timeout(patience):
                answer = await self._ask(path, call)
        except TimeoutError:
            return None
        if answer.status == _ERROR and call in self._watched.errors:
            raise self._watched.errors[call]
        return answer

    async def _ask(self, path: str, call: int) -> _Answer:
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            head = (
                f"POST {path} HTTP/1.1\r\nHost: shop\r\nConnection: close\r\nContent-Length: 0\r\n"
            )
            writer.write(f"{head}{_CALL}: {call}\r\n\r\n".encode())
            answered, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        return _Answer(int(answered.split()[1]), body)

    async def order(self, household: int, patience: float = _PATIENCE) -> Any:
        """Order one thing; the number, or None where the customer was not served."""
        return self._noted(await self.post(f"/orders?household={household}&sku={_SKU}", patience))

    async def pay(self, number: Any) -> None:
        """Pay an order that nobody has locked."""
        self._noted(await self.post(f"/orders/{number}/pay"))

    async def pay_locked(self, number: int) -> bool:
        """Pay an order that somebody else has locked; whether there was no answer in time. An error is one."""
        with suppress(*_ANSWERS):
            return await self.post(f"/orders/{number}/pay", _PATIENCE_AT_LOCKS) is None
        return False

    def _noted(self, answer: _Answer | None) -> Any:
        if answer is None:
            self._seen.unanswered += 1
        elif answer.status != _OK:
            self._seen.refused[answer.status] += 1
        else:
            return json.loads(answer.body)
        return None


async def serve(
    shop: Callable[[str], Any],
    conditions: Conditions,
    *,
    orders: int,
    payments: int,
    bystanders: int,
) -> Service:
    """So many customers at once, some of whom pay then; payers of locked orders, with bystanders; and the end."""
    seen, made = Service(orders=orders, payments=payments, bystanders=bystanders), list[Any]()

    async def start(number: int) -> None:
        made.append(shop(conditions.url))

    async with of_the_check(conditions, 4) as others, evidence(conditions) as noted:
        await storm(start, 1)
        if made and not isinstance(made[0], FastAPI):
            seen.returned = type(made[0]).__name__
        elif made:
            watched = _Watched(made[0], others, seen)
            try:
                async with serving(watched) as browser:  # type: ignore[arg-type]  # it is an app
                    await _visit(_Customers(browser.base_url, watched, seen), others, seen)
                seen.left = await _left(others)
                await _count(others, seen)
            finally:
                await _forget(others)
    vars(seen).update(vars(noted))
    return seen


async def _visit(customers: _Customers, others: asyncpg.Pool, seen: Service) -> None:
    households = own_households()
    numbers: list[Any] = []

    async def order(number: int) -> None:
        numbers.append(await customers.order(households[number]))

    async def pay(number: int) -> None:
        await customers.pay(numbers[number])

    async def order_alone(number: int) -> None:
        await customers.order(households[seen.orders])

    with _engines() as engines:
        if not (await storm(order_alone, 1))["ok"]:
            return
    scopes = [PoolScope(engine) for engine in engines]
    watching = asyncio.create_task(_watch(scopes, seen), name=THE_CHECK)
    try:
        for action, count in ((order, seen.orders), (pay, seen.payments)):
            if (await storm(action, count))["ok"] < count or seen.unanswered or seen.refused:
                return
        await _meet_a_colleague(customers, others, seen)
    finally:
        watching.cancel()
        for scope in scopes:
            scope.close()


@contextmanager
def _engines() -> Iterator[set[Engine]]:
    """The engines that are used in the block; one for each session is told from their number."""
    used: set[Engine] = set()

    def note(connection: Connection) -> None:
        used.add(connection.engine)

    event.listen(Engine, "engine_connect", note)
    try:
        yield used
    finally:
        event.remove(Engine, "engine_connect", note)


async def _watch(scopes: Sequence[PoolScope], seen: Service) -> None:
    """Note who holds and who waits, when somebody has stood in line for long."""
    while True:
        await asyncio.sleep(0.2)
        for scope in scopes:
            waiters = scope.waiters
            if waiters and time.perf_counter() - waiters[0].since > _SUSPICIOUS:
                seen.in_line = scope.verdict_now()


async def _meet_a_colleague(customers: _Customers, others: asyncpg.Pool, seen: Service) -> None:
    """Some pay orders that a colleague has locked, as many as there are connections, and bystanders order meanwhile."""
    first = seen.orders + 1
    make = "INSERT INTO orders (household_id, status) VALUES ($1, 'new') RETURNING id"
    rows = own_households()[first : first + seen.payers]
    locked = [await others.fetchval(make, row) for row in rows]

    async def visit(number: int) -> None:
        if number >= seen.payers:
            await asyncio.sleep(_AFTER_THEM)
            household = own_households()[first + number]
            is_served = await customers.order(household, _PATIENCE_AT_LOCKS) is not None
            seen.blocked += not is_served
        else:
            is_stuck = await customers.pay_locked(locked[number])
            seen.stuck += is_stuck

    async with others.acquire() as colleague, colleague.transaction():
        await colleague.execute("SELECT FROM orders WHERE id = ANY ($1::int[]) FOR UPDATE", locked)
        await storm(visit, seen.payers + seen.bystanders)


async def _count(others: asyncpg.Pool, seen: Service) -> None:
    """What is in the database, when the service has ended."""
    price = await others.fetchval("SELECT unit_price FROM products WHERE sku = $1", _SKU)
    found = await others.fetch(_ORDERS, [*own_households()[: seen.orders]])
    times = Counter(row["household_id"] for row in found)
    good = [row for row in found if row["lines"] == [f"({_SKU},1,{price})"]]
    seen.missing = seen.orders - len(times)
    seen.wrong = seen.orders - sum(times[row["household_id"]] == 1 for row in good)
    seen.unpaid = seen.payments - sum(row["status"] == "paid" for row in found)


async def _left(others: asyncpg.Pool) -> int:
    """The connections that this process still has in the server's list."""
    until = time.monotonic() + _GOODBYE
    async with others.acquire() as connection:
        while left := await of_this_process(connection):
            if time.monotonic() > until:
                break
            await asyncio.sleep(0.02)
        return left


async def _forget(others: asyncpg.Pool) -> None:
    customers = own_households()
    ours = "household_id BETWEEN $1 AND $2"
    ends = customers[0], customers[-1]
    lines = f"DELETE FROM order_lines USING orders WHERE order_id = orders.id AND {ours}"
    await others.execute(lines, *ends)
    await others.execute(f"DELETE FROM orders WHERE {ours}", *ends)


def too_many(run: Recording, seen: Service) -> Iterator[Finding]:
    """Engines that may open more connections than the task allows."""
    pools = own_pools(run, seen)
    most = sum(pool.capacity or 0 for pool in pools)
    if most > _SIZE:
        each = " + ".join(str(pool.capacity) for pool in pools)
        told = f"The pools of your service may open {each} connections; the task allows {_SIZE}."
        yield Finding("size-is-not-the-limit", told)


def holds_and_waits(run: Recording, seen: Service) -> Iterator[Finding]:
    """Customers who hold a connection and stand in line for another, so that nobody is served."""
    stuck = [each for each in seen.in_line.holding if each.waits] if seen.in_line else []
    if seen.in_line and stuck and seen.unanswered:
        told = f"{seen.unanswered} of {seen.orders} customers at once had no answer after {_PATIENCE:g} s"
        yield Finding("holds-and-waits", f"{told}: {who_holds_and_waits(seen.in_line, stuck)}")


def waits_with_the_pool(run: Recording, seen: Service) -> Iterator[Finding]:
    """Those who wait for a lock keep all connections, as long as the colleague takes."""
    if seen.stuck:
        yield Finding(
            "a-lock-is-no-line",
            f"A colleague had locked {seen.payers} orders, and as many customers wanted to pay them. After"
            f" {_PATIENCE_AT_LOCKS:g} s {seen.stuck} of them still waited. Of {seen.bystanders} who came after them and"
            f" wanted something else, {seen.blocked} were not served.",
        )


def answers_too_early(run: Recording, seen: Service) -> Iterator[Finding]:
    """What the customer reads is not there yet, or never will be."""
    if seen.too_early and seen.missing:
        yield Finding(
            "forgets-to-commit",
            f"{seen.too_early} customers were answered with 200, and {seen.missing} of {seen.orders} orders were not"
            " in the database at the end.",
        )
    if seen.too_early:
        yield Finding(
            "answers-before-it-commits",
            f"{seen.too_early} times, at the moment at which the customer was answered with 200, nobody else could see"
            " in the database what was written. If that commit fails, nobody will.",
        )


def demands(run: Recording, seen: Service) -> Iterator[Finding]:
    """Each sentence of the task's text; what the rules say comes before it."""
    if seen.returned:
        told = f"shop(url) returned no FastAPI but {seen.returned}."
        yield Finding("not-what-was-asked", told)
        return
    if seen.unanswered:
        told = f"{seen.unanswered} customers had no answer after {_PATIENCE:g} s."
        yield Finding("never-ends", told)
    for status, count in seen.refused.items():
        told = f"{count} customers got the status {status}; the task wants all of them served."
        yield Finding("not-what-was-asked", told)
    if seen.wrong or seen.unpaid:
        told = f"{seen.wrong} of {seen.orders} orders were not as the task wants them: one for each customer, with one"
        yield Finding(
            "not-what-was-asked",
            f'{told} line at the shop\'s price. {seen.unpaid} of {seen.payments} that were paid were not "paid".',
        )
    if seen.left:
        yield Finding(
            "ends-without-a-goodbye",
            f"When your service had ended, the server still had {seen.left} of its connections.",
        )


def prove(run: Recording, seen: Service) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{seen.orders} customers served with {connections(run)}, each order in the database"
        " when its customer read the answer.\n"
        f"{seen.payers} customers wanted to pay orders that were locked: {seen.payers} were told, and"
        f" {seen.bystanders} of {seen.bystanders} others were served. At the end the server had {seen.left}"
        " connections of your service."
    )


def plot_requests(before: Recording, after: Recording) -> Picture:
    """Both runs without their pools: as it is given, the service has one for each session."""
    before.pools, after.pools = [], []
    return before.plot(after)


serve_a_crowd: Task[Service] = Task(
    "08",
    "serve_a_crowd",
    "shop",
    load=serve,
    trials=({"orders": 60, "payments": 20, "bystanders": 20},),
    rules=(
        engine_per_call,
        too_many,
        holds_and_waits,
        expired_objects,
        waits_with_the_pool,
        answers_too_early,
    ),
    demands=(demands,),
    proof=prove,
    load_seconds=_LOAD_SECONDS,
    curves=("requests",),
    plot=plot_requests,
    hints=(
        "For each line ask: how often does it run, with 60 customers? Who waits in it, and with what in their hands?"
        " When does it run: before the answer is sent, or after?",
        "One engine, made in shop, and an async_sessionmaker. Each endpoint opens one session, asks for the price in"
        " it, and its block ends before the return. FastAPI(lifespan=...) says what happens at the end.",
        'connect_args={"server_settings": {"lock_timeout": "500ms"}} limits the wait for a lock. The order\'s number'
        " is still to be read after the commit: expire_on_commit=False. At the end: await engine.dispose().",
    ),
)
