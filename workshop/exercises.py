"""The exercises: what they give, what their solutions are, and what is done of them (`python3 lab.py progress`).

A solution notebook holds the whole exercise; its cells with the tag "solution" are what the learner is to find,
so the exercise is the notebook without them. Notebooks are read as the JSON that they are: nbformat takes more
than a second to import, and a check starts several processes.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from workshop.mistake import Mistake

if TYPE_CHECKING:
    from workshop.checks.task import Task

ROOT = Path(__file__).resolve().parent.parent
SOLUTIONS, EXERCISES = ROOT / "solutions", ROOT / "exercises"
PROGRESS = EXERCISES / "progress.json"
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


def tasks(exercise: str) -> dict[str, Task]:
    """The tasks of an exercise, by name, in their order."""
    from workshop.checks.task import Task

    module = importlib.import_module(f"workshop.checks.{path_of(exercise).stem[3:]}")
    return {one.name: one for one in vars(module).values() if isinstance(one, Task)}


# What they give


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


# What is done


def _done() -> dict[str, dict[str, str]]:
    try:
        found: dict[str, dict[str, str]] = json.loads(PROGRESS.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def is_done(exercise: str, task: str) -> bool:
    """Whether a check of this task has ever said "right"."""
    return _done().get(exercise, {}).get(task) == "right"


def note(exercise: str, task: str, kind: str) -> None:
    """Remember what came of a try, where it was made in the learner's own exercise; what is right stays right."""
    if Path.cwd() != EXERCISES or kind not in ("right", "wrong", "raised"):
        return
    done = _done()
    if done.get(exercise, {}).get(task) == "right":
        return
    done.setdefault(exercise, {})[task] = kind
    new = PROGRESS.with_suffix(".new")
    new.write_text(json.dumps(done, indent=1), encoding="utf-8")
    os.replace(new, PROGRESS)


def state() -> dict[str, dict[str, str]]:
    """For each exercise, each of its tasks: "done", "tried" or "open"."""
    marks = {"right": "done", "wrong": "tried", "raised": "tried"}
    noted = _done()
    return {
        number: {
            name: marks.get(noted.get(number, {}).get(name, ""), "open") for name in tasks(number)
        }
        for number in numbers()
    }


def progress() -> None:
    """Print each task of each exercise, and whether it is done."""
    found = state()
    for number, names in found.items():
        for name, mark in names.items():
            print(f"{number}  {name:<24} {mark}")
    marks = [mark for names in found.values() for mark in names.values()]
    print(f"{marks.count('done')} of {len(marks)} tasks done")


if __name__ == "__main__":
    progress()
