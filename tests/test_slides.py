"""The slides: each question and picture of a lesson is on one of them, and each fits where it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from environments import demand_sphinx
from lesson_minutes import A_PREDICTION
from playwright.sync_api import Browser

from workshop import slides

ROOT = Path(__file__).parents[1]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SIZE = {"width": 1280, "height": 720}
# What is cut off or larger than its slide, and what a browser would not read out.
FAULTS = """
() => Array.from({length: Reveal.getTotalSlides()}, () => {
    const slide = Reveal.getCurrentSlide(), faults = [];
    for (const element of slide.querySelectorAll('*')) {
        if (element.closest('aside')) continue;
        const box = element.getBoundingClientRect();
        if (box.bottom > innerHeight || box.right > innerWidth) faults.push('too large');
        if (getComputedStyle(element).overflowY === 'auto' && element.scrollHeight > element.clientHeight + 1)
            faults.push('cut off');
        if (element.tagName === 'IMG' && !element.alt) faults.push('without words');
    }
    const title = (slide.querySelector('h1, h2, h3') || {innerText: ''}).innerText;
    Reveal.next();
    return [title, faults];
})
"""

each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("slides")
    demand_sphinx(slides.build(into))
    return into


@each_lesson
def test_each_question_list_and_picture_has_its_slide(lesson: Path) -> None:
    cells = json.loads(lesson.read_text("utf-8"))["cells"]
    made = slides.slides_of(cells, "what the guide says")
    text = "".join("".join(cell["source"]) + "\n\n" for cell in cells)
    titles = [slide.title for slide in made]
    assert titles.count("Predict") == len(A_PREDICTION.findall(text)) > 0
    assert titles[-2:] == ["Summary", "At work on Monday"]
    pictures = [cell for cell in cells if "<img " in json.dumps(cell.get("outputs", []))]
    assert sum("<img " in slide.shown for slide in made) == len(pictures)
    assert made[0].notes == ["what the guide says"]
    assert "you said" not in "".join(slide.shown for slide in made if slide.title == "What it was")


@each_lesson
def test_a_slide_holds_what_is_on_it(lesson: Path, built: Path, browser: Browser) -> None:
    """In the size of a projector; and nothing comes from elsewhere."""
    page = browser.new_page(viewport=SIZE)  # type: ignore[arg-type]
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    page.goto((built / f"{lesson.stem}.html").as_uri())
    page.wait_for_function("window.Reveal && Reveal.isReady()")
    found = page.evaluate(FAULTS)
    page.close()
    assert len(found) > 15
    assert [(title, faults) for title, faults in found if faults or not title] == []
    assert [url for url in fetched if not url.startswith(("file:", "data:"))] == []
