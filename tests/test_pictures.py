"""Pictures: their labels can be read on white, and their text alternatives arrive wherever they are shown."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

import nbformat
import numpy as np
import pytest
from bs4 import BeautifulSoup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
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
    OTHER,
    WAITING,
    Picture,
    contrast,
    ink,
    stored_picture,
)
from ormscope.lab.pool_curves import shade
from ormscope.lab.run import ObjectsSample, PoolCurve
from ormscope.lab.step_curve import Drawn, drawn
from ormscope.lab.storm import Request
from ormscope.lab.waits_picture import draw_waits
from ormscope.ledger import Sample
from ormscope.places import Place
from ormscope.verdict import Holding, Verdict, Waiting
from workshop import pictures
from workshop.monitor import draw_watched
from workshop.prometheus import Scrape, firing_of

LEAST_CONTRAST = 4.5  # of a text, WCAG 2.2, level AA
COLORS = [CHECKED_OUT, WAITING, CAPACITY, COMPLETED, FAILED, LOOP_LAG, MEMORY, OBJECTS, OTHER]


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


def toggling(samples: int = 2_000, pools: int = 1) -> Recording:
    """A second in which connections of one pool after another come and go, two at a time, and tasks wait."""
    curves = [
        PoolCurve(
            name,
            20,
            [
                Sample(at / samples, 18 + at % 3 if at < samples - 1 else 0, at % 2)
                for at in range(samples)
            ],
        )
        for name in ("orders", "prices", "audit")[:pools]
    ]
    requests = [Request(number, 0.0, number / 200, "ok") for number in range(200)]
    return Recording(
        "toggling",
        ended="returned",
        seconds=1.0,
        pools=curves,
        requests=requests,
        announced=200,
    )


def watched() -> dict[str, list[Scrape]]:
    """Scrapes of a pool that is starved from its third, and of one where nobody waits."""

    def scrape(at: float, pool: str, deadlocks: int) -> Scrape:
        numbers = {
            "waiting": 200.0 * deadlocks,
            "oldest_wait_seconds": max(0.0, at - 100.5) if deadlocks else 0.0,
            "deadlocks_total": deadlocks,
            "wait_seconds_count": 0,
            "waits_within_a_second": 0,
        }
        cause = "deadlock" if deadlocks else "healthy"
        return Scrape(at, pool, cause, {f"sqlalchemy_pool_{key}": numbers[key] for key in numbers})

    moments = [100 + number / 4 for number in range(21)]
    return {
        "starved": [scrape(at, "starved", int(at >= 100.5)) for at in moments],
        "busy": [scrape(at, "busy", 0) for at in moments],
    }


def told(wrong: bool) -> dict[str, list[pictures.Told]]:
    return {number: [("0 s", 1.0, 2.0, wrong)] for number in ("waiting", "checked out")}


WANTED = {"busy": "saturated", "idle": "healthy"}
SAID = {"as given": WANTED, "yours": {"busy": "deadlock", "idle": "healthy"}}
PICTURES: dict[str, Callable[[Recording], Picture]] = {
    "run": lambda run: run.plot(),
    "runs": lambda run: run.plot(run, titles=["broken", "fixed"]),
    "toggling": lambda run: toggling().plot(),
    "toggling, side by side": lambda run: toggling().plot(run, toggling()),
    "three runs": lambda run: toggling().plot(run, toggling(), titles=["one", "two", "three"]),
    "two pools": lambda run: toggling(pools=2).plot(),
    "alerts": lambda run: draw_watched(
        watched(), {pool: firing_of(scrapes) for pool, scrapes in watched().items()}, "the test"
    ),
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


def texts(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.texts]


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_no_text_lies_upon_another_or_is_cut_off(
    draw: Callable[[Recording], Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[Text] = []
    draw_text = Text.draw

    def noted(self: Text, renderer: Any, **more: Any) -> None:
        if self.get_visible() and self.get_text().strip() and self not in labels:
            labels.append(self)
        draw_text(self, renderer, **more)

    figure = draw(recording()).figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    monkeypatch.setattr(Text, "draw", noted)  # not before: what is laid out first may move
    canvas.draw()
    boxes = {label: label.get_window_extent().padded(-2) for label in labels}
    width, height = canvas.get_width_height()
    cut_off = [
        label.get_text()
        for label, box in boxes.items()
        if not (box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height)
    ]
    assert cut_off == []
    upon = [
        (one.get_text(), other.get_text())
        for one, other in combinations(labels, 2)
        if boxes[one].overlaps(boxes[other])
    ]
    assert upon == []


def test_any_number_of_runs_can_be_drawn() -> None:
    picture = recording().plot(*[recording()] * 10)
    assert len(picture.figure.axes) == 11 * len(recording().curves)
    assert picture.png().startswith(b"\x89PNG")


def area(curve: Drawn) -> float:
    return float(np.sum(curve.values[:-1] * np.diff(curve.times)))


def test_a_slow_curve_is_drawn_as_it_is() -> None:
    times, values = np.array([0.0, 0.2, 0.5, 0.9]), np.array([0.0, 3.0, 1.0, 2.0])
    curve = drawn(times, values, until=1.0, column=0.02)
    assert curve.times.tolist() == [0.0, 0.2, 0.5, 0.9, 1.0]
    assert curve.values.tolist() == [0.0, 3.0, 1.0, 2.0, 2.0]
    assert not len(curve.band_times)


def test_a_curve_that_toggles_too_fast_is_drawn_as_its_mean_between_its_extremes() -> None:
    """For three quarters of each millisecond 4, then 8, from 0.2 s to 0.6 s; 6 before, 0 after."""
    times, values = [0.0], [6.0]
    for number in range(200, 600):
        times += [number / 1000, number / 1000 + 0.00075]
        values += [4.0, 8.0]
    curve = drawn(np.array([*times, 0.6]), np.array([*values, 0.0]), until=1.0, column=0.02)
    steps = dict(zip(curve.times.tolist(), curve.values.tolist(), strict=True))
    assert steps.pop(0.0) == 6 and steps.pop(1.0) == 0
    assert min(steps) == pytest.approx(0.2) and max(steps) == pytest.approx(0.6)
    assert steps.pop(max(steps)) == 0
    assert len(steps) == 20 and list(steps.values()) == pytest.approx([5.0] * 20)
    band = curve.band_times[~np.isnan(curve.band_times)]
    assert (band[0], band[-1]) == pytest.approx((0.2, 0.6))
    assert {*curve.lows.tolist()} == {4.0} and {*curve.highs[1:].tolist()} == {8.0}


@pytest.mark.parametrize(("pulses", "columns"), [(1, 0), (2, 0), (3, 1)])
def test_a_single_column_is_a_mean_only_where_it_turns_often(pulses: int, columns: int) -> None:
    """Pulses within one column, and another curve where each second column has two."""
    times = [0.0, *(0.501 + number / 500 for number in range(2 * pulses)), 0.9]
    values = [0.0, *[1.0, 0.0] * pulses, 2.0]
    curve = drawn(np.array(times), np.array(values), until=1.0, column=0.02)
    assert len(curve.band_times) == 3 * columns  # its start, its end, the gap
    assert (len(curve.times) == len(times) + 1) is (columns == 0)
    again = [start + at / 500 for start in np.arange(0.501, 0.7, 0.04) for at in range(4)]
    many = drawn(np.array([0.0, *again]), np.resize([0.0, 1.0], len(again) + 1), 1.0, 0.02)
    assert np.isnan(many.band_times).sum() == 1, "one stretch"
    assert np.nanmax(many.band_times) - np.nanmin(many.band_times) == pytest.approx(0.18)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_drawn_has_the_area_and_the_extremes_of_the_curve(seed: int) -> None:
    rng = random.Random(seed)
    times, values = [0.0], [0]
    while times[-1] < 1:
        rate = rng.choice((30, 300, 3_000))
        for _ in range(rng.randrange(1, 200)):
            times.append(times[-1] + rng.expovariate(rate))
            values.append(max(0, values[-1] + rng.choice((-1, 1))))
    until = times[-1] + 0.01
    exact = sum(
        value * (end - start)
        for value, start, end in zip(values, times, [*times[1:], until], strict=True)
    )
    curve = drawn(np.array(times), np.array(values, dtype=float), until, column=0.02)
    assert (np.diff(curve.times) >= 0).all()
    assert area(curve) == pytest.approx(exact, abs=0.002 * until)
    assert max(curve.values.max(), np.max(curve.highs, initial=0)) == max(values)
    points = {*zip(curve.times.tolist(), curve.values.tolist(), strict=True)}
    for before, (at, value), after in zip(
        values, zip(times[1:], values[1:], strict=True), values[2:], strict=False
    ):
        if (value - before) * (after - value) < 0:  # an extreme
            banded = (curve.band_times[:-1] <= at) & (at < curve.band_times[1:])
            lows, highs = curve.lows[:-1][banded], curve.highs[:-1][banded]
            assert ((lows <= value) & (value <= highs)).any() or (at, value) in points


def test_a_long_curve_is_drawn_with_few_points_and_keeps_its_peaks() -> None:
    times = np.arange(20_000) / 1000
    values = np.full(len(times), 5.0)
    values[7_777], values[12_345] = 19, 0
    curve = drawn(times, values, until=20.0, column=0.37)
    assert len(curve.times) < 2_000 and not len(curve.band_times)
    assert (curve.times[0], curve.times[-1]) == (0.0, 20.0)
    kept = dict(zip(curve.times.tolist(), curve.values.tolist(), strict=True))
    assert {7.777: 19, 12.345: 0}.items() <= kept.items()
    busy = toggling(100_000)
    drawn_points = [
        len(line.get_xdata()) for axes in busy.plot().figure.axes for line in axes.lines
    ]
    assert max(drawn_points) < 2_000


def test_the_mean_is_said_where_it_is_drawn_and_only_there() -> None:
    busy, slow = toggling(), recording()
    picture = busy.plot(slow)
    of_busy, of_slow = picture.alternative.split("everything. ")
    mean = busy.pools[0].mean_checked_out
    assert mean == pytest.approx(19, abs=0.1)
    assert f"mean {mean:.1f}" in texts(picture.figure.axes[0])
    assert f"On average {mean:.1f} connections of orders were checked out." in of_busy
    assert "a band from its lowest value to its highest" in of_busy
    assert "band" not in of_slow
    assert not any(text.startswith("mean") for text in texts(picture.figure.axes[1]))


def test_two_pools_have_two_colours_of_one_hue_and_each_queue_says_for_what() -> None:
    connections, tasks = toggling(pools=2).plot().figure.axes
    for axes, color in ((connections, CHECKED_OUT), (tasks, WAITING)):
        expected = {shade(color, 0), shade(color, 1)}
        assert expected <= {to_hex(line.get_color()) for line in axes.lines}
        assert contrast(shade(color, 1)) > 1.8 * contrast(shade(color, 0))
    labels = texts(connections)
    assert {label.partition(":")[0] for label in labels} == {"orders", "prices"}
    assert "waiting for\nprices: 1" in texts(tasks)
    assert "waiting for a\nconnection 1" in texts(toggling().plot().figure.axes[1])


def test_the_peak_of_memory_is_written_beside_its_end() -> None:
    fallen = Recording(
        "fallen",
        seconds=1.0,
        curves=("memory",),
        memory=[MemorySample(at / 2, 100.0 + extra) for at, extra in enumerate((0, 417, 381))],
    )
    assert texts(fallen.plot().figure.axes[0]) == ["end 381 MiB", "peak 417 MiB"]


def test_a_quantity_has_one_unit_in_all_pictures() -> None:
    run = recording()
    curves = run.plot().figure.axes
    bars = pictures.export_ladder({"as given": run}, 1000).figure.axes
    assert [axes.get_ylabel() for axes in curves][2:] == [
        "MiB above start",
        "objects",
        "loop lag, s",
    ]
    assert [axes.get_xlabel() for axes in bars] == [
        "MiB above the start",
        "thousand rows per second",
        "seconds",
    ]
    assert [text for axes in bars for text in texts(axes)] == ["30", "1.00", "0.20"]


def test_an_alert_is_drawn_from_the_moment_at_which_it_fires() -> None:
    scrapes = watched()
    firing = {pool: firing_of(scrapes[pool]) for pool in scrapes}
    # The oldest wait is above a second from the scrape at 101.75 s; "for: 2m" is two seconds in the lesson.
    assert firing == {
        "starved": {
            "ConnectionPoolDeadlock": (100.5, 105.0),
            "ConnectionPoolWait": (103.75, 105.0),
        },
        "busy": {},
    }
    picture = draw_watched(scrapes, firing, "the test")
    starved, busy = picture.figure.axes[4:]
    assert texts(starved) == [" from 0.5 s ", " from 3.8 s "] and texts(busy) == ["no alert fires"]
    extents = [bars.get_datalim(starved.transData) for bars in starved.collections]
    assert [(box.x0, box.x1) for box in extents] == [(0.5, 5.0), (3.75, 5.0)]
    assert "ConnectionPoolDeadlock fires after 0.5 s" in picture.alternative
    assert (
        "busy: up to 0 tasks waiting, the oldest for up to 0.0 s, no alert fires"
        in picture.alternative
    )
