"""The curves of pools: connections checked out, tasks that wait for one, requests that have ended."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.ticker import MaxNLocator

from ormscope.lab.labels import Label, label_ends
from ormscope.lab.picture import CAPACITY, CHECKED_OUT, COMPLETED, FAILED, WAITING
from ormscope.lab.run import Run
from ormscope.lab.step_curve import Drawn, Numbers, drawn


class Told(NamedTuple):
    """What a picture says of a curve beyond the run's summary, for who cannot see it; whether it has means in it."""

    sentences: str
    blurred: bool


class Shown(NamedTuple):
    """A run as its curves are drawn from it.

    `samples` has an array for each pool, whose rows are the times, the connections checked out and the tasks waiting;
    `column` is how many seconds a column of the picture is wide (`ormscope.lab.step_curve.drawn`).
    """

    run: Run
    samples: list[Numbers]
    column: float


def shown(run: Run, column: float) -> Shown:
    """A run, with the samples of each pool as an array that begins with none checked out and none waiting."""
    arrays = []
    for pool in run.pools:
        flat = np.fromiter(chain.from_iterable(pool.samples), np.float64, 3 * len(pool.samples))
        arrays.append(np.concatenate([np.zeros((3, 1)), flat.reshape(-1, 3).T], axis=1))
    return Shown(run, arrays, column)


def most_connections(of: Shown) -> int:
    """How high the connections reach."""
    capacities = [pool.capacity or 0 for pool in of.run.pools]
    return max([*capacities, *(int(out.max()) for _, out, _ in of.samples)], default=1)


def most_tasks(of: Shown) -> int:
    """How high the tasks reach."""
    return max([of.run.announced, 1, *(int(waiting.max()) for *_, waiting in of.samples)])


def shade(color: str, number: int) -> str:
    """The colour of a thing in the first, second or third pool: the hue tells the thing, the depth the pool."""
    red, green, blue = to_rgb(color)
    depth = (1, 0.45, 0.7)[number % 3]
    return to_hex((red * depth, green * depth, blue * depth))


def draw_step_curve(axes: Axes, curve: Drawn, color: str, filled: bool = False) -> bool:
    """Draw the line, and the band where it is a mean; whether there is one."""
    if filled:
        axes.fill_between(
            curve.times, curve.values, step="post", color=color, alpha=0.18, linewidth=0
        )
    if len(curve.band_times):
        axes.fill_between(
            curve.band_times,
            curve.lows,
            curve.highs,
            step="post",
            color=color,
            alpha=0.25,
            linewidth=0,
        )
    axes.step(curve.times, curve.values, where="post", color=color, zorder=3)
    return len(curve.band_times) > 0


def draw_connections(axes: Axes, of: Shown, top: int) -> Told:
    """Connections checked out over time, and the capacity of each pool."""
    labels: list[Label] = []
    sentences: list[str] = []
    blurred = False
    run, samples, column = of
    alone = len(run.pools) == 1
    axes.set_ylim(0, top * 1.15)
    for number, (pool, (times, checked_out, _)) in enumerate(zip(run.pools, samples, strict=True)):
        color = shade(CHECKED_OUT, number)
        curve = drawn(times, checked_out, run.seconds, column)
        toggles = draw_step_curve(axes, curve, color, filled=True)
        blurred |= toggles
        out, mean = int(checked_out[-1]), _mean(times[1:], checked_out[1:])
        sentences.append(f"On average {mean:.1f} connections of {pool.name} were checked out.")
        if pool.capacity is not None:
            axes.axhline(
                pool.capacity,
                color=CAPACITY if alone else color,
                linewidth=1.4,
                linestyle=(0, (4, 3)),
            )
        if alone:
            labels.append(Label(out, f"checked out {out}", color))
            if toggles:
                labels.append(Label(mean, f"mean {mean:.1f}", color))
            if pool.capacity is not None:
                labels.append(Label(pool.capacity, f"capacity {pool.capacity}", CAPACITY))
        else:
            text = f"{pool.name}: {out}"
            text += f" of {pool.capacity}" if pool.capacity is not None else ""
            text += f"\nmean {mean:.1f}" if toggles else ""
            labels.append(Label(mean if toggles else out, text, color))
    _draw_deadlock(axes, run, top)
    label_ends(axes, labels)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    return Told(" ".join(sentences), blurred)


def _draw_deadlock(axes: Axes, run: Run, top: int) -> None:
    """When the first deadlock was proved."""
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


def draw_tasks(axes: Axes, of: Shown, top: int) -> Told:
    """Tasks that wait for a connection, and requests that completed and failed, over time."""
    labels: list[Label] = []
    blurred = False
    run, samples, column = of
    axes.set_ylim(0, top * 1.12)
    for number, (pool, (times, _, waiting)) in enumerate(zip(run.pools, samples, strict=True)):
        color = shade(WAITING, number)
        blurred |= draw_step_curve(axes, drawn(times, waiting, run.seconds, column), color)
        what = " a\nconnection" if len(run.pools) == 1 else f"\n{pool.name}:"
        labels.append(Label(waiting[-1], f"waiting for{what} {waiting[-1]:.0f}", color))
    if run.announced:
        ended = sorted((request.end, request.outcome == "ok") for request in run.requests)
        for name, color, good in (("completed", COMPLETED, True), ("failed", FAILED, False)):
            times = np.array([0.0, *(end for end, ok in ended if ok is good)])
            count = len(times) - 1
            if count or good:
                curve = drawn(times, np.arange(count + 1.0), run.seconds, column)
                draw_step_curve(axes, curve, color)
                labels.append(Label(count, f"{name} {count}", color))
    label_ends(axes, labels)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]))
    return Told("", blurred)


def _mean(times: Numbers, values: Numbers) -> float:
    """`PoolCurve.mean_checked_out`, a hundred times as fast: a picture of a long run is drawn while it goes on."""
    if len(times) < 2:
        return 0.0
    return float(np.dot(values[:-1], np.diff(times))) / float(times[-1] - times[0])
