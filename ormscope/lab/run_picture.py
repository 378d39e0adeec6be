"""The picture of a run, or of several side by side: its curves over time, named beside their ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
    look,
)
from ormscope.lab.run import Curve, PoolCurve, Run
from ormscope.lab.step_curve import thinned


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
    return thinned(times, [*checked_out, checked_out[-1]])


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
        steps = thinned([*times, run.seconds], [*values, values[-1]])
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
