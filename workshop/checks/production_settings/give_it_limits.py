"""Exercise 09, task 1: the engine of a service, on a day with a crowd, slow statements, a lock and a restart."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ormscope.lab import Recording
from workshop.checks.catalogue import Finding
from workshop.checks.production_settings.day import (
    CANCELED,
    LOAD_SECONDS,
    LOCKED,
    SIZE,
    Day,
    Limits,
    Wait,
    use_for_a_day,
)
from workshop.checks.task import Task

_NAME = "shop"
_POOL_TIMEOUT = 0.5  # seconds
_SLACK = 0.9  # no clock is early, but some are coarse
_TINY = re.compile(r"\dms")  # of a limit, in the server's words
_DEFAULT_NAMES = {"", "asyncpg"}
_WANTED = Limits("1s", "500ms")


def demands(run: Recording, seen: Day) -> Iterator[Finding]:
    """Each sentence of the task's text; what explains most comes first."""
    if seen.returned:
        told = f"make_engine(url) returned no AsyncEngine but {seen.returned}."
        yield Finding("not-what-was-asked", told)
        return
    yield from _of_the_pool(seen)
    yield from _of_the_server(seen)
    if lost := sum(wait.end == "lost" for wait in seen.customers):
        yield Finding(
            "the-pool-would-know",
            f"The server had ended all connections, and then {len(seen.customers)} customers came: {lost} of them"
            " were handed a dead one, and got the error.",
        )
    yield from _of_customers(seen)
    if seen.names & _DEFAULT_NAMES:
        yield Finding(
            "everybody-is-nobody",
            f"In pg_stat_activity the connections of your engine are called {_quoted(seen.names)}.",
        )
    if seen.names != {_NAME}:
        yield Finding(
            "not-what-was-asked",
            f'In pg_stat_activity your connections are called {_quoted(seen.names)}; the task wants "{_NAME}".',
        )


def ends_what_is_quick(run: Recording, seen: Day) -> Iterator[Finding]:
    """What the server ends though it is quick: also what the driver asks when it opens a connection.

    So the call may fail with whatever the driver makes of that.
    """
    quick = [*seen.customers, *(wait for wait in seen.in_line if wait.end == CANCELED)]
    ended = sum(wait.end == CANCELED for wait in quick)
    tiny = {limit for limits in seen.first_limits for limit in limits if _TINY.fullmatch(limit)}
    if ended or tiny:
        told = f"The server ended {ended} of {len(quick)} quick statements."
        if tiny:
            told = f"{told} It says of your connections: a limit of {' and '.join(sorted(tiny))}."
        yield Finding("a-number-is-in-seconds", told)


def _of_the_pool(seen: Day) -> Iterator[Finding]:
    """How many connections there are, and how long others wait for one."""
    held = sum(wait.end == "ok" for wait in seen.in_line)
    asked = f"{len(seen.in_line)} customers wanted a connection at the same time, and kept it."
    if held > SIZE:
        told = f"{asked} {held} had one, and the task allows {SIZE}."
        yield Finding("size-is-not-the-limit", told)
    left_out = [wait for wait in seen.in_line if wait.end != "ok"]
    if endless := sum(wait.end == "waits" for wait in left_out):
        yield Finding(
            "everybody-is-patient",
            f"{asked} {held} had one, and {endless} still stood in line after {seen.patience:g} s.",
        )
    if held < SIZE:
        told = f"{asked} Only {held} got one; the task wants {SIZE}."
        yield Finding("not-what-was-asked", told)
    for wait in left_out:
        if wait.end != "refused" or wait.seconds < _POOL_TIMEOUT * _SLACK:
            told = f"Somebody in line for a connection {_ended(wait)}; the task wants TimeoutError"
            yield Finding("not-what-was-asked", f"{told} after {_POOL_TIMEOUT:g} s.")
    if seen.pool_timeout > _POOL_TIMEOUT:
        told = f"Your pool lets people wait for {seen.pool_timeout:g} s; the task wants {_POOL_TIMEOUT:g} s."
        yield Finding("not-what-was-asked", told)


def _of_the_server(seen: Day) -> Iterator[Finding]:
    """What becomes of slow statements, and of those that wait for a lock."""
    slow = f"{len(seen.statements)} customers sent a statement that takes 30 s."
    locked = f"{len(seen.locks)} customers wanted to lock a row that a colleague had locked."
    for told, waits in ((slow, seen.statements), (locked, seen.locks)):
        endless = [wait for wait in waits if wait.end == "waits"]
        first, later = _of_statements(seen.first_limits), _of_statements(seen.later_limits)
        if endless and later == {"0"} != first:
            limits = ", ".join(sorted(first))
            yield Finding(
                "once-set-is-set",
                f"{told} After {seen.patience:g} s nothing had ended it. The server's statement_timeout was {limits}"
                " when your connections were new, and 0 when they came from the pool again.",
            )
        if given_up := [wait for wait in waits if wait.end == "given up"]:
            seconds = max(wait.seconds for wait in given_up)
            yield Finding(
                "whoever-leaves-ends-it",
                f"{told} After {seconds:.1f} s it was your client that gave up, not the server.",
            )
        if endless and waits is seen.statements:
            told = f"{told} After {seen.patience:g} s it was still at work, and had its connection."
            yield Finding("somebody-presses-ctrl-c", told)
        limited_as_work = [wait for wait in waits if wait.end == CANCELED]
        if waits is seen.locks and (endless or limited_as_work):
            until = "they still waited" if endless else "statement_timeout ended them"
            seconds = seen.patience if endless else min(wait.seconds for wait in limited_as_work)
            told = f"{told} After {seconds:.1f} s {until}, with {len(waits)} of {SIZE} connections."
            yield Finding("a-lock-is-no-line", told)
    for other in seen.later_limits - {_WANTED}:
        yield Finding(
            "not-what-was-asked",
            f"The server says of a connection: statement_timeout {other.statement}, lock_timeout {other.lock}; the"
            f" task wants {_WANTED.statement} and {_WANTED.lock}.",
        )
    for wait in (*seen.statements, *seen.locks):
        if wait.end not in (CANCELED, LOCKED):
            told = f"A statement that takes too long {_ended(wait)}; the task wants the server to end it."
            yield Finding("not-what-was-asked", told)


def _of_statements(limits: set[Limits]) -> set[str]:
    return {limit.statement for limit in limits}


def _of_customers(seen: Day) -> Iterator[Finding]:
    for wait in seen.customers:
        if wait.end != "ok":
            told = f"A customer with a quick statement {_ended(wait)}; the task wants them served."
            yield Finding("not-what-was-asked", told)


def _ended(wait: Wait) -> str:
    how = {
        "ok": "was served",
        "refused": "got TimeoutError from the pool",
        "given up": "got TimeoutError from the client",
        "lost": "lost the connection",
        "waits": "was still waiting",
        CANCELED: "was ended by the server's statement_timeout",
        LOCKED: "was ended by the server's lock_timeout",
    }
    return f"{how[wait.end]} after {wait.seconds:.2f} s"


def _quoted(names: set[str]) -> str:
    return " and ".join(f'"{name}"' for name in sorted(names))


def prove(run: Recording, seen: Day) -> str:
    """What a run of a right answer has shown."""
    held = sum(wait.end == "ok" for wait in seen.in_line)
    return (
        f"{len(seen.in_line)} customers at once: {held} had a connection, {len(seen.in_line) - held} were told to come"
        f" back. {len(seen.statements)} statements without an end and {len(seen.locks)} waits for a lock: ended by"
        " the server.\n"
        "All connections ended from outside: 0 of the customers after it noticed. The server knows all of them as"
        f" {_quoted(seen.names)}."
    )


give_it_limits: Task[Day] = Task(
    "09",
    "give_it_limits",
    "make_engine",
    load=use_for_a_day,
    trials=({"crowd": 12, "customers": 20},),
    rules=(ends_what_is_quick,),
    demands=(demands,),
    proof=prove,
    load_seconds=LOAD_SECONDS,
    hints=(
        "Two of the limits, and what happens to dead connections, are arguments of create_async_engine. The others are"
        " the server's: who tells it, and when?",
        "The pool: pool_size, max_overflow, pool_timeout, pool_pre_ping. The server:"
        ' connect_args={"server_settings": {...}}, which asyncpg sends when it connects. Its values are text.',
        'In server_settings a number without a unit is in milliseconds: "lock_timeout": "500ms",'
        ' "statement_timeout": "1s". And "application_name" goes there, too.',
    ),
)
