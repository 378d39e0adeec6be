"""Watching a service from outside: its metrics over HTTP, and a Prometheus that judges them.

Prometheus is a program of its own and need not be there; where it is, it is started on a free port of
127.0.0.1, in a temporary folder, and goes with whoever asked for it, however that one ends.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import IncompleteRead
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

from matplotlib.axes import Axes
from prometheus_client.parser import text_string_to_metric_families

from ormscope.lab.picture import CAPACITY, FAILED, WAITING, Picture, look, new_figure
from ormscope.metrics import ALERTS
from workshop.keeper import Keeper, free_port
from workshop.mistake import Mistake

ROOT = Path(__file__).resolve().parent.parent
HURRY = 60
"""In the lesson, a minute of the alert rules lasts a second."""

Firing = dict[str, tuple[float, float]]
"""For each alert that has fired, by its name, the first and the last moment at which it did."""
_ALERTS = ("ConnectionPoolDeadlock", "ConnectionPoolWait")

# Straight to this machine, also where HTTP_PROXY is set.
_open = build_opener(ProxyHandler({})).open
# How it looks when a service is not there yet, or any more.
_ABSENT = (URLError, TimeoutError, ConnectionError, IncompleteRead)
_SCRAPE_SECONDS = 0.25
_START_SECONDS = 30.0


def ask(port: int, timeout: float = 1.0) -> str:
    """The metrics of the service at a port of 127.0.0.1, as text.

    Raises URLError or TimeoutError where it does not answer within `timeout` seconds.
    """
    with _open(f"http://127.0.0.1:{port}/metrics", timeout=timeout) as answer:
        text: str = answer.read().decode()
    return text


@dataclass(frozen=True)
class Scrape:
    """The metrics of one pool at `time`, in seconds: its name, its verdict, and the numbers.

    Of the histograms' buckets it has one: `scrape["waits_within_a_second"]`.
    """

    time: float
    pool: str
    cause: str
    numbers: dict[str, float]

    def __getitem__(self, name: str) -> float:
        """One number: `scrape["waiting"]` is sqlalchemy_pool_waiting. Raises KeyError where there is none."""
        return self.numbers[f"sqlalchemy_pool_{name}"]

    @property
    def lag(self) -> float:
        """event_loop_lag_seconds."""
        return self.numbers["event_loop_lag_seconds"]


def parsed(text: str, at: float = 0.0) -> Scrape:
    """The metrics of a service that has one pool."""
    numbers, pool, cause = {}, "", ""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            pool = sample.labels.get("pool", pool)
            if "cause" in sample.labels:
                cause = sample.labels["cause"] if sample.value else cause
            elif "le" not in sample.labels:
                numbers[sample.name] = sample.value
            elif (
                sample.name == "sqlalchemy_pool_wait_seconds_bucket"
                and sample.labels["le"] == "1.0"
            ):
                numbers["sqlalchemy_pool_waits_within_a_second"] = sample.value
    return Scrape(at, pool, cause, numbers)


def hurried(rules: str, factor: float) -> str:
    """Alert rules whose minutes last 60 / `factor` seconds; what they mean stays the same."""

    def shorter(match: re.Match[str]) -> str:
        milliseconds = int(match["minutes"]) * 60_000 / factor
        return f"{match['before']}{milliseconds:.0f}ms{match['after']}"

    return re.sub(
        r"(?P<before>for: |\[)(?P<minutes>\d+)m(?P<after>\]|$)", shorter, rules, flags=re.MULTILINE
    )


class Prometheus:
    """A Prometheus that scrapes some ports of 127.0.0.1 and evaluates alert rules, until `close()`.

    Raises Mistake where the program is missing, or does not start.
    """

    def __init__(
        self, ports: Sequence[int], rules: str, scrape_seconds: float = _SCRAPE_SECONDS
    ) -> None:
        program = shutil.which("prometheus")
        if program is None:
            raise Mistake("There is no program named prometheus here.")
        interval = f"{scrape_seconds * 1000:.0f}ms"
        setting: dict[str, Any] = {
            "global": {
                "scrape_interval": interval,
                "scrape_timeout": interval,
                "evaluation_interval": interval,
            },
            "rule_files": ["alerts.yml"],
            "scrape_configs": [
                {
                    "job_name": "shop",
                    "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}],
                }
            ],
        }
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._keeper = Keeper(_KEEPER, program, str(port), json.dumps(setting), rules)
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def _await_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while self._keeper.process.poll() is None and time.monotonic() < deadline:
            # It says that it is ready some seconds before it takes over what it is to scrape.
            with contextlib.suppress(*_ABSENT):
                targets = self._get("targets")["activeTargets"]
                if targets and all(target["health"] != "unknown" for target in targets):
                    return
            time.sleep(0.05)
        raise Mistake("Prometheus did not start. Run `prometheus --version` to see why.")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of a PromQL expression now: for each series its labels ("metric") and "value", or "values"."""
        answer: list[dict[str, Any]] = self._get(f"query?{urlencode({'query': expression})}")[
            "result"
        ]
        return answer

    def values(self, label: str, series: str) -> list[str]:
        """The values of a label, over all series that a selector matches."""
        return list(self._get(f"label/{label}/values?{urlencode({'match[]': series})}"))

    def alerts(self) -> list[dict[str, Any]]:
        """The alerts that are pending or firing now."""
        answer: list[dict[str, Any]] = self._get("alerts")["alerts"]
        return answer

    def firing(self) -> list[tuple[str, str, list[float]]]:
        """The alerts that have fired: name, pool, and the moments at which it did, in `time.monotonic()` seconds."""
        since_boot = time.monotonic() - time.time()
        return [
            (
                series["metric"]["alertname"],
                series["metric"]["pool"],
                [at + since_boot for at, _ in series["values"]],
            )
            for series in self.query('ALERTS{alertstate="firing"}[1h]')
        ]

    def _get(self, what: str) -> Any:
        with _open(f"{self._url}/api/v1/{what}", timeout=10) as answer:
            return json.load(answer)["data"]

    def close(self) -> None:
        """End it, and wait until it and its folder are gone."""
        self._keeper.stop()


# Keeps one Prometheus as long as its standard input is open, which ends with the parent in any case. (A thread of
# its own reads that, so that a Prometheus that does not start ends its keeper.)
_KEEPER = """
import subprocess, sys, tempfile, threading
from pathlib import Path
program, port, setting, rules = sys.argv[1:]
with tempfile.TemporaryDirectory(prefix="workshop-prometheus-") as folder:
    Path(folder, "prometheus.yml").write_text(setting, encoding="utf-8")  # JSON is YAML
    Path(folder, "alerts.yml").write_text(rules, encoding="utf-8")
    prometheus = subprocess.Popen(
        # Relative, for rule_files are patterns: it would find none in a folder whose name has a bracket.
        [program, "--config.file=prometheus.yml", "--storage.tsdb.path=data",
         f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"],
        cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    threading.Thread(target=lambda: (sys.stdin.read(), prometheus.terminate()), daemon=True).start()
    prometheus.wait()
"""


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
        while not self._closing.wait(_SCRAPE_SECONDS):
            try:
                self.scrapes.append(parsed(ask(self.port), time.monotonic()))
            except HTTPError:
                raise  # it is there, and its collector fails
            except _ABSENT:
                continue


def firing_of(scrapes: Sequence[Scrape]) -> Firing:
    """When the alerts of ormscope/alerts.yml would have fired, in a hurry, for one pool with these metrics.

    What Prometheus does from the same rules, for a process that is not started anew meanwhile.
    """
    firing: dict[str, list[float]] = {alert: [] for alert in _ALERTS}
    late_since = None
    for count, scrape in enumerate(scrapes, 1):
        if scrape.cause == "deadlock" or scrape["deadlocks_total"]:
            firing["ConnectionPoolDeadlock"].append(scrape.time)
        if not _is_late(scrapes[:count]):
            late_since = None
            continue
        late_since = scrape.time if late_since is None else late_since
        if scrape.time - late_since >= 120 / HURRY:
            firing["ConnectionPoolWait"].append(scrape.time)
    return {alert: (times[0], times[-1]) for alert, times in firing.items() if times}


def _is_late(scrapes: Sequence[Scrape]) -> bool:
    """Whether at the last of these the oldest wait, or the 95th percentile of a minute's waits, is above a second.

    It is where fewer than 95 of 100 waits that ended in this minute, hurried, lasted a second at most.
    """
    last = scrapes[-1]
    first = next(scrape for scrape in scrapes if scrape.time >= last.time - 60 / HURRY)
    ended, in_time = (
        last[name] - first[name] for name in ("wait_seconds_count", "waits_within_a_second")
    )
    return last["oldest_wait_seconds"] > 1 or in_time < 0.95 * ended


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
    for row, alert in enumerate(_ALERTS):
        if alert in firing:
            start = _since_first(run, firing[alert][0])
            end = _since_first(run, min(firing[alert][1], run[-1].time))
            bar = (start, max(end - start, _SCRAPE_SECONDS))
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
    axes.set_ylim(len(_ALERTS) - 0.4, -0.6)
    names = [alert.replace("Pool", "Pool\n") for alert in _ALERTS]
    axes.set_yticks(range(len(_ALERTS)), names, size=11)
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
