"""The exercises: what each answer draws, that they are made from their solutions, and that nothing is lost."""

from __future__ import annotations

import ast
import asyncio
import importlib
import json
import linecache
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import psutil
import pytest
from answers import Answers, drill
from leftovers import await_that, runs_of
from nbclient import NotebookClient
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import QueuePool

from workshop import database, exercises, progress
from workshop import generator as generator_module
from workshop.checks import lent
from workshop.checks.answer import as_given
from workshop.checks.catalogue import Misconception, misconceptions
from workshop.checks.returned import another_answer, is_same
from workshop.checks.task import Task
from workshop.database import Server

ROOT = Path(__file__).parents[1]


def checks_of(number: str) -> ModuleType:
    """The checks of an exercise, as its notebook imports them."""
    return importlib.import_module(f"workshop.checks.{exercises.path_of(number).stem[3:]}")


MODULES = {
    number: importlib.import_module(f"answers.exercise_{number}") for number in exercises.numbers()
}
TASKS: dict[str, tuple[Task[Any], Answers, Any]] = {
    f"{number}-{name}": (task, module.ANSWERS[name], module)
    for number, module in MODULES.items()
    for name, task in exercises.tasks(number).items()
}
each_task = pytest.mark.parametrize("task, answers, module", TASKS.values(), ids=TASKS)


@pytest.fixture(autouse=True)
def one_database(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks use the database of all tests, and so do the answers, in their processes."""
    monkeypatch.setitem(database._databases, 1, server.database)
    monkeypatch.setenv(database.INHERITANCE, "{}")  # is put back at the end
    database._bequeath()


# The matrix


def written(source: str, module: Any, task: Task[Any]) -> Callable[..., Any]:
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
def test_as_given(task: Task[Any], answers: Answers, module: Any) -> None:
    assert (
        task.check(as_given(task.exercise, task.function, answers.right[0])).kind == "not attempted"
    )


@pytest.mark.parametrize(
    "task, answer",
    [
        pytest.param(task, answer, marks=[] if number else pytest.mark.quick)
        for task, answers, _ in TASKS.values()
        for number, answer in enumerate(answers.right)
    ],
    ids=lambda part: part.name if isinstance(part, Task) else part.__name__,
)
def test_right_answer(task: Task[Any], answer: Callable[..., Any]) -> None:
    outcome = task.check(answer)
    assert (outcome.kind, outcome.misconception) == ("right", None), outcome
    assert outcome.run is not None


@pytest.mark.parametrize(
    "task, answer, misconception",
    [(task, *wrong) for task, answers, _ in TASKS.values() for wrong in answers.wrong],
    ids=lambda part: part if isinstance(part, str) else getattr(part, "name", "") or part.__name__,
)
def test_wrong_answer(task: Task[Any], answer: Callable[..., Any], misconception: str) -> None:
    """It draws exactly its misconception, with the sentence that helps and the place to read again."""
    outcome = task.check(answer)
    assert (outcome.kind, outcome.misconception) == ("wrong", misconception), outcome
    known = misconceptions()[misconception]
    assert known.says in outcome.text
    assert known.section in outcome.text


@each_task
def test_code_that_raises(task: Task[Any], answers: Answers, module: Any) -> None:
    """The learner reads their own traceback, and nothing of the machinery."""
    outcome = task.check(written("raise LookupError('nowhere')", module, task))
    assert outcome.kind == "raised", outcome
    assert "LookupError: nowhere" in outcome.text
    assert "workshop" not in outcome.text


def test_the_frames_of_a_driver_are_not_shown() -> None:
    """The learner's line, and what the database said."""
    line = "OrderLine(order_id=-1, sku=sku, quantity=1, unit_price=1)"
    source = f"async with Session.begin() as session:\n        session.add({line})"
    outcome = TASK.check(written(source, MODULE, TASK))
    assert outcome.kind == "raised"
    assert "in place_order" in outcome.text and "ForeignKeyViolationError" in outcome.text
    assert "packages" not in outcome.text and "The above exception" not in outcome.text


@each_task
def test_code_that_never_ends(
    task: Task[Any],
    answers: Answers,
    module: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A shorter limit proves the same, as long as the function was reached before it."""
    monkeypatch.setattr(task, "load_seconds", 2.0)
    reached = tmp_path / "reached"
    given = exercises.given_functions(task.exercise)[task.function]
    is_async = isinstance(given, ast.AsyncFunctionDef)
    forever = "await __import__('asyncio').Event().wait()" if is_async else "while True: pass"
    source = f"open({str(reached)!r}, 'w').close()\n    {forever}"
    outcome = task.check(written(source, module, task))
    assert (outcome.kind, outcome.misconception) == ("wrong", "never-ends"), outcome
    assert reached.exists()


def test_code_that_blocks_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TASK, "load_seconds", 1.0)
    outcome = TASK.check(written("while True: pass", MODULE, TASK))
    assert (outcome.kind, outcome.misconception) == ("wrong", "never-ends"), outcome


@pytest.mark.parametrize(
    ("usual", "load", "expected"),
    [(1e-6, 0, 4), (1e6, 99, 4), (1e6, 1.9, 2), (1e6, 0.1, 1)],
    ids=["a slow machine", "one that stands", "one that is busy", "a fast one"],
)
def test_a_slow_machine_gets_more_time(
    usual: float, load: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is right on one machine would be refused on another; but no check goes on for minutes."""
    monkeypatch.setattr(lent, "_SAMPLE_SECONDS", usual)
    cores = psutil.cpu_count() or 1
    monkeypatch.setattr(psutil, "getloadavg", lambda: (load * cores, 0, 0))
    lent_to = TASK._conditions()
    assert (lent_to.slowness, lent_to.load_seconds) == (expected, TASK.load_seconds * expected)
    pool = lent_to.engine(1).pool
    assert isinstance(pool, QueuePool)
    assert pool.timeout() == lent.POOL_TIMEOUT * expected


# The catalogue


def test_every_misconception_is_drawn_by_a_wrong_answer() -> None:
    drawn = {name for _, answers, _ in TASKS.values() for _, name in answers.wrong}
    assert drawn | {"never-ends"} | set(drill.DRAWN) == set(misconceptions())
    assert len(drawn) >= 25


@pytest.mark.parametrize("about", misconceptions().values(), ids=misconceptions())
def test_a_misconception_says_what_to_read_again(about: Misconception) -> None:
    (lesson,) = (ROOT / "notebooks").glob(f"{about.lesson}_*.ipynb")
    cells = nbformat.read(lesson, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert about.section in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    assert about.idea.startswith("This holds only if ") and about.says.endswith(".")


@pytest.mark.parametrize(
    "returned, expected, words",
    [
        (
            None,
            {1: 2},
            "None, as a function does without a `return`. The task wants {1: 2} (dict).",
        ),
        ([(1, 2)], {1: 2}, "[(1, 2)] (list). The task wants {1: 2} (dict)."),
        ({1: 2, 3: 4}, {1: 2}, "a key that was not asked for: 3 (int)."),
        ({}, {1: 2}, "0 of 1 keys: 1 (int) is missing."),
        ({3: 2}, {1: 2}, "the key 3 (int). The task wants 1 (int)."),
        (
            {1: 7.5},
            {1: Decimal("7.5")},
            "7.5 (float) for 1. The task wants Decimal('7.5') (Decimal).",
        ),
        ([1, 3], [1, 2], "3 (int) at [1]. The task wants 2 (int)."),
        ([1], [1, 2], "1 values, [1]. The task wants 2."),
        ("x" * 50_000_000, 3, f"'{'x' * 27}...{'x' * 28}' (str). The task wants 3 (int)."),
    ],
    ids=["none", "type", "extra", "missing", "other", "value", "item", "fewer", "long"],
)
def test_what_came_back_is_told(returned: Any, expected: Any, words: str) -> None:
    assert not is_same(returned, expected)
    assert another_answer("f()", returned, expected).evidence == f"f() returned {words}"


@each_task
def test_hints_come_one_at_a_time_and_then_the_solution(
    task: Task[Any],
    answers: Answers,
    module: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(task, "_hints_shown", 0)
    monkeypatch.setattr(progress, "PROGRESS", tmp_path / "progress.json")
    assert 2 <= len(task.hints) <= 3
    task.show_solution()
    assert capsys.readouterr().out.startswith("Not yet:")
    for number in range(1, len(task.hints) + 1):
        task.hint()
        printed = " ".join(capsys.readouterr().out.split())
        assert all(hint in printed for hint in task.hints[:number])
        assert not any(hint in printed for hint in task.hints[number:])
    task.show_solution()
    printed = capsys.readouterr().out
    assert exercises.solution_of(task.exercise, task.name)
    assert all(source in printed for source in exercises.solution_of(task.exercise, task.name))


# What learners do besides


TASK, ANSWERS, MODULE = TASKS["01-reuse_the_session"]


def ordinary(Session: Any, number: int, sku: int) -> None: ...
async def generator(Session: Any, number: int, sku: int) -> AsyncIterator[int]:
    yield number


async def other_arguments(Session: Any) -> None: ...


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (ordinary, "begin it with `async def`"),
        (generator, "do not `yield` in it"),
        (other_arguments, "wanted is place_order(Session, number, sku)"),
        (None, "place_order is no function but NoneType"),
        ("place_order", "place_order is no function but str"),
    ],
    ids=["ordinary", "generator", "arguments", "None", "text"],
)
def test_what_cannot_be_an_answer(answer: Any, sentence: str) -> None:
    outcome = TASK.check(answer)
    assert outcome.kind == "raised"
    assert sentence in outcome.text and "\n" not in outcome.text


def test_a_call_instead_of_the_function() -> None:
    outcome = TASK.check(ANSWERS.right[0](None, 1, 2))
    assert (outcome.kind, outcome.text) == (
        "raised",
        "you called place_order; the check wants the function itself, without ().",
    )


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("raise SystemExit('enough')", "SystemExit: enough"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise asyncio.CancelledError", "asyncio.exceptions.CancelledError"),
        (
            "asyncio.current_task().cancel(); await asyncio.sleep(1)",
            "60 of 60 calls were cancelled",
        ),
        ("__import__('os')._exit(1)", "the process in which your code ran has died"),
    ],
)
def test_code_that_wants_to_end_more_than_itself(source: str, told: str) -> None:
    outcome = TASK.check(written(source, MODULE, TASK))
    assert outcome.kind == "raised", outcome
    assert told in outcome.text


def test_code_that_cannot_be_sent() -> None:
    answer = written("return guard", MODULE, TASK)
    answer.__globals__["guard"] = threading.Lock()
    outcome = TASK.check(answer)
    assert outcome.kind == "raised"
    assert "in a process of its own, and the global " in outcome.text and "\n" not in outcome.text


def test_what_the_function_prints_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Its first lines, for it is called many times; also where it raises."""
    outcome = TASK.check(written("print('here'); await reuse(Session, number, sku)", MODULE, TASK))
    assert outcome.kind == "right"
    limit = "... (only the first 12 printed lines are shown)\n"
    assert capsys.readouterr().out == "here\n" * 12 + limit
    outcome = TASK.check(written("print('here'); raise LookupError", MODULE, TASK))
    assert outcome.kind == "raised"
    assert capsys.readouterr().out == "here\n" * 12 + limit


def test_what_is_logged_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """As a driver's complaint of a connection that was cut off, which comes in one run of many."""
    source = "__import__('logging').error('cut off'); await reuse(Session, number, sku)"
    assert TASK.check(written(source, MODULE, TASK)).kind == "right"
    assert capsys.readouterr().out == ""


def test_a_comment_is_no_attempt() -> None:
    given = exercises.given_functions("01")["place_order"]
    body = "\n".join(map(ast.unparse, given.body)).replace("\n", "\n    ")
    assert TASK.check(written(f"# what now?\n    {body}", MODULE, TASK)).kind == "not attempted"


def test_an_interrupted_check(server: Server) -> None:
    """■ ends it, and nothing is left of it."""
    timer = threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    outcome = TASK.check(written("while True: pass", MODULE, TASK))
    timer.join()
    assert outcome.kind == "stopped"
    assert observed() == []


def test_checks_leave_nothing_running(server: Server) -> None:
    """Again and again, whatever the answer does."""
    texts = {
        str(TASK.check(answer)) for answer in [MODULE.nine_permits, *[MODULE.return_at_once] * 9]
    }
    assert len(texts) == 2, "the feedback differs from run to run"
    assert observed() == []
    assert await_that(lambda: asyncio.run(_clients(server.url)) == 0, 3)


def observed() -> list[psutil.Process]:
    return runs_of(psutil.Process())


async def _clients(url: str) -> int:
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        others = await connection.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
        )
    await engine.dispose()
    return others or 0


CHECK = (
    "from workshop.checks import pool_starvation as check\n\ncheck.reuse_the_session(place_order)"
)


def run_cells(*sources: str) -> list[str]:
    """What cells show in a fresh kernel, one after another, also after one that fails."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in sources]
    )
    NotebookClient(notebook, kernel_name="python3", allow_errors=True, timeout=120).execute(
        stderr=subprocess.DEVNULL
    )
    return [
        "".join(
            "\n".join(output.traceback) if output.output_type == "error" else output.get("text", "")
            for output in cell.outputs
        )
        for cell in notebook.cells
    ]


def test_a_check_in_a_restarted_kernel() -> None:
    """The check is the first cell to run: one line says what is missing."""
    (shown,) = run_cells(CHECK)
    assert shown.startswith("name 'place_order' is not defined. Run the cells above first")
    assert "\n" not in shown


def test_a_syntax_error_in_the_last_version() -> None:
    """The check does not judge the version before it as if it were the last."""
    given = "async def place_order(Session, number, sku):\n    pass"
    *_, shown, mended = run_cells(
        "%load_ext workshop",
        given,
        "async def place_order(Session, number, sku):\n    async with Session() as session\n        pass",
        CHECK,
        given + "\n\nplace_order = 1",
    )
    assert shown.startswith("RAISED: the last version of place_order has a syntax error (line 2:")
    assert mended == ""


# Made from the solutions


each_exercise = pytest.mark.parametrize("number", exercises.numbers())


def exercise_path(number: str) -> Path:
    return exercises.EXERCISES / exercises.path_of(number).name


@each_exercise
def test_an_exercise_is_what_its_solution_makes(number: str) -> None:
    assert generator_module.is_as_made(exercise_path(number))


@each_exercise
def test_no_text_of_a_solution_is_in_its_exercise(number: str) -> None:
    """Neither in its cells nor in their outputs."""
    solution = nbformat.read(exercises.path_of(number), as_version=4)
    hidden, shown = [
        "\n".join(
            cell.source
            for cell in solution.cells
            if ("solution" in cell.metadata.get("tags", [])) is in_solution
        )
        for in_solution in (True, False)
    ]
    lines = {line.strip() for line in hidden.splitlines()}
    telling = {line for line in lines if len(line) > 10 and line not in shown}
    assert telling
    everything = json.dumps(nbformat.read(exercise_path(number), as_version=4))
    assert [line for line in telling if json.dumps(line)[1:-1] in everything] == []


@each_exercise
def test_an_exercise_shows_what_to_expect(number: str) -> None:
    """The picture of each solved check, with its text alternative."""
    exercise = generator_module.generated(nbformat.read(exercises.path_of(number), as_version=4))
    expected = [cell for cell in exercise.cells if cell.get("attachments")]
    assert len(expected) == len(exercises.task_names(number))
    alternative = re.compile(r"!\[.*\bas given\b.{10,}\byours\b.{10,}\]\(attachment:")
    assert all(alternative.search(cell.source) for cell in expected)


def test_the_pictures_of_exercise_08_tell_what_was_told() -> None:
    """A watcher changes no curve, so they lay its answers on the truth."""
    exercise = generator_module.generated(nbformat.read(exercises.path_of("08"), as_version=4))
    metrics, pages = (cell.source for cell in exercise.cells if cell.get("attachments"))
    assert "as given: 13 of 24 numbers wrong; yours: 0 of 24" in metrics
    assert "as given: right in 11 of 24 situations; yours: right in 24 of 24" in pages


@each_exercise
def test_each_task_has_its_cells(number: str) -> None:
    """A function to mend, a check, a solution that the check calls right."""
    solution = nbformat.read(exercises.path_of(number), as_version=4)
    tasks = {name: task for name, task in vars(checks_of(number)).items() if isinstance(task, Task)}
    names = exercises.task_names(number)
    assert 1 <= len(names) <= 4
    assert {name: task.name for name, task in tasks.items()} == {name: name for name in names}
    checks = {cell.id: cell for cell in solution.cells if cell.id.startswith("check-")}
    assert list(checks) == [f"check-{name.replace('_', '-')}" for name in names]
    for name, task in tasks.items():
        assert task.function in exercises.given_functions(number)
        assert exercises.solution_of(number, name)
        cell = checks[f"check-{name.replace('_', '-')}"]
        assert f"check.{name}({task.function})" in cell.source
        assert cell.outputs[0].text.startswith("RIGHT: ")


# Nothing is lost


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what progress needs."""
    for name in ("workshop", "ormscope", "solutions", "exercises"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "my_notebooks").mkdir()
    return tmp_path


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )


def test_progress(checkout: Path) -> None:
    """What is right stays right, what is no try is not noted, and only the learner's own notebooks count."""
    note = (
        "from workshop.progress import note\n"
        "for kind in {kinds}: note('01', 'reuse_the_session', kind)"
    )
    total = sum(len(exercises.task_names(number)) for number in exercises.numbers())

    def after(folder: str, *kinds: str) -> tuple[str, str]:
        subprocess.run(
            [sys.executable, "-c", note.format(kinds=list(kinds))],
            cwd=checkout / folder,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            check=True,
        )
        lines = run(checkout, "workshop.progress").stdout.splitlines()
        assert len(lines) == total + 1
        return lines[0].split()[-1], lines[-1]

    nothing, first = f"0 of {total} tasks done", f"1 of {total} tasks done"
    assert after("my_notebooks", "not attempted", "stopped") == ("open", nothing)
    assert after("solutions", "right") == ("open", nothing)
    assert after("exercises", "right") == ("open", nothing)
    assert after("my_notebooks", "raised", "wrong") == ("tried", nothing)
    assert after("my_notebooks", "right", "wrong") == ("done", first)
    (checkout / "my_notebooks" / "progress.json").write_text('{"01": {', "utf-8")
    assert after("my_notebooks", "stopped") == ("open", nothing)
