"""Pictures that only the lessons need; the look and the curves are ormscope's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ormscope.lab import Recording
from ormscope.lab.picture import (
    CAPACITY,
    CHECKED_OUT,
    COMPLETED,
    LOOP_LAG,
    MEMORY,
    OBJECTS,
    OTHER,
    WAITING,
    Picture,
    look,
    new_figure,
)


def phase_diagram(survived: Mapping[tuple[int, int], bool], depth: int) -> Picture:
    """Which pools survive how many tasks: a mark for each (tasks, capacity), and the line tasks × (depth - 1) + 1."""
    most_tasks = max(tasks for tasks, _ in survived)
    most_capacity = max(capacity for _, capacity in survived)
    with look():
        figure = new_figure(10, 6.2)
        axes = figure.subplots()
        for good, color, marker in ((True, COMPLETED, "o"), (False, WAITING, "X")):
            points = [point for point, outcome in survived.items() if outcome is good]
            axes.plot(
                [tasks for tasks, _ in points],
                [capacity for _, capacity in points],
                marker,
                color=color,
                markersize=13,
                zorder=3,
            )
        ends = (0.5, most_tasks + 0.5)
        # Half a step below the smallest capacity that is enough, so that the line separates the marks; it says so.
        axes.plot(ends, [tasks * (depth - 1) + 0.5 for tasks in ends], color=CAPACITY, linewidth=2)
        axes.set_xlim(*ends)
        axes.set_ylim(0.4, most_capacity + 0.6)
        axes.set_xlabel("tasks at once")
        axes.set_ylabel("capacity of the pool")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(False)
        axes.set_title(f"{depth} connections per task")
        for height, text, color in (
            (0.95, "● all tasks\n   finish", COMPLETED),
            (0.5, "✖ deadlock", WAITING),
            (0.2, f"line: capacity =\ntasks × {depth - 1} + ½", CAPACITY),
        ):
            axes.annotate(
                text,
                (1, height),
                xycoords="axes fraction",
                xytext=(10, 0),
                textcoords="offset points",
                va="top",
                color=color,
                weight="bold",
            )
    deadlocks = sum(not outcome for outcome in survived.values())
    alternative = (
        f"1 to {most_tasks} tasks on pools of 1 to {most_capacity} connections, {depth} connections per task: "
        f"{deadlocks} of {len(survived)} runs deadlocked, all of them below capacity = tasks × {depth - 1} + 1."
        if all(
            outcome == (capacity > tasks * (depth - 1))
            for (tasks, capacity), outcome in survived.items()
        )
        else f"{deadlocks} of {len(survived)} runs deadlocked; they do not follow the formula."
    )
    return Picture(figure, f"which pools survive, {depth} connections per task", alternative)


def ladder(recordings: Mapping[str, Recording]) -> Picture:
    """Throughput and slowest request of several runs, one bar each."""
    runs = recordings.values()
    figure = _bars(
        list(recordings),
        [
            (
                "Throughput",
                "orders placed per second",
                COMPLETED,
                [run.throughput for run in runs],
            ),
            (
                "Slowest order",
                "seconds from arrival to the end",
                OTHER,
                [run.slowest for run in runs],
            ),
        ],
    )
    alternative = "; ".join(
        f"{name}: {run.throughput:.0f} orders placed per second, the slowest ended after {run.slowest:.2f} s"
        for name, run in recordings.items()
    )
    return Picture(figure, "throughput and slowest order of each remedy", alternative)


def export_ladder(recordings: Mapping[str, Recording], rows: int) -> Picture:
    """Memory, speed and longest loop stall of several exports of the same `rows`, one bar each."""
    runs = recordings.values()
    speeds = [rows / max(run.seconds, 1e-9) / 1000 for run in runs]
    figure = _bars(
        list(recordings),
        [
            ("Peak memory", "MiB above the start", MEMORY, [run.extra_memory for run in runs]),
            ("Speed", "thousand rows per second", COMPLETED, speeds),
            (
                "Longest loop stall",
                "seconds",
                LOOP_LAG,
                [run.longest_lag for run in runs],
            ),
        ],
    )
    alternative = "; ".join(
        f"{name}: peak {run.extra_memory:.0f} MiB, {speed:.0f} thousand rows per second, "
        f"the event loop up to {run.longest_lag:.2f} s late"
        for (name, run), speed in zip(recordings.items(), speeds, strict=True)
    )
    return Picture(figure, "memory, speed and loop stall of each export", alternative)


def _bars(names: Sequence[str], panels: Sequence[tuple[str, str, str, Sequence[float]]]) -> Figure:
    """Horizontal bars, one for each name, in panels side by side: title, unit, color and values of each.

    The numbers of a panel have all the same precision: whole ones, or hundredths where one is below ten and none
    reaches a hundred.
    """
    with look():
        figure = new_figure(10, 1.6 + 0.55 * len(names))
        row = figure.subplots(1, len(panels), sharey=True)
        for axes, (title, unit, color, values) in zip(row, panels, strict=True):
            bars = axes.barh(names, values, color=color, height=0.62)
            digits = 0 if max(values) >= 100 or min(values) >= 10 else 2
            axes.bar_label(bars, [f"{value:.{digits}f}" for value in values], padding=4)
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.set_title(title)
            axes.set_xlabel(unit)
            axes.set_xlim(0, max(values) * (1 + 0.1 * len(panels)) or 1)
            axes.grid(axis="x")
            axes.grid(visible=False, axis="y")
        row[0].invert_yaxis()
    return figure


Told = tuple[str, float, float | None, bool]
"""The moment of a scrape, what was true, what it told (None: nothing), and whether that was wrong."""


def scrapes_told(told: Mapping[str, Mapping[str, Sequence[Told]]]) -> Picture:
    """What the scrapes of several functions told of several numbers, on what was true."""
    numbers = list(next(iter(told.values())))
    with look():
        figure = new_figure(10, 6)
        grid = figure.subplots(len(numbers), len(told), sharex=True, sharey="row")
        for column, (name, rows) in zip(grid.T, told.items(), strict=True):
            column[0].set_title(name)
            for axes, number in zip(column, numbers, strict=True):
                for at, (_, true, found, wrong) in enumerate(rows[number]):
                    axes.plot(at, true, "o", color="#B8B8B8", markersize=15)
                    if wrong:
                        axes.axvspan(at - 0.5, at + 0.5, color=WAITING, alpha=0.13, linewidth=0)
                    if found is not None:
                        axes.plot(at, found, "o", color=CHECKED_OUT, markersize=7, zorder=3)
                axes.margins(y=0.25)
                axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
            moments = [moment for moment, *_ in rows[numbers[0]]]
            axes.set_xticks(range(len(moments)), moments, rotation=90)
        for axes, number in zip(grid[:, 0], numbers, strict=True):
            axes.set_ylabel(number)
        figure.align_ylabels()
        figure.supxlabel("grey: what was true; blue: what the scrape told; shaded: wrong", size=14)
    counts = "; ".join(
        f"{name}: {sum(wrong for row in rows.values() for *_, wrong in row)} of"
        f" {sum(map(len, rows.values()))} numbers wrong"
        for name, rows in told.items()
    )
    return Picture(
        figure, " | ".join(told), f"Grey is what was true, blue what was told. {counts}."
    )


def answers(wanted: Mapping[str, str], said: Mapping[str, Mapping[str, str]]) -> Picture:
    """What several functions said of the same situations, beside what was wanted, as a table."""
    right = {
        name: [found[situation] == wanted[situation] for situation in wanted]
        for name, found in said.items()
    }
    with look():
        figure = new_figure(10, 0.9 + 0.3 * len(wanted))
        axes = figure.subplots()
        for column, (name, found) in enumerate({"wanted": wanted, **said}.items()):
            axes.text(column, -1, name, va="center", weight="bold", size=16)
            for row, situation in enumerate(wanted):
                text, color, weight = found[situation], OBJECTS, "normal"
                if name in right:
                    good, weight = right[name][row], "bold"
                    text = f"{'✔' if good else '✖'} {text}"
                    color = COMPLETED if good else WAITING
                axes.text(column, row, text, va="center", color=color, weight=weight)
        axes.set_xlim(-0.1, len(said) + 0.9)
        axes.set_ylim(len(wanted) - 0.4, -1.5)
        axes.set_yticks(range(len(wanted)), wanted)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    counts = "; ".join(
        f"{name}: right in {sum(found)} of {len(wanted)} situations"
        for name, found in right.items()
    )
    return Picture(figure, " | ".join(said), f"{counts}.")


def progress_board(state: Mapping[str, Mapping[str, str]]) -> Picture:
    """What is done of the exercises: a row for each task, as `workshop.progress.state` tells them."""
    rows = [(number, *task) for number, tasks in state.items() for task in tasks.items()]
    looks = {"done": (COMPLETED, "●"), "tried": (LOOP_LAG, "◐"), "open": (OBJECTS, "○")}
    with look():
        figure = new_figure(10, 0.4 + 0.4 * max(len(rows), 1))
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(0, 10)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        for row, (number, name, mark) in enumerate(rows):
            color, sign = looks[mark]
            axes.text(0, row, number, va="center", weight="bold")
            axes.text(0.7, row, name.replace("_", " "), va="center")
            axes.text(5, row, f"{sign}  {mark}", va="center", color=color, weight="bold")
    done = [name for _, name, mark in rows if mark == "done"]
    alternative = f"{len(done)} of {len(rows)} tasks of the exercises are done: {', '.join(done) or 'none yet'}."
    return Picture(figure, "what is done of the exercises", alternative)
