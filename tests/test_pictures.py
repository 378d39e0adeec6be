"""Pictures: their labels can be read on white, and their text alternatives arrive wherever they are shown."""

from __future__ import annotations

from collections.abc import Callable

import nbformat
import pytest
from bs4 import BeautifulSoup
from matplotlib.figure import Figure
from matplotlib.text import Text
from nbconvert import HTMLExporter
from sanitizing import masked

from ormscope.lab import Recording
from ormscope.lab.memory import MemorySample
from ormscope.lab.picture import (
    CAPACITY,
    CHECKED_OUT,
    COMPLETED,
    FAILED,
    LOOP_LAG,
    MEMORY,
    OBJECTS,
    WAITING,
    Picture,
    contrast,
    ink,
    stored_picture,
)
from ormscope.lab.run import ObjectsSample, PoolCurve
from ormscope.lab.storm import Request
from ormscope.lab.waits_picture import draw_waits
from ormscope.ledger import Sample
from ormscope.places import Place
from ormscope.verdict import Holding, Verdict, Waiting
from workshop import pictures

LEAST_CONTRAST = 4.5  # of a text, WCAG 2.2, level AA
COLORS = [CHECKED_OUT, WAITING, CAPACITY, COMPLETED, FAILED, LOOP_LAG, MEMORY, OBJECTS]


def deadlock() -> Verdict:
    places = (Place("place_order", 3, "await session.flush()", "shop.py"),)
    waits = Waiting("request 1", 0.5, places, "shop")
    holding = Holding("request 1", 1.0, places, True, waits, None, None)
    return Verdict(
        pool="shop",
        at=0.5,
        capacity=2,
        checked_out=2,
        timeout=None,
        holding=(holding,),
        waiting=(waits, waits),
        cause="deadlock",
    )


def recording() -> Recording:
    """A run with whatever a picture can name."""
    return Recording(
        "everything",
        ended="memory limit",
        seconds=1.0,
        memory_limit=20.0,
        curves=("connections", "requests", "memory", "objects", "loop lag"),
        pools=[PoolCurve("shop", 2, [Sample(0.1, 1, 0), Sample(0.2, 2, 1)], [deadlock()])],
        requests=[Request(0, 0.0, 0.5, "ok"), Request(1, 0.0, 0.6, "LookupError")],
        announced=2,
        loop_lag=[(0.5, 0.2)],
        memory=[MemorySample(0.0, 100.0), MemorySample(1.0, 130.0)],
        objects=[ObjectsSample(0.1, 9000), ObjectsSample(0.9, 10)],
    )


def told(wrong: bool) -> dict[str, list[pictures.Told]]:
    return {number: [("0 s", 1.0, 2.0, wrong)] for number in ("waiting", "checked out")}


WANTED = {"busy": "saturated", "idle": "healthy"}
SAID = {"as given": WANTED, "yours": {"busy": "deadlock", "idle": "healthy"}}
PICTURES: dict[str, Callable[[Recording], Picture]] = {
    "run": lambda run: run.plot(),
    "runs": lambda run: run.plot(run, titles=["broken", "fixed"]),
    "waits": draw_waits,
    "phase diagram": lambda run: pictures.phase_diagram({(1, 1): False, (1, 2): True}, 2),
    "ladder": lambda run: pictures.ladder({"as given": run, "mended": run}),
    "export ladder": lambda run: pictures.export_ladder({"as given": run, "yours": run}, 1000),
    "scrapes": lambda run: pictures.scrapes_told({"as given": told(True), "yours": told(False)}),
    "answers": lambda run: pictures.answers(WANTED, SAID),
    "progress": lambda run: pictures.progress_board(
        {"01": {"one": "done", "two": "tried", "three": "open"}}
    ),
}


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("white") == pytest.approx(1)
    assert contrast("black") == pytest.approx(21)
    assert contrast("#767676") == pytest.approx(4.54, abs=0.01)  # the lightest grey that passes


@pytest.mark.parametrize("color", COLORS)
def test_a_text_in_each_colour_can_be_read(color: str) -> None:
    assert contrast(ink(color)) >= LEAST_CONTRAST
    assert contrast(ink(color)) == pytest.approx(max(contrast(color), 4.6))


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_every_label_can_be_read(draw: Callable[[Recording], Picture]) -> None:
    figure = draw(recording()).figure
    labels = [label for label in figure.findobj(Text) if label.get_text().strip()]
    assert len(labels) >= 3
    faint = [it.get_text() for it in labels if contrast(it.get_color()) < LEAST_CONTRAST]
    assert faint == []


ALTERNATIVE = 'broken. "pool" <up to 20>\n20 of 20 & no more'


@pytest.fixture
def picture() -> Picture:
    return Picture(Figure(), "a figure", ALTERNATIVE)


def test_what_is_stored_can_be_read_back(picture: Picture) -> None:
    assert stored_picture(picture.html()) == (ALTERNATIVE, picture.png())
    assert stored_picture("<table></table>") is None


def test_the_alternative_arrives_in_nbconverts_html(picture: Picture) -> None:
    data = {"text/html": picture._repr_html_(), "text/plain": repr(picture)}
    output = nbformat.v4.new_output("display_data", data=data)
    cell = nbformat.v4.new_code_cell("picture", outputs=[output])
    page, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    images = [image["alt"] for image in BeautifulSoup(page, "html.parser").find_all("img")]
    assert images == [ALTERNATIVE]


def test_nbval_masks_pictures_and_measured_numbers_and_nothing_else(picture: Picture) -> None:
    assert masked(f"a {picture.html(90)} b") == "a <img> b"
    assert masked("≈ 1,952 of 2,000, after ≈ 0.57 s. 3 of 4") == "≈ # of 2,000, after ≈ # s. 3 of 4"
    text = 'pool: 20 of 20 <img alt="x" src="x.png">, about 3 ≈ x'
    assert masked(text) == text
