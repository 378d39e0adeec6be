"""What README.md says is what the notebooks show, and the links of all pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from workshop.notebooks import pictures

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = re.findall(r"^\| \d\d \| \[(.+?)\]\((.+?)\).*\| (\d+) \|$", README, re.MULTILINE)
CLAIMS = re.findall(
    r"^\| (\w\d+\w?) \| .+? \| (true|half true|false|broken code) \| \[.+?\]\((.+?)#cell-id=(.+?)\) \|$",
    README,
    re.MULTILINE,
)


def cells(path: str) -> list[Any]:
    return list(nbformat.read(ROOT / path, as_version=4).cells)


def test_every_lesson_and_exercise_is_in_a_table() -> None:
    assert [path for _, path, _ in NOTEBOOKS] == [
        path.relative_to(ROOT).as_posix()
        for folder in ("notebooks", "exercises")
        for path in sorted((ROOT / folder).glob("*.ipynb"))
    ]


@pytest.mark.parametrize("title, path, minutes", NOTEBOOKS)
def test_title_and_minutes(title: str, path: str, minutes: str) -> None:
    opening = cells(path)[0].source
    assert f"**Time.** {minutes} minutes" in opening
    assert opening.splitlines()[0].endswith(f" {title}")


def test_every_claim_that_a_cell_judges_is_in_the_table() -> None:
    tagged = [
        (tag.removeprefix("claim-"), path.relative_to(ROOT).as_posix())
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
        for cell in nbformat.read(path, as_version=4).cells
        for tag in cell.metadata.get("tags", [])
        if tag.startswith("claim-")
    ]
    assert len(tagged) >= 6
    assert sorted(tagged) == sorted((claim, path) for claim, _, path, _ in CLAIMS)


def test_every_claim_of_the_article_has_its_verdict() -> None:
    """Six on starvation, one on Tortoise, five on memory, four takeaways; read from the article once, by people."""
    wanted = {*(f"A{n}" for n in range(1, 7)), *(f"M{n}" for n in range(1, 6)), "K1", "K2", "K3"}
    wanted |= {"K4", "T1"}
    assert {claim for claim, *_ in CLAIMS} == wanted


@pytest.mark.parametrize("claim, verdict, path, cell_id", CLAIMS)
def test_verdict_on_a_claim_is_what_its_cell_printed(
    claim: str, verdict: str, path: str, cell_id: str
) -> None:
    (cell,) = [cell for cell in cells(path) if cell.id == cell_id]
    assert f"claim-{claim}" in cell.metadata.tags
    printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    assert f"{claim} {verdict}" in printed.splitlines()


def test_the_picture_is_the_one_in_lesson_01() -> None:
    """`lab.py refresh` stores both at once; a picture that was drawn for the README would be another."""
    (cell,) = [
        cell
        for cell in cells("notebooks/01_pool_starvation.ipynb")
        if "readme" in cell.metadata.get("tags", [])
    ]
    (stored,) = pictures(cell)
    assert stored == (ROOT / "notebooks/01_pool_starvation.png").read_bytes()
    assert "](notebooks/01_pool_starvation.png)" in README


PAGES = sorted(
    path
    for pattern in ("*.md", "instructor/*.md", "notebooks/*.md", "ormscope/*.md", "data/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
