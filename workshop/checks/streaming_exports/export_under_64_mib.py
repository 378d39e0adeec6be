"""Exercise 04, task 1: an export of many lines to a file, in a small container."""

from __future__ import annotations

import asyncio
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper
from itertools import zip_longest
from tempfile import TemporaryFile
from typing import Any, TextIO

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import evidence
from workshop.checks.lent import Conditions
from workshop.checks.memory import (
    LARGEST_BATCH,
    SAMPLED_SECONDS,
    MemoryBudget,
    Read,
    collects_garbage,
    cursor_without_transaction,
    expunge_all_in_a_stream,
    pages_without_order,
    reading,
    reads_a_stream_in_one_piece,
    yield_per_without_a_stream,
)
from workshop.checks.rules import leaves_it_checked_out
from workshop.checks.task import Task

_SHOWN = 80  # characters of a line; two lines of the sales are told apart by them
MOVED = 229_000  # the first of the lines that a table has whose rows have moved
BUDGET = MemoryBudget(
    container=64,
    objects=2 * LARGEST_BATCH,
    mebibytes=64,
    growth=3,  # right answers stay below 2, and 40,000 more lines of text take 5
)


@dataclass(kw_only=True)
class Export(Read):
    """How many lines were `asked` of all calls and of the `last`, and how many were `written`.

    `difference` tells the first line that is not as it should be, if there is one; `ends` the first or last line of a
    file in which no other is missing, and `disorder` the first line of a file in which only the order is not right.
    `closed` says whether a file came back closed.
    """

    asked: int
    last: int
    written: int
    difference: str
    ends: str
    disorder: str
    closed: bool


async def export_twice(
    export: Callable[..., Any],
    conditions: Conditions,
    *,
    ranges: tuple[range, range],
    moved: bool = False,
) -> Export:
    """Export a few lines and then many, each to a file of its own; of a table whose rows have `moved`, if so."""
    engine = conditions.engine(5)
    if moved:
        event.listen(engine.sync_engine, "connect", _move_rows)
    sessions = async_sessionmaker(engine)

    async def export_range(file: TextIO, ids: range, number: int) -> None:
        await export(sessions, file, ids[0], ids[-1])

    with text_file() as few, text_file() as many, reading(export, engine) as noted_of_reading:
        files = dict(zip((few, many), ranges, strict=True))
        async with evidence(conditions, engine) as noted:
            for file, ids in files.items():
                await storm(partial(export_range, file, ids), 1)
                await asyncio.sleep(SAMPLED_SECONDS)  # also a short export is seen
                if noted_of_reading.streamed > LARGEST_BATCH:
                    break  # more lines would only end the process
        await engine.dispose()
        found = [await compare(engine, file, ids) for file, ids in files.items() if not file.closed]
        closed = few.closed or many.closed
    return Export(
        **vars(noted),
        **vars(noted_of_reading),
        asked=sum(map(len, ranges)),
        last=len(ranges[1]),
        written=sum(comparison.written for comparison in found),
        difference=next(filter(None, (comparison.difference for comparison in found)), ""),
        ends=next(filter(None, (comparison.ends for comparison in found)), ""),
        disorder=next(filter(None, (comparison.disorder for comparison in found)), ""),
        closed=closed,
    )


def _move_rows(connection: Any, record: Any) -> None:
    """Let a connection see the last rows of the sales in another order, as after many an UPDATE."""
    cursor = connection.cursor()
    cursor.execute(
        "CREATE TEMPORARY TABLE sales AS"
        f" SELECT * FROM sales WHERE id >= {MOVED} ORDER BY hashint4(id)"
    )
    cursor.close()
    connection.commit()


def text_file() -> Any:
    """A file as the learner's code is lent it."""
    return TemporaryFile("w+", encoding="utf-8", newline="")


@dataclass
class Comparison:
    """How many lines were written, and the first that is not as it should be: see Export."""

    written: int = 0
    difference: str = ""
    ends: str = ""
    disorder: str = ""


async def compare(engine: AsyncEngine, file: TextIO, ids: range) -> Comparison:
    """Compare a file with the sales lines of these numbers, as PostgreSQL writes them."""
    query = f"SELECT * FROM sales WHERE id BETWEEN {ids[0]} AND {ids[-1]} ORDER BY id"
    comparison = Comparison()
    with TemporaryFile() as wanted:  # in memory it would count as the export's
        async with engine.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            await driver.copy_from_query(query, output=wanted, format="csv")
        right = TextIOWrapper(wanted, encoding="utf-8", newline="")
        for number, (line, other) in enumerate(zip_longest(_lines(file), _lines(right)), 1):
            comparison.written += line is not None
            if line != other and not comparison.difference:
                comparison.difference = (
                    f"Line {number} is {_shown(line)}; wanted is {_shown(other)}."
                )
        if comparison.difference:
            _tell_more(
                comparison, list(map(_shown, _lines(file))), list(map(_shown, _lines(right)))
            )
    return comparison


def _lines(file: TextIO) -> Iterator[list[str]]:
    file.flush()
    file.seek(0)
    return csv.reader(file)


def _tell_more(comparison: Comparison, written: list[str], right: list[str]) -> None:
    """What else is known of a file that is not as it should be."""
    if sorted(written) == sorted(right):
        comparison.disorder = comparison.difference
    missing = {*right} - {*written}
    if missing and missing <= {right[0], right[-1]} and {*written} <= {*right}:
        comparison.ends = min(missing)


def _shown(line: list[str] | None) -> str:
    return "missing" if line is None else ",".join(line)[:_SHOWN] or "empty"


def closes_the_file(run: Recording, seen: Export) -> Iterator[Finding]:
    """A file that was lent, and cannot be written to or read any more."""
    if seen.closed:
        yield Finding("closes-what-it-was-lent", "The file was closed when your function returned.")


def demands(run: Recording, seen: Export) -> Iterator[Finding]:
    """All lines are written, in their order, as PostgreSQL writes them."""
    if seen.disorder:
        yield Finding("no-order-by", f"All lines are there, in another order. {seen.disorder}")
    if seen.difference:
        yield from pages_without_order(run, seen)
    if seen.ends:
        yield Finding(
            "leaves-out-an-end",
            f"Of {seen.asked:,} lines, {seen.written:,} were written. Missing is {seen.ends}.",
        )
    if seen.written < seen.asked:
        yield Finding(
            "part-of-the-rows", f"Of {seen.asked:,} lines, {seen.written:,} were written."
        )
    if seen.difference:
        yield Finding("another-file", seen.difference)
    yield from pages_without_order(run, seen)


def prove(run: Recording, seen: Export) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{seen.written:,} lines as they should be, under {BUDGET.container} MiB, and no more memory for the last"
        f" {seen.last:,} than for the first {seen.asked - seen.last:,}."
    )


export_under_64_mib = Task(
    "04",
    "export_under_64_mib",
    "export",
    load=export_twice,
    trials=(
        # No multiples of any batch.
        {"ranges": (range(1, 10_007), range(1, 50_013))},
        {
            "ranges": (range(MOVED + 700, MOVED + 1_705), range(MOVED + 500, MOVED + 2_703)),
            "moved": True,
        },
    ),
    rules=(
        collects_garbage,
        expunge_all_in_a_stream,
        yield_per_without_a_stream,
        reads_a_stream_in_one_piece,
        BUDGET.loads_everything,
        BUDGET.keeps_everything,
        cursor_without_transaction,
        closes_the_file,
    ),
    demands=(demands, leaves_it_checked_out),
    proof=prove,
    curves=("memory", "objects"),
    memory=BUDGET,
    hints=(
        "How many lines are in memory when the first one is written?",
        "Let the lines come in batches. In which of the lesson's rungs does a batch have a size, "
        "and what do you keep of a batch once it is written?",
        "Add execution_options(yield_per=1_000) to the statement, await session.stream_scalars(…) in place of "
        "session.scalars(…), and write each batch of `async for batch in sales.partitions()`.",
    ),
)
