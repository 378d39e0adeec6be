"""Make the exercises from their solutions, and bring one back as it was (`python3 lab.py reset NN`)."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from workshop.exercises import EXERCISES, ROOT, SOLUTION_TAG, SOLUTIONS, path_of
from workshop.mistake import Mistake

KEPT = EXERCISES / "kept"  # what a reset has put aside
EXPECTED = "expected.png"


def _tags(cell: NotebookNode) -> list[str]:
    found: list[str] = cell.metadata.get("tags", [])
    return found


def generated(solution: NotebookNode) -> NotebookNode:
    """The exercise that belongs to a solution, not executed.

    After each check it shows what the solved check showed: the picture, as an attachment of a text cell.
    """
    cells: list[NotebookNode] = []
    for cell in solution.cells:
        if SOLUTION_TAG in _tags(cell):
            continue
        if cell.cell_type != "code":
            cells.append(NotebookNode(cell))
            continue
        cells.append(NotebookNode(cell, outputs=[], execution_count=None))
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                cells.append(_expected(cell.id, output))
    exercise: NotebookNode = nbformat.v4.new_notebook(cells=cells, metadata=solution.metadata)
    return exercise


def _expected(check_id: str, output: NotebookNode) -> NotebookNode:
    alternative = " ".join(output.metadata["image/png"]["alt"].split())
    cell: NotebookNode = nbformat.v4.new_markdown_cell(
        f"What you should see when it is right, beside the code as it was given:\n\n"
        f"![{alternative}](attachment:{EXPECTED})",
        id=f"{check_id}-expected",
        attachments={EXPECTED: {"image/png": output.data["image/png"].replace("\n", "")}},
    )
    return cell


def is_as_made(path: Path) -> bool:
    """Whether an exercise is what its solution makes: nobody has worked on it, and nothing has drifted."""
    try:
        found = nbformat.read(path, as_version=4)
    except Exception:  # half-written, or no notebook at all
        return False
    wanted = generated(nbformat.read(SOLUTIONS / path.name, as_version=4))
    return [_plain(cell) for cell in found.cells] == [_plain(cell) for cell in wanted.cells]


def _plain(cell: NotebookNode) -> tuple[Any, ...]:
    return cell.cell_type, cell.id, cell.source, _tags(cell), cell.get("attachments")


def reset(exercise: str) -> None:
    """Bring an exercise back as it was; the learner's version is kept under a dated name."""
    solution = path_of(exercise)
    path = EXERCISES / solution.name
    if path.exists():
        if is_as_made(path):
            print(f"exercises/{path.name} is as it was made.")
            return
        KEPT.mkdir(exist_ok=True)
        moment = datetime.now().strftime("%Y-%m-%d %H.%M.%S")
        kept = KEPT / f"{path.stem} {moment}.ipynb"
        number = 1
        while kept.exists():
            number += 1
            kept = KEPT / f"{path.stem} {moment} ({number}).ipynb"
        path.rename(kept)
        print(f"Your version is kept as {kept.relative_to(ROOT).as_posix()}")
    nbformat.write(generated(nbformat.read(solution, as_version=4)), path)
    print(f"exercises/{path.name} is as it was made; reload it where it is open (menu File).")


def main() -> int:
    """Carry out one command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="lab.py reset")
    parser.add_argument("numbers", nargs="+", metavar="NN", help="numbers of exercises")
    arguments = parser.parse_args()
    try:
        for number in arguments.numbers:
            reset(number)
    except (Mistake, OSError) as mistake:
        print(mistake, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
