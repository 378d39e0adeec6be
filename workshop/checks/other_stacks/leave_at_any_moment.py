"""Exercise 11, task 2: customers who leave while their transaction begins, on SQLite."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ormscope.lab import Recording, storm
from workshop import stacks
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import Conditions
from workshop.checks.task import Task
from workshop.strikes import strike

_PATIENCE = 1.0  # seconds, until a call counts as stuck where nothing is slow
_QUIET = 0.2  # seconds, for what was begun for customers who have gone
_FIRST = 1000  # the first household of those who stay; those who leave are below


@dataclass(kw_only=True)
class Visits(Evidence):
    """What became of those who left, and of those who came after them.

    `ends` tells for each moment at which a call was cancelled how it ended, see `strike`. `stuck_after` is the moment
    after which the next customer had no answer within `patience` seconds; 0 where all had one. Of `stayed` customers
    so many had no order when their call returned, as `early`; in the end there are `halves`, which are not reserved,
    and `twice` as second ones.
    """

    patience: float
    ends: list[str] = field(default_factory=list)
    stuck_after: int = 0
    stayed: int = 0
    early: int = 0
    halves: int = 0
    twice: int = 0


async def come_and_go(
    reserve: Callable[..., Any], conditions: Conditions, *, moments: int
) -> Visits:
    """A customer leaves at the first `await`, another one stays; the next leaves at the second; and so on."""
    from workshop.tortoise_shop import Order

    path, seen = stacks.sqlite_shop(), Visits(patience=_PATIENCE * conditions.slowness)

    async def visits(_: int) -> None:
        await reserve(_FIRST)  # if that does not end, it has nothing to do with those who leave
        for moment in range(1, moments + 1):
            seen.ends.append(await strike(reserve(moment), moment, seen.patience))
            staying = asyncio.create_task(reserve(_FIRST + moment))
            seen.stayed += 1
            done, _pending = await asyncio.wait([staying], timeout=seen.patience)
            stuck = not done or isinstance(staying.exception(), TimeoutError)
            if stuck and "cancelled" in seen.ends:
                staying.cancel()
                seen.stuck_after = moment
                return
            if not done:
                await staying
            staying.result()
            seen.early += not _orders(path, _FIRST + moment)
            if seen.ends[-1] == "ended":
                return

    async with stacks.tortoise(path, 1):
        await Order.all().count()  # the connection is there
        async with evidence(conditions) as noted:
            await storm(visits, 1)
            await asyncio.sleep(_QUIET)
        found = _orders(path)
    vars(seen).update(vars(noted))
    seen.halves = sum(status != "reserved" for _, status in found)
    seen.twice = len(found) - len({household for household, _ in found})
    return seen


def _orders(path: str, household: int | None = None) -> list[tuple[int, str]]:
    """What others see in the file: all orders, or those of one household."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT household_id, status FROM orders").fetchall()
    return [row for row in rows if household in (None, row[0])]


def lost(run: Recording, seen: Visits) -> Iterator[Finding]:
    """The connection has not come back from somebody who left."""
    if seen.stuck_after:
        yield Finding(
            "async-with-gives-it-back",
            f"A customer left at the {_ordinal(seen.stuck_after)} moment at which your code waits, and the next one had"
            f" no answer after {seen.patience:g} s.",
        )


def keeps_them(run: Recording, seen: Visits) -> Iterator[Finding]:
    """A cancellation that nobody hears of."""
    went_on = seen.ends.count("went on")
    if went_on:
        yield Finding(
            "a-cancellation-is-an-error",
            f"{went_on} of {len(seen.ends)} calls were cancelled and returned as if nothing had been.",
        )
    failed = seen.ends.count("failed")
    if failed:
        told = f"{failed} of {len(seen.ends)} calls were cancelled and ended with another error."
        yield Finding("a-cancellation-is-an-error", told)


def demands(run: Recording, seen: Visits) -> Iterator[Finding]:
    """Each sentence of the task's text."""
    if seen.early:
        told = f"{seen.early} of {seen.stayed} customers who stayed had no order when their call returned."
        yield Finding("fire-and-forget", told)
    if seen.halves:
        told = f'{seen.halves} orders are in the file that are not "reserved".'
        yield Finding("half-an-order", told)
    if seen.twice:
        yield Finding("twice", f"{seen.twice} orders are there a second time.")


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


def prove(run: Recording, seen: Visits) -> str:
    """What a run of a right answer has shown."""
    left = seen.ends.count("cancelled")
    return (
        f"A customer left at each moment at which your code waits ({left}), and whoever came after them was served.\n"
        "Each order in the file is reserved, and none is there twice."
    )


leave_at_any_moment: Task[Visits] = Task(
    "11",
    "leave_at_any_moment",
    "reserve",
    load=come_and_go,
    trials=({"moments": 30},),
    rules=(lost, keeps_them),
    demands=(demands,),
    proof=prove,
    curves=("requests",),
    load_seconds=8.0,
    hints=(
        "Who gives back the connection if a cancellation strikes within in_transaction's own __aenter__?",
        "Nothing within the transaction can help: it was never entered. What has to be cancelled instead?",
        "Do the work in a function of its own, in a task, and await asyncio.shield(task): who leaves cancels the"
        " waiting, not the work. Keep the task in a set until it is done, for the loop keeps it only weakly.",
    ),
)
