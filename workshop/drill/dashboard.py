"""The dashboard: what the scrapes of a load have shown, over time, with two loads on the same axes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ormscope.lab.picture import (
    CHECKED_OUT,
    COMPLETED,
    FAILED,
    LOOP_LAG,
    MEMORY,
    WAITING,
    Picture,
    look,
    new_figure,
)
from workshop.drill.run import OK, Look, Run

_CURVES = (
    ("waiting", "waiting", WAITING),
    ("checked_out", "checked out", CHECKED_OUT),
    ("lag", "loop lag, s", LOOP_LAG),
    ("memory", "memory, MiB", MEMORY),
)


def draw(**runs: Run) -> Picture:
    """A column for each load, by its name: answers a second, those who wait, connections, loop lag, memory."""
    with look():
        figure = new_figure(10, 8.5)
        grid: Any = figure.subplots(
            1 + len(_CURVES), len(runs), sharex=True, sharey="row", squeeze=False
        )
        heights = []
        for (name, run), column in zip(runs.items(), grid.T, strict=True):
            column[0].set_title(name.replace("_", " "))
            heights.append(_draw_answers(column[0], run))
            for axes, (attribute, _, color) in zip(column[1:], _CURVES, strict=True):
                for worker in sorted({look.worker for look in run.looks}):
                    points = [look for look in run.looks if look.worker == worker]
                    _draw_curve(axes, points, attribute, color)
            column[-1].set_xlabel("seconds")
        grid[0][0].set_ylabel("answers / s")
        grid[0][0].set_ylim(0, max(heights))
        for row, (_, label, _) in zip(grid[1:], _CURVES, strict=True):
            row[0].set_ylabel(label)
            row[0].set_ylim(bottom=0)
        figure.align_ylabels(grid[:, 0])
    return Picture(figure, " | ".join(runs), " ".join(_told(*item) for item in runs.items()))


def _draw_answers(axes: Any, run: Run) -> float:
    """How many answers each second brought, and how many of them were failures; the height that this needs."""
    moments = range(
        int(max((answer.asked + answer.waited for answer in run.answers), default=0)) + 1
    )
    counts = {
        is_ok: Counter(
            int(answer.asked + answer.waited)
            for answer in run.answers
            if (answer.status == OK) == is_ok
        )
        for is_ok in (True, False)
    }
    served = [counts[True][moment] for moment in moments]
    failed = [counts[False][moment] for moment in moments]
    at = [moment + 0.5 for moment in moments]
    axes.bar(at, served, 0.9, color=COMPLETED)
    axes.bar(at, failed, 0.9, bottom=served, color=FAILED, hatch="//")
    words = f"{run.served} served, {run.failed} failed\n" + _alerts(run).replace(", ", ",\n")
    axes.annotate(
        words,
        (0.5, 0.97),
        xycoords="axes fraction",
        ha="center",
        va="top",
        weight="bold",
    )
    room = 0.5 * len(words.splitlines())  # above the bars, as a share of the tallest
    return max(1, *map(sum, zip(served, failed, strict=True))) * (1 + room)


def _draw_curve(axes: Any, looks: list[Look], attribute: str, color: str) -> None:
    times = [look.time for look in looks]
    axes.plot(times, [getattr(look, attribute) for look in looks], color=color)


def _told(name: str, run: Run) -> str:
    return (
        f"{name.replace('_', ' ')}: {run.served} of {len(run.answers)} requests served; in each of two workers up to"
        f" {run.most('waiting'):.0f} wait and {run.most('checked_out'):.0f} connections are checked out, the loop is up"
        f" to {run.most('lag'):.1f} s late, and memory grows by up to {max(0.0, run.grown):.0f} MiB; {_alerts(run)}."
    )


def _alerts(run: Run) -> str:
    return f"alerts: {', '.join(run.alerts) or 'none'}"
