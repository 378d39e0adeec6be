"""Exercise 08, task 2: from a few scrapes, whether somebody is to be woken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import Conditions
from workshop.checks.returned import another_answer
from workshop.checks.task import Task
from workshop.checks.watching_the_pool.situations import (
    SITUATIONS,
    impatient,
    needs_somebody,
    patient,
)

if TYPE_CHECKING:
    from ormscope.lab.picture import Picture

# The wrong idea of somebody who pages in such a situation, the plainest first; none where several would explain it.
_FALSE_ALARMS = {
    "idle": "",
    "full": "full-is-no-fault",
    "busy": "queue-is-no-outage",
    "held for long": "hold-is-not-wait",
    "long report": "still-is-not-stuck",
    "timeouts": "timeout-is-no-deadlock",
    "hiccup": "one-scrape-is-no-outage",
    "hiccup, over": "one-scrape-is-no-outage",
    "two hiccups": "one-scrape-is-no-outage",
    "yesterday's deadlocks": "counter-is-no-gauge",
    "deadlock, over": "over-is-over",
    "restart": "counter-starts-anew",
}
_NOW = {"new deadlock", "deadlock", "old deadlock"}
_BROKEN = {"timed-out deadlocks", "broken at first", "broken at last"}
_RESTARTED = {"restart, deadlock", "restart, as many", "restart, at once"}
_TOO_LONG = {"stuck", "overloaded"}
_DEADLOCKS = _NOW | _BROKEN | _RESTARTED
_HOUR = 3600.0


class _Silence(NamedTuple):
    """A wrong idea that shows in silence: in all of `missed`, and in none of `told`; `best` shows it best."""

    misconception: str
    best: str
    missed: set[str]
    told: set[str]


_SILENCES = (
    _Silence(
        "timeout-is-no-deadlock", "deadlock", {"new deadlock", "deadlock"}, {"timed-out deadlocks"}
    ),
    _Silence("moving-is-not-fast", "overloaded", {"overloaded"}, {"stuck"}),
    _Silence("history-is-not-now", "stuck", {"stuck"}, {"overloaded"}),
    _Silence("only-the-cause", "stuck", _TOO_LONG, _DEADLOCKS),
    _Silence(
        "deadlock-needs-no-slack", "new deadlock", {"new deadlock"}, _TOO_LONG | {"old deadlock"}
    ),
    _Silence("counter-is-no-gauge", "deadlock", {"deadlock"}, _BROKEN | {"new deadlock"}),
    _Silence("between-two-scrapes", "timed-out deadlocks", _BROKEN, _NOW),
    _Silence("one-step-for-all", "broken at first", {"broken at first"}, {"timed-out deadlocks"}),
    _Silence("one-step-for-all", "broken at last", {"broken at last"}, {"timed-out deadlocks"}),
    *(
        _Silence("counter-starts-anew", name, {name}, _DEADLOCKS - _RESTARTED | _TOO_LONG)
        for name in ("restart, deadlock", "restart, as many", "restart, at once")
    ),
)


@dataclass(kw_only=True)
class Pages(Evidence):
    """For each situation, whether the learner's function `paged`, and whether that was `wanted`.

    `odd` tells the first answer that is neither True nor False, and `changed` the situation in which it said
    something else when it was asked again. `paged_later` says whether it paged when the first in line had waited
    for an hour longer than in the situation "overloaded".
    """

    paged: dict[str, bool]
    wanted: dict[str, bool]
    odd: Finding | None
    changed: str
    paged_later: bool


async def ask_whether_to_page(
    should_page: Callable[..., Any],
    conditions: Conditions,
    *,
    capacity: int,
    queue: int,
    bearable: float,
    scrapes: int,
) -> Pages:
    """Show the learner's function the scrapes of pools to which all kinds of things happen."""
    shown = await patient(conditions.url, capacity, queue, bearable, scrapes)
    shown |= await impatient(conditions.url, capacity, scrapes)
    bears = dict.fromkeys(SITUATIONS, bearable)
    bears["just bearable"] = min(scrape["oldest_wait_seconds"] for scrape in shown["just bearable"])
    told: dict[str, Any] = {}
    again: dict[str, Any] = {}
    later: list[Any] = []

    async def ask(name: str, number: int) -> None:
        told[name] = should_page([dict(scrape) for scrape in shown[name]], bears[name])

    async def ask_again(name: str, number: int) -> None:
        again[name] = should_page([dict(scrape) for scrape in shown[name]], bears[name])

    async def ask_later(number: int) -> None:
        longer = [
            {**scrape, "oldest_wait_seconds": scrape["oldest_wait_seconds"] + _HOUR}
            for scrape in shown["overloaded"]
        ]
        later.append(should_page(longer, bearable))

    async with evidence(conditions) as noted:
        for name in SITUATIONS:
            await storm(partial(ask, name), 1)
        if len(told) == len(SITUATIONS):
            for name in reversed(SITUATIONS):
                await storm(partial(ask_again, name), 1)
            await storm(ask_later, 1)
    wanted = {name: needs_somebody(shown[name], bears[name]) for name in SITUATIONS}
    odd = (
        another_answer(f"{SITUATIONS[name].capitalize()}, should_page", found, wanted[name])
        for name, found in told.items()
        if not _is_true_or_false(found)
    )
    return Pages(
        **vars(noted),
        paged={name: _is_true(found) for name, found in told.items()},
        wanted=wanted,
        odd=next(odd, None),
        changed=next((name for name in again if _is_true(again[name]) != _is_true(told[name])), ""),
        paged_later=any(map(_is_true, later)),
    )


def _is_true_or_false(told: Any) -> bool:
    """Also 1 and 0, which are equal to them, and NumPy's own."""
    is_bool = isinstance(told, int) or type(told).__name__ in ("bool", "bool_")
    return is_bool and bool(told in (True, False))


def _is_true(told: Any) -> bool:
    return _is_true_or_false(told) and bool(told)


def returns_something_else(run: Recording, seen: Pages) -> Iterator[Finding]:
    """Neither True nor False, or one at first and the other when asked again."""
    if seen.odd is not None:
        yield seen.odd
    if seen.changed:
        first, then = ("paged", "did not") if seen.paged[seen.changed] else ("did not page", "did")
        yield Finding(
            "not-what-was-asked",
            f"Asked twice with the same scrapes and the same `bearable`, you {first} at first and {then} the second "
            f"time, {SITUATIONS[seen.changed]}. Nothing but the two arguments was to count.",
        )


def demands(run: Recording, seen: Pages) -> Iterator[Finding]:
    """Somebody is woken by a deadlock, or by customers who wait, and by nothing else."""
    if len(set(seen.paged.values())) == 1:
        always = "each time" if seen.paged["idle"] else "not once"
        yield Finding("always-the-same", f"Of {len(seen.paged)} situations you paged for {always}.")
    missed = {name for name in seen.paged if seen.wanted[name] and not seen.paged[name]}
    for name, misconception in _FALSE_ALARMS.items():
        if seen.paged[name] and not seen.wanted[name]:
            if name == "timeouts" and not missed & _DEADLOCKS:
                misconception = "one-scrape-is-no-outage"  # deadlocks it knows otherwise
            yield Finding(misconception or "not-what-was-asked", f"You paged {SITUATIONS[name]}.")
    if missed:
        yield _silent(missed, seen)
    # Last: whoever looks at other waits may page here by chance.
    if seen.paged["just bearable"] and not seen.wanted["just bearable"]:
        yield Finding("not-what-was-asked", f"You paged {SITUATIONS['just bearable']}.")


def _silent(missed: set[str], seen: Pages) -> Finding:
    """The wrong idea of somebody who did not page in these situations; what was seen, where none is sure."""
    if "overloaded" in missed and seen.paged_later:
        return Finding(
            "another-limit",
            f"You did not page {SITUATIONS['overloaded']}; when they had waited for an hour longer, you did.",
        )
    for silence in _SILENCES:
        if silence.missed <= missed and not silence.told & missed:
            return Finding(silence.misconception, f"You did not page {SITUATIONS[silence.best]}.")
    first = next(name for name in SITUATIONS if name in missed)
    others = f", nor in {len(missed) - 1} other situations that need somebody" * (len(missed) > 1)
    return Finding("not-what-was-asked", f"You did not page {SITUATIONS[first]}{others}.")


def prove(run: Recording, seen: Pages) -> str:
    """What a run of a right answer has shown."""
    return (
        f"A pool of {run.pools[0].capacity} in {len(seen.wanted)} situations: paged for the"
        f" {sum(seen.wanted.values())} that need somebody, silent in the others."
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
    "08",
    "wake_somebody",
    "should_page",
    load=ask_whether_to_page,
    trials=(
        {"capacity": 5, "queue": 12, "bearable": 0.2, "scrapes": 6},
        {"capacity": 2, "queue": 7, "bearable": 0.1, "scrapes": 4},
    ),
    rules=(),
    demands=(returns_something_else, demands),
    proof=prove,
    plot=plot,
    hints=(
        "Two reasons are worth waking somebody for, and each has a line of its own: a deadlock, and customers who "
        "wait. Which of them may be over by the next scrape, and which ends only when somebody does something?",
        "What is there at a scrape, a gauge tells (look at the last one); what came and went between two scrapes, only "
        "a counter tells, by its rise from one scrape to the next. And if it has fallen? Then the process was started "
        "anew, at 0, and what the counter shows has happened since.",
        "any(after > (before if after >= before else 0) for before, after in pairwise(…)) over deadlocks_total; or the "
        'last verdict is "deadlock"; or all(…) of the oldest waits are longer than bearable.',
    ),
)
