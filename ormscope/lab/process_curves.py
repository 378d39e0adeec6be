"""The curves of a process: its memory, the objects in its identity maps, the lag of its event loop."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ormscope.lab.labels import Label, label_ends
from ormscope.lab.picture import CAPACITY, FAILED, LOOP_LAG, MEMORY, OBJECTS
from ormscope.lab.pool_curves import Shown, Told, draw_step_curve
from ormscope.lab.step_curve import drawn


def most_memory(of: Shown) -> float:
    """How high the memory reaches, in MiB."""
    return max(of.run.extra_memory, of.run.memory_limit or 0.0, 8.0)


def draw_memory(axes: Axes, of: Shown, top: float) -> Told:
    """Resident memory beyond that at the start, and the limit that ends the run."""
    run = of.run
    first = run.memory[0].mebibytes if run.memory else 0.0
    times = [0.0, *(sample.time for sample in run.memory)]
    extra = [0.0, *(sample.mebibytes - first for sample in run.memory)]
    axes.set_ylim(0, top * 1.15)
    axes.plot(times, extra, color=MEMORY, zorder=3)
    axes.fill_between(times, extra, color=MEMORY, alpha=0.25, linewidth=0)
    end, peak = f"{extra[-1]:.0f} MiB", f"{max(extra):.0f} MiB"
    labels = []
    if run.ended == "memory limit":
        axes.plot(times[-1:], extra[-1:], "X", color=FAILED, markersize=13, zorder=4)
        labels.append(Label(extra[-1], f"killed at\n{end}", FAILED))
    elif max(extra) > 1.05 * extra[-1] and peak != end:
        labels += [
            Label(extra[-1], f"end {end}", CAPACITY),
            Label(max(extra), f"peak {peak}", CAPACITY),
        ]
    else:
        labels.append(Label(extra[-1], end, CAPACITY))
    if run.memory_limit is not None:
        axes.axhline(run.memory_limit, color=FAILED, linewidth=1.8, linestyle=(0, (4, 3)))
        labels.append(Label(run.memory_limit, f"limit {run.memory_limit:g} MiB", FAILED))
    label_ends(axes, labels)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    return Told(
        f"Memory rose by up to {run.extra_memory:.0f} MiB and stood {run.kept_memory:.0f} MiB above the start"
        f" at the end, after {run.seconds:.1f} s.",
        False,
    )


def most_objects(of: Shown) -> float:
    """How high the objects reach."""
    return max(of.run.most_objects, 10)


def draw_objects(axes: Axes, of: Shown, top: float) -> Told:
    """Objects alive in the identity maps."""
    run = of.run
    times = np.array([0.0, *(sample.time for sample in run.objects)])
    alive = np.array([0.0, *(sample.alive for sample in run.objects)])
    axes.set_ylim(0, top * 1.15)
    blurred = draw_step_curve(axes, drawn(times, alive, run.seconds, of.column), OBJECTS)
    labels = [Label(alive[-1], f"{_thousands(alive[-1])} objects", OBJECTS)]
    if max(alive) > 1.3 * alive[-1]:
        labels.append(Label(max(alive), f"most {_thousands(max(alive))}", OBJECTS))
    label_ends(axes, labels)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: _thousands(value))
    return Told(
        f"Up to {run.most_objects:,} objects were alive in identity maps, {alive[-1]:,.0f} at the end.",
        blurred,
    )


def _thousands(value: float) -> str:
    """A count that is short enough to stand beside a curve: 950, 9,500, 95k."""
    return f"{value:,.0f}" if value < 10_000 else f"{value / 1000:.0f}k"


def longest_lag(of: Shown) -> float:
    """How high the loop lag reaches, in seconds."""
    return max(of.run.longest_lag, 0.05)


def draw_lag(axes: Axes, of: Shown, top: float) -> Told:
    """How late the event loop was, as seen 20 times a second."""
    run = of.run
    times = [0.0, *(at for at, _ in run.loop_lag)]
    lag = [0.0, *(seconds for _, seconds in run.loop_lag)]
    axes.set_ylim(0, top * 1.15)
    axes.step(times, lag, where="pre", color=LOOP_LAG)
    label_ends(axes, [Label(max(lag), f"longest {max(lag):.2f} s", CAPACITY)])
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    return Told(f"The event loop was up to {run.longest_lag:.2f} s late.", False)
