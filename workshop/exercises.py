"""The exercises: their tasks, what they give, and what their solutions are.

A solution notebook holds the whole exercise; its cells with the tag "solution" are what the learner is to find,
so the exercise is the notebook without them. Notebooks are read as the JSON that they are: nbformat takes time
to import, and a check starts several processes.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
from pathlib import Path
from typing import Any

from workshop.mistake import Mistake

ROOT = Path(__file__).resolve().parent.parent
MY_NOTEBOOKS = ROOT / "my_notebooks"  # the learner's copies, see workshop.copies
SOLUTIONS, EXERCISES = ROOT / "solutions", ROOT / "exercises"
SOLUTION_TAG, TASK_TAG = "solution", "task-"

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def path_of(exercise: str) -> Path:
    """The solution notebook of an exercise, by its number ("1" or "01"); raises Mistake where there is none."""
    known = {path.name[:2]: path for path in sorted(SOLUTIONS.glob("[0-9][0-9]_*.ipynb"))}
    if exercise.zfill(2) not in known:
        raise Mistake(f"There is no exercise {exercise}; there are {', '.join(known)}.")
    return known[exercise.zfill(2)]


def numbers() -> list[str]:
    """The numbers of all exercises."""
    return [path.name[:2] for path in sorted(SOLUTIONS.glob("[0-9][0-9]_*.ipynb"))]


def task_names(exercise: str) -> list[str]:
    """The names of an exercise's tasks, in their order."""
    names = (
        tag.removeprefix(TASK_TAG)
        for tags, _ in _code(exercise)
        for tag in tags
        if tag.startswith(TASK_TAG)
    )
    return list(dict.fromkeys(names))


def tasks(exercise: str) -> dict[str, Any]:
    """The tasks of an exercise (`workshop.checks.task.Task`), by name, in their order.

    For whoever gives answers to all checks; the checks themselves stand on this module, so it looks them up late.
    """
    checks = importlib.import_module(f"workshop.checks.{path_of(exercise).stem[3:]}")
    return {name: getattr(checks, name) for name in task_names(exercise)}


@functools.cache
def given_functions(exercise: str) -> dict[str, FunctionNode]:
    """The functions that an exercise gives, by name."""
    return {
        node.name: node
        for tags, source in _code(exercise)
        if SOLUTION_TAG not in tags
        for node in ast.parse(re.sub(r"^%.*", "", source, flags=re.MULTILINE)).body
        if isinstance(node, FunctionNode)
    }


def solution_of(exercise: str, task: str) -> list[str]:
    """The code of a task's solution, cell by cell."""
    wanted = {SOLUTION_TAG, f"{TASK_TAG}{task}"}
    return [source for tags, source in _code(exercise) if wanted <= set(tags)]


def _code(exercise: str) -> list[tuple[list[str], str]]:
    """The tags and the source of each code cell."""
    cells = json.loads(path_of(exercise).read_text(encoding="utf-8"))["cells"]
    return [
        (cell["metadata"].get("tags", []), "".join(cell["source"]))
        for cell in cells
        if cell["cell_type"] == "code"
    ]
