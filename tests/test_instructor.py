"""The guide for instructors: its minutes are those of the notebooks, and the places that it names exist.

The handout is two pages, with the values of `db.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from lesson_minutes import (
    MINUTES_OF_RUNS,
    WORDS_PER_MINUTE,
    on_call,
    predicting,
    reading,
    up_to_five,
)
from playwright.sync_api import Browser

from workshop import db

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "instructor" / "README.md").read_text(encoding="utf-8")
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The room takes two fifths longer than somebody alone: an estimate, with which the agendas are made.
IN_THE_ROOM = 1.4
PARTS = [
    "What it is for",
    "On your screen",
    "Where people get stuck",
    "When you are late",
    "Where to bring everybody back",
    "Questions",
]
MOST_WORDS = 450  # of a page
AGENDAS = {
    title: (int(total), re.findall(r"^\| \d:\d\d \| (\d+) \| (.+) \|$", rows, re.MULTILINE))
    for title, total, rows in re.findall(
        r"^### ([^\n]+): (\d+) minutes$(.*?)(?=^##|\Z)", GUIDE, re.MULTILINE | re.DOTALL
    )
}
# The rows of the table of minutes: lesson, reading, predicting, running (seconds), in the room, exercise.
MINUTES = {
    cells[0]: cells[1:]
    for cells in re.findall(
        r"^\| (\d\d) \| (\d+) \| (\d+) \| (\d+) s \| (\d+) \| (\d+|) \|$", GUIDE, re.MULTILINE
    )
}

each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


@each_lesson
def test_a_lesson_has_its_minutes(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    read, predict, run, in_the_room, exercise = MINUTES[path.name[:2]]
    assert (int(read), int(predict)) == (round(reading(cells)), predicting(cells))
    assert 0 < int(run) <= 60 * MINUTES_OF_RUNS
    alone = reading(cells) + predicting(cells) + int(run) / 60
    assert int(in_the_room) == on_call(cells) + up_to_five(IN_THE_ROOM * alone)
    has = ROOT / "exercises" / path.name
    assert has.exists() == bool(exercise)
    if exercise:
        opening = nbformat.read(has, as_version=4).cells[0].source
        assert f"**Time.** {exercise} minutes" in opening


@each_lesson
def test_a_lesson_has_its_page(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    page = (ROOT / "instructor" / f"{path.stem}.md").read_text(encoding="utf-8")
    assert page.splitlines()[0] == cells[0].source.splitlines()[0]
    assert len(page.split()) <= MOST_WORDS
    found = re.findall(r"^\*\*(.+?)\.\*\*", page, re.MULTILINE)
    assert [part for part in found if part in PARTS] == PARTS
    if (ROOT / "exercises" / path.name).exists():
        assert "The exercise" in found


@each_lesson
def test_the_sections_that_a_page_names_exist(path: Path) -> None:
    """Whoever is late has no time to look for a section of another name."""
    source = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    headings = {
        re.sub(r"[`\\]|^\d+\. ", "", heading)
        for heading in re.findall(r"^#+ (.+)$", source, re.MULTILINE)
    }
    page = (ROOT / "instructor" / f"{path.stem}.md").read_text(encoding="utf-8")
    parts = re.findall(
        r"^\*\*(?:When you are late|Where to bring everybody back)\.\*\* (.+)$", page, re.MULTILINE
    )
    named = [name for part in parts for name in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", part)]
    assert {name.replace("`", "") for name in named} <= headings, named


def test_an_hour_is_enough_to_prepare() -> None:
    """What is to be read takes as long as it says, lesson 01 as long as it says itself, and all less than an hour."""
    hour = re.search(r"^\*\*With an hour\*\* .+$", GUIDE, re.MULTILINE)
    assert hour is not None
    to_read, lesson, slides = map(int, re.findall(r"\((\d+) minutes\)", hour.group()))
    pages = [
        GUIDE,
        *(path.read_text("utf-8") for path in sorted((ROOT / "instructor").glob("0[0-3]_*.md"))),
    ]
    assert sum(len(page.split()) for page in pages) / WORDS_PER_MINUTE <= to_read
    assert f"**Time.** {lesson} minutes" in nbformat.read(LESSONS[1], as_version=4).cells[0].source
    assert to_read + lesson + slides < 60


@pytest.mark.parametrize("title", AGENDAS)
def test_an_agenda_ends_when_it_says(title: str) -> None:
    total, rows = AGENDAS[title]
    assert sum(int(minutes) for minutes, _ in rows) == total
    assert any("Break" in what for _, what in rows)


def test_an_agenda_has_its_clock() -> None:
    """A row begins when those before it are over."""
    clock = 0
    for hours, minutes, takes in re.findall(r"^\| (\d):(\d\d) \| (\d+) \| ", GUIDE, re.MULTILINE):
        clock = 0 if (hours, minutes) == ("0", "00") else clock
        assert int(hours) * 60 + int(minutes) == clock
        clock += int(takes)


@pytest.mark.parametrize("title", AGENDAS)
def test_an_agenda_gives_a_whole_lesson_its_time(title: str) -> None:
    """A row of a part of a lesson names the parts; one that has only the lesson's title is the whole."""
    titles = {path.name[:2]: _title(path) for path in LESSONS}
    _, rows = AGENDAS[title]
    lessons = [
        (number, int(minutes), what)
        for minutes, row in rows
        for number, what in re.findall(r"\[(\d\d)\]\(.+?\): (.+)$", row)
    ]
    assert len(lessons) >= 4
    for number, minutes, what in lessons:
        whole = int(MINUTES[number][3])
        assert minutes >= whole if what == titles[number] else minutes < whole, (number, what)


def _title(path: Path) -> str:
    title: str = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0]
    return title.removeprefix(f"# {path.name[:2]} ")


def test_three_agendas() -> None:
    assert [total for total, _ in AGENDAS.values()] == [120, 240, 450]


HANDOUT = ROOT / "instructor" / "handout.html"


@pytest.mark.parametrize("paper", ["A4", "Letter"])
def test_the_handout_is_two_pages(paper: str, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(HANDOUT.as_uri())
    printed = page.pdf(format=paper)
    page.close()
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) == 2


def test_the_handout_has_the_values_of_the_file() -> None:
    rows = re.findall(
        r"<tr><td><code>(\w+)</code></td><td>(.+?)</td>", HANDOUT.read_text(encoding="utf-8")
    )
    settings = db.Settings(database_url="postgresql+asyncpg://host/shop")
    told = {name: value for name, value in rows if name in db.Settings.model_fields}
    assert len(told) >= 7
    for name, value in told.items():
        if name != "application_name":
            assert value == str(getattr(settings, name)).removesuffix(".0"), name
    engine = db.make_engine(settings)
    assert dict(rows)["max_overflow"] == str(engine.pool._max_overflow)
    assert engine.pool._pre_ping and dict(rows)["pool_pre_ping"] == "on"
