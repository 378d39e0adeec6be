"""A task of an exercise: one function of the learner's, what it must do under load, and what comes of a try."""

from __future__ import annotations

import ast
import inspect
import linecache
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ormscope.lab import Recording, observe
from ormscope.lab.observe import UnsendableError
from ormscope.lab.run import Curve
from workshop import exercises, progress
from workshop.checks.catalogue import misconceptions
from workshop.checks.evidence import LOAD_SECONDS
from workshop.database import database_url
from workshop.kernel import syntax_error_of
from workshop.mistake import Mistake

if TYPE_CHECKING:
    from ormscope.lab.picture import Picture

FUSE = LOAD_SECONDS + 2  # for what blocks the event loop, so that the load cannot end itself
_MOST_LINES_SHOWN = 12
_WIDTH = 88  # columns; JupyterLab breaks longer lines within a word
_CHECKS = os.path.dirname(__file__)

Kind = Literal["not attempted", "right", "wrong", "raised", "stopped"]


class Finding(NamedTuple):
    """A wrong idea, by its name in the catalogue, and what was seen of it in this run."""

    misconception: str
    evidence: str


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
            one if one.startswith(" ") else textwrap.fill(one, _WIDTH) for one in lines
        )


class Task:
    """One task; call it with the learner's function, and it says what came of it.

    `load(answer, url, **trial)` is an `async def`. It runs in a fresh process under observation, once for each of
    the `trials` (that is, with other seeds), starts the learner's function through `storm`, and returns what it
    noted: a dict, or None where it had to give up. `judge(run)` tells the wrong idea, if it sees one, from the
    recording; `proof(runs)` is the sentence for a right answer, and `plot` draws the code as it was given beside it.
    `memory_limit` is in MiB.

    A check never raises, and ends within seconds whatever the function does.
    """

    def __init__(
        self,
        exercise: str,
        name: str,
        function: str,
        *,
        load: Callable[..., Any],
        trials: Sequence[dict[str, Any]],
        judge: Callable[[Recording], Finding | None],
        proof: Callable[[list[Recording]], str],
        hints: Sequence[str],
        curves: Sequence[Curve] = ("connections", "requests"),
        plot: Callable[[Recording, Recording], Picture] = Recording.plot,
        memory_limit: float | None = None,
    ) -> None:
        self.exercise = exercise
        self.name = name
        self.function = function
        self.hints = tuple(hints)
        self._load = load
        self._trials = trials
        self._judge = judge
        self._proof = proof
        self._curves = curves
        self._plot = plot
        self._memory_limit = memory_limit
        self._hints_shown = 0

    def __repr__(self) -> str:
        return f"the check of {self.name}; call it with your {self.function}"

    def __call__(self, answer: Any) -> None:
        """Check the learner's function and show what came of it."""
        outcome = self.check(answer)
        print(outcome)
        if outcome.run is not None:
            from IPython.display import display

            before = self._run(self._given(answer), "as given", **self._trials[0])
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
        if unfit := self._unfit(answer):
            return Outcome("raised", unfit)
        if not self._is_attempted(answer):
            return Outcome(
                "not attempted",
                f"{self.function} is still as it was given. "
                "If you have changed it, run its cell, and do not rename it.",
            )
        try:
            return self._try(answer)
        except Mistake as mistake:
            return Outcome("stopped", str(mistake))

    def _try(self, answer: Any) -> Outcome:
        runs: list[Recording] = []
        for trial in self._trials:
            try:
                run = self._run(answer, "yours", **trial)
            except UnsendableError as error:
                return Outcome("raised", f"your code cannot run in a process of its own: {error}")
            except (
                BaseException
            ) as error:  # SystemExit, say: what the code raised there is raised here
                return Outcome("raised", _told(error))
            if run.ended == "interrupted":
                return Outcome("stopped", "You stopped the check; nothing was judged.")
            if (outcome := self._judged(run)) is not None:
                return outcome
            runs.append(run)
        return Outcome("right", self._proof(runs), run=runs[0])

    def _run(self, answer: Any, title: str, **trial: Any) -> Recording:
        return observe(
            self._load,
            answer,
            database_url(),
            title=title,
            fuse=FUSE,
            memory_limit=self._memory_limit,
            curves=self._curves,
            live=False,
            **trial,
        )

    def _judged(self, run: Recording) -> Outcome | None:
        """What is wrong with a run; None where nothing is."""
        if run.ended == "died":
            return Outcome("raised", "the process in which your code ran has died.")
        finding = None if run.ended == "fuse" else self._judge(run)
        failed = [one for one in run.requests if one.outcome != "ok"]
        if finding is None and failed:
            return Outcome(
                "raised", f"{len(failed)} of {run.announced} calls\n{_own(failed[0].error)}"
            )
        if run.ended == "fuse" or (finding is None and not run.result["ended"]):
            seconds = run.fuse if run.ended == "fuse" else LOAD_SECONDS
            finding = Finding("never-ends", f"It had not ended after {seconds:g} s.")
        if finding is None and len(run.requests) < run.announced:
            lost = run.announced - len(run.requests)
            return Outcome("raised", f"{lost} of {run.announced} calls were cancelled.")
        if finding is None:
            return None
        about = misconceptions()[finding.misconception]
        text = f'{about.idea}\n{finding.evidence}\n{about.says}\nRead again: lesson {about.lesson}, "{about.section}".'
        return Outcome("wrong", text, finding.misconception)

    def _unfit(self, answer: Any) -> str:
        """Why `answer` cannot be what was asked for; empty where it can."""
        given = exercises.given_functions(self.exercise)[self.function]
        wanted = f"{self.function}({ast.unparse(given.args)})"
        if error := syntax_error_of(self.function):
            return (
                f"the last version of {self.function} has a syntax error ({error}), "
                "so Python still knows the one before it. Mend it, run its cell, and check again."
            )
        if inspect.iscoroutine(answer):
            answer.close()
            return f"you called {self.function}; the check wants the function itself, without ()."
        if not isinstance(answer, FunctionType):
            return (
                f"{self.function} is no function but {type(answer).__name__}; wanted is {wanted}."
            )
        if isinstance(given, ast.AsyncFunctionDef) and not inspect.iscoroutinefunction(answer):
            return f"{self.function} is no coroutine function; begin it with `async def`, and do not `yield` in it."
        if isinstance(given, ast.FunctionDef) and inspect.iscoroutinefunction(answer):
            return f"{self.function} is asked for as an ordinary function; begin it with `def`."
        try:
            inspect.signature(answer).bind(*given.args.args)
        except TypeError:
            found = f"{self.function}{inspect.signature(answer)}"
            return f"{found} takes other arguments than were asked for; wanted is {wanted}."
        return ""

    def _is_attempted(self, answer: FunctionType) -> bool:
        """Whether the function, or a function of the notebook that it calls, differs from what was given."""
        given = exercises.given_functions(self.exercise)
        for function in _reachable(answer):
            try:
                (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
            except (OSError, SyntaxError, ValueError):
                return True  # nobody knows how it is written, so it is judged
            known = given.get(function.__name__)
            if known is None or ast.dump(node) != ast.dump(known):
                return True
        return False

    def _given(self, answer: FunctionType) -> Any:
        """The function as it was given, among the learner's other names."""
        namespace = dict(answer.__globals__)
        for name, node in exercises.given_functions(self.exercise).items():
            filename, source = f"<ipython-input-given-{name}>", ast.unparse(node)
            linecache.cache[filename] = (
                len(source),
                None,
                source.splitlines(keepends=True),
                filename,
            )
            # As a cell is: without the annotations that this module puts off.
            exec(compile(source, filename, "exec", dont_inherit=True), namespace)
        return namespace[self.function]


def _reachable(function: FunctionType) -> Iterator[FunctionType]:
    """A function, and those beside it that it names, directly or through others."""
    unseen, seen = [function], {function}
    while unseen:
        one = unseen.pop()
        yield one
        for name in one.__code__.co_names:
            called = one.__globals__.get(name)
            if (
                isinstance(called, FunctionType)
                and called.__globals__ is function.__globals__
                and called not in seen
            ):
                seen.add(called)
                unseen.append(called)


def _told(error: BaseException) -> str:
    """The learner's own traceback of an exception that `observe` raised."""
    render = getattr(error, "_render_traceback_", None)
    return _own("\n".join(render()) if render else f"{type(error).__name__}: {error}")


def _own(report: str) -> str:
    """A traceback without the frames of the checks, shortened where it is long."""
    lines: list[str] = []
    skipping = False
    for line in report.splitlines():
        is_frame = line.lstrip().startswith("File ")
        skipping = _CHECKS in line if is_frame else skipping and line.startswith("    ")
        if not skipping:
            lines.append(line)
    if len(lines) > _MOST_LINES_SHOWN:
        lines = [*lines[: _MOST_LINES_SHOWN // 2], "  ...", *lines[-_MOST_LINES_SHOWN // 2 :]]
    return "\n".join(lines)
