"""A task of an exercise: one function of the learner's, what it must do under load, and what comes of a try."""

from __future__ import annotations

import os
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal

from ormscope.lab import Recording, observe
from ormscope.lab.forks import preload
from ormscope.lab.observe import UnsendableError
from ormscope.lab.run import Curve
from ormscope.lab.storm import Request
from workshop import exercises, progress
from workshop.checks.answer import as_given, is_attempted, unfit
from workshop.checks.catalogue import Finding
from workshop.checks.lent import Conditions, slowness
from workshop.checks.memory import MemoryBudget
from workshop.checks.rules import POOL_TIMEOUT_ERROR, Noted, Rule, never_awaited
from workshop.checks.tracebacks import MOST_LINES, own_part, told
from workshop.checks.unheard import listening
from workshop.database import database_url
from workshop.mistake import Mistake

if TYPE_CHECKING:
    from ormscope.lab.picture import Picture

LOAD_SECONDS = 6.0  # a load that lasts longer is cancelled; a right answer needs a tenth of it
_FUSE_SECONDS = 2.0  # more, for what blocks the event loop, so that the load cannot end itself
_MOST_PLACES = 3  # of those where a load stood
_WIDTH = 88  # columns; JupyterLab breaks longer lines within a word

Kind = Literal["not attempted", "right", "wrong", "raised", "stopped"]


@dataclass(frozen=True)
class Outcome:
    """What came of a try: `text` is what the learner reads, `run` the first of the runs that proved a right answer."""

    kind: Kind
    text: str
    misconception: str | None = None
    run: Recording | None = None

    def __str__(self) -> str:
        lines = f"{self.kind.upper()}: {self.text}".splitlines()
        # A traceback is not to be wrapped.
        return "\n".join(
            line if line.startswith(" ") else textwrap.fill(line, _WIDTH) for line in lines
        )


class Task(Generic[Noted]):
    """One task; call it with the learner's function, and it says what came of it.

    `load(answer, conditions, **trial)` is an `async def`. It runs in a fresh process under observation, once for each
    of the `trials` (that is, with other seeds), starts the learner's function through `storm`, and returns what it
    noted. `rules` are what can be wrong with any run, the most telling first; `demands` what the task's text asks
    of the work besides, for runs in which all calls came to a good end. `proof` is what a run of a right answer
    has shown, and `plot` draws the code as it was given beside it. `memory` ends a run that takes too much.

    A check never raises, and ends within seconds whatever the function does: `load_seconds` after a load began,
    and later only where the machine is slow.
    """

    def __init__(
        self,
        exercise: str,
        name: str,
        function: str,
        *,
        load: Callable[..., Coroutine[Any, Any, Noted]],
        trials: Sequence[dict[str, Any]],
        rules: Sequence[Rule[Noted]],
        demands: Sequence[Rule[Noted]],
        proof: Callable[[Recording, Noted], str],
        hints: Sequence[str],
        curves: Sequence[Curve] = ("connections", "requests"),
        plot: Callable[[Recording, Recording], Picture] = Recording.plot,
        memory: MemoryBudget | None = None,
        load_seconds: float = LOAD_SECONDS,
    ) -> None:
        self.exercise = exercise
        self.name = name
        self.function = function
        self.hints = tuple(hints)
        self.load_seconds = load_seconds
        self._load = load
        self._trials = trials
        self._rules = rules
        self._demands = demands
        self._proof = proof
        self._curves = curves
        self._plot = plot
        self._memory = memory
        self._hints_shown = 0
        self._lines_printed = 0
        preload(load.__module__)

    def __repr__(self) -> str:
        return f"the check of {self.name}; call it with your {self.function}"

    def __call__(self, answer: Any) -> None:
        """Check the learner's function and show what came of it."""
        outcome = self.check(answer)
        print(outcome)
        if outcome.run is not None:
            from IPython.display import display

            given = as_given(self.exercise, self.function, answer)
            before = self._run(given, "as given", self._conditions(), **self._trials[0])
            display(self._plot(before, outcome.run))
        progress.note(self.exercise, self.name, outcome.kind)

    def hint(self) -> None:
        """Show the next hint; after the last one, all of them again."""
        self._hints_shown = min(self._hints_shown + 1, len(self.hints))
        for number, hint in enumerate(self.hints[: self._hints_shown], 1):
            print(textwrap.fill(f"Hint {number} of {len(self.hints)}: {hint}", _WIDTH))
        if self._hints_shown == len(self.hints):
            print(f"That was the last one. check.{self.name}.show_solution() shows a solution.")

    def show_solution(self) -> None:
        """Show a solution, once the task is done or all hints have been read."""
        left = len(self.hints) - self._hints_shown
        if left and not progress.is_done(self.exercise, self.name):
            print(
                f"Not yet: solve it, or read the hints that are left: {left} (check.{self.name}.hint())."
            )
            return
        for source in exercises.solution_of(self.exercise, self.name):
            print(source, end="\n\n")
        print(f"From solutions/{exercises.path_of(self.exercise).name}, which also says why.")

    def check(self, answer: Any) -> Outcome:
        """What comes of the learner's function `answer`."""
        if reason := unfit(self.exercise, self.function, answer):
            return Outcome("raised", reason)
        if not is_attempted(self.exercise, answer):
            return Outcome(
                "not attempted",
                f"{self.function} is still as it was given. "
                "If you have changed it, run its cell, and do not rename it.",
            )
        self._lines_printed = 0
        try:
            return self._try(answer)
        except Mistake as mistake:
            return Outcome("stopped", str(mistake))

    def _try(self, answer: Any) -> Outcome:
        runs: list[Recording] = []
        conditions = self._conditions()
        for trial in self._trials:
            try:
                run = self._run(answer, "yours", conditions, on_print=self._show, **trial)
            except UnsendableError as error:
                culprit = error.culprit or f"something in {self.function}"
                return Outcome(
                    "raised",
                    f"The check runs {self.function} in a process of its own, and {culprit} cannot be sent there: "
                    f"make it within {self.function}.",
                )
            except BaseException as error:  # what it raises there is raised here, also SystemExit
                return Outcome("raised", told(error))
            if run.ended == "interrupted":
                return Outcome("stopped", "You stopped the check; nothing was judged.")
            if (outcome := self._judged(run)) is not None:
                return outcome
            runs.append(run)
        proofs = [self._proof(run, run.result).splitlines() for run in runs]
        in_all = [line for line in proofs[0] if all(line in proof for proof in proofs)]
        of_one = [line for proof in proofs for line in proof if line not in in_all]
        return Outcome("right", "\n".join(of_one + in_all), run=runs[0])

    def _show(self, line: str) -> None:
        """Show what the learner's function prints, as far as anybody reads it: it is called many times."""
        self._lines_printed += 1
        if self._lines_printed <= MOST_LINES:
            print(line, end="")
        elif self._lines_printed == MOST_LINES + 1:
            print(f"... (only the first {MOST_LINES} printed lines are shown)")

    def _conditions(self) -> Conditions:
        how_slow = slowness()
        return Conditions(database_url(), self.load_seconds * how_slow, how_slow)

    def _run(self, answer: Any, title: str, conditions: Conditions, **trial: Any) -> Recording:
        return observe(
            _load_quietly,
            self._load,
            answer,
            conditions,
            title=title,
            fuse=conditions.load_seconds + _FUSE_SECONDS,
            memory_limit=self._memory.container if self._memory is not None else None,
            curves=self._curves,
            live=False,
            **trial,
        )

    def _at_the_end(self, run: Recording, has_noted: bool) -> str:
        """How far a load was that has not ended, and where it stood."""
        seconds = run.fuse - has_noted * _FUSE_SECONDS
        said = f"After {seconds:g} s, {len(run.requests)} of {run.announced} calls had ended"
        printed = ""
        if self._lines_printed > MOST_LINES:
            printed = f" It had printed {self._lines_printed:,} lines, which takes time."
        if not has_noted:
            seen = [verdict for pool in run.pools for verdict in (*pool.troubles, pool.last)]
            blocked = [verdict.blocked for verdict in seen if verdict and verdict.blocked]
            where = f": it was blocked in {blocked[-1].short}" if blocked else ""
            return f"{said}, and the event loop stood still{where}.{printed}"
        standing = run.result.standing.most_common(_MOST_PLACES)
        where = "; ".join(f"{count} at {place}" for place, count in standing)
        stood = f"; shortly before, tasks were waiting here: {where}" if where else ""
        return f"{said}{stood}.{printed}"

    def _judged(self, run: Recording) -> Outcome | None:
        """What is wrong with a run; None where nothing is."""
        if run.ended == "died":
            return Outcome("raised", "the process in which your code ran has died.")
        if run.ended == "memory limit" and self._memory is not None:
            return _wrong(self._memory.exceeded(run))
        has_noted = run.ended != "fuse"
        rules = (never_awaited, *self._rules)
        if has_noted and (outcome := _wrong(_first(rules, run))) is not None:
            return outcome
        if has_noted and run.result.unheard.raised:
            return Outcome("raised", f"in a task of yours:\n{own_part(run.result.unheard.raised)}")
        failed = [request for request in run.requests if request.outcome != "ok"]
        if failed:
            return Outcome("raised", _failed(run, failed))
        if not has_noted or not run.result.ended:
            return _wrong(Finding("never-ends", self._at_the_end(run, has_noted)))
        if len(run.requests) < run.announced:
            lost = run.announced - len(run.requests)
            return Outcome("raised", f"{lost} of {run.announced} calls were cancelled.")
        return _wrong(_first(self._demands, run))


def _failed(run: Recording, failed: Sequence[Request]) -> str:
    """Which calls failed, and how the first; one that was refused a connection may have failed because of another."""
    first = min(failed, key=lambda request: request.outcome == POOL_TIMEOUT_ERROR)
    text = f"{len(failed)} of {run.announced} calls\n{own_part(first.error)}"
    if first.outcome != POOL_TIMEOUT_ERROR or run.ended == "fuse" or run.result.crowd is None:
        return text
    crowd = run.result.crowd
    holders = Counter(holder.places[0].short for holder in crowd.holding if holder.places)
    where = "; ".join(f"{count} at {place}" for place, count in holders.most_common())
    return f"{text}\nShortly before, {crowd.checked_out} of {crowd.capacity} connections were out: {where}."


async def _load_quietly(
    load: Callable[..., Coroutine[Any, Any, Noted]], *arguments: Any, **trial: Any
) -> Noted:
    """Run a load, in the check's own process. What the learner prints is shown.

    What is logged or warned of is not: a driver's complaint of a connection that was cut off comes in one run of many.
    """
    sys.stderr = open(os.devnull, "w")  # noqa: ASYNC230, SIM115  # until the process ends
    with listening() as unheard:
        noted = await load(*arguments, **trial)
    noted.unheard = unheard
    return noted


def _first(rules: Sequence[Rule[Noted]], run: Recording) -> Finding | None:
    """The first wrong idea that rules tell of a run."""
    return next((finding for rule in rules for finding in rule(run, run.result)), None)


def _wrong(finding: Finding | None) -> Outcome | None:
    return Outcome("wrong", str(finding), finding.misconception) if finding is not None else None
