"""The notebooks: how they are written, what they say, and that nothing is left of them.

nbval compares every text output (see pyproject.toml), nbval_gate.py judges the rest of its run; this file covers
what needs no run, and shows that both can fail.
"""

from __future__ import annotations

import ast
import copy
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import nbformat
import psutil
import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager
from leftovers import assert_nothing_is_left, await_that, runs_of
from lesson_minutes import A_PREDICTION, minutes
from matplotlib.figure import Figure
from nbformat import NotebookNode
from sanitizing import masked

from ormscope.lab.picture import Picture, stored_picture
from ormscope.verdict import Cause
from workshop import notebooks, postgres

ROOT = Path(__file__).parents[1]
CANARIES = Path(__file__).parent / "canaries"
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOKS = [
    *LESSONS,
    *sorted(ROOT.glob("exercises/*.ipynb")),
    *sorted(ROOT.glob("solutions/*.ipynb")),
]

LONGEST_CELL = 30  # lines
ORDERINGS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
# Seconds from an interrupt to the end of the cell: some tenths when idle; the run itself would go on for a minute.
STOPPED_WITHIN = 5.0
PATIENCE = 60.0  # seconds for what has to come, on a busy machine

each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}"
)
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


# How they are written


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def output_texts(cell: NotebookNode) -> Iterator[str]:
    """Every text in the stored outputs of a cell, text alternatives and tracebacks included."""
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield from (
            text for kind, text in output.get("data", {}).items() if kind.startswith("text/")
        )
        yield from output.get("traceback", [])
        yield output.get("evalue", "")


def complaints_about_code(cell: NotebookNode) -> Iterator[str]:
    last = ([""] + [line for line in cell.source.splitlines() if line.strip()])[-1].rstrip()
    if "clear_output" in cell.source:
        yield "clear_output, which nbval takes for a changed output"
    if last.endswith(";"):
        yield "a trailing semicolon, which hides an output from the reader"
    if len(cell.source.splitlines()) > LONGEST_CELL:
        yield f"more than {LONGEST_CELL} lines"
    for comparison in hidden_comparisons(cell.source):
        yield f"the number behind {comparison!r} is not printed, only True or False"
    if "≈" in cell.source and "assert" not in cell.source:
        yield "a measured number whose bound no assert holds"
    markers = "\n".join([cell.source, *tags(cell)])
    if re.search(
        r"nbval[-_](skip|ignore[-_]output)|validate_ignore_output", markers, re.IGNORECASE
    ):
        yield "a marker that switches nbval off"
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stderr":
            yield f"a stored warning or error: {output.text[:100]!r}"
        if output.output_type == "error" and "raises-exception" not in tags(cell):
            yield f"a stored {output.ename} without the tag raises-exception"
        data = output.get("data", {})
        picture = stored_picture(data.get("text/html", ""))
        if "image/png" in data or (picture is not None and not picture[0].strip()):
            yield "a picture without a text alternative"
    if "verdict" in tags(cell) and not notebooks.texts(cell).strip():
        yield "the tag verdict, but nothing printed"


def hidden_comparisons(source: str) -> Iterator[str]:
    """The comparisons of numbers that a cell prints, where they do not only decide what is printed."""
    plain = "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))
    for call in ast.walk(ast.parse(plain)):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            continue
        parts = list(ast.walk(call))
        choices = [part.test for part in parts if isinstance(part, ast.IfExp)]
        choices += [
            test for part in parts if isinstance(part, ast.comprehension) for test in part.ifs
        ]
        decide = {id(node) for choice in choices for node in ast.walk(choice)}
        for part in parts if call.func.id == "print" else ():
            orders = isinstance(part, ast.Compare) and isinstance(part.ops[0], ORDERINGS)
            if orders and id(part) not in decide:
                yield ast.unparse(part)


PATHS_OF_A_MACHINE = re.compile(
    r"/(root/|(home|Users|tmp)/\w|var/folders/)|\b[A-Za-z]:\\Users|ipykernel_\d"
)


def complaints(notebook: NotebookNode) -> Iterator[str]:
    """What is wrong with how a notebook is written, one line for each cell and fault."""
    code = [cell for cell in code_cells(notebook) if cell.source.strip()]
    counts = [cell.execution_count for cell in code]
    if None in counts:
        yield "has cells that were not run, which nbval would not compare"
    elif counts != list(range(1, len(code) + 1)):
        yield f"was not run once from top to bottom: {counts}"
    if not code or code[0].source.splitlines()[0].strip() != "%load_ext workshop":
        yield "does not begin its first code cell with %load_ext workshop"
    for number, cell in enumerate(notebook.cells):
        faults = list(complaints_about_code(cell)) if cell.cell_type == "code" else []
        for text in [cell.source, *output_texts(cell)]:
            if path := PATHS_OF_A_MACHINE.search(text):
                faults.append(f"a path of one machine: {path.group()}")
        yield from (f"cell {number} has {fault}" for fault in faults)


def test_the_lessons_are_there() -> None:
    """The tests of this file and the gate would all pass if there were no notebooks."""
    assert [path.name for path in LESSONS[:3]] == [
        "00_start_here.ipynb",
        "01_pool_starvation.ipynb",
        "02_feeding_the_pool.ipynb",
    ]


@each_notebook
def test_how_it_is_written(path: Path) -> None:
    assert "\n".join(complaints(nbformat.read(path, as_version=4))) == ""


SPOILED: list[tuple[str, Callable[[NotebookNode], object]]] = [
    ("clear_output", lambda cell: cell.update(source="from IPython.display import clear_output")),
    ("semicolon", lambda cell: cell.update(source="1 + 1;\n")),
    ("lines", lambda cell: cell.update(source="\n" * LONGEST_CELL + "1")),
    ("switches nbval off", lambda cell: cell.update(source="# NBVAL_IGNORE_OUTPUT\n1")),
    ("switches nbval off", lambda cell: cell.metadata.update(tags=["nbval-skip"])),
    ("not run", lambda cell: cell.update(execution_count=None)),
    ("not run once", lambda cell: cell.update(execution_count=7)),
    ("path of one machine", lambda cell: cell.update(source="open('/Users/somebody/x')")),
    ("is not printed", lambda cell: cell.update(source="print('soon:', 0.5 < 1)")),
    ("whose bound", lambda cell: cell.update(source="print('≈ 0.5 s')")),
    ("nothing printed", lambda cell: cell.update(outputs=[])),
    ("stored warning", lambda cell: cell.outputs.append(stream("careful", name="stderr"))),
    (
        "path of one machine",
        lambda cell: cell.outputs.append(stream("at /var/folders/ipykernel_1/2.py")),
    ),
    ("stored ValueError", lambda cell: cell.outputs.append(error("ValueError"))),
    ("text alternative", lambda cell: cell.outputs.append(picture(" "))),
    ("text alternative", lambda cell: cell.outputs.append(plain_picture())),
]


def stream(text: str, name: str = "stdout") -> NotebookNode:
    return nbformat.v4.new_output("stream", name=name, text=text)


def error(name: str) -> NotebookNode:
    return nbformat.v4.new_output("error", ename=name, evalue="", traceback=[])


def picture(alternative: str) -> NotebookNode:
    data = {"text/html": Picture(Figure(), "a figure", alternative).html()}
    return nbformat.v4.new_output("display_data", data=data)


def plain_picture() -> NotebookNode:
    """As matplotlib has it: neither JupyterLab nor nbconvert says what is on it."""
    return nbformat.v4.new_output("display_data", data={"image/png": "iVBORw0KGgo="})


@pytest.mark.parametrize(("complaint", "spoil"), SPOILED)
def test_the_lint_sees(complaint: str, spoil: Callable[[NotebookNode], object]) -> None:
    """Each rule complains of a notebook that breaks it; none of one that keeps them all."""
    first = nbformat.v4.new_code_cell("%load_ext workshop", execution_count=1)
    second = nbformat.v4.new_code_cell(
        "print(1)", execution_count=2, outputs=[stream("1\n")], metadata={"tags": ["verdict"]}
    )
    notebook = nbformat.v4.new_notebook(cells=[first, second])
    assert list(complaints(notebook)) == []
    spoil(second)
    (found,) = complaints(notebook)
    assert complaint in found


@each_lesson
def test_how_a_lesson_opens_and_ends(path: Path) -> None:
    """The title, what you will do, learn and need, the minutes; at last summary and Monday."""
    cells = nbformat.read(path, as_version=4).cells
    opening = cells[0].source
    assert cells[0].cell_type == "markdown"
    assert opening.startswith(f"# {path.name[:2]} "), "opens with its number and title"
    for paragraph in ("What you will do", "What you will learn", "What you need"):
        assert re.search(rf"^\*\*{paragraph}\.\*\* \S", opening, re.MULTILINE), paragraph
    assert re.search(rf"^\*\*Time\.\*\* {minutes(cells)} minutes", opening, re.MULTILINE)
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert re.findall(r"^## (.+)$", prose, re.MULTILINE)[-2:] == ["Summary", "At work on Monday"]


# What `run` and `refresh` do: a second engine


@pytest.fixture
def temporary(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of all processes that this test starts; they can be told by it."""
    folder = sandbox / "tmp"
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    return folder


def comparable(cell: NotebookNode) -> dict[str, Any]:
    """The outputs of a cell as far as every run must repeat them."""
    data = [output.data for output in cell.outputs if "data" in output]
    return {
        "printed": masked(notebooks.texts(cell)),
        "results": [bundle.get("text/plain") for bundle in data],
        "pictures": [stored_picture(bundle.get("text/html", "")) is not None for bundle in data],
        "errors": [
            (output.ename, output.evalue)
            for output in cell.outputs
            if output.output_type == "error"
        ],
    }


@each_lesson
def test_each_prediction_has_a_place_and_is_compared_with_what_came(path: Path) -> None:
    """The question, a cell to write the answer down, and then the two side by side."""
    order = ""  # Q: the question, P: the place, S: side by side
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            order += "Q" * len(A_PREDICTION.findall(cell.source))
            continue
        order += "P" if "my_prediction = None" in cell.source else ""
        if 'print("you said", my_prediction)\n' in cell.source:
            assert "it was" in cell.source
            order += "S"
    assert order and order == "QPS" * order.count("Q"), order


def told_too_early(notebook: NotebookNode) -> Iterator[str]:
    """The causes that a prediction's comparison names and that stand above it, in the lesson's aims or its section.

    What an earlier cell of the lesson has shown is known, and a lesson's title names its subject.
    """
    aims = notebook.cells[0].source.partition("\n")[2]
    known = section = ""
    asked: str | None = None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            *_, last = re.split(r"^(?=## )", cell.source, flags=re.MULTILINE)
            section = last if last.startswith("## ") else f"{section}\n{cell.source}"
            asked = f"{aims}\n{section}" if A_PREDICTION.search(cell.source) else asked
            continue
        texts = "\n".join(output_texts(cell)).lower()
        section += f"\n{cell.source}\n{texts}"
        if asked is not None and 'print("you said", my_prediction)\n' in cell.source:
            for cause in set(get_args(Cause)) - {"healthy", "unknown"}:
                if cause in texts and cause in asked.lower() and cause not in known:
                    yield cause
            asked = None
        known += texts


@each_lesson
def test_no_verdict_stands_above_its_prediction(path: Path) -> None:
    assert list(told_too_early(nbformat.read(path, as_version=4))) == []


@pytest.mark.parametrize("early", ["aims", "section", "code"])
def test_a_verdict_above_its_prediction_is_seen(early: str) -> None:
    told = {early: "Soon we shall see a deadlock."}
    cells = [
        nbformat.v4.new_markdown_cell(f"# 98 Deadlock\n{told.get('aims', '')}"),
        nbformat.v4.new_markdown_cell(f"## A run\n{told.get('section', '')}"),
        nbformat.v4.new_code_cell(f"# {told.get('code', '')}"),
        nbformat.v4.new_markdown_cell("**Predict.** What will it be?"),
        nbformat.v4.new_code_cell(
            'print("you said", my_prediction)\n', outputs=[stream("it was a deadlock\n")]
        ),
    ]
    assert list(told_too_early(nbformat.v4.new_notebook(cells=cells))) == ["deadlock"]
    cells[-1].outputs = [stream("it was healthy\n")]
    assert list(told_too_early(nbformat.v4.new_notebook(cells=cells))) == []


def test_an_exception_group_is_a_failure() -> None:
    with pytest.raises(notebooks.CellFailed, match="ExceptionGroup: unhandled errors"):
        notebooks.execute(CANARIES / "exception_group.ipynb")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what running a lesson needs, with one lesson more, which fails."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("workshop", "ormscope", "data"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "notebooks").mkdir()
    shutil.copy(LESSONS[0], folder / "notebooks")
    failing = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("%load_ext workshop"), nbformat.v4.new_code_cell("1 / 0")]
    )
    nbformat.write(failing, folder / "notebooks" / "99_fails.ipynb")
    return folder


def run_notebooks(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "workshop.notebooks", *arguments],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )


def test_run_saves_and_reports(checkout: Path) -> None:
    """A line for each cell, the verdicts as text, a copy with its pictures, and no noise."""
    lesson = nbformat.read(LESSONS[0], as_version=4)
    done = run_notebooks(checkout, "run", "00")
    assert (done.returncode, done.stderr) == (0, "")
    cells = code_cells(lesson)
    assert re.findall(r"^00_start_here  cell +(\d+) of (\d+) +\d+\.\d s$", done.stdout, re.M) == [
        (str(number), str(len(cells))) for number in range(1, len(cells) + 1)
    ]
    for cell in cells:
        if "verdict" in tags(cell):
            lines = masked(notebooks.texts(cell)).splitlines()
            assert "".join(f"    {line}\n" for line in lines) in masked(done.stdout)
    executed = nbformat.read(checkout / "executed" / LESSONS[0].name, as_version=4)
    assert list(map(comparable, code_cells(executed))) == list(map(comparable, cells))
    saved = [path.read_bytes() for path in sorted((checkout / "executed").glob("00_*.png"))]
    assert saved == [png for cell in code_cells(executed) for png in notebooks.pictures(cell)] != []
    assert nbformat.read(checkout / "notebooks" / LESSONS[0].name, as_version=4) == lesson


@pytest.mark.parametrize("command", ["run", "refresh"])
def test_a_cell_that_fails(command: str, checkout: Path) -> None:
    """One line that names the lesson and the error, exit status 1, and the notebook as it was."""
    path = checkout / "notebooks" / "99_fails.ipynb"
    before = path.read_bytes()
    done = run_notebooks(checkout, command, "99")
    assert done.returncode == 1
    assert done.stderr == "99_fails.ipynb: a cell failed: ZeroDivisionError: division by zero\n"
    assert path.read_bytes() == before
    assert not (checkout / "executed" / path.name).exists()


def test_a_kernel_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = tmp_path / "busy.py"
    busy.write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONSTARTUP", str(busy))  # the kernel runs it before it answers anybody
    settings = copy.deepcopy(notebooks.SETTINGS)
    settings.NotebookClient.startup_timeout = 0
    monkeypatch.setattr(notebooks, "SETTINGS", settings)
    with pytest.raises(
        notebooks.CellFailed, match="the kernel did not start: Kernel didn't respond"
    ):
        notebooks.execute(LESSONS[0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1


def test_a_lesson_that_is_not_there(checkout: Path) -> None:
    done = run_notebooks(checkout, "run", "42")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "There is no lesson 42; there are 00, 99.\n"


def test_executed_copies_are_ignored_by_git() -> None:
    command = ["git", "check-ignore", "--quiet", "executed/00_start_here.ipynb"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


# That the gate can fail: nbval as pyproject.toml sets it up


def run_gate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """pytest with the project's own options, in a process of its own."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--color=no",
            "-p",
            "no:cacheprovider",
            *map(str, arguments),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def outcomes(report: Path) -> dict[str, list[str]]:
    """For each notebook in a JUnit report, "passed" or the message of its failure, cell by cell."""
    found: dict[str, list[str]] = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        faults = [
            part.text or part.get("message", "")
            for part in case
            if part.tag in ("failure", "error")
        ]
        found.setdefault(case.get("classname", "").split(".")[-2], []).append(
            "\n".join(faults) or ("skipped" if len(case) else "passed")
        )
    return found


CANARY_FAILURES = {
    # name: (which code cell fails, what the gate says)
    "changed_print": (1, r"mismatch 'stdout'[^$]*'yesterday\\n' == 'today\\n'"),
    "exception_group": (
        1,
        r"Cell execution caused an exception[^$]*ExceptionGroup: unhandled errors",
    ),
    "exception_that_does_not_come": (1, r"Missing output fields from running code: .*'ename'"),
    "changed_verdict": (2, r"'healthy\\n' == 'deadlock\\n'"),
    "silent_error": (1, r"The kernel replied \['error'\], not 'ok'"),
    "left_process": (1, r"after 15\.0 s there is still \[psutil\.Process"),
}


@pytest.fixture(scope="module")
def canaries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    report = tmp_path_factory.mktemp("canaries") / "report.xml"
    paths = [CANARIES / f"{name}.ipynb" for name in ("control", *CANARY_FAILURES)]
    done = run_gate(f"--junit-xml={report}", *paths)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    return outcomes(report)


def test_control_keeps_the_gate_green(canaries: dict[str, list[str]]) -> None:
    """Nothing but their fault turns the canaries red."""
    assert canaries["control"] == ["passed"] * 5


@pytest.mark.parametrize("name", CANARY_FAILURES)
def test_canary_turns_the_gate_red(name: str, canaries: dict[str, list[str]]) -> None:
    """It fails in the cell with the fault, for the reason it was made for, and nowhere else."""
    cell, reason = CANARY_FAILURES[name]
    assert re.search(reason, canaries[name][cell]), canaries[name][cell]
    assert canaries[name][:cell] + canaries[name][cell + 1 :] == ["passed"] * (
        len(canaries[name]) - 1
    )


def test_a_cell_that_hangs_turns_the_gate_red(tmp_path: Path) -> None:
    """At the time limit, not after half an hour, although such a cell cannot be interrupted."""
    report = tmp_path / "report.xml"
    done = run_gate(f"--junit-xml={report}", "--nbval-cell-timeout=5", CANARIES / "hang.ipynb")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    first, second = outcomes(report)["hang"]
    assert first == "passed"
    assert "Timeout of 5 seconds exceeded" in second


def test_the_gate_is_strict_and_limits_time() -> None:
    """The options that make nbval a gate are in force for whoever runs pytest here."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    options = settings["tool"]["pytest"]["ini_options"]["addopts"]
    assert "--nbval" in options
    assert "--nbval-current-env" in options
    assert any(option.startswith("--nbval-cell-timeout=") for option in options)
    assert not any("lax" in option or "rerun" in option for option in options)


def test_the_gate_judges_a_notebook_that_is_run_alone() -> None:
    """No folder named tests is asked for then, so its conftest.py is not read."""
    done = run_gate("--collect-only", "--trace-config", "notebooks/00_start_here.ipynb")
    assert re.search(r"registered: <module 'nbval_gate'", done.stdout), done.stdout


def test_the_gate_covers_every_notebook() -> None:
    """pytest collects each code cell of each notebook, and no canary."""
    done = run_gate("--collect-only", "--quiet", "--ignore-glob=*.py")
    collected = re.findall(r"^(.+\.ipynb)::Cell \d+$", done.stdout, re.MULTILINE)
    assert {name: collected.count(name) for name in collected} == {
        path.relative_to(ROOT).as_posix(): len(code_cells(nbformat.read(path, as_version=4)))
        for path in NOTEBOOKS
    }


@each_notebook
def test_it_brings_itself_back_by_its_own_number(path: Path) -> None:
    """Numbers change when a lesson comes between; a command that is copied from here must name this notebook."""
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    named = re.findall(r"lab\.py reset (?:--lesson )?(\d\d)", text)
    assert {*named} <= {path.name[:2]}


# That nothing is left


STARVED = """
from functools import partial

from sqlalchemy import select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from ormscope.lab import observe, storm
from workshop.shop import Order, Product


async def place_order(Session, number):
    async with Session() as session:
        session.add(Order(household_id=number))
        await session.flush()
        async with Session() as another:
            await another.scalar(select(Product.unit_price).where(Product.sku == 1082185))
        await session.commit()


async def rush_hour():
    engine = create_async_engine(DATABASE_URL, pool_size=20, max_overflow=0)
    return await storm(partial(place_order, async_sessionmaker(engine)), 200)
"""
START_SERVER = """
%load_ext workshop
from workshop.database import database_url
DATABASE_URL = database_url()
"""
OBSERVE = "starved = observe(rush_hour, fuse=60)"
# Awaited, for a server takes a moment to see that a killed client is gone.
COUNT_CONNECTIONS = """
import asyncpg, time

async def connections():
    connection = await asyncpg.connect(DATABASE_URL.replace("+asyncpg", ""))
    try:
        return await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
    finally:
        await connection.close()

deadline = time.monotonic() + 3
while (left := await connections()) and time.monotonic() < deadline:
    pass
print(left)
"""
FLAT = "20 of 20 checked out, 20 at the end; up to 200 waiting, 200 at the end"


class Kernel:
    """A kernel whose cells are sent one by one, in a temporary folder of its own."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        self.manager = KernelManager(kernel_name="python3")
        # What the environment's configuration loads is tested in tests/test_lab.py.
        self.manager.start_kernel(extra_arguments=["--IPKernelApp.exec_lines=[]"])
        self.client: BlockingKernelClient = self.manager.client()
        self.client.start_channels()

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.manager.provisioner.pid)

    def ready(self) -> None:
        self.client.wait_for_ready(timeout=PATIENCE)

    def send(self, code: str) -> str:
        """Send a cell, do not wait for it."""
        return self.client.execute(code, stop_on_error=False)

    def reply(self, sent: str) -> dict[str, Any]:
        """Wait for the end of a cell that was sent."""
        while True:
            message = self.client.get_shell_msg(timeout=PATIENCE)
            if message["parent_header"].get("msg_id") == sent:
                return message["content"]

    def await_output(self, sent: str, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Wait for an output of the cell that meets the condition."""
        assert any(condition(message["content"]) for message in self.messages(sent)), "none came"

    def messages(self, sent: str) -> Iterator[dict[str, Any]]:
        """What the cell publishes, to its end; also for a cell that is never replied to."""
        while True:
            message = self.client.get_iopub_msg(timeout=PATIENCE)
            if message["parent_header"].get("msg_id") == sent:
                yield message
                if message["content"].get("execution_state") == "idle":
                    return

    def run(self, code: str) -> str:
        """Run a cell to its end; what it printed. Fails where the cell does."""
        printed = []

        def take(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = self.client.execute_interactive(
            code, timeout=PATIENCE, output_hook=take, stop_on_error=False
        )
        content = reply["content"]
        assert content["status"] == "ok", content.get("traceback")
        return "".join(printed)

    def observed(self) -> list[psutil.Process]:
        """The observed processes that this kernel has started and that still run."""
        return runs_of(self.process)

    def starts(self, what: Callable[[], object]) -> None:
        assert await_that(what, PATIENCE), "the kernel did not get so far"

    def picture_shown(self, sent: str, alternative: str = "") -> None:
        """Wait for a picture with this in its text alternative."""
        self.await_output(
            sent,
            lambda content: (
                alternative in (stored_picture(content["data"].get("text/html", "")) or [""])[0]
                if "data" in content
                else False
            ),
        )


@pytest.fixture
def kernel(temporary: Path) -> Iterator[Kernel]:
    kernel = Kernel(temporary)
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)
    assert_nothing_is_left(temporary)


def server_folders(kernel: Kernel) -> list[Path]:
    # Not what `tempfile` writes for a moment to see whether it can: an interrupt just then would leave it.
    return list(kernel.temporary.glob(f"{postgres.APPLICATION}-*"))


def until_started(kernel: Kernel) -> None:
    """The process is there, and knows nothing yet."""


def until_server_starts(kernel: Kernel) -> str:
    """A folder is being filled, and perhaps a server is coming up in it."""
    kernel.ready()
    sent = kernel.send(START_SERVER)
    kernel.starts(lambda: server_folders(kernel))
    return sent


def until_server_runs(kernel: Kernel) -> None:
    kernel.ready()
    kernel.run(START_SERVER)


def until_observed_process_starts(kernel: Kernel) -> None:
    until_server_runs(kernel)
    kernel.run(STARVED)
    kernel.send(OBSERVE)
    kernel.starts(kernel.observed)


def until_starved(kernel: Kernel) -> None:
    until_server_runs(kernel)
    kernel.run(STARVED)
    kernel.picture_shown(kernel.send(OBSERVE), FLAT)


@pytest.mark.parametrize(
    "until",
    [
        until_started,
        until_server_starts,
        until_server_runs,
        until_observed_process_starts,
        until_starved,
    ],
    ids=lambda until: until.__name__,
)
def test_killed_kernel_leaves_nothing(
    until: Callable[[Kernel], object],
    kernel: Kernel,
    record_property: Callable[[str, object], None],
) -> None:
    """SIGKILL, at some moment after each stage: within 3 s no process and no file is left."""
    until(kernel)
    delay = random.uniform(0, 0.5)
    record_property("seconds after the stage", delay)
    time.sleep(delay)  # the moment is to be any
    processes = [kernel.process, *kernel.process.children(recursive=True)]
    kernel.process.kill()
    assert_nothing_is_left(kernel.temporary, processes)


def test_interrupt_keeps_the_recording(kernel: Kernel) -> None:
    """■ in a starved cell: it ends, and the next cells find what was seen."""
    until_server_runs(kernel)
    kernel.run(STARVED)
    sent = kernel.send(OBSERVE)
    kernel.picture_shown(sent, FLAT)
    interrupted = time.monotonic()
    kernel.manager.interrupt_kernel()
    reply = kernel.reply(sent)
    assert time.monotonic() - interrupted < STOPPED_WITHIN
    assert reply["status"] == "ok"
    assert kernel.observed() == []
    assert kernel.run("print(starved.ended, starved.verdict().cause)") == "interrupted deadlock\n"
    assert FLAT in kernel.run("print(starved.summary())")
    assert kernel.run(COUNT_CONNECTIONS) == "0\n"
    assert kernel.run("print(1 + 1)") == "2\n"


def test_interrupt_at_any_moment(
    kernel: Kernel, record_property: Callable[[str, object], None]
) -> None:
    """The cell ends, leaves no process, and the next one works."""
    until_server_runs(kernel)
    kernel.run(STARVED)
    delays = [random.uniform(0, 1.5) for _ in range(8)]
    record_property("seconds after the start of the cell", delays)
    for delay in delays:
        sent = kernel.send(OBSERVE)
        kernel.await_output(sent, lambda content: content.get("execution_state") == "busy")
        time.sleep(delay)  # the moment is to be any
        interrupted = time.monotonic()
        kernel.manager.interrupt_kernel()
        kernel.reply(sent)
        assert time.monotonic() - interrupted < STOPPED_WITHIN, f"interrupted after {delay} s"
        assert kernel.observed() == [], f"interrupted after {delay} s"
        assert kernel.run("print(1 + 1)") == "2\n"
    assert kernel.run(COUNT_CONNECTIONS) == "0\n"


def test_interrupt_while_the_server_starts(kernel: Kernel) -> None:
    """Nothing is left of a start that was broken off, and the next one succeeds."""
    sent = until_server_starts(kernel)
    kernel.manager.interrupt_kernel()
    # On a busy machine the interrupt may come just too late.
    broken_off = kernel.reply(sent)["status"] == "error"
    assert len(server_folders(kernel)) == (0 if broken_off else 1)
    kernel.run(START_SERVER)
    assert kernel.run(COUNT_CONNECTIONS) == "0\n"
    assert len(server_folders(kernel)) == 1


@pytest.mark.parametrize("loaded", [True, False], ids=["with extension", "without"])
def test_the_extension_makes_an_exception_group_an_error(loaded: bool, kernel: Kernel) -> None:
    """Without it no error message is sent, which is why each notebook loads it."""
    extension, group = code_cells(nbformat.read(CANARIES / "exception_group.ipynb", as_version=4))
    kernel.ready()
    if loaded:
        kernel.run(extension.source)
    kinds = [message["msg_type"] for message in kernel.messages(kernel.send(group.source))]
    assert ("error" in kinds) is loaded
