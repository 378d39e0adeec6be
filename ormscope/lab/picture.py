"""Pictures of runs: one look, one meaning for each colour, labels beside the curves, a text alternative."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ormscope.lab.run import Curve, PoolCurve, Run
from ormscope.places import own_line
from ormscope.verdict import Holding, Waiting

# Okabe and Ito's palette, which colour-blind people can tell apart; each meaning keeps its colour in every picture.
CHECKED_OUT = "#0072B2"
WAITING = "#D55E00"
CAPACITY = "#000000"
COMPLETED = "#009E73"
FAILED = "#CC79A7"
LOOP_LAG = "#E69F00"
MEMORY = "#56B4E9"
OBJECTS = "#6B6B6B"

STYLE = Path(__file__).with_name("style.mplstyle")

_LIVE_DPI = 90
_FINAL_DPI = 180
_SHOWN_WIDTH = 900  # pixels in the notebook
_LEAST_CONTRAST = 4.6  # of a text with white; WCAG wants 4.5, and colours are rounded
# Drawing may take this share of one core at most: what is measured runs on the same machine. Where nothing
# moves any more there is nothing to disturb.
_DRAWING_SHARE = 0.04
_DRAWING_SHARE_STANDING = 0.5
_STANDING_AFTER = 0.15  # seconds without any event
_SHORTEST_PAUSE = 0.2  # seconds


class Picture:
    """A figure with its text alternative; a notebook shows it as an image that carries both.

    `title` is the plain-text form, the same in every run; `alternative` describes the data.
    """

    def __init__(self, figure: Figure, title: str, alternative: str) -> None:
        self.figure, self.title, self.alternative = figure, title, alternative
        for label in figure.findobj(Text):
            label.set_color(ink(label.get_color()))

    def __repr__(self) -> str:
        return f"<Picture: {self.title}>"

    def _repr_html_(self) -> str:
        return self.html()

    def html(self, dpi: int = _FINAL_DPI) -> str:
        """The picture as an `<img>` element: what a notebook shows and stores.

        Of a plain PNG, JupyterLab drops the text alternative, and nbconvert writes that there is none.
        """
        png = base64.b64encode(self.png(dpi)).decode()
        height = round(_SHOWN_WIDTH * self.figure.get_figheight() / self.figure.get_figwidth())
        alternative = html.escape(self.alternative)
        return f'<img alt="{alternative}" width="{_SHOWN_WIDTH}" height="{height}" src="data:image/png;base64,{png}">'

    def png(self, dpi: int = _FINAL_DPI) -> bytes:
        """The picture as a PNG file's bytes."""
        self.figure.set_dpi(dpi)
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        pixels = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
        data = io.BytesIO()
        if dpi >= _FINAL_DPI:
            # 48 colours are plenty, and make the file that a notebook stores four times smaller.
            pixels.convert("RGB").quantize(48, dither=Image.Dither.NONE).save(data, "PNG")
        else:  # one that is soon replaced: to find the 48 would take a third of its drawing
            pixels.convert("RGB").save(data, "PNG", compress_level=1)
        return data.getvalue()


def stored_picture(markup: str) -> tuple[str, bytes] | None:
    """The text alternative and the PNG of a picture, from what `Picture.html` gave; None for any other HTML."""
    found = re.fullmatch(r'<img alt="([^"]*)".* src="data:image/png;base64,([^"]+)">', markup)
    return found and (html.unescape(found[1]), base64.b64decode(found[2]))


def contrast(color: Any) -> float:
    """The contrast of a colour with white, 1 to 21 (WCAG 2.2, "contrast ratio")."""
    return 1.05 / (_luminance(_linear(color)) + 0.05)


def ink(color: Any) -> Any:
    """The colour for a text: the same, or darker where it could not be read on white well enough."""
    linear = _linear(color)
    darker = min(1.0, (1.05 / _LEAST_CONTRAST - 0.05) / max(_luminance(linear), 1e-9))
    if darker == 1.0:
        return color
    return tuple(
        12.92 * part if part <= 0.0031308 else 1.055 * part ** (1 / 2.4) - 0.055
        for part in (darker * part for part in linear)
    )


def _linear(color: Any) -> list[float]:
    return [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in matplotlib.colors.to_rgb(color)
    ]


def _luminance(linear: list[float]) -> float:
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def new_figure(width: float = 10.0, height: float = 4.6) -> Figure:
    """An empty figure in the project's look, in inches; draw on it within `look()`."""
    return Figure(figsize=(width, height), layout="constrained")


def look() -> Any:
    """The project's look, as a context manager."""
    return matplotlib.style.context(STYLE)


def draw(*runs: Run, titles: Sequence[str] | None = None) -> Picture:
    """The curves of one run, or of several side by side on the same axes."""
    names = list(titles or [run.title for run in runs])
    curves = runs[0].curves
    with look():
        # Fixed margins, with room for the labels: the axes must not jump while a run is drawn live.
        figure = Figure(figsize=(10, 4.6 + 0.4 * (len(runs) > 1)))
        figure.subplots_adjust(0.1, 0.13, 0.82, 0.91, wspace=0.62, hspace=0.16)
        grid = figure.subplots(
            len(curves),
            len(runs),
            sharex=True,
            sharey="row",
            squeeze=False,
            height_ratios=[3, *[2] * (len(curves) - 1)],
        )
        seconds = max(max(run.seconds, 0.05) * 1.02 for run in runs)
        for row, curve in zip(grid, curves, strict=True):
            unit, highest, draw_curve = _CURVES[curve]
            top = max(highest(run) for run in runs)
            row[0].set_ylabel(unit)
            for axes, run in zip(row, runs, strict=True):
                draw_curve(axes, run, top)
        for column, name in enumerate(names):
            grid[0][column].set_title(name)
            grid[-1][column].set_xlim(0, seconds)
            grid[-1][column].set_xlabel("seconds since the start")
            # Fewer marks where pictures stand side by side, or their numbers would run into one another.
            grid[-1][column].xaxis.set_major_locator(
                MaxNLocator(8 // len(runs), steps=[1, 2, 5, 10])
            )
        figure.align_ylabels()
    alternative = "\n".join(
        " ".join(
            filter(None, [f"{name}.", run.summary(), *(_ALTERNATIVES[it](run) for it in curves)])
        )
        for name, run in zip(names, runs, strict=True)
    )
    return Picture(figure, " | ".join(names), alternative)


def _most_connections(run: Run) -> int:
    return max((max(curve.capacity or 0, curve.most_checked_out) for curve in run.pools), default=1)


def _most_requests(run: Run) -> int:
    return max([run.announced, 1, *(curve.most_waiting for curve in run.pools)])


def _steps(curve: PoolCurve, until: float) -> tuple[list[float], list[int]]:
    times = [0.0, *(sample.time for sample in curve.samples), until]
    checked_out = [0, *(sample.checked_out for sample in curve.samples)]
    return _thinned(times, [*checked_out, checked_out[-1]])


def _thinned(times: list[float], values: list[int]) -> tuple[list[float], list[int]]:
    """A step function, in order of time, without the points that no eye could tell apart.

    Of each stretch of time as narrow as the finest picture can show it keeps the first, the lowest, the highest
    and the last point. Drawing a long storm would otherwise take most of its time for nothing.
    """
    if len(times) <= 4 * _SHOWN_WIDTH:
        return times, values
    width = times[-1] / _SHOWN_WIDTH
    kept: list[int] = []
    for _, stretch in groupby(range(len(times)), key=lambda at: times[at] // width):
        points = list(stretch)
        lowest, highest = min(points, key=values.__getitem__), max(points, key=values.__getitem__)
        kept += sorted({points[0], lowest, highest, points[-1]})
    return [times[at] for at in kept], [values[at] for at in kept]


def _draw_pool(axes: Axes, run: Run, top: int) -> None:
    """Connections checked out over time: the first pool filled, further pools as broken lines."""
    labels: list[tuple[float, str, str]] = []
    for number, curve in enumerate(run.pools):
        times, checked_out = _steps(curve, run.seconds)
        alone = len(run.pools) == 1
        line = ("-", "--", ":")[number % 3]
        axes.step(times, checked_out, where="post", color=CHECKED_OUT, linestyle=line, zorder=3)
        if number == 0:
            axes.fill_between(
                times, checked_out, step="post", color=CHECKED_OUT, alpha=0.18, linewidth=0
            )
        out = f"checked out {checked_out[-1]}" if alone else f"{curve.name}: {checked_out[-1]}"
        if curve.capacity is not None:
            axes.axhline(curve.capacity, color=CAPACITY, linewidth=1.4, linestyle=(0, (4, 3)))
            if alone:
                labels.append((curve.capacity, f"capacity {curve.capacity}", CAPACITY))
            else:
                out += f" of {curve.capacity}"
        labels.append((checked_out[-1], out, CHECKED_OUT))
    for verdict in run.deadlocks[:1]:
        axes.axvline(verdict.at, color=WAITING, linewidth=1.6)
        late = verdict.at > run.seconds * 0.6
        axes.annotate(
            "deadlock proved" if len(run.pools) == 1 else f"deadlock\nin {verdict.pool}",
            (verdict.at, top * 0.5),
            xytext=(-6 if late else 6, 0),
            textcoords="offset points",
            ha="right" if late else "left",
            color=WAITING,
            weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
        )
    axes.set_ylim(0, top * 1.15)
    _label_ends(axes, labels, top, gap=0.11)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))


def _draw_requests(axes: Axes, run: Run, top: int) -> None:
    """Tasks waiting for a connection, requests completed and failed, over time."""
    lines: list[tuple[str, str, list[float], list[int]]] = []
    if run.pools:
        changes = sorted(
            (sample.time, number, sample.waiting)
            for number, curve in enumerate(run.pools)
            for sample in curve.samples
        )
        now, times, waiting = [0] * len(run.pools), [0.0], [0]
        for moment, number, value in changes:
            now[number] = value
            times.append(moment)
            waiting.append(sum(now))
        lines.append(("waiting", WAITING, times, waiting))
    if run.announced:
        done = sorted((request.end, request.outcome == "ok") for request in run.requests)
        for name, color, good in (("completed", COMPLETED, True), ("failed", FAILED, False)):
            ends = [end for end, ok in done if ok is good]
            if ends or good:
                lines.append((name, color, [0.0, *ends], list(range(len(ends) + 1))))
    for _, color, times, values in lines:
        steps = _thinned([*times, run.seconds], [*values, values[-1]])
        axes.step(*steps, where="post", color=color)
    axes.set_ylim(0, top * 1.12)
    _label_ends(
        axes,
        [(values[-1], f"{name} {values[-1]}", color) for name, color, _, values in lines],
        top,
        gap=0.19,
    )
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]))


def _most_memory(run: Run) -> float:
    return max(run.extra_memory, run.memory_limit or 0.0, 8.0)


def _draw_memory(axes: Axes, run: Run, top: float) -> None:
    """Resident memory beyond that at the start, and the limit that ends the run."""
    first = run.memory[0].mebibytes if run.memory else 0.0
    times = [0.0, *(sample.time for sample in run.memory)]
    extra = [0.0, *(sample.mebibytes - first for sample in run.memory)]
    axes.plot(times, extra, color=MEMORY, zorder=3)
    axes.fill_between(times, extra, color=MEMORY, alpha=0.25, linewidth=0)
    labels = [(extra[-1], f"{extra[-1]:.0f} MiB", CAPACITY)]
    if run.memory_limit is not None:
        axes.axhline(run.memory_limit, color=FAILED, linewidth=1.8, linestyle=(0, (4, 3)))
        labels.append((run.memory_limit, f"limit {run.memory_limit:g} MiB", FAILED))
    if run.ended == "memory limit":
        axes.plot(times[-1:], extra[-1:], "X", color=FAILED, markersize=13, zorder=4)
        labels[0] = (extra[-1], "killed", FAILED)
    elif max(extra) > 1.3 * extra[-1] + 8:
        labels.append((max(extra), f"peak {max(extra):.0f}", CAPACITY))
    axes.set_ylim(0, top * 1.15)
    _label_ends(axes, labels, top, gap=0.13)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))


def _most_objects(run: Run) -> float:
    return max(run.most_objects, 10)


def _draw_objects(axes: Axes, run: Run, top: float) -> None:
    """Objects alive in the identity maps."""
    times = [0.0, *(sample.time for sample in run.objects), run.seconds]
    alive = [0, *(sample.alive for sample in run.objects)]
    axes.step(times, [*alive, alive[-1]], where="post", color=OBJECTS)
    labels = [(float(alive[-1]), f"{_thousands(alive[-1])} objects", OBJECTS)]
    if max(alive) > 1.3 * alive[-1]:
        labels.append((max(alive), f"most {_thousands(max(alive))}", OBJECTS))
    axes.set_ylim(0, top * 1.15)
    _label_ends(axes, labels, top, gap=0.2)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: _thousands(value))


def _thousands(value: float) -> str:
    """A count that is short enough to stand beside a curve: 950, 9,500, 95k."""
    return f"{value:,.0f}" if value < 10_000 else f"{value / 1000:.0f}k"


def _longest_lag(run: Run) -> float:
    return max(run.longest_lag, 0.05)


def _draw_lag(axes: Axes, run: Run, top: float) -> None:
    """How late the event loop was, as seen 20 times a second."""
    times = [0.0, *(at for at, _ in run.loop_lag)]
    lag = [0.0, *(seconds for _, seconds in run.loop_lag)]
    axes.step(times, lag, where="pre", color=LOOP_LAG)
    axes.set_ylim(0, top * 1.15)
    _label_ends(axes, [(max(lag), f"longest {max(lag):.2f} s", CAPACITY)], top, gap=0.2)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


# What each curve is called on its axis, how high it reaches, and who draws it.
_CURVES: dict[Curve, tuple[str, Callable[[Run], float], Callable[[Axes, Run, Any], None]]]
_CURVES = {
    "connections": ("connections", _most_connections, _draw_pool),
    "requests": ("requests", _most_requests, _draw_requests),
    "memory": ("MiB more", _most_memory, _draw_memory),
    "objects": ("objects", _most_objects, _draw_objects),
    "loop lag": ("loop lag, s", _longest_lag, _draw_lag),
}
# What a picture of that curve says beyond the recording's summary, for who cannot see it.
_ALTERNATIVES: dict[Curve, Callable[[Run], str]] = {
    "connections": lambda run: "",
    "requests": lambda run: "",
    "memory": lambda run: (
        f"Memory rose by up to {run.extra_memory:.0f} MiB and stood {run.kept_memory:.0f} MiB above the start"
        f" at the end, after {run.seconds:.1f} s."
    ),
    "objects": lambda run: (
        f"Up to {run.most_objects:,} objects were alive in identity maps,"
        f" {run.objects[-1].alive if run.objects else 0:,} at the end."
    ),
    "loop lag": lambda run: f"The event loop was up to {run.longest_lag:.2f} s late.",
}


def _label_ends(axes: Axes, labels: list[tuple[float, str, str]], top: float, gap: float) -> None:
    """Name each curve to the right of its end; `gap` is the least distance of two names, as a share of `top`."""
    height = -math.inf
    for value, text, color in sorted(labels):
        height = max(value, height + gap * top, 0.05 * top)
        axes.annotate(
            text,
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            weight="bold",
        )


class LivePicture:
    """The picture of a run that is still going on, in a notebook."""

    def __init__(self, run: Run) -> None:
        from IPython.display import DisplayHandle

        self._run = run
        self._handle = DisplayHandle()
        self._events = 0
        self._cost = 0.0
        self._next = self._last_end = self._moved = time.monotonic()
        self._shown = False

    def draw_if_due(self) -> None:
        """Draw, unless the last drawing was so recent that one more would disturb what is measured."""
        now = time.monotonic()
        events = sum(len(pool.samples) for pool in self._run.pools)
        events += len(self._run.objects)
        if events != self._events:
            self._events, self._moved = events, now
        if now - self._moved > _STANDING_AFTER:
            self._next = min(self._next, self._last_end + self._pause(_DRAWING_SHARE_STANDING))
        if now >= self._next:
            self._show(_LIVE_DPI)
            self._last_end = time.monotonic()
            self._cost = self._last_end - now
            self._next = self._last_end + self._pause(_DRAWING_SHARE)

    def _pause(self, share: float) -> float:
        return max(_SHORTEST_PAUSE, self._cost / share)

    def draw_final(self) -> None:
        """Draw the whole run, finely."""
        self._show(_FINAL_DPI)

    def _show(self, dpi: int) -> None:
        picture = draw(self._run)
        data = {"text/html": picture.html(dpi), "text/plain": repr(picture)}
        if self._shown:
            self._handle.update(data, raw=True)
        else:
            self._handle.display(data, raw=True)
            self._shown = True


def draw_waits(run: Run) -> Picture:
    """The wait-for graph of the first deadlock: who holds each connection, and what the holder waits for."""
    if not run.deadlocks:
        raise ValueError(f"no wait-for graph: no deadlock was seen in {run.title!r}")
    verdict = run.deadlocks[0]
    holding = sorted(verdict.holding, key=lambda holder: _natural(holder.owner))
    others = len(verdict.waiting) - sum(
        holder.waits is not None and holder.waits.pool == verdict.pool for holder in holding
    )
    locked_out = [holder.in_server for holder in holding if holder.in_server is not None]
    font = 12 if len(holding) <= 24 else 8
    with look():
        figure = new_figure(10, 5.6)
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(-3.05, 1.55)
        axes.set_ylim(-1.25, 1.25)
        axes.set_aspect("equal")
        for number, holder in enumerate(holding):
            angle = math.pi / 2 - 2 * math.pi * number / len(holding)
            x, y = math.cos(angle), math.sin(angle)
            _arrow(axes, (0.4 * x, 0.4 * y), (0.97 * x, 0.97 * y), CHECKED_OUT, "-")
            _arrow(axes, (0.97 * x, 0.97 * y), (0.4 * x, 0.4 * y), WAITING, "--")
            axes.plot([x], [y], "o", color=CHECKED_OUT, markersize=font)
            axes.annotate(
                holder.owner,
                (1.08 * x, 1.08 * y),
                ha="left" if x > 0.05 else "right" if x < -0.05 else "center",
                va="bottom" if y > 0.95 else "top" if y < -0.95 else "center",
                fontsize=font,
            )
        axes.annotate(
            f"{verdict.pool}\n{verdict.checked_out} of {verdict.capacity}\nchecked out",
            (0, 0),
            ha="center",
            va="center",
            weight="bold",
        )
        notes = [
            ("holds a connection,\n" + _mostly("taken in", holding), CHECKED_OUT, 0.75),
            (
                "waits for one more,\n"
                + _mostly("asked for in", [holder.waits for holder in holding if holder.waits]),
                WAITING,
                0.2,
            ),
        ]
        if locked_out:
            line = Counter(place.short for place in locked_out).most_common(1)[0][0]
            notes[1] = (f"{notes[1][0]},\nor for a lock in the server, in {line}", WAITING, 0.2)
        if others:
            notes.append((f"{others} more in line,\nholding nothing", "#444444", -0.75))
        for text, color, y in notes:
            axes.annotate(text, (-3.05, y), color=color, weight="bold", va="center", fontsize=14)
        figure.suptitle("Who waits for whom", x=0.01, ha="left", weight="bold", fontsize=16)
    asked = {holder.waits.pool for holder in holding if holder.waits} or {verdict.pool}
    of = "the same pool" if asked == {verdict.pool} else " and ".join(sorted(asked))
    lock = f", {len(locked_out)} of them in the server for a lock" if locked_out else ""
    alternative = (
        f"Wait-for graph: {len(holding)} tasks each hold one connection of {verdict.pool} and wait for one more"
        f" of {of}{lock}; {others} tasks that hold nothing wait behind them."
    )
    return Picture(figure, "who waits for whom", alternative)


def _mostly(verb: str, entries: Sequence[Holding | Waiting]) -> str:
    """The source line that most of them come from."""
    places = Counter(own_line(entry.places).short for entry in entries if entry.places)
    return f"{verb} {places.most_common(1)[0][0]}" if places else f"{verb} no line of yours"


def _natural(name: str) -> tuple[str, int]:
    """A sort key that puts "request 9" before "request 10"."""
    words, _, number = name.rpartition(" ")
    return (words, int(number)) if number.isdigit() else (name, 0)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, line: str
) -> None:
    axes.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={
            "arrowstyle": "-|>",
            "color": color,
            "linewidth": 1.6,
            "linestyle": line,
            "connectionstyle": "arc3,rad=0.1",
            "shrinkA": 0,
            "shrinkB": 4,
        },
    )
