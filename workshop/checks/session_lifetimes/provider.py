"""The payment provider of exercise 06, task 1: it takes its time, and looks at what the others can see meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import asyncpg

from workshop.checks.session_lifetimes.calls import Holds, current_call

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
        call = current_call.get()
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
            for timer in timers:
                timer.cancel()
        self._look(call)
        if number in self._declined:
            raise DeclinedError(f"order {number}: card declined")
        self.charged[number] += 1

    def _look(self, call: int | None) -> None:
        self.held = self.held or self._holds.count(call) > 0
