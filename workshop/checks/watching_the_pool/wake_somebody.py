"""Exercise 07, task 2: from a few scrapes, whether somebody is to be woken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import Conditions
from workshop.checks.task import Task, Trials
from workshop.checks.watching_the_pool.situations import (
    SITUATIONS,
    impatient,
    needs_somebody,
    patient,
)

if TYPE_CHECKING:
    from ormscope.lab.picture import Picture

# The wrong idea of somebody who pages in such a situation, the plainest first.
_FALSE_ALARMS = {
    "idle": "always-the-same",
    "full": "full-is-no-fault",
    "busy": "queue-is-no-outage",
    "long report": "still-is-not-stuck",
    "timeouts": "timeout-is-no-deadlock",
    "hiccup": "one-scrape-is-no-outage",
    "hiccup, over": "one-scrape-is-no-outage",
    "yesterday's deadlocks": "counter-is-no-gauge",
    "restart": "counter-starts-anew",
}


@dataclass(kw_only=True)
class Pages(Evidence):
    """For each situation, whether the learner's function `paged`, and whether that was `wanted`."""

    paged: dict[str, bool]
    wanted: dict[str, bool]


async def ask_whether_to_page(
    should_page: Callable[..., Any],
    conditions: Conditions,
    *,
    capacity: int,
    queue: int,
    bearable: float,
) -> Pages:
    """Show the learner's function the scrapes of pools to which all kinds of things happen."""
    scrapes = await patient(conditions.url, capacity, queue, bearable)
    scrapes |= await impatient(conditions.url, capacity)
    paged: dict[str, bool] = {}

    async def ask(name: str, number: int) -> None:
        paged[name] = bool(should_page([dict(scrape) for scrape in scrapes[name]], bearable))

    async with evidence(conditions) as noted:
        for name in SITUATIONS:
            await storm(partial(ask, name), 1)
    wanted = {name: needs_somebody(scrapes[name], bearable) for name in SITUATIONS}
    return Pages(**vars(noted), paged=paged, wanted=wanted)


def demands(run: Recording, seen: Pages) -> Iterator[Finding]:
    """Somebody is woken by a deadlock, or by customers who wait, and by nothing else."""
    if len(set(seen.paged.values())) == 1:
        always = "each time" if seen.paged["idle"] else "not once"
        yield Finding("always-the-same", f"Of {len(seen.paged)} situations you paged for {always}.")
    for name, misconception in _FALSE_ALARMS.items():
        if seen.paged[name] and not seen.wanted[name]:
            yield Finding(misconception, f"You paged {SITUATIONS[name]}.")
    missed = {name for name in seen.paged if seen.wanted[name] and not seen.paged[name]}
    if missed:
        misconception, name = _missed(missed)
        yield Finding(misconception, f"You did not page {SITUATIONS[name]}.")


def _missed(missed: set[str]) -> tuple[str, str]:
    """The wrong idea of somebody who did not page in these situations, and the one that shows it best."""
    if {"new deadlock", "old deadlock"} <= missed and "timed-out deadlocks" not in missed:
        return "timeout-is-no-deadlock", "old deadlock"
    if "overloaded" in missed:
        return "only-the-cause", "overloaded"
    if "old deadlock" in missed:
        return "history-is-not-now", "old deadlock"
    if "new deadlock" in missed:
        return "deadlock-needs-no-slack", "new deadlock"
    if "deadlock" in missed:
        return "counter-is-no-gauge", "deadlock"
    if "timed-out deadlocks" in missed:
        return "between-two-scrapes", "timed-out deadlocks"
    return "counter-starts-anew", "restart, deadlock"


def prove(trials: Trials[Pages]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"A pool of {run.pools[0].capacity} in {len(seen.wanted)} situations: paged for the"
        f" {sum(seen.wanted.values())} that need somebody, silent in the others."
        for run, seen in trials
    )


def plot(before: Recording, after: Recording) -> Picture:
    """In which situations two functions woke somebody."""
    from workshop.pictures import answers

    def as_words(paged: dict[str, bool]) -> dict[str, str]:
        return {name: "paged" if paged[name] else "silent" for name in SITUATIONS}

    return answers(
        as_words(after.result.wanted),
        {run.title: as_words(run.result.paged) for run in (before, after)},
    )


wake_somebody = Task(
    "07",
    "wake_somebody",
    "should_page",
    load=ask_whether_to_page,
    trials=(
        {"capacity": 5, "queue": 12, "bearable": 0.3},
        {"capacity": 2, "queue": 7, "bearable": 0.1},
    ),
    rules=(),
    demands=(demands,),
    proof=prove,
    plot=plot,
    hints=(
        "Two reasons are worth waking somebody for, and each has a line of its own: a deadlock, and customers who "
        "wait. Which of them needs slack, and which does not?",
        "What is there at a scrape, a gauge tells (look at the last one); what came and went between two scrapes, only "
        "a counter tells, by its rise from one scrape to the next. How does it look when the process starts anew?",
        'any(after > before for before, after in pairwise(…)) over deadlocks_total; or the last verdict is "deadlock"; '
        "or all(…) of the oldest waits are longer than bearable.",
    ),
)
