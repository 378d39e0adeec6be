"""Exercise 03, task 1: an alarm that reads a census, and names what keeps most objects alive."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from sqlalchemy.ext.asyncio import async_sessionmaker

from ormscope import SessionCensus
from ormscope.census import Keeper, Kind
from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import Conditions
from workshop.checks.returned import another_answer
from workshop.checks.task import Task
from workshop.checks.the_memory_leak.situations import KEEPERS, NOTHING_ALIVE

if TYPE_CHECKING:
    from ormscope.lab.picture import Picture

# How many objects the culprit keeps, and each of the others: two of these together are more.
MOST, FEWER = range(70, 100), range(50, 65)
_SHOWN = 200  # characters of what it said


@dataclass(kw_only=True)
class Question:
    """One census, and what the alarm `said` about it: a word, a number, None, or the class of what it returned.

    The census had objects of `classes` in so many `sessions`, `kept_by` these, the first of which kept most:
    `largest` says how many of what, and `report` is what the census prints. `wanted` is the right answer, and
    `difference` says what was returned in its place.
    """

    kept_by: Sequence[str]
    wanted: str | None
    said: Any
    classes: list[str]
    sessions: int
    largest: str
    report: str
    difference: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether the alarm said anything but the right answer."""
        return bool(self.said != self.wanted)

    @property
    def answer(self) -> str:
        """What the alarm said, in words."""
        said = self.said
        return f"an object of the class {said.__name__}" if isinstance(said, type) else repr(said)

    @property
    def situation(self) -> str:
        """What the census had found, in words."""
        if self.wanted is None:
            return "No object was alive"
        return f"The most objects, {self.largest}, were kept by {self.wanted!r}"

    def __str__(self) -> str:
        return f"{self.situation}, and your function returned {self.answer}."


@dataclass(kw_only=True)
class Alarm(Evidence):
    """What was asked, as far as the function answered."""

    asked: list[Question]

    @property
    def wrong(self) -> list[Question]:
        """The questions that were answered wrongly, beginning with one in which something was alive."""
        wrong = [question for question in self.asked if question.is_wrong]
        return sorted(wrong, key=lambda question: question.wanted is None)


async def ask_about_situations(
    culprit: Callable[[SessionCensus], Any],
    conditions: Conditions,
    *,
    situations: Sequence[Sequence[str]],
    seed: int,
) -> Alarm:
    """Make the situations, each of whose first keeper keeps most, and ask the alarm about a census of each."""
    engine, chance = conditions.engine(capacity=5), random.Random(seed)
    censuses: list[SessionCensus] = []
    gc.disable()  # it would undo the cycles
    for names in situations:
        async with AsyncExitStack() as kept:
            for number, name in enumerate(names):
                count = chance.choice(FEWER if number else MOST)
                keep = KEEPERS[name](async_sessionmaker(engine), count)
                await kept.enter_async_context(keep)
            censuses.append(SessionCensus())
        gc.collect()
    gc.enable()

    # Before the alarm has them in its hands.
    asked = [
        Question(
            kept_by=names,
            wanted=None if names[0] in NOTHING_ALIVE else names[0],
            said=None,
            classes=sorted(census.alive),
            sessions=census.sessions,
            largest="".join(f"{keeper.count} {keeper.name}" for keeper in census.keepers[:1]),
            report=str(census),
        )
        for names, census in zip(situations, censuses, strict=True)
    ]
    answered: set[int] = set()

    async def ask(number: int) -> None:
        returned, question = culprit(censuses[number]), asked[number]
        question.said = _plain(returned)
        question.difference = another_answer("culprit(census)", returned, question.wanted).evidence
        answered.add(number)

    async with evidence(conditions, engine) as noted:
        await storm(ask, len(censuses))
    await engine.dispose()
    return Alarm(**vars(noted), asked=[asked[number] for number in sorted(answered)])


def _plain(said: Any) -> Any:
    """An answer as it can be sent and shown: itself where it is a word, a number or None, else its class."""
    if isinstance(said, str):
        return str(said)[:_SHOWN]
    return said if said is None or type(said) is int else type(said)


def names_somebody_else(run: Recording, seen: Alarm) -> Iterator[Finding]:
    """Anything but the kind of the largest keeper, or None where nothing is alive."""
    if not seen.wrong or len(seen.asked) < run.announced:
        return
    first, said = seen.wrong[0], {question.said for question in seen.asked}
    alive = [question for question in seen.wrong if question.wanted is not None]
    if alive and all(question.said in question.classes for question in alive):
        yield Finding("blames-the-class", str(first))
    if len(said - {None}) == 1 and isinstance(first.said, str) and first.wanted is not None:
        same = [question for question in seen.asked if question.said is not None]
        yield Finding(
            "one-culprit-for-all",
            f"Your function returned {first.answer} in {len(same)} of {len(seen.asked)} situations,"
            " and None in the others."
            if None in said
            else f"Your function returned {first.answer} in all {len(same)} situations.",
        )
    spoke = any(question.said is not None for question in seen.wrong)
    if spoke and all(map(_counts_sessions, seen.wrong)):
        yield Finding("counts-sessions", f"{first} census.sessions was {first.sessions}.")
    if not alive and first.said in get_args(Kind):
        yield Finding("always-a-culprit", str(first))
    if alive and all(map(_reports, alive)):
        yield Finding("not-a-kind", str(first))
    if alive and all(map(_names_another, alive)):
        yield Finding("not-the-largest", str(first))
    if first.said is None:  # a return may be missing, or return None
        yield Finding("not-what-was-asked", f"{first} The task wants {first.wanted!r}.")
    yield Finding("not-what-was-asked", f"{first.situation}. {first.difference}")


def _names_another(question: Question) -> bool:
    """Whether somebody is named who did keep objects, and not the most."""
    return question.said in question.kept_by[1:]


def _reports(question: Question) -> bool:
    """Whether the alarm returned the report, or a part of it, or the keeper itself; a part may be empty."""
    said = question.said
    if isinstance(said, str):
        return not said or (" " in said and said in question.report)
    return said in (Keeper, SessionCensus)


def _counts_sessions(question: Question) -> bool:
    said, sessions = question.said, question.sessions
    if sessions and said == "scoped registry":
        return True
    return bool(said == sessions or not (said or sessions))


def prove(run: Recording, seen: Alarm) -> str:
    """What a run of a right answer has shown."""
    said = [question.said for question in seen.asked]
    return (
        f"{len(said)} censuses, {len({*said} - {None})} different culprits, each named; where nothing was alive"
        f" ({said.count(None)} of {len(said)}), no alarm was raised."
    )


def plot(before: Recording, after: Recording) -> Picture:
    """Whom two alarms named in the same situations."""
    from workshop.pictures import answers

    def by_situation(seen: Alarm, key: str) -> dict[str, str]:
        return {", ".join(question.kept_by): str(getattr(question, key)) for question in seen.asked}

    return answers(
        by_situation(after.result, "wanted"),
        {run.title: by_situation(run.result, "said") for run in (before, after)},
    )


name_the_culprit = Task(
    "03",
    "name_the_culprit",
    "culprit",
    load=ask_about_situations,
    trials=(
        {
            "seed": 3,
            "situations": (
                ("variable", "modified", "collection"),
                ("modified", "new"),
                ("collection", "variable"),
                ("cycle", "result"),
                ("idle sessions",),
                ("nothing",),
            ),
        },
        {
            "seed": 5,
            "situations": (
                ("variable", "modified", "traceback"),
                ("new", "scoped registry"),
                ("result", "collection"),
                ("scoped registry", "modified"),
                ("nothing",),
                ("traceback", "cycle"),
            ),
        },
    ),
    rules=(names_somebody_else,),
    demands=(),
    proof=prove,
    plot=plot,
    hints=(
        "print(census) is for people. What it prints comes from attributes: "
        "census.alive counts objects by class; which attribute tells who keeps them?",
        "census.keepers is a list of Keeper, each with count, name, kind and where. "
        "What does the list look like when nothing is alive?",
        "The largest keeper comes first: return census.keepers[0].kind, and None where the list is empty.",
    ),
)
