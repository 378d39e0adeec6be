"""Exercise 05, task 1: a report that waits for a synchronous driver within the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn, cast

import psycopg  # noqa: F401 (its import takes a moment, and would count as a stall of the learner's)
from sqlalchemy import create_engine, func, select
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import evidence
from workshop.checks.lent import Conditions
from workshop.checks.returned import another_answer, is_same
from workshop.checks.rules import (
    another_pool,
    changes_the_pool,
    engine_per_call,
    leaves_it_checked_out,
    one_session_many_tasks,
    own_pools,
    sync_engine_in_async_code,
)
from workshop.checks.task import Task
from workshop.checks.the_blocked_loop.pulse import Beats, pulse
from workshop.checks.unpooled import Unpooled, backends, connects_past_the_pools
from workshop.shop import Sale

_REPORT_SECONDS = 0.1  # that the report takes in PostgreSQL; the exercise says so
_AGAIN = 4
_STOOD_STILL = 0.6  # seconds in all; a dozen reports in the loop's thread take twice as long
_LOOP_THREADS = 8
_MOST_THREADS = 16
_MOST_STEPS = 200  # of the loop for each report; a right one needs two dozen
_OLD_TIMEOUT = 1.0
_OTHER_LOOP = ("attached to a different loop", "bound to a different event loop")


@dataclass(kw_only=True)
class Reports(Unpooled):
    """How many reports were `right`, `another` the first that was not, and `beats` what the loop's pulse showed.

    `processes` is how many processes the code wanted to start, `disposed` whether an engine has another pool than it
    had, and `still_working` how many connections were busy for nobody when all calls had ended.
    """

    right: int
    another: Finding | None
    beats: Beats
    processes: int
    disposed: bool
    still_working: int

    @property
    def stall(self) -> str:
        """That the loop stood still, and where, in words."""
        ((place, _),) = self.beats.places.most_common(1)
        return f"While your calls ran, the loop stood still again and again, in {place}"


async def ask_for_reports(
    report: Callable[..., Any], conditions: Conditions, *, calls: int, capacity: int
) -> Reports:
    """Ask for so many reports at once, and for a few of them again."""
    asyncio.get_running_loop().set_default_executor(futures.ThreadPoolExecutor(_LOOP_THREADS))
    shop = conditions.engine(capacity)
    old = create_engine(
        make_url(conditions.url).set(drivername="postgresql+psycopg"),
        pool_size=capacity,
        max_overflow=0,
        pool_timeout=_OLD_TIMEOUT,
        pool_logging_name="old service",
    )
    async with shop.connect() as connection:
        columns = func.count().label("lines"), func.sum(Sale.sales_value)
        sold = select(Sale.sku, *columns).group_by(Sale.sku).order_by(columns[0].desc(), Sale.sku)
        wanted = {
            row.sku: (row.lines, row.sum) for row in await connection.execute(sold.limit(calls))
        }
    await shop.dispose()
    skus, told = list(wanted), list[tuple[int, Any]]()

    async def ask(number: int) -> None:
        told.append((skus[number], await report(old, shop, skus[number])))

    pools = shop.pool, old.pool
    # What is asked of an asynchronous pool is asked of a synchronous one as well.
    async with (
        backends(conditions) as server,
        evidence(conditions, shop, cast(AsyncEngine, old)) as noted,
    ):
        with _no_processes() as wished, pulse() as measured:
            await storm(ask, calls)
            if measured.stood_still < _STOOD_STILL and len(told) == calls:
                await storm(ask, _AGAIN)
    still_working = cast(QueuePool, old.pool).checkedout()
    disposed = (shop.pool, old.pool) != pools
    await shop.dispose()
    others = [(sku, row) for sku, row in told if not is_same(_figures(row), wanted[sku])]
    return Reports(
        **vars(noted),
        backends=server,
        right=len(told) - len(others),
        another=next(
            (another_answer(f"report(old, shop, {sku})", row, wanted[sku]) for sku, row in others),
            None,
        ),
        beats=measured,
        processes=len(wished),
        disposed=disposed,
        still_working=still_working,
    )


@contextmanager
def _no_processes() -> Iterator[list[BaseProcess]]:
    """Note each process that is to be started, and start none: it would outlive the check, or wait for ever."""
    wished, start = list[BaseProcess](), BaseProcess.start

    def refuse(process: BaseProcess) -> NoReturn:
        wished.append(process)
        raise RuntimeError("the check starts no other process")

    BaseProcess.start = refuse  # type: ignore[assignment, method-assign]
    try:
        yield wished
    finally:
        BaseProcess.start = start  # type: ignore[method-assign]


def _figures(row: Any) -> tuple[Any, ...] | None:
    """What a report says, as a row, a tuple or a list; None where it is no such thing."""
    if isinstance(row, str | bytes | Mapping) or not hasattr(type(row), "__len__"):
        return None
    return tuple(row)


def starts_processes(run: Recording, seen: Reports) -> Iterator[Finding]:
    """Another process, to which an engine cannot go."""
    if seen.processes:
        yield Finding(
            "process-takes-no-engine",
            "Your code wanted to start other processes; the check let none of them start.",
        )


def asks_another_loop(run: Recording, seen: Reports) -> Iterator[Finding]:
    """A loop of its own, with connections of the first."""
    if any(text in request.error for request in run.requests for text in _OTHER_LOOP):
        yield Finding(
            "another-loop", "The call raised RuntimeError: what it awaited belongs to another loop."
        )


def turns_round_and_round(run: Recording, seen: Reports) -> Iterator[Finding]:
    """A loop that never rests while it waits."""
    # As many as for two reports go in each second to whoever looks on.
    if seen.beats.steps > _MOST_STEPS * (run.announced + 2 * run.seconds):
        yield Finding(
            "asks-again-and-again",
            f"The loop took more than {_MOST_STEPS} steps for each report; it needs two dozen or so.",
        )


def disposes_of_an_engine(run: Recording, seen: Reports) -> Iterator[Finding]:
    """An engine that came back with another pool."""
    if seen.disposed:
        yield Finding(
            "not-what-was-asked",
            "Afterwards an engine had another pool, as after dispose(): both were to stay as they are.",
        )


def blocks_the_loop(run: Recording, seen: Reports) -> Iterator[Finding]:
    """The loop stood still; the idea is in what it stood still for."""
    if seen.beats.stood_still <= _STOOD_STILL:
        return
    if any("is not callable" in request.error for request in run.requests):
        yield Finding(
            "calls-instead-of-passing",
            f"{seen.stall}; and what it returned was then called, which raised TypeError.",
        )
    waits = seen.beats.waits
    if waits["pool"]:
        yield Finding(
            "pool-wait-without-await",
            f"{seen.stall}: it waited for a connection of the synchronous pool, and those who had one could not go on.",
        )
    if waits["thread"]:
        yield Finding("waits-for-the-thread", f"{seen.stall}, where it waited for a thread.")
    # A stack that is left while it is read looks cut off, as a greenlet's does; few of many looks do.
    if waits["in a greenlet"] > waits["call"]:
        yield Finding("run-sync-is-no-thread", f"{seen.stall}, in a call that SQLAlchemy made.")
    if own_pools(run, seen) or seen.tampered:
        yield Finding(
            "more-connections-for-one-thread",
            f"{seen.stall}, and there were more connections than you were given.",
        )
    half = run.announced // 2
    if seen.queuers > half or seen.sleepers > half:
        yield Finding(
            "blocks-one-at-a-time",
            f"{seen.stall}, while the others waited for their turn in {seen.queues_at or seen.sleeps_at}.",
        )
    yield Finding("async-def-is-enough", f"{seen.stall}.")


def thread_for_each_call(run: Recording, seen: Reports) -> Iterator[Finding]:
    """Threads without a limit."""
    if seen.beats.threads > _MOST_THREADS:
        yield Finding(
            "thread-for-each-call",
            f"Your code started more than {_MOST_THREADS} threads.",
        )


def one_at_a_time_in_the_background(run: Recording, seen: Reports) -> Iterator[Finding]:
    """The loop is free, and the connections are, too."""
    most = max(pool.most_checked_out for pool in run.pools)
    if seen.right and most <= (run.pools[0].capacity or 0) // 4:
        yield Finding(
            "one-at-a-time-in-the-background",
            f"The loop was free, and at most {most} of {run.pools[0].capacity} connections were in use.",
        )


def limit_ends_the_thread(run: Recording, seen: Reports) -> Iterator[Finding]:
    """Work that goes on although nobody waits for it any more."""
    if seen.still_working or seen.left_running:
        yield Finding(
            "limit-ends-the-thread",
            "All calls had ended, and reports were still being made for nobody.",
        )


def demands(run: Recording, seen: Reports) -> Iterator[Finding]:
    """Each call returns the lines and the revenue, fresh from PostgreSQL."""
    if seen.another is not None:
        yield seen.another
    if any(request.end - request.start < 0.9 * _REPORT_SECONDS for request in run.requests):
        yield Finding(
            "success-without-work",
            "Some calls ended sooner than PostgreSQL can make the report: they did not ask for it.",
        )


def prove(run: Recording, seen: Reports) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{seen.right} of {run.announced} reports right, with {run.pools[0].capacity} connections,"
        " and the loop did not stand still in your code."
    )


free_the_loop = Task(
    "05",
    "free_the_loop",
    "report",
    load=ask_for_reports,
    trials=({"calls": 12, "capacity": 8}, {"calls": 40, "capacity": 10}),
    rules=(
        starts_processes,
        sync_engine_in_async_code,
        # Before the loop's pulse: to make an engine or to connect takes a moment, on a busy machine a long one.
        engine_per_call,
        connects_past_the_pools("past-the-pools"),
        asks_another_loop,
        blocks_the_loop,
        turns_round_and_round,
        thread_for_each_call,
        another_pool,
        disposes_of_an_engine,
        changes_the_pool,
        one_session_many_tasks,
        one_at_a_time_in_the_background,
        limit_ends_the_thread,
        leaves_it_checked_out,
    ),
    demands=(demands,),
    proof=prove,
    curves=("requests", "loop lag"),
    hints=(
        "Where in report could another task run? Count its awaits.",
        "Two ways lead out: an engine whose driver awaits, or another thread for the call that does not. "
        "You are lent what both of them need.",
        "Either `async with shop.connect() as connection` and await what it executes, or "
        "`await asyncio.to_thread(report_of, old, sku)`: the function and its arguments, not its result.",
    ),
)
