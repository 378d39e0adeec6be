"""The exercises: what each answer draws, that they are made from their solutions, and that nothing is lost."""

from __future__ import annotations

import ast
import importlib
import linecache
from collections.abc import Callable
from typing import Any

import pytest
from answers import Answers

from workshop import database, exercises
from workshop.checks.catalogue import misconceptions
from workshop.checks.task import Task
from workshop.database import Server

MODULES = {
    number: importlib.import_module(f"answers.exercise_{number}") for number in exercises.numbers()
}
TASKS: dict[str, tuple[Task, Answers, Any]] = {
    f"{number}-{name}": (task, MODULES[number].ANSWERS[name], MODULES[number])
    for number in exercises.numbers()
    for name, task in exercises.tasks(number).items()
}
each_task = pytest.mark.parametrize("task, answers, module", TASKS.values(), ids=TASKS)


@pytest.fixture(autouse=True)
def one_database(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks use the database of all tests."""
    monkeypatch.setitem(database._databases, 1, server.database)


# The matrix


def written(source: str, module: Any, task: Task) -> Callable[..., Any]:
    """A function that a learner writes with these lines as its body, under the task's name and arguments."""
    given = exercises.given_functions(task.exercise)[task.function]
    prefix = "async " if isinstance(given, ast.AsyncFunctionDef) else ""
    text = f"{prefix}def {task.function}({ast.unparse(given.args)}):\n    {source}\n"
    filename = f"<ipython-input-{task.name}-{hash(source)}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace = dict(vars(module))
    exec(compile(text, filename, "exec"), namespace)
    return namespace[task.function]  # type: ignore[no-any-return]


@each_task
def test_as_given(task: Task, answers: Answers, module: Any) -> None:
    assert task.check(task._given(answers.right[0])).kind == "not attempted"


@pytest.mark.parametrize(
    "task, answer",
    [(task, answer) for task, answers, _ in TASKS.values() for answer in answers.right],
    ids=lambda one: one.name if isinstance(one, Task) else one.__name__,
)
def test_right_answer(task: Task, answer: Callable[..., Any]) -> None:
    outcome = task.check(answer)
    assert (outcome.kind, outcome.misconception) == ("right", None), outcome
    assert outcome.run is not None


@pytest.mark.parametrize(
    "task, answer, misconception",
    [(task, *wrong) for task, answers, _ in TASKS.values() for wrong in answers.wrong],
    ids=lambda one: one if isinstance(one, str) else getattr(one, "name", None) or one.__name__,
)
def test_wrong_answer(task: Task, answer: Callable[..., Any], misconception: str) -> None:
    """It draws exactly its misconception, with the sentence that helps and the place to read again."""
    outcome = task.check(answer)
    assert (outcome.kind, outcome.misconception) == ("wrong", misconception), outcome
    known = misconceptions()[misconception]
    assert known.says in outcome.text
    assert known.section in outcome.text


@each_task
def test_code_that_raises(task: Task, answers: Answers, module: Any) -> None:
    """The learner reads his own traceback, and nothing of the machinery."""
    outcome = task.check(written("raise LookupError('nowhere')", module, task))
    assert outcome.kind == "raised", outcome
    assert "LookupError: nowhere" in outcome.text
    assert "workshop" not in outcome.text


@each_task
def test_code_that_never_ends(task: Task, answers: Answers, module: Any) -> None:
    outcome = task.check(written("while True: pass", module, task))
    assert (outcome.kind, outcome.misconception) == ("wrong", "never-ends"), outcome
