"""A watch on services through their metrics, what it draws, and the alerts that fire: for the lesson."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.error import HTTPError

from matplotlib.axes import Axes

from ormscope.lab.picture import CAPACITY, FAILED, WAITING, Picture, look, new_figure
from ormscope.metrics import ALERTS
from workshop.keeper import free_port
from workshop.prometheus import (
    ABSENT,
    ALERT_NAMES,
    HURRY,
    SCRAPE_SECONDS,
    Firing,
    Prometheus,
    Scrape,
    ask,
    firing_of,
    hurried,
    parsed,
)


class Monitor:
    """Watches the services that listen at `port`, one after another, four times a second, until `close()`.

    `scrapes` are their metrics in the order of time. The alert rules of ormscope are evaluated with each minute
    shortened to a second: by Prometheus if it is installed, else here, from the same metrics.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.scrapes: list[Scrape] = []
        installed = shutil.which("prometheus") is not None
        rules = hurried(ALERTS.read_text(encoding="utf-8"), HURRY)
        self._prometheus = Prometheus([self.port], rules) if installed else None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._scrape_for_ever, name="monitor", daemon=True)
        self._thread.start()

    @property
    def judge(self) -> str:
        """Who evaluates the alert rules."""
        return "Prometheus" if self._prometheus else "the lesson itself, for want of Prometheus"

    def of(self, pool: str) -> list[Scrape]:
        """The metrics of the pool with this name, in the order of time."""
        return [scrape for scrape in self.scrapes if scrape.pool == pool]

    def alerts(self, pool: str) -> list[str]:
        """The names of the alerts that fired for the pool with this name, in alphabetical order."""
        return sorted(self.firing(pool))

    def firing(self, pool: str) -> Firing:
        """When the alerts fired for the pool with this name, by their names."""
        if self._prometheus is None:
            return firing_of(self.of(pool))
        found: Firing = {}
        for alert, about, times in self._prometheus.firing():
            if about == pool:
                first, last = found.get(alert, (times[0], times[-1]))
                found[alert] = min(first, times[0]), max(last, times[-1])
        return found

    def plot(self, *pools: str) -> Picture:
        """Those who wait, the oldest wait, and when alerts fired, over time, for several pools side by side."""
        return draw_watched(
            {pool: self.of(pool) for pool in pools},
            {pool: self.firing(pool) for pool in pools},
            self.judge,
        )

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._thread.join()
        if self._prometheus is not None:
            self._prometheus.close()

    def _scrape_for_ever(self) -> None:
        while not self._closing.wait(SCRAPE_SECONDS):
            try:
                self.scrapes.append(parsed(ask(self.port), time.monotonic()))
            except HTTPError:
                raise  # it is there, and its collector fails
            except ABSENT:
                continue


def draw_watched(
    runs: Mapping[str, Sequence[Scrape]], firing: Mapping[str, Firing], judge: str
) -> Picture:
    """What was scraped of several pools, side by side, and when an alert fired for each."""
    rows = (("waiting", "tasks waiting", 20), ("oldest_wait_seconds", "oldest wait, s", 2))
    with look():
        figure = new_figure(10, 6.0)
        grid: Any = figure.subplots(
            3, len(runs), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 3, 2]
        )
        for (name, label, least), line in zip(rows, grid, strict=False):
            line[0].set_ylabel(label)
            top = max([least, *(scrape[name] for run in runs.values() for scrape in run)])
            for axes, run in zip(line, runs.values(), strict=True):
                _curve(axes, [(scrape.time - run[0].time, scrape[name]) for scrape in run])
                axes.set_ylim(0, top * 1.1)
        longest = max(run[-1].time - run[0].time for run in runs.values())
        for (pool, run), column in zip(runs.items(), grid.T, strict=True):
            column[0].set_title(pool)
            column[1].axhline(1, color=FAILED, linewidth=1.8, linestyle=(0, (4, 3)))
            _draw_alerts(column[2], firing[pool], run, longest)
            column[2].set_xlabel("seconds since\nthe first scrape")
        grid[1][len(runs) // 2].annotate(" alert above 1 s", (0, 1.1), color=FAILED, weight="bold")
        grid[2][0].set_xlim(0, longest * 1.05)
        figure.align_ylabels(grid[:2, 0])
    alternative = "; ".join(
        f"{pool}: up to {max(scrape['waiting'] for scrape in run):.0f} tasks waiting, the oldest for up to"
        f" {max(scrape['oldest_wait_seconds'] for scrape in run):.1f} s, "
        + (
            " and ".join(
                f"{alert} fires after {_since_first(run, first):.1f} s"
                for alert, (first, _) in sorted(firing[pool].items())
            )
            or "no alert fires"
        )
        for pool, run in runs.items()
    )
    title = " | ".join(runs)
    return Picture(figure, title, f"{alternative}. The alerts were evaluated by {judge}.")


def _since_first(run: Sequence[Scrape], moment: float) -> float:
    """Seconds since the first scrape; none where Prometheus, which scrapes for itself, was a little earlier."""
    return max(0.0, moment - run[0].time)


def _draw_alerts(axes: Axes, firing: Firing, run: Sequence[Scrape], longest: float) -> None:
    """A bar for each alert, from when it fired until it was resolved, or until the last scrape."""
    for row, alert in enumerate(ALERT_NAMES):
        if alert in firing:
            start = _since_first(run, firing[alert][0])
            end = _since_first(run, min(firing[alert][1], run[-1].time))
            bar = (start, max(end - start, SCRAPE_SECONDS))
            axes.broken_barh([bar], (row - 0.35, 0.7), color=FAILED)
            axes.annotate(
                f" from {start:.1f} s ",
                (start, row),
                va="center",
                ha="left" if start < 0.6 * longest else "right",
                color=CAPACITY,
                weight="bold",
            )
    if not firing:
        axes.annotate(
            "no alert fires", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center"
        )
    axes.set_ylim(len(ALERT_NAMES) - 0.4, -0.6)
    names = [alert.replace("Pool", "Pool\n") for alert in ALERT_NAMES]
    axes.set_yticks(range(len(ALERT_NAMES)), names, size=11)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)


def _curve(axes: Axes, points: list[tuple[float, float]]) -> None:
    axes.plot(
        [at for at, _ in points],
        [value for _, value in points],
        color=WAITING,
        marker="o",
        markersize=4,
        markerfacecolor=CAPACITY,
        markeredgewidth=0,
    )
