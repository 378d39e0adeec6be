"""Watching a service from outside: its metrics over HTTP, and a Prometheus that judges them.

Prometheus is a program of its own and need not be there; where it is, it is started on a free port of
127.0.0.1, in a temporary folder, and goes with whoever asked for it, however that one ends.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import IncompleteRead
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

from prometheus_client.parser import text_string_to_metric_families

from workshop.keeper import Keeper, free_port
from workshop.mistake import Mistake

HURRY = 60
"""In the lesson, a minute of the alert rules lasts a second."""

Firing = dict[str, tuple[float, float]]
"""For each alert that has fired, by its name, the first and the last moment at which it did."""
ALERT_NAMES = ("ConnectionPoolDeadlock", "ConnectionPoolWait")

# Straight to this machine, also where HTTP_PROXY is set.
_open = build_opener(ProxyHandler({})).open
# How it looks when a service is not there yet, or any more.
ABSENT = (URLError, TimeoutError, ConnectionError, IncompleteRead)
SCRAPE_SECONDS = 0.25
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


def firing_of(scrapes: Sequence[Scrape]) -> Firing:
    """When the alerts of ormscope/alerts.yml would have fired, in a hurry, for one pool with these metrics.

    What Prometheus does from the same rules, for a process that is not started anew meanwhile.
    """
    firing: dict[str, list[float]] = {alert: [] for alert in ALERT_NAMES}
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


class Prometheus:
    """A Prometheus that scrapes some ports of 127.0.0.1 and evaluates alert rules, until `close()`.

    Raises Mistake where the program is missing, or does not start.
    """

    def __init__(
        self, ports: Sequence[int], rules: str, scrape_seconds: float = SCRAPE_SECONDS
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
            with contextlib.suppress(*ABSENT):
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
