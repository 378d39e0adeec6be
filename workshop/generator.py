"""Make the exercises from their solutions."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from ormscope.lab.picture import stored_picture
from workshop.exercises import SOLUTION_TAG, SOLUTIONS

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
            if picture := stored_picture(output.get("data", {}).get("text/html", "")):
                cells.append(_expected(cell.id, *picture))
    exercise: NotebookNode = nbformat.v4.new_notebook(cells=cells, metadata=solution.metadata)
    return exercise


def _expected(check_id: str, alternative: str, png: bytes) -> NotebookNode:
    cell: NotebookNode = nbformat.v4.new_markdown_cell(
        f"What you should see when it is right, beside the code as it was given:\n\n"
        f"![{' '.join(alternative.split())}](attachment:{EXPECTED})",
        id=f"{check_id}-expected",
        attachments={EXPECTED: {"image/png": base64.b64encode(png).decode()}},
    )
    return cell


def is_as_made(path: Path) -> bool:
    """Whether an exercise is what its solution makes: nothing has drifted."""
    try:
        found = nbformat.read(path, as_version=4)
    except Exception:  # half-written, or no notebook at all
        return False
    wanted = generated(nbformat.read(SOLUTIONS / path.name, as_version=4))
    return [_plain(cell) for cell in found.cells] == [_plain(cell) for cell in wanted.cells]


def _plain(cell: NotebookNode) -> tuple[Any, ...]:
    return cell.cell_type, cell.id, cell.source, _tags(cell), cell.get("attachments")
