"""The payment provider of exercise 06, task 1: it takes its time, and looks at what the others can see meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from workshop.checks.calls import Holds, current_call, pause
from workshop.payment import Declined

_PROVIDER_SECONDS = 0.15


class UnansweredError(TimeoutError):
    """The provider has charged, and nobody hears of it: the network has lost its answer."""


@dataclass
class Asked:
    """What a provider has noted.

    `calls` counts how often each call has asked it, `charged` the payments of each order, `statuses` those that orders
    had meanwhile, and `left_waiting` the calls that did not wait for its answer. `held` says whether a call had a
    connection while it worked.
    """

    calls: Counter[int | None] = field(default_factory=Counter)
    charged: Counter[int] = field(default_factory=Counter)
    statuses: Counter[str | None] = field(default_factory=Counter)
    left_waiting: int = 0
    held: bool = False


class Provider:
    """The payment provider: somebody else, and slow. While it works it looks as another process would.

    It declines the orders in `declined`; those in `unanswered` it charges, and its answer gets lost; a call in
    `given_up` is cancelled by its customer meanwhile, through the function that stands there.
    """

    def __init__(self, holds: Holds, database: asyncpg.Pool, owed: dict[int, int]) -> None:
        self.noted = Asked()
        self.declined: set[int] = set()
        self.unanswered: set[int] = set()
        self.given_up: dict[int, Callable[[], Any]] = {}
        self._holds = holds
        self._database = database
        self._owed = owed

    async def __call__(self, number: Any, household: Any) -> None:
        """Pay an order."""
        if self._owed.get(number) != household:
            raise ValueError(
                f"provider({number!r}, {household!r}): there is no such order of such a household"
            )
        call = current_call.get()
        self.noted.calls[call] += 1
        try:
            await self._think(call, number)
        except asyncio.CancelledError:
            self.noted.left_waiting += call not in self.given_up
            raise
        if number in self.declined:
            raise Declined(f"order {number}: card declined")
        self.noted.charged[number] += 1
        if number in self.unanswered:
            raise UnansweredError(f"order {number}: no answer")

    async def _think(self, call: int | None, number: int) -> None:
        self._look(call)
        found = "SELECT status FROM orders WHERE id = $1"
        self.noted.statuses[await self._database.fetchval(found, number)] += 1
        await pause(_PROVIDER_SECONDS / 2)
        self._look(call)
        if call in self.given_up:
            self.given_up[call]()
        await pause(_PROVIDER_SECONDS / 2)
        self._look(call)

    def _look(self, call: int | None) -> None:
        self.noted.held |= self._holds.count(call) > 0
