"""Exercise 06, task 2: a page that stays open, and a session that stays open with it."""

from __future__ import annotations

from collections.abc import Iterator

from ormscope.lab import Recording
from workshop.checks.calls import (
    unless_raised,
)
from workshop.checks.catalogue import Finding
from workshop.checks.lent import connections
from workshop.checks.rules import (
    LEFT_OVER,
    deadlock,
    one_at_a_time,
    one_session_many_tasks,
    retries,
    swallows_the_timeout,
)
from workshop.checks.session_lifetimes.pages import (
    QUIET_SECONDS,
    RIGHT_BEGINNING,
    STATUSES,
    Pages,
    open_tabs,
)
from workshop.checks.task import Task
from workshop.checks.unpooled import NO_OTHER_CONNECTIONS


def holds_while_it_waits(run: Recording, seen: Pages) -> Iterator[Finding]:
    """A connection that nobody needs until something changes, or somebody has read; or a look again and again."""
    if seen.found["idle"]:
        yield Finding(
            "closed-session-opens-again" if seen.found["reopened"] else "as-long-as-the-response",
            "Pages that only waited for news had a connection checked out.",
        )
    if seen.found["slow"]:
        told = "Pages whose customer read slowly had a connection checked out."
        yield Finding("holds-while-they-read", told)

    if seen.found["questions"] > 1:
        yield Finding(
            "asks-all-the-time",
            f"While nothing changed, a page asked the database {seen.found['questions']} times"
            f" within {QUIET_SECONDS:g} s.",
        )


def demands(run: Recording, seen: Pages) -> Iterator[Finding]:
    """A page shows each change of its order, and where there is no order the answer is 404."""
    if seen.strangers_status == 200 and seen.found["too late"]:
        yield Finding(
            "status-comes-first",
            "An order that does not exist was answered with the status 200,"
            " and an HTTPException was raised after that.",
        )

    if others := [began for began in seen.began if began != RIGHT_BEGINNING]:
        yield Finding(
            "not-what-was-asked",
            f'{len(seen.began)} pages were opened when their orders were "new", and {seen.done} began with that;'
            f' another {others[0]}. The task wants "data: new" and an empty line.',
        )
    if not all(seen.kept_up):
        yield Finding(
            "reads-once",
            f"The orders were {', then '.join(STATUSES)}; of {len(seen.kept_up)} pages that were read,"
            f" {sum(seen.kept_up)} showed this.",
        )
    if stale := [status for status in seen.late if status != STATUSES[-1]]:
        yield Finding(
            "remembers-for-others",
            f'A page that was opened when its order was "{STATUSES[-1]}" began with {stale[0]!r}.',
        )
    if seen.strangers_status != 404:
        yield Finding(
            "not-what-was-asked",
            f"An order that does not exist was answered with the status {seen.strangers_status};"
            " the task wants 404.",
        )


def prove(run: Recording, seen: Pages) -> str:
    """What a run of a right answer has shown."""
    pages = f"{run.announced - 2} pages open with {connections(run)}"
    return f"{pages}, each change shown, and none held while they waited."


follow_an_order = Task(
    "06",
    "follow_an_order",
    "shop",
    load=open_tabs,
    trials=({"tabs": 16, "capacity": 4}, {"tabs": 8, "capacity": 1}),
    # To sleep between two looks is no mistake here.
    rules=unless_raised(
        *NO_OTHER_CONNECTIONS,
        holds_while_it_waits,
        one_session_many_tasks,
        one_at_a_time,
        swallows_the_timeout,
        retries,
        deadlock,
        *LEFT_OVER,
    ),
    demands=(demands,),
    proof=prove,
    hints=(
        "When does the code behind the `yield` of a dependency run: when follow returns, or when the last event has "
        "been sent?",
        "What needs the database here? A look whether the order exists, and a look at its status for each event. "
        "Give each look a session of its own.",
        "Leave the dependency out. In follow and in events: async with Session() as session, read, end the block; "
        "and only then return, yield, or wait.",
    ),
)
