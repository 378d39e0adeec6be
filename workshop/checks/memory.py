"""How much memory a task's code may take, and what is wrong where it takes more."""

from __future__ import annotations

import gc
import re
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import FrameType
from typing import Any, Generic, TypeVar

from sqlalchemy import event
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_ss_cursor
from sqlalchemy.ext.asyncio import AsyncEngine

from ormscope.lab import Recording
from ormscope.places import place
from workshop.checks.answer import replace_names
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence
from workshop.checks.unheard import is_learners

LARGEST_BATCH = 5_000
"""How many rows a task's code may have at once."""
SAMPLED_SECONDS = 0.2
"""How long a load stands still after each call: memory is looked at every 20 ms, on a busy machine less often."""
_COLLECTIONS = 3  # that are really made for the learner's code; the rest are counted, for each takes 10 ms and more
_PAGE = re.compile(r"\bOFFSET\b|\bid (>=?|BETWEEN) .*\bLIMIT\b", re.DOTALL)
_ADDS_UP = re.compile(r"\bsum\s*\(|\bGROUP BY\b", re.IGNORECASE)
_FEW_PAGES = 2
_NO_TRANSACTION = "cursor cannot be created outside of a transaction"
_READ_AT_ONCE = "with a server-side cursor"  # of AsyncMethodRequired
T = TypeVar("T")


@dataclass
class Reading:
    """What is noted of how code reads: the most rows that it had at once of a query, a stream in one piece, a batch.

    `streams` is how many results it began to stream, `unordered` how often it asked for a page, by OFFSET or behind a
    number, by one statement without ORDER BY, `added` whether a statement let the database group or add up, and
    `collected_at` where it first called the garbage collector. `late_reads` is how often a stream was read on after
    the end of its transaction, and `late_error` what that raised: it depends on whose the connection is by then.
    """

    queried: int = 0
    streamed: int = 0
    batch: int = 0
    streams: int = 0
    unordered: int = 0
    added: bool = False
    collected_at: str = ""
    late_reads: int = 0
    late_error: str = ""

    @property
    def in_one_go(self) -> int:
        """The most lines that SQLAlchemy made into objects or rows without a pause."""
        return max(self.queried, self.streamed, self.batch)


@dataclass(kw_only=True)
class Read(Evidence, Reading):
    """The evidence of code that reads many rows."""


@contextmanager
def reading(answer: Callable[..., Any], engine: AsyncEngine) -> Iterator[Reading]:
    """Note how the learner's code reads by the engine that it is lent, to the end of the block."""
    noted, calls, pages = Reading(), 0, Counter[str]()
    transactions: dict[int, Any] = {}  # in which a stream began, by its cursor's id
    collect = gc.collect
    fetch_all: Callable[[Any], Any] = AsyncAdapt_asyncpg_ss_cursor.fetchall
    fetch_many: Callable[..., Any] = AsyncAdapt_asyncpg_ss_cursor.fetchmany

    def note_collection(generation: int = 2) -> int:
        nonlocal calls
        calls += 1
        noted.collected_at = noted.collected_at or _learners_line(sys._getframe(1))
        return collect(generation) if calls <= _COLLECTIONS else 0

    @contextmanager
    def read_on(cursor: Any) -> Iterator[None]:
        now = cursor._adapt_connection._transaction
        is_late = transactions.get(id(cursor), now) is not now
        noted.late_reads += is_late
        try:
            yield
        except Exception as error:
            if is_late:
                noted.late_error = noted.late_error or type(error).__name__
            raise

    def note_streamed(cursor: Any) -> Any:
        with read_on(cursor):
            rows = fetch_all(cursor)
        noted.streamed = max(noted.streamed, len(rows))
        return rows

    def note_batch(cursor: Any, size: int | None = None) -> Any:
        with read_on(cursor):
            rows = fetch_many(cursor, size)
        noted.batch = max(noted.batch, len(rows))
        return rows

    def note_query(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if cursor.description is not None:
            noted.queried = max(noted.queried, cursor.rowcount)
            if cursor.rowcount < 0:  # a server-side cursor does not know it yet
                noted.streams += 1
                transactions[id(cursor)] = cursor._adapt_connection._transaction
        note_sum(statement)
        if _PAGE.search(statement) and "ORDER BY" not in statement:
            pages[statement] += 1
            noted.unordered = max(pages.values())

    def note_sum(statement: str) -> None:
        noted.added = noted.added or bool(_ADDS_UP.search(statement))

    def note_logged(logged: Any) -> None:
        note_sum(logged.query)

    def listen_to_the_driver(connection: Any, *_: Any) -> None:
        """What is asked of the driver itself passes SQLAlchemy by."""
        connection.driver_connection.add_query_logger(note_logged)

    event.listen(engine.sync_engine, "checkout", listen_to_the_driver)
    event.listen(engine.sync_engine, "after_cursor_execute", note_query)
    # How a server-side cursor is read: SQLAlchemy has no event for it.
    AsyncAdapt_asyncpg_ss_cursor.fetchall = note_streamed  # type: ignore[method-assign]
    AsyncAdapt_asyncpg_ss_cursor.fetchmany = note_batch  # type: ignore[method-assign]
    gc.collect = note_collection
    replace_names(answer, collect, note_collection)
    try:
        yield noted
    finally:
        event.remove(engine.sync_engine, "checkout", listen_to_the_driver)
        event.remove(engine.sync_engine, "after_cursor_execute", note_query)
        gc.collect = collect
        AsyncAdapt_asyncpg_ss_cursor.fetchmany = fetch_many  # type: ignore[method-assign]
        AsyncAdapt_asyncpg_ss_cursor.fetchall = fetch_all  # type: ignore[method-assign]


def _learners_line(frame: FrameType | None) -> str:
    """The innermost line of the learner's code that led to a frame; of a thread that began elsewhere there is none."""
    while frame is not None and not is_learners(frame.f_code.co_filename):
        frame = frame.f_back
    return "a thread" if frame is None else place((frame.f_code, frame.f_lineno)).short


class LookedAt(Generic[T]):
    """A coroutine that can be awaited like any other: `look` is called whenever it waits for something."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], look: Callable[[], None]) -> None:
        self._coroutine = coroutine
        self._look = look

    def __await__(self) -> Generator[Any, Any, T]:
        """Pass on what the coroutine waits for, and what comes of it."""
        steps: Generator[Any, Any, T] = self._coroutine.__await__()
        step: Callable[[], Any] = partial(next, steps)
        while True:
            try:
                awaited = step()
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            self._look()
            try:
                step = partial(steps.send, (yield awaited))
            except BaseException as error:
                step = partial(steps.throw, error)


@dataclass(frozen=True)
class MemoryBudget:
    """What a run may take beyond what it began with; its methods are rules, in the order in which they are asked.

    `container` is at how many MiB the run is ended, and `mebibytes` how many are too many. `objects` is how many
    mapped objects may be alive at once. `growth` is how many MiB more the last call may take than those before it,
    where the last has more to do.
    """

    container: float
    objects: int
    mebibytes: float
    growth: float | None = None

    def loads_everything(self, run: Recording, seen: Evidence | None) -> Iterator[Finding]:
        """More objects than there may be."""
        if run.most_objects > self.objects:
            yield Finding(
                "loads-everything",
                f"More than {self.objects:,} objects were alive at the same time.",
            )

    def keeps_everything(self, run: Recording, seen: Evidence | None) -> Iterator[Finding]:
        """Few objects, and too much memory, or more and more of it."""
        few = f"No more than {self.objects:,} objects were alive, and"
        if run.extra_memory > self.mebibytes or run.ended == "memory limit":
            yield Finding(
                "keeps-everything-in-another-shape",
                f"{few} your code still took more than {self.mebibytes:g} MiB.",
            )
        if self.growth is not None and _growth_at_the_end(run) > self.growth:
            yield Finding(
                "keeps-everything-in-another-shape", f"{few} more to do still took more memory."
            )

    def exceeded(self, run: Recording) -> Finding | None:
        """The first of the rules that is broken: all that can be known of a run that passed its limit."""
        rules = (yield_per_without_a_stream, self.loads_everything, self.keeps_everything)
        return next(chain.from_iterable(rule(run, None) for rule in rules), None)


def yield_per_without_a_stream(run: Recording, seen: Evidence | None) -> Iterator[Finding]:
    """Batches were asked of `execute` or `scalars`, which read all rows at once, and then refuse."""
    lines = (line for request in run.requests for line in request.error.splitlines())
    if said := next((line.partition(": ")[2] for line in lines if _READ_AT_ONCE in line), None):
        yield Finding(
            "yield-per-without-a-stream", f"SQLAlchemy raised AsyncMethodRequired: {said}"
        )


def reads_a_stream_in_one_piece(run: Recording, seen: Read) -> Iterator[Finding]:
    """A stream that was not read in batches."""
    if seen.streamed > LARGEST_BATCH:
        yield Finding(
            "stream-without-yield-per",
            f"A stream was read in one piece: {seen.streamed:,} rows at once.",
        )


def pages_without_order(run: Recording, seen: Read) -> Iterator[Finding]:
    """Pages of rows that come in no order, so that one need not begin where another ends."""
    if seen.unordered > _FEW_PAGES:
        yield Finding(
            "no-order-by",
            f"Your code asked for {seen.unordered:,} pages (LIMIT) by a statement without ORDER BY.",
        )


def added_by_the_database(run: Recording, seen: Read) -> Iterator[Finding]:
    """Lines that never come to Python."""
    if seen.added:
        yield Finding("added-by-the-database", "Your statement groups or adds up lines itself.")


def collects_garbage(run: Recording, seen: Read) -> Iterator[Finding]:
    """A call that costs much, and frees nothing that is referred to."""
    if seen.collected_at:
        yield Finding("collects-garbage", f"{seen.collected_at}, called gc.collect().")


def cursor_without_transaction(run: Recording, seen: Read) -> Iterator[Finding]:
    """A stream that is read on after its transaction has ended."""
    raised = {request.outcome.rpartition(".")[2] for request in run.requests}
    never_had_one = any(_NO_TRANSACTION in request.error for request in run.requests)
    name = "NoActiveSQLTransactionError" if never_had_one else seen.late_error
    if name in raised:
        yield Finding(
            "stream-without-its-transaction",
            f"Reading the stream raised {name}: a cursor needs a transaction that is open.",
        )


def expunge_all_in_a_stream(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """A call that takes away what the stream still needs."""
    if any("identity map is no longer valid" in request.error for request in run.requests):
        yield Finding(
            "expunge-all-in-a-stream",
            "The second batch raised InvalidRequestError: this identity map is no longer valid.",
        )


def _growth_at_the_end(run: Recording) -> float:
    """How many MiB more the last of several calls took than all that was before it."""
    if len(run.requests) < 2:
        return 0.0
    last = max(run.requests, key=lambda request: request.start)
    until = last.end + SAMPLED_SECONDS
    before = max(sample.mebibytes for sample in run.memory if sample.time <= last.start)
    return max(sample.mebibytes for sample in run.memory if sample.time <= until) - before
