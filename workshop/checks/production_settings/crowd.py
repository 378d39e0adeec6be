"""The customers of exercise 09, task 2, and what others see in the database at the moment they are answered."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import httpx
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ormscope import Verdict
from workshop.checks.evidence import Evidence
from workshop.checks.lent import own_households
from workshop.checks.unpooled import of_this_process

SIZE = 5
SKU = 1082185
_PATIENCE = 3.5  # seconds, until a customer counts as one without an answer
_PATIENCE_AT_LOCKS = 2.0  # the same where a lock is in the way
_ANSWERS = (DBAPIError, PoolTimeoutError, TimeoutError)  # for whoever wants what is locked
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

    slowness: int = 1
    returned: str = ""
    orders: int = 0
    payments: int = 0
    unanswered: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    too_early: int = 0
    wrong: int = 0
    missing: int = 0
    unpaid: int = 0
    payers: int = SIZE
    stuck: int = 0
    bystanders: int = 0
    blocked: int = 0
    left: int = 0
    in_line: Verdict | None = None

    @property
    def patience(self) -> float:
        """After how many seconds a customer counts as one without an answer."""
        return _PATIENCE * self.slowness

    @property
    def patience_at_locks(self) -> float:
        """The same where a lock is in the way."""
        return _PATIENCE_AT_LOCKS * self.slowness


class Watched:
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


class Customers:
    """The customers of a service, each with one request."""

    def __init__(self, browser: httpx.AsyncClient, watched: Watched, seen: Service) -> None:
        self._browser = browser
        self._watched = watched
        self._seen = seen
        self._calls = 0

    async def _post(self, path: str, patience: float) -> httpx.Response | None:
        """The answer, or None where there is none in time; raises what the service has raised."""
        self._calls += 1
        call = self._calls
        try:
            async with asyncio.timeout(patience):
                answer = await self._browser.post(path, headers={_CALL: str(call)})
        except TimeoutError:
            return None
        if answer.status_code == _ERROR and call in self._watched.errors:
            raise self._watched.errors[call]
        return answer

    async def order(self, household: int, patience: float | None = None) -> Any:
        """Order one thing; the number, or None where the customer was not served."""
        path = f"/orders?household={household}&sku={SKU}"
        return self._noted(await self._post(path, patience or self._seen.patience))

    async def pay(self, number: Any) -> None:
        """Pay an order that nobody has locked."""
        self._noted(await self._post(f"/orders/{number}/pay", self._seen.patience))

    async def pay_locked(self, number: int) -> bool:
        """Pay an order that somebody else has locked; whether there was no answer in time. An error is one."""
        with suppress(*_ANSWERS):
            return await self._post(f"/orders/{number}/pay", self._seen.patience_at_locks) is None
        return False

    def _noted(self, answer: httpx.Response | None) -> Any:
        if answer is None:
            self._seen.unanswered += 1
        elif answer.status_code != _OK:
            self._seen.refused[answer.status_code] += 1
        else:
            return answer.json()
        return None


async def note_orders(others: asyncpg.Pool, seen: Service) -> None:
    """What is in the database, when the service has ended."""
    price = await others.fetchval("SELECT unit_price FROM products WHERE sku = $1", SKU)
    found = await others.fetch(_ORDERS, [*own_households()[: seen.orders]])
    times = Counter(row["household_id"] for row in found)
    good = [row for row in found if row["lines"] == [f"({SKU},1,{price})"]]
    seen.missing = seen.orders - len(times)
    seen.wrong = seen.orders - sum(times[row["household_id"]] == 1 for row in good)
    seen.unpaid = seen.payments - sum(row["status"] == "paid" for row in found)


async def connections_left(others: asyncpg.Pool) -> int:
    """The connections that this process still has in the server's list."""
    until = time.monotonic() + _GOODBYE
    async with others.acquire() as connection:
        while left := await of_this_process(connection):
            if time.monotonic() > until:
                break
            await asyncio.sleep(0.02)
        return left


async def forget_customers(others: asyncpg.Pool) -> None:
    customers = own_households()
    ours = "household_id BETWEEN $1 AND $2"
    ends = customers[0], customers[-1]
    lines = f"DELETE FROM order_lines USING orders WHERE order_id = orders.id AND {ours}"
    await others.execute(lines, *ends)
    await others.execute(f"DELETE FROM orders WHERE {ours}", *ends)
