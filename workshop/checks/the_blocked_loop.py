"""The checks of exercise 05: a report of the old service, and sums that keep everybody waiting."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from decimal import Decimal
from types import CodeType, FrameType
from typing import Any, cast

import psycopg  # noqa: F401 (its import takes a moment, and would count as a stall of the learner's)
from sqlalchemy import Engine, create_engine, event, func, select
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.pool import QueuePool
from sqlalchemy.util.queue import Queue as PoolQueue

from ormscope.lab import Recording, storm
from ormscope.places import is_user_code, place
from ormscope.stacks import thread_frames
from workshop.checks.evidence import evidence
from workshop.checks.lent import engine_of
from workshop.checks.task import Finding, Task
from workshop.shop import Sale

_BEAT_SECONDS = 0.005
_LOOK_SECONDS = 0.01
_LATE_SECONDS = 0.07  # that the loop must be late before anybody asks why; a report takes longer
_HERE = os.path.abspath(__file__)
_LOOP_STEP = asyncio.Handle._run.__code__
_POOL_WAIT = PoolQueue.get.__code__
_THREAD_WAITS: set[CodeType] = {
    function.__code__
    for function in (
        futures.Future.result,
        futures.Future.exception,
        futures.wait,
        threading.Thread.join,
        queue.Queue.get,
    )
}


class Pulse:
    """The pulse of the running event loop, and what its thread does in the learner's code while there is none.

    `stood_still` is how many seconds the loop stood still within the learner's code. `waits` counts what it was
    seen to stand still for: the "pool", a "thread", a call "in a greenlet", or a "call" of the task's own.
    `longest_work` is the longest time that the loop's thread worked from one beat to the next, in seconds of its
    own: while the machine is busy with others, it does not work. `threads` is the most threads at once, beyond
    those at the beginning.
    """

    def __init__(self) -> None:
        self.stood_still = 0.0
        self.waits = Counter[str]()
        self._places = Counter[str]()
        self.longest_work = 0.0
        self.threads = 0
        self._closed = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._beaten, self._worked = time.perf_counter(), time.thread_time()
        self._seen_at: float | None = None  # the beat after which the learner's code was seen
        self._handle = self._loop.call_soon(self._beat)
        self._threads_before = threading.active_count() + 1  # with the one that looks
        self._looker = threading.Thread(target=self._look, name="the check", daemon=True)
        self._looker.start()

    @property
    def stands_at(self) -> str:
        """Where in the learner's code the loop stood still most of the time; empty where it never did."""
        return max(self._places, key=self._places.__getitem__, default="")

    def close(self) -> None:
        """Stop, and count what is going on."""
        self._count()
        self._handle.cancel()
        self._closed.set()
        self._looker.join()

    def _beat(self) -> None:
        self._count()
        self._handle = self._loop.call_later(_BEAT_SECONDS, self._beat)

    def _count(self) -> None:
        now, worked = time.perf_counter(), time.thread_time()
        if self._seen_at == self._beaten:
            self.stood_still += now - self._beaten
        self.longest_work = max(self.longest_work, worked - self._worked)
        self._beaten, self._worked = now, worked

    def _look(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            self.threads = max(self.threads, threading.active_count() - self._threads_before)
            beaten = self._beaten
            if time.perf_counter() - beaten < _LATE_SECONDS:
                continue
            frames = thread_frames(self._loop_thread)
            own = [one for one in frames if _is_learners(one)]
            if not own:
                continue
            self._seen_at = beaten
            code = {one.f_code for one in frames}
            if _POOL_WAIT in code:
                self.waits["pool"] += 1
            elif code & _THREAD_WAITS:
                self.waits["thread"] += 1
            elif _LOOP_STEP not in code:  # a stack of its own, that begins below the loop
                self.waits["in a greenlet"] += 1
            else:
                self.waits["call"] += 1
            self._places[place((own[-1].f_code, own[-1].f_lineno)).short] += 1


def _is_learners(frame: FrameType) -> bool:
    filename = frame.f_code.co_filename
    return is_user_code(filename) and os.path.dirname(filename) != os.path.dirname(_HERE)


@contextmanager
def pulse() -> Iterator[Pulse]:
    """Feel the pulse of the running event loop from here to the end of the block."""
    measured = Pulse()
    try:
        yield measured
    finally:
        measured.close()


def _through_sync_engine(run: Recording) -> Finding | None:
    if any("MissingGreenlet" in one.outcome for one in run.requests):
        return Finding(
            "sync-face-of-an-async-engine",
            "The call raised MissingGreenlet: its driver wanted to await, and there was nobody to do it.",
        )
    return None


# free_the_loop

_REPORT_SECONDS = 0.1  # that the report takes in PostgreSQL; the exercise says so
_AGAIN = 4
_STOOD_STILL = 0.6  # seconds in all; a dozen reports in the loop's thread take twice as long
_LOOP_THREADS = 8
_MOST_THREADS = 16
_OLD_TIMEOUT = 1.0


async def ask_for_reports(
    report: Callable[..., Any], url: str, *, calls: int, capacity: int
) -> dict[str, Any]:
    """Ask for so many reports at once, and for a few of them again; how many were right, and what was noted."""
    asyncio.get_running_loop().set_default_executor(futures.ThreadPoolExecutor(_LOOP_THREADS))
    shop = engine_of(url, capacity)
    old = create_engine(
        make_url(url).set(drivername="postgresql+psycopg"),
        pool_size=capacity,
        max_overflow=0,
        pool_timeout=_OLD_TIMEOUT,
        pool_logging_name="old service",
    )
    async with shop.connect() as connection:
        columns = func.count().label("lines"), func.sum(Sale.sales_value)
        sold = select(Sale.sku, *columns).group_by(Sale.sku).order_by(columns[0].desc(), Sale.sku)
        wanted = {
            one.sku: (one.lines, one.sum) for one in await connection.execute(sold.limit(calls))
        }
    await shop.dispose()
    skus, told = list(wanted), list[tuple[int, Any]]()

    async def ask(number: int) -> None:
        told.append((skus[number], await report(old, shop, skus[number])))

    # What is asked of an asynchronous pool is asked of a synchronous one as well.
    async with evidence(shop, cast(AsyncEngine, old)) as noted:
        with pulse() as measured:
            await storm(ask, calls)
            if measured.stood_still < _STOOD_STILL:
                await storm(ask, _AGAIN)
    still_working = _checked_out(old)
    await shop.dispose()
    return dataclasses.asdict(noted) | {
        "right": sum(_figures(row) == wanted[sku] for sku, row in told),
        "stood_still": measured.stood_still,
        "stands_at": measured.stands_at,
        "waits": measured.waits,
        "threads": measured.threads,
        "still_working": still_working,
    }


def _checked_out(engine: Engine) -> int:
    return cast(QueuePool, engine.pool).checkedout()


def _figures(row: Any) -> tuple[Any, ...] | None:
    """What a report says, as a row, a tuple or a list; None where it is no such thing."""
    try:
        return tuple(row)[:2]
    except TypeError:
        return None


def judge_reports(run: Recording) -> Finding | None:
    """What is wrong with how reports were made."""
    seen = run.result
    if (finding := _through_sync_engine(run)) is not None:
        return finding
    own = run.pools[2:]
    # Before the loop's pulse: to make an engine takes a moment, on a busy machine a long one.
    if len(own) > 3 or any(one.capacity is None for one in own):
        return Finding("engine-per-call", "Your code made engines of its own, again and again.")
    if seen["stood_still"] > _STOOD_STILL:
        return _blocked(run, own)
    if seen["threads"] > _MOST_THREADS:
        return Finding(
            "thread-for-each-call",
            f"For {run.announced - _AGAIN} reports at once there were more than {_MOST_THREADS} threads.",
        )
    if seen["tampered"]:
        return Finding("changes-the-pool", "A pool came back with other settings than it had.")
    if seen["sharers"]:
        return Finding(
            "one-session-many-tasks", "Several tasks wanted to use one connection at the same time."
        )
    most = max(one.most_checked_out for one in run.pools)
    if seen["right"] and most <= (run.pools[0].capacity or 0) // 4:
        return Finding(
            "one-at-a-time-in-the-background",
            f"The loop was free, and at most {most} of {run.pools[0].capacity} connections were in use.",
        )
    if seen["still_working"] or seen["left_running"]:
        return Finding(
            "limit-ends-the-thread",
            "All calls had ended, and reports were still being made for nobody.",
        )
    if seen["left_out"]:
        return Finding("leaves-it-checked-out", "A connection was still checked out at the end.")
    if run.completed < run.announced:
        return None
    if not seen["ended"]:
        return None
    if seen["right"] < run.announced:
        return Finding(
            "success-without-work",
            f"{run.completed} calls ended without an error, and {seen['right']} returned the lines and the revenue.",
        )
    if any(one.end - one.start < 0.9 * _REPORT_SECONDS for one in run.requests):
        return Finding(
            "success-without-work",
            "Some calls ended sooner than PostgreSQL can make the report: they did not ask for it.",
        )
    return None


def _blocked(run: Recording, own: list[Any]) -> Finding:
    """The wrong idea of an answer in which the loop stood still."""
    seen = run.result
    evidence = f"While your calls ran, the loop stood still again and again, in {seen['stands_at']}"
    if any("is not callable" in one.error for one in run.requests):
        return Finding(
            "calls-instead-of-passing",
            f"{evidence}; and what it returned was then called, which raised TypeError.",
        )
    reasons = seen["waits"]
    if reasons["pool"]:
        return Finding(
            "pool-wait-without-await",
            f"{evidence}: it waited for a connection of the synchronous pool, and those who had one could not go on.",
        )
    if reasons["thread"]:
        return Finding("waits-for-the-thread", f"{evidence}, where it waited for a thread.")
    # A stack that is left while it is read looks cut off, as a greenlet's does; few of many looks do.
    if reasons["in a greenlet"] > reasons["call"]:
        return Finding("run-sync-is-no-thread", f"{evidence}, in a call that SQLAlchemy made.")
    if own or seen["tampered"]:
        return Finding(
            "more-connections-for-one-thread",
            f"{evidence}, and there were more connections than you were given.",
        )
    half = run.announced // 2
    if seen["queuers"] > half or seen["sleepers"] > half:
        return Finding(
            "blocks-one-at-a-time",
            f"{evidence}, while the others waited for their turn in {seen['queues_at'] or seen['sleeps_at']}.",
        )
    return Finding("async-def-is-enough", f"{evidence}.")


def prove_reports(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.result['right']} of {run.announced} reports right, with {run.pools[0].capacity} connections,"
        " and the loop did not stand still in your code."
        for run in runs
    )


free_the_loop = Task(
    "05",
    "free_the_loop",
    "report",
    load=ask_for_reports,
    trials=({"calls": 12, "capacity": 8}, {"calls": 40, "capacity": 10}),
    judge=judge_reports,
    proof=prove_reports,
    curves=("requests", "loop lag"),
    hints=(
        "Where in report could another task run? Count its awaits.",
        "Two ways lead out: an engine whose driver awaits, or another thread for the call that does not. "
        "You are lent what both of them need.",
        "Either `async with shop.connect() as connection` and await what it executes, or "
        "`await asyncio.to_thread(report_of, old, sku)`: the function and its arguments, not its result.",
    ),
)


# sum_without_a_stall

_OVERLOOKED = (
    0.5  # of the time that the code as it was given keeps the loop; the exercise asks for a fifth
)
_LINES_FOR_A_WAY = 10
_MANY_WAYS = 500  # to the server, in a call that did not end


async def sum_stores(
    revenue: Callable[..., Any], url: str, *, first: int, lines: int
) -> dict[str, Any]:
    """Sum up so many sales lines for each store; what came of it, and how long the loop was kept in one go."""
    engine, last = engine_of(url, 5), first + lines - 1
    sessions, found = async_sessionmaker(engine), list[Any]()
    asked = Counter[str]()

    async def ask(number: int) -> None:
        found.append(await revenue(sessions, first, last))

    def note(*about: Any) -> None:
        options = about[4].execution_options
        batch = options.get("yield_per")
        asked["ways"] += 1 if batch is None else max(lines // batch, 1)
        asked["streamed"] += bool(options.get("stream_results"))
        asked["in batches"] += batch is not None

    async with sessions() as session:
        sums = select(Sale.store_id, func.sum(Sale.sales_value)).group_by(Sale.store_id)
        rows = await session.execute(sums.where(Sale.id.between(first, last)))
        right: dict[int, Decimal] = {one.store_id: one.sum for one in rows}
    gc.collect()
    gc.freeze()  # to look through all modules again and again is not the learner's work
    # On a loop of its own, so that the picture does not show it.
    as_given = await asyncio.to_thread(asyncio.run, _kept_by_all_at_once(url, first, last))
    event.listen(engine.sync_engine, "before_cursor_execute", note)
    async with evidence(engine) as noted:
        with pulse() as measured:
            await storm(ask, 1)
    await engine.dispose()
    answer = found[0] if found else None
    return dataclasses.asdict(noted) | {
        "lines": lines,
        "stores": len(right),
        "kept": measured.longest_work / as_given,
        "asked": asked,
        "right": answer == right and not any(isinstance(one, float) for one in answer.values()),
        "nearly": _nearly(answer, right),
    }


async def _kept_by_all_at_once(url: str, first: int, last: int) -> float:
    """How long the given code keeps a loop, in one go, to load these lines, in seconds of its thread."""
    engine = engine_of(url, 1, "as given")
    async with AsyncSession(engine) as session:
        await session.connection()
        worked = []
        for _ in range(2):  # the machine may slow down one of them
            with pulse() as measured:
                (await session.scalars(select(Sale).where(Sale.id.between(first, last)))).all()
            worked.append(measured.longest_work)
    await engine.dispose()
    return min(worked)


def _nearly(answer: Any, right: dict[int, Decimal]) -> bool:
    """Whether an answer has the right stores and sums, but for what a float loses."""
    try:
        return answer.keys() == right.keys() and all(
            abs(float(answer[store]) - float(right[store])) < 0.01 for store in right
        )
    except (AttributeError, TypeError, ValueError):
        return False


def judge_sums(run: Recording) -> Finding | None:
    """What is wrong with how sales were summed up."""
    seen = run.result
    if (finding := _through_sync_engine(run)) is not None:
        return finding
    asked = seen["asked"]
    if seen["kept"] > _OVERLOOKED:
        evidence = "Your code kept the loop about as long, in one go, as the code that was given"
        if asked["in batches"]:
            return Finding("one-huge-batch", f"{evidence}, although it asked for batches.")
        if asked["streamed"]:
            return Finding("stream-without-yield-per", f"{evidence}, although it asked to stream.")
        return Finding("the-driver-awaits-so-all-is-well", f"{evidence}.")
    if asked["ways"] > (seen["lines"] // _LINES_FOR_A_WAY if seen["ended"] else _MANY_WAYS):
        return Finding(
            "batch-of-one",
            f"The loop was free, and your code went to the server far too often for {seen['lines']:,} lines.",
        )
    if run.completed < run.announced or not seen["ended"]:
        return None
    if seen["left_out"]:
        return Finding("leaves-it-checked-out", "A connection was still checked out at the end.")
    if seen["right"]:
        return None
    if seen["nearly"]:
        return Finding("floats-lose-cents", "The sums are floats, or no longer exact.")
    return Finding(
        "part-of-the-rows",
        f"The sums of {seen['stores']} stores were asked for, and some are missing or differ.",
    )


def prove_sums(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.result['lines']:,} lines, the sums of {run.result['stores']} stores exact, and the loop was kept for"
        " less than half as long, in one go, as by the code that was given."
        for run in runs
    )


sum_without_a_stall = Task(
    "05",
    "sum_without_a_stall",
    "revenue",
    load=sum_stores,
    trials=({"first": 1, "lines": 14_000}, {"first": 150_001, "lines": 12_000}),
    judge=judge_sums,
    proof=prove_sums,
    curves=("loop lag",),
    hints=(
        "The driver awaits while the rows come. Which line makes objects of them, and how many in one go?",
        "Between two batches the loop has its turn. Or does Python need the lines at all, to know their sum?",
        "Either stream_scalars with execution_options(yield_per=1_000) and `async for batch in sales.partitions()`, or "
        "select(Sale.store_id, func.sum(Sale.sales_value)) with group_by(Sale.store_id).",
    ),
)
