"""Exercise 11, task 3: a psycopg_pool before a crowd."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests
from sqlalchemy.engine import make_url

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import Conditions
from workshop.checks.task import Task

_SIZE, _LINE, _SECONDS = 5, 10, 1.0
_DEFAULT_SIZE = 4
_SOON = 0.5  # seconds; whoever is refused at once, is so before
_PATIENCE = 2.5  # seconds, until a wait counts as one without an end
_START = 5.0  # seconds for the first connections


@dataclass(kw_only=True)
class Crowd(Evidence):
    """What became of a crowd before a pool.

    `returned` is the type of what the function returned, where that is no pool. `held` are those who got a connection
    and kept it; of the others so many were `refused` at once, had waited `too_late`, or still waited when the check
    had no patience any more. `waits` are the seconds of those who were too late.
    """

    returned: str = ""
    held: int = 0
    refused: int = 0
    too_late: int = 0
    still_waiting: int = 0
    waits: list[float] = field(default_factory=list)


async def meet_the_crowd(
    open_pool: Callable[[str], Any], conditions: Conditions, *, crowd: int
) -> Crowd:
    """A crowd that wants connections, of which the first keep theirs."""
    made: list[Any] = []
    seen = Crowd()
    conninfo = make_url(conditions.url).set(drivername="postgresql")

    async def start(number: int) -> None:
        made.append(await open_pool(conninfo.render_as_string(hide_password=False)))

    async with evidence(conditions) as noted:
        await storm(start, 1)
        if made and not isinstance(pool := made[0], AsyncConnectionPool):
            seen.returned = type(pool).__name__
        elif made:
            try:
                await pool.wait(_START)
                await _hold_all(pool, seen, crowd)
            finally:
                await pool.close(timeout=0.1)
    vars(seen).update(vars(noted))
    return seen


async def _hold_all(pool: AsyncConnectionPool[Any], seen: Crowd, crowd: int) -> None:
    let_go = asyncio.Event()

    async def customer() -> None:
        began = time.perf_counter()
        try:
            async with pool.connection():
                seen.held += not let_go.is_set()
                await let_go.wait()
        except TooManyRequests:
            seen.refused += 1
        except PoolTimeout:
            seen.waits.append(time.perf_counter() - began)

    tasks = [asyncio.create_task(customer()) for _ in range(crowd)]
    await asyncio.wait(tasks, timeout=_PATIENCE)
    seen.too_late = len(seen.waits)
    seen.still_waiting = sum(not task.done() for task in tasks) - seen.held
    let_go.set()
    await asyncio.gather(*tasks)


def wrong_size(run: Recording, seen: Crowd) -> Iterator[Finding]:
    """Fewer or more connections than the task wants."""
    if seen.held == _DEFAULT_SIZE:
        told = f"{seen.held} customers had a connection at once; the task wants {_SIZE}."
        yield Finding("four-is-the-default", told)
    if seen.held and seen.held != _SIZE:
        told = f"{seen.held} customers had a connection at once; the task wants {_SIZE}."
        yield Finding("not-what-was-asked", told)


def line_without_an_end(run: Recording, seen: Crowd) -> Iterator[Finding]:
    """Nobody is refused, however long the line."""
    waited = seen.too_late + seen.still_waiting
    if seen.held and not seen.refused and waited > _LINE:
        yield Finding(
            "a-line-has-an-end", f"{waited} customers stood in line, and none was refused."
        )


def waits_too_long(run: Recording, seen: Crowd) -> Iterator[Finding]:
    """Whoever is in line is there for half a minute."""
    if seen.still_waiting:
        told = f"{seen.still_waiting} customers still stood in line after {_PATIENCE:g} s."
        yield Finding("a-pool-is-impatient", told)


def demands(run: Recording, seen: Crowd) -> Iterator[Finding]:
    """Each sentence of the task's text; what the rules say comes before it."""
    if seen.returned:
        told = f"open_pool(conninfo) returned no AsyncConnectionPool but {seen.returned}."
        yield Finding("not-what-was-asked", told)
        return
    if seen.too_late != _LINE:
        told = f"{seen.too_late} customers stood in line, and {seen.refused} were refused at once; the task wants"
        yield Finding("not-what-was-asked", f"{told} {_LINE} in line.")
    if min(seen.waits) < 0.9 * _SECONDS:
        told = f"Whoever stood in line was sent away after {min(seen.waits):.1f} s; the task wants {_SECONDS:g} s."
        yield Finding("not-what-was-asked", told)


def prove(run: Recording, seen: Crowd) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{seen.held} customers had a connection, {seen.too_late} stood in line and were sent away after a second,"
        f" {seen.refused} were refused at once."
    )


draw_a_line: Task[Crowd] = Task(
    "11",
    "draw_a_line",
    "open_pool",
    load=meet_the_crowd,
    trials=({"crowd": 40},),
    rules=(wrong_size, line_without_an_end, waits_too_long),
    demands=(demands,),
    proof=prove,
    curves=("requests",),
    load_seconds=12.0,
    hints=(
        "Three arguments of AsyncConnectionPool are missing or too large. Its documentation has each with its default.",
        "max_size is min_size unless somebody says otherwise; timeout is 30 seconds; and max_waiting=0 means that all"
        " may wait.",
        "min_size=5, max_size=5, timeout=1, max_waiting=10.",
    ),
)
