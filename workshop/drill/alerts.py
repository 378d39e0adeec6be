"""The alerts of a load: judged by a Prometheus where there is one, else here by the same rules."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from ormscope.metrics import ALERTS
from workshop.drill.run import Look, Run
from workshop.drill.running import NAMES
from workshop.prometheus import HURRY, Prometheus, Scrape, firing_of, hurried


class Alerts:
    """The two alert rules of ormscope on the workers' metrics, a minute shortened to a second, until `close()`."""

    def __init__(self, ports: Sequence[int]) -> None:
        self._prometheus = None
        if shutil.which("prometheus") is not None:
            rules = hurried(ALERTS.read_text(encoding="utf-8"), HURRY)
            self._prometheus = Prometheus(ports, rules, scrape_seconds=0.5)

    @property
    def judge(self) -> str:
        """Who evaluates the rules."""
        return "Prometheus" if self._prometheus else "the drill itself, for want of Prometheus"

    def fired(self, run: Run, began: float, ended: float) -> list[str]:
        """The names of the alerts that fired for one of the workers, between two moments of `time.monotonic()`."""
        if self._prometheus is None:
            firings = [firing_of(_scrapes(run, name)) for name in NAMES]
            return sorted({alert for firing in firings for alert in firing})
        return sorted(
            {
                alert
                for alert, _, times in self._prometheus.firing()
                if any(began <= time <= ended for time in times)
            }
        )

    def close(self) -> None:
        """End the Prometheus, where there is one."""
        if self._prometheus is not None:
            self._prometheus.close()


def _scrapes(run: Run, name: str) -> list[Scrape]:
    return [
        Scrape(look.time, name, look.cause, _numbers(look))
        for look in run.looks
        if look.worker == name
    ]


def _numbers(look: Look) -> dict[str, float]:
    numbers = {
        "deadlocks_total": look.deadlocks,
        "oldest_wait_seconds": look.oldest_wait,
        "wait_seconds_count": look.waits_ended,
        "waits_within_a_second": look.waits_in_time,
    }
    return {f"sqlalchemy_pool_{name}": value for name, value in numbers.items()}
