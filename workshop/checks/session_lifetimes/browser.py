"""The customers of exercise 06, task 2: tabs that follow an order, and the news that their pages wait for."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any


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
        for future in self._waiting.values():
            if not future.done():
                future.set_result(None)

    def is_awaited(self, number: int) -> bool:
        """Whether somebody waits for news of this order."""
        return number in self._waiting and not self._waiting[number].done()


class Tab:
    """A browser's tab that asks an application for the page of one order, and keeps it open.

    `events` are those that it has read, of each its data; a slow tab reads so many, `most_read`, and no more, and
    `is_blocked` then says that the application stands in a write to it. `status` is that of the answer, and `unread`
    what came without an end.
    """

    def __init__(self, order: int, most_read: int | None = None) -> None:
        self.order = order
        self.most_read = most_read
        self.status: int | None = None
        self.events: list[str] = []
        self.is_open = True
        self.is_blocked = False
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._has_asked = False
        self.unread = ""

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
        # An event may come in parts; it ends with an empty line.
        self.unread += message.get("body", b"").decode().replace("\r\n", "\n")
        *events, self.unread = self.unread.split("\n\n")
        for event in events:
            data = [line[5:].strip() for line in event.splitlines() if line.startswith("data:")]
            if data:
                await self._read("\n".join(data).strip('"'))

    async def _read(self, data: str) -> None:
        if len(self.events) == self.most_read:
            self.is_blocked = True
            await asyncio.shield(self._closed)
        self.events.append(data)
