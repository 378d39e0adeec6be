"""The glossary of the lessons: each of its words is at work where it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from workshop.checks.catalogue import misconceptions

ROOT = Path(__file__).resolve().parent.parent
TERMS = re.findall(
    r"^### (.+)\n.*\*\((\d\d)\)\*$",
    (ROOT / "notebooks" / "glossary.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


@pytest.mark.parametrize("term, number", TERMS)
def test_a_term_of_the_glossary_is_at_work_in_its_lesson(term: str, number: str) -> None:
    """In what it says or shows, or in what its exercise's checks answer."""
    (lesson,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    (exercise,) = (ROOT / "solutions").glob(f"{number}_*.ipynb") if number != "00" else (lesson,)
    told = [lesson.read_text(encoding="utf-8"), exercise.read_text(encoding="utf-8")]
    told += [about.says for about in misconceptions().values() if about.lesson == number]
    stem = re.split(r"[ `(-]", term.strip("`").lower())[0][:8]
    assert stem in " ".join(told).lower()


def test_the_glossary_is_in_order() -> None:
    terms = [re.sub("[^a-z]", "", term.lower()) for term, _ in TERMS]
    assert len(terms) > 30 and terms == sorted(terms)
