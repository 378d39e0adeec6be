"""The load on the service: a bounded crowd of httpx clients, and looks at the service meanwhile, in one process.

Its first line of input is a JSON object (`Load`), its answer one line: the Run. It ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import asyncpg
import httpx
import psutil

from workshop.drill.looks import Looks
from workshop.drill.processors import Processors, server_of
from workshop.drill.run import NO_ANSWER, OK, Answer, Run
from workshop.drill.running import Worker

MOST_CLIENTS = 400
MOST_SECONDS = 120.0
SKU = 1082185
LINES = 15_000  # of the sales, which the export adds up
SCREENS = 12  # in the warehouse, each with the feed open
_ROUND_SECONDS = 3.0  # each customer asks once in so many
_WAVES = 3  # in a round: apps refresh on the second
_WARM_UP_SECONDS = 60.0  # for what is asked of a worker that nobody else asks
_LEFT_SECONDS = 8.0  # longer than any request may take, its time limits one after the other
_EXPORT_SECONDS = 1.5  # between two exports
_CLIENT_SECONDS = 15.0  # until whoever asks hangs up; all should be answered long before
REVOKED, _NOBODY = "token-of-somebody-who-left", "no-token-at-all"


@dataclass(frozen=True)
class Load:
    """What to do: so many clients for so many seconds, on these workers of a service at this database."""

    url: str
    workers: list[Worker]
    clients: int
    seconds: float

    async def run(self) -> Run:
        """Do it, and look on."""
        run = Run(self.clients, self.seconds)
        context = ssl.create_default_context()  # takes long to make, so it is made once
        dsn = self.url.replace("+asyncpg", "")
        settings = {"application_name": "on call"}
        looking = await asyncpg.connect(dsn, server_settings=settings)
        try:
            crowd = _Crowd(self, context, run)
            await crowd.warm_up()
            await looking.execute("TRUNCATE receipts")
            highest = await looking.fetchval("SELECT coalesce(max(id), 0) FROM orders")
            async with Looks(self.workers, looking, run) as looks:
                processors = Processors(self._ours(looking))
                began = time.monotonic()
                await crowd.ask_everything(began)
                run.others, run.idle = processors.shares()
                run.found["left_out"] = await looks.left_out(_LEFT_SECONDS)
            await crowd.ask_what_must_hold(looking, highest)
        finally:
            await looking.close()
        return run

    def _ours(self, looking: asyncpg.Connection) -> Iterator[psutil.Process]:
        """The processes of the load, of the service, and of its database where that is on this machine."""
        yield psutil.Process()
        yield from (psutil.Process(worker.pid) for worker in self.workers)
        server = server_of(looking.get_server_pid())
        if server is not None:
            yield server


class _Crowd:
    """The customers, the screens and the export."""

    def __init__(self, load: Load, context: ssl.SSLContext, run: Run) -> None:
        self._load, self._context, self._run = load, context, run
        self._seen: list[set[int]] = [set() for _ in range(SCREENS)]

    def _client(
        self, number: int, token: str | None = None, patience: float = _CLIENT_SECONDS
    ) -> httpx.AsyncClient:
        """One plain connection to a worker, as the balancer deals them out."""
        port = self._load.workers[number % len(self._load.workers)].port
        return httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {token or f'token-{number}'}"},
            timeout=patience,
            verify=self._context,
            trust_env=False,
        )

    async def warm_up(self) -> None:
        """Each worker imports, connects and caches once, which is no matter of the load."""
        for number, _ in enumerate(self._load.workers):
            async with self._client(number, patience=_WARM_UP_SECONDS) as client:
                await client.post("/orders", json={"sku": SKU})
                await client.post(f"/export?last={LINES}&rehearsal=true")

    async def ask_everything(self, began: float) -> None:
        """Everybody at once, to the end of the load."""
        screens = [asyncio.create_task(self._watch(number)) for number in range(SCREENS)]
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._export(began))
                for number in range(self._load.clients):
                    group.create_task(self._customer(number, began))
        finally:
            for task in screens:
                task.cancel()
            await asyncio.gather(*screens, return_exceptions=True)

    async def _customer(self, number: int, began: float) -> None:
        """Order, look at the orders, and so on; one request in each round."""
        turn = wave = number // len(self._load.workers) % _WAVES
        at = wave * _ROUND_SECONDS / _WAVES
        async with self._client(number) as client:
            while at < self._load.seconds:
                await asyncio.sleep(max(0.0, began + at - time.monotonic()))
                if turn % 2:
                    await self._ask(client, began, "GET", "/orders")
                else:
                    await self._ask(client, began, "POST", "/orders", json={"sku": SKU})
                turn += 1
                at += _ROUND_SECONDS

    async def _export(self, began: float) -> None:
        """The nightly export, as often as the sale makes it run, of one worker after the other."""

        async def once(number: int) -> None:
            async with self._client(number) as client:
                answer = await self._ask(client, began, "POST", f"/export?last={LINES}")
            if answer is not None and answer.status_code == OK:
                self._run.found.setdefault("exported", []).append(answer.json())

        async with asyncio.TaskGroup() as group:
            for number in range(int(self._load.seconds / _EXPORT_SECONDS)):
                at = (number + 0.5) * _EXPORT_SECONDS
                await asyncio.sleep(max(0.0, began + at - time.monotonic()))
                group.create_task(once(number))

    async def _ask(
        self, client: httpx.AsyncClient, began: float, method: str, path: str, **options: Any
    ) -> httpx.Response | None:
        asked = time.monotonic()
        try:
            answer = await client.request(method, path, **options)
        except httpx.TransportError:
            answer = None
        status = NO_ANSWER if answer is None else answer.status_code
        request = f"{method} {path.partition('?')[0]}"
        now = time.monotonic()
        self._run.answers.append(Answer(request, asked - began, now - asked, status))
        return answer

    async def _watch(self, number: int) -> None:
        """A screen of the warehouse; it comes back where the feed breaks off."""
        while True:
            try:
                async with (
                    self._client(number) as client,
                    client.stream("GET", "/feed", timeout=None) as answer,
                ):
                    async for line in answer.aiter_lines():
                        if line.startswith("data: "):
                            self._seen[number].add(int(line.removeprefix("data: ")))
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.5)

    async def ask_what_must_hold(self, looking: asyncpg.Connection, highest: int) -> None:
        """What has to be so whatever the load, asked when it is over, and of each worker."""
        found = self._run.found
        found["strangers"] = found["revoked"] = 0
        for number, _ in enumerate(self._load.workers):
            for kind, token in (("strangers", _NOBODY), ("revoked", REVOKED)):
                async with self._client(number, token, _WARM_UP_SECONDS) as client:
                    if kind == "revoked":
                        await looking.execute(_REVOKE, token, False)
                        await client.get("/me")
                        await looking.execute(_REVOKE, token, True)
                    answer = await client.get("/me")
                    found[kind] += answer.status_code == OK
        found["receipts"], found["distinct"], found["highest"] = await looking.fetchrow(_RECEIPTS)
        orders = {row["id"] for row in await looking.fetch(_NEW_ORDERS, highest)}
        found["orders"] = len(orders)
        found["screens"] = [len(seen & orders) for seen in self._seen]
        wanted = await looking.fetchrow(_EXPORT, LINES)
        found["wanted"] = {"lines": wanted["lines"], "total": str(wanted["total"])}


_REVOKE = "UPDATE api_tokens SET revoked = $2 WHERE token = $1"
_RECEIPTS = "SELECT count(*), count(DISTINCT number), coalesce(max(number), 0) FROM receipts"
_NEW_ORDERS = "SELECT id FROM orders WHERE id > $1"
_EXPORT = "SELECT count(*) AS lines, sum(sales_value) AS total FROM sales WHERE id <= $1"


def main() -> None:
    """Read what to do, do it, answer."""
    request = json.loads(sys.stdin.readline())

    def end_with_the_input() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_the_input, daemon=True).start()
    request["workers"] = [Worker(**worker) for worker in request["workers"]]
    try:
        answer = asyncio.run(Load(**request).run()).to_json()
    except Exception:  # the one who asked tells it
        answer = {"failure": traceback.format_exc()}
    print(json.dumps(answer, default=str), flush=True)


if __name__ == "__main__":
    main()
