"""The learner's own copies: what is in them, that they follow what is stored, and that nothing of theirs is lost."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from workshop import copies

ROOT = Path(__file__).parents[1]
LESSON, EXERCISE = "01_pool_starvation.ipynb", "01b_exercise.ipynb"
PREPARE = "from workshop import copies; copies.prepare()"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the notebooks, and of what makes copies of them."""
    folder = tmp_path / "checkout"
    for name in ("workshop", "ormscope", "notebooks", "exercises", "solutions", "data"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / ".gitignore", folder)
    return folder


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )


def prepare(checkout: Path) -> str:
    """What the making of the copies prints."""
    done = run(checkout, "-c", PREPARE)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def reset(checkout: Path, *arguments: str) -> str:
    done = run(checkout, "-m", "workshop.copies", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def edit(path: Path, change: Callable[[NotebookNode], object]) -> None:
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def predict(notebook: NotebookNode) -> None:
    cell = next(cell for cell in notebook.cells if cell.source.startswith("my_prediction = None"))
    cell.source = "my_prediction = 42"


def run_all(notebook: NotebookNode) -> None:
    """What JupyterLab leaves where somebody has run each cell, also the last one."""
    for count, cell in enumerate(notebook.cells, 1):
        if cell.cell_type == "code":
            output = nbformat.v4.new_output("stream", name="stdout", text="mine")
            cell |= {"outputs": [output], "execution_count": count}
    notebook.cells.append(nbformat.v4.new_code_cell())


def add_sentence(notebook: NotebookNode) -> None:
    notebook.cells[0].source += "\n\nAnd one sentence more."


def opening(path: Path) -> str:
    text: str = nbformat.read(path, as_version=4).cells[0].source
    return text


def test_a_copy_is_what_is_stored_without_its_outputs(checkout: Path) -> None:
    assert prepare(checkout) == ""
    stored_ones = (*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("exercises/*.ipynb"))
    assert set(copies.copies()) == set(stored_ones)
    for stored, copy in copies.copies().items():
        there = checkout / copy.relative_to(ROOT)
        mine, theirs = (nbformat.read(path, as_version=4) for path in (there, stored))
        nbformat.validate(mine)
        for cell, original in zip(mine.cells, theirs.cells, strict=True):
            assert (cell.id, cell.metadata) == (original.id, original.metadata)
            assert cell.get("attachments") == original.get("attachments")
            if cell.cell_type == "code":
                assert cell.source == original.source
                assert (cell.outputs, cell.execution_count) == ([], None)


def test_links_lead_from_copy_to_copy(checkout: Path) -> None:
    """Who follows one must not find the outputs of what lies ahead, nor change what git knows."""
    prepare(checkout)
    folder = checkout / "my_notebooks"
    links = {
        (path.name, link)
        for path in folder.glob("*.ipynb")
        for cell in nbformat.read(path, as_version=4).cells
        for link in re.findall(r"\]\((?!\w+:)([^)#]+)", cell.source)
        if cell.cell_type == "markdown"
    }
    assert {(LESSON, EXERCISE), (EXERCISE, LESSON), (LESSON, "02_feeding_the_pool.ipynb")} <= links
    assert all((folder / link).is_file() for _, link in links)
    notebooks = [link for _, link in links if link.endswith(".ipynb")]
    assert not any(link.startswith(("../notebooks", "../exercises")) for link in notebooks)


def test_a_link_to_another_file_leads_on(checkout: Path) -> None:
    def link(notebook: NotebookNode) -> None:
        notebook.cells[
            0
        ].source += "[data](../data/README.md#columns) [page](https://example.org/a)"

    edit(checkout / "notebooks" / LESSON, link)
    prepare(checkout)
    text = opening(checkout / "my_notebooks" / LESSON)
    assert text.endswith("[data](../data/README.md#columns) [page](https://example.org/a)")


@pytest.mark.parametrize("change", [lambda notebook: None, run_all], ids=["as made", "only run"])
def test_a_copy_that_nobody_has_changed_follows(
    change: Callable[[NotebookNode], object], checkout: Path
) -> None:
    prepare(checkout)
    copy = checkout / "my_notebooks" / LESSON
    edit(copy, change)
    before = copy.read_bytes()
    assert prepare(checkout) == ""
    assert copy.read_bytes() == before, "the learner's outputs are his"
    edit(checkout / "notebooks" / LESSON, add_sentence)
    assert prepare(checkout) == ""
    assert opening(copy).endswith("And one sentence more.")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: edit(path, predict),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b'{"cells": ['),
    ],
    ids=["worked on", "empty", "cut short"],
)
def test_a_copy_that_was_worked_on_stays(spoil: Callable[[Path], object], checkout: Path) -> None:
    prepare(checkout)
    copy = checkout / "my_notebooks" / LESSON
    spoil(copy)
    mine = copy.read_bytes()
    edit(checkout / "notebooks" / LESSON, add_sentence)
    assert prepare(checkout) == (
        f"my_notebooks/{LESSON} stays as you left it, though the lesson has changed since;"
        " python3 lab.py reset --lesson 01 brings the new one.\n"
    )
    assert copy.read_bytes() == mine
    printed = reset(checkout, "--lesson", "1")
    (kept,) = (checkout / "my_notebooks" / "kept").iterdir()
    assert kept.name in printed
    assert kept.read_bytes() == mine
    assert opening(copy).endswith("And one sentence more.")
    assert prepare(checkout) == ""


def test_each_reset_keeps_a_version_of_its_own(checkout: Path) -> None:
    """Also within one second; and of an exercise, where nothing else is said."""
    prepare(checkout)
    lesson, exercise = (checkout / "my_notebooks" / name for name in (LESSON, EXERCISE))
    as_made = exercise.read_bytes()
    edit(lesson, predict)
    mine = lesson.read_bytes()
    for number in range(1, 4):
        edit(exercise, add_sentence)
        reset(checkout, "01")
        assert len(list((checkout / "my_notebooks" / "kept").iterdir())) == number
        assert exercise.read_bytes() == as_made
    exercise.unlink()
    assert "is as it was made" in reset(checkout, "01")
    assert exercise.read_bytes() == as_made
    assert lesson.read_bytes() == mine


@pytest.mark.parametrize(
    "arguments, known",
    [
        (["42"], "There is no exercise 42; there are 01, 02,"),
        (["00"], "There is no exercise 00; there are 01, 02,"),
        (["--lesson", "42"], "There is no lesson 42; there are 00, 01,"),
    ],
)
def test_reset_of_what_is_not_there(arguments: list[str], known: str, checkout: Path) -> None:
    done = run(checkout, "-m", "workshop.copies", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(known)
    assert len(done.stderr.splitlines()) == 1


def test_a_lesson_with_another_name_leaves_no_copy_of_the_old_one(checkout: Path) -> None:
    """Unless it was worked on; and what a learner has made there is none of ours."""
    prepare(checkout)
    folder = checkout / "my_notebooks"
    worked_on = "02_feeding_the_pool.ipynb"
    edit(folder / worked_on, add_sentence)
    (folder / "scratch.ipynb").write_text("{}", "utf-8")
    for name in (LESSON, worked_on):
        path = checkout / "notebooks" / name
        path.rename(path.with_name(f"{name[:2]}_another_name.ipynb"))
    prepare(checkout)
    found = {path.name for path in folder.glob("*.ipynb")}
    assert {"01_another_name.ipynb", "02_another_name.ipynb", "scratch.ipynb"} <= found
    assert worked_on in found
    assert LESSON not in found


def test_git_sees_nothing_and_can_pull(checkout: Path) -> None:
    """In mid-workshop, with copies that were run and changed, and a note of what is done."""

    def git(folder: Path, *arguments: str) -> str:
        name = ["-c", "user.name=Tests", "-c", "user.email=tests@example.org"]
        command = ["git", *name, *arguments]
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        ).stdout

    git(checkout, "init", "--quiet", "--initial-branch=main")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message=first")
    mine = checkout.parent / "mine"
    git(checkout.parent, "clone", "--quiet", str(checkout), str(mine))
    prepare(mine)
    edit(mine / "my_notebooks" / LESSON, run_all)
    edit(mine / "my_notebooks" / EXERCISE, add_sentence)
    note = "from workshop.progress import note; note('01', 'reuse_the_session', 'right')"
    subprocess.run(
        [sys.executable, "-B", "-c", note],
        cwd=mine / "my_notebooks",
        env={**os.environ, "PYTHONPATH": str(mine)},
        check=True,
    )
    assert (mine / "my_notebooks" / "progress.json").exists()
    reset(mine, "01")
    assert git(mine, "status", "--porcelain") == ""
    edit(checkout / "notebooks" / LESSON, add_sentence)
    git(checkout, "commit", "--quiet", "--all", "--message=second")
    git(mine, "pull", "--quiet")
    prepare(mine)
    assert opening(mine / "my_notebooks" / LESSON).endswith("And one sentence more.")
