"""Exercise 07, task 1: a report of many queries, which ask at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import async_sessionmaker

from ormscope.lab import Recording, storm
from workshop.checks.calls import (
    Holds,
    current_call,
    raise_own,
    unless_raised,
    within,
)
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Work, evidence
from workshop.checks.lent import Conditions, connections
from workshop.checks.returned import another_answer
from workshop.checks.rules import USE_OF_POOLS, lock_without_an_end
from workshop.checks.task import Task
from workshop.checks.unpooled import NO_OTHER_CONNECTIONS, Unpooled, backends
from workshop.shop import Sale

_AT_ONCE = 3
_SESSION_SHARED = "https://sqlalche.me/e/21/isce"
_NO_PRODUCT = 2**40  # more than the column's type can hold: the query fails


@dataclass(kw_only=True)
class Reports(Work, Unpooled):
    """Of so many calls `asked`, how many were `right`, and `another` tells what one returned instead.

    Of so many `failing`, `told` raised, and in `refused` the database was asked and refused. `most` is the most
    connections that one call had at once, `shared` says whether a connection was used by two tasks at the same time.
    `at_work` and `at_work_after_failing` are the calls of which something went on after their end, and `errors` are
    exceptions that were returned, as text.
    """

    right: int
    asked: int
    another: Finding | None
    failing: int
    told: int
    refused: int
    most: int
    shared: bool
    at_work: int
    at_work_after_failing: int
    errors: list[str]


async def show_reports(
    report: Callable[..., Any],
    conditions: Conditions,
    *,
    calls: int,
    capacity: int,
    products: int,
) -> Reports:
    """Show so many reports at once, some of which must fail."""
    engine = conditions.engine(capacity)
    sold = select(Sale.sku, func.sum(Sale.quantity)).group_by(Sale.sku).order_by(Sale.sku)
    holds, shown, told, refused = Holds(engine), dict[int, Any](), set[int](), set[int]()
    failing = {*range(3, calls, 5)}

    # Where one query fails, the others are still at work.
    holds.is_slow = lambda call, text: call in failing and str(_NO_PRODUCT) not in text

    async def show(number: int) -> None:
        current_call.set(number)
        asked = _asked(numbers, number, products)
        if number in failing:
            asked.insert(2, _NO_PRODUCT)
        try:
            shown[number] = await report(sessions, asked)
        except Exception as error:  # whatever it makes of a query that failed, it says so
            for each in within(error):
                if isinstance(each, PoolTimeoutError):
                    raise each from None
            if number not in failing:
                raise_own(error)
            told.add(number)
            if _is_from_the_database(error):
                refused.add(number)
        finally:
            holds.end(number)

    async with backends(conditions) as server:
        async with engine.connect() as connection:
            some = {sku: int(count) for sku, count in await connection.execute(sold.limit(400))}
        await engine.dispose()
        numbers = list(some)
        async with evidence(conditions, engine) as noted:
            sessions = async_sessionmaker(engine)
            await storm(show, calls)
    await engine.dispose()
    expected = {
        number: {sku: some[sku] for sku in _asked(numbers, number, products)}
        for number in range(calls)
        if number not in failing
    }
    wrong = [number for number in expected if shown.get(number) != expected[number]]
    refused |= failing & holds.failed
    return Reports(
        **vars(noted),
        backends=server,
        done=len(expected) - len(wrong) + len(told),
        right=len(expected) - len(wrong),
        asked=len(expected),
        another=another_answer(
            f"report(Session, {list(expected[wrong[0]])})", shown.get(wrong[0]), expected[wrong[0]]
        )
        if wrong
        else None,
        failing=len(failing),
        told=len(told),
        refused=len(refused),
        most=holds.most,
        shared=holds.shared,
        at_work=len(holds.at_work),
        at_work_after_failing=len(holds.at_work & told),
        errors=[text for returned in shown.values() for text in _errors_in(returned)],
    )


def _asked(numbers: Sequence[int], number: int, products: int) -> list[int]:
    return [numbers[(number * 7 + index * 3) % len(numbers)] for index in range(products)]


def _is_from_the_database(error: BaseException | None) -> bool:
    """Whether the database, or its driver, has refused, and this came of it."""
    return error is not None and any(
        type(each).__module__.startswith(("sqlalchemy", "asyncpg"))
        or _is_from_the_database(each.__cause__ or each.__context__)
        for each in within(error)
    )


def _errors_in(report: Any) -> list[str]:
    values = report.values() if isinstance(report, dict) else ()
    return [str(value) for value in values if isinstance(value, BaseException)]


def wrong_way_of_asking(run: Recording, seen: Reports) -> Iterator[Finding]:
    """Queries that share a session, outlive their call, or hand on their exceptions as if they were numbers."""
    errors = [*seen.errors, *(request.error for request in run.requests)]
    if seen.shared or any(_SESSION_SHARED in error for error in errors):
        yield Finding(
            "one-session-many-tasks", "Several tasks wanted to use one connection at the same time."
        )
    if seen.at_work_after_failing or (seen.left_running and seen.told):
        yield Finding(
            "gather-leaves-the-others",
            "A query failed, the call raised, and other queries of the same call were still at work.",
        )
    if seen.at_work:
        yield Finding(
            "fire-and-forget",
            "Calls had ended, and queries of theirs were still at work.",
        )
    if seen.errors:
        yield Finding(
            "errors-among-results", "Among the numbers that calls returned there were exceptions."
        )


def takes_the_whole_pool(run: Recording, seen: Reports) -> Iterator[Finding]:
    """More connections than one call may have."""
    if seen.most > _AT_ONCE:
        yield Finding(
            "takes-the-whole-pool", f"One call had more than {_AT_ONCE} connections at once."
        )


def demands(run: Recording, seen: Reports) -> Iterator[Finding]:
    """A call with a query that failed raises, and each other returns its sums."""
    if seen.another is not None:
        yield seen.another
    if seen.refused < seen.failing:
        yield Finding(
            "looks-for-it-itself",
            f"{seen.failing} calls had a number that the database refuses,"
            f" and {seen.failing - seen.refused} of them did not ask the database for it.",
        )
    if seen.told < seen.failing:
        yield Finding(
            "swallows-the-timeout",
            f"{seen.failing} calls had a query that failed, and {seen.told} of them raised.",
        )


def prove(run: Recording, seen: Reports) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{seen.right} of {seen.asked} reports right with {connections(run)}, at most {_AT_ONCE} for one call;"
        f" {seen.failing} failed as they should, and left nothing behind."
    )


ask_in_parallel = Task(
    "07",
    "ask_in_parallel",
    "report",
    load=show_reports,
    trials=(
        {"calls": 14, "capacity": 6, "products": 8},
        {"calls": 10, "capacity": 1, "products": 6},
    ),
    rules=unless_raised(
        wrong_way_of_asking,
        lock_without_an_end,
        *NO_OTHER_CONNECTIONS,
        *USE_OF_POOLS,
        takes_the_whole_pool,
    ),
    demands=(demands,),
    proof=prove,
    hints=(
        "How many tasks use the session at the same moment, and for how many is a session made?",
        "Before you give each task a session: who counts the connections of one call then, and what do the other tasks "
        "do when one fails? Do they have to be tasks at all?",
        "One statement: select(Sale.sku, func.sum(Sale.quantity)).where(Sale.sku.in_(skus)).group_by(Sale.sku).",
    ),
)
