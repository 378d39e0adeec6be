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

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import Conditions
from workshop.checks.memory import (
    SAMPLED_SECONDS,
    MemoryBudget,
    collects_garbage,
    expunge_all_in_a_stream,
)
from workshop.checks.rules import cursor_without_transaction
from workshop.checks.task import Task, Trials

BUDGET = MemoryBudget(
    container=64,
    objects=10_000,  # two batches, if they are large
    mebibytes=64,
    growth=3,  # right answers stay below 2, and 40,000 more lines of text take 5
)


@dataclass(kw_only=True)
class Export(Evidence):
    """How many lines were `asked` of all calls and of the `last`, and how many were `written`.

    `difference` tells the first line that is not as it should be, if there is one.
    """

    asked: int
    last: int
    written: int
    difference: str


async def export_twice(
    export: Callable[..., Any], conditions: Conditions, *, first: int, lines: tuple[int, int]
) -> Export:
    """Export a few lines and then many, each to a file of its own."""
    engine = conditions.engine(5)
    sessions = async_sessionmaker(engine)

    async def export_range(file: TextIO, ids: range, number: int) -> None:
        await export(sessions, file, ids[0], ids[-1])

    with text_file() as few, text_file() as many:
        ranges = {few: range(first, first + lines[0]), many: range(first, first + lines[1])}
        async with evidence(conditions, engine) as noted:
            for file, ids in ranges.items():
                await storm(partial(export_range, file, ids), 1)
                await asyncio.sleep(SAMPLED_SECONDS)  # also a short export is seen
        await engine.dispose()
        found = [await compare(engine, file, ids) for file, ids in ranges.items()]
    return Export(
        **vars(noted),
        asked=sum(lines),
        last=lines[1],
        written=sum(comparison.written for comparison in found),
        difference=next(filter(None, (comparison.difference for comparison in found)), ""),
    )


def text_file() -> Any:
    """A file as the learner's code is lent it."""
    return TemporaryFile("w+", encoding="utf-8", newline="")


@dataclass
class Comparison:
    """How many lines were written, and the first that is not as it should be."""

    written: int = 0
    difference: str = ""


async def compare(engine: AsyncEngine, file: TextIO, ids: range) -> Comparison:
    """Compare a file with the sales lines of these numbers, as PostgreSQL writes them."""
    query = f"SELECT * FROM sales WHERE id BETWEEN {ids[0]} AND {ids[-1]} ORDER BY id"
    comparison = Comparison()
    with TemporaryFile() as wanted:  # in memory it would count as the export's
        async with engine.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            await driver.copy_from_query(query, output=wanted, format="csv")
        for written in (wanted, file):
            written.flush()
            written.seek(0)
        expected = csv.reader(TextIOWrapper(wanted, encoding="utf-8", newline=""))
        for number, (line, right) in enumerate(zip_longest(csv.reader(file), expected), 1):
            comparison.written += line is not None
            if line != right and not comparison.difference:
                comparison.difference = (
                    f"Line {number} is {_shown(line)}; wanted is {_shown(right)}."
                )
    return comparison


def _shown(line: list[str] | None) -> str:
    return "missing" if line is None else ",".join(line)[:80] or "empty"


def demands(run: Recording, seen: Export) -> Iterator[Finding]:
    """All lines are written, in their order, as PostgreSQL writes them."""
    if seen.written < seen.asked:
        yield Finding(
            "part-of-the-rows", f"Of {seen.asked:,} lines, {seen.written:,} were written."
        )
    if seen.difference:
        yield Finding("another-file", seen.difference)


def prove(trials: Trials[Export]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{seen.written:,} lines as they should be, under {BUDGET.container} MiB, and no more memory for the last"
        f" {seen.last:,} than for the first {seen.asked - seen.last:,}."
        for _, seen in trials
    )


export_under_64_mib = Task(
    "04",
    "export_under_64_mib",
    "export",
    load=export_twice,
    trials=(
        {"first": 1, "lines": (10_000, 50_000)},
        {"first": 150_001, "lines": (2_000, 2_000)},
    ),
    rules=(
        collects_garbage,
        expunge_all_in_a_stream,
        BUDGET.loads_everything,
        BUDGET.keeps_everything,
        cursor_without_transaction,
    ),
    demands=(demands,),
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
