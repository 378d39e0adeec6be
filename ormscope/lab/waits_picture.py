"""The wait-for graph of a deadlock as a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes

from ormscope.lab.picture import CHECKED_OUT, OTHER, WAITING, Picture, look, new_figure
from ormscope.lab.run import Run
from ormscope.places import own_line
from ormscope.verdict import Holding, Waiting


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
            notes.append((f"{others} more in line,\nholding nothing", OTHER, -0.75))
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
