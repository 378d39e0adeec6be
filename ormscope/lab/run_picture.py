"""The picture of a run, or of several side by side: its curves over time, named beside their ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ormscope.lab import pool_curves, process_curves
from ormscope.lab.picture import SHOWN_WIDTH, Picture, look
from ormscope.lab.pool_curves import Shown, Told
from ormscope.lab.run import Curve, Run

# What goes up and down three times in so little is seen as a block: a line is three pixels wide.
_COLUMN_PIXELS = 12
_TITLE_POINTS = 16
_BOLD_WIDTH = 0.7  # of a letter of the title, on average, as a share of its size


def draw(*runs: Run, titles: Sequence[str] | None = None) -> Picture:
    """The curves of one run, or of several side by side on the same axes.

    Where a curve goes up and down too fast for the eye it is drawn as its mean, with a band from its lowest value
    to its highest (`ormscope.lab.step_curve.drawn` has the formula).
    """
    names = list(titles or [run.title for run in runs])
    curves = runs[0].curves
    with look():
        # Fixed margins, with room for the labels: the axes must not jump while a run is drawn live.
        height = 4.6 + 0.4 * (len(runs) > 1) + 1.3 * max(0, len(curves) - 2)
        figure = Figure(figsize=(10, height))
        left, right = 0.1, 0.82
        between = min(0.17, 0.57 / len(runs))  # for the labels of each column
        wide = (right - left - between * (len(runs) - 1)) / len(runs)
        figure.subplots_adjust(
            left, 0.6 / height, right, 1 - 0.42 / height, wspace=between / wide, hspace=0.16
        )
        grid = figure.subplots(
            len(curves),
            len(runs),
            sharex=True,
            sharey="row",
            squeeze=False,
            height_ratios=[3, *[2] * (len(curves) - 1)],
        )
        seconds = max(max(run.seconds, 0.05) * 1.02 for run in runs)
        column = seconds * _COLUMN_PIXELS / (wide * SHOWN_WIDTH)
        all_shown = [pool_curves.shown(run, column) for run in runs]
        told: list[list[Told]] = []
        for row, curve in zip(grid, curves, strict=True):
            unit, highest, draw_curve = _CURVES[curve]
            top = max(map(highest, all_shown))
            row[0].set_ylabel(unit)
            told.append(
                [draw_curve(axes, of, top) for axes, of in zip(row, all_shown, strict=True)]
            )
        for number, name in enumerate(names):
            # The room until the next title; a longer one is set smaller.
            room = (wide + between if len(runs) > 1 else 1 - left) * figure.get_figwidth() * 72
            size = min(_TITLE_POINTS, room / (max(len(name), 1) * _BOLD_WIDTH))
            grid[0][number].set_title(name, size=size)
            grid[-1][number].set_xlim(0, seconds)
            grid[-1][number].set_xlabel("seconds since the start")
            # Fewer marks where pictures stand side by side, or their numbers would run into one another.
            grid[-1][number].xaxis.set_major_locator(
                MaxNLocator(max(2, 8 // len(runs)), steps=[1, 2, 5, 10])
            )
        figure.align_ylabels()
    alternative = "\n".join(
        " ".join(filter(None, [f"{name}.", run.summary(), *_sentences(of_run)]))
        for name, run, of_run in zip(names, runs, zip(*told, strict=True), strict=True)
    )
    return Picture(figure, " | ".join(names), alternative)


def _sentences(told: Iterable[Told]) -> Iterator[str]:
    """What is said of the curves of a run, and of how some are drawn."""
    blurred = False
    for curve in told:
        yield curve.sentences
        blurred |= curve.blurred
    if blurred:
        yield (
            "Where a curve goes up and down too fast to be seen, its mean is drawn, with a band from its lowest"
            " value to its highest."
        )


# What each curve is called on its axis, how high it reaches, and who draws it and tells of it.
_CURVES: dict[Curve, tuple[str, Callable[[Shown], float], Callable[[Axes, Shown, Any], Told]]] = {
    "connections": ("connections", pool_curves.most_connections, pool_curves.draw_connections),
    "requests": ("tasks", pool_curves.most_tasks, pool_curves.draw_tasks),
    "memory": ("MiB above start", process_curves.most_memory, process_curves.draw_memory),
    "objects": ("objects", process_curves.most_objects, process_curves.draw_objects),
    "loop lag": ("loop lag, s", process_curves.longest_lag, process_curves.draw_lag),
}
