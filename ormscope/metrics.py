"""PoolCollector: what PoolScope and LoopScope see, for Prometheus.

    REGISTRY.register(PoolCollector(PoolScope(engine), loop=LoopScope()))
    start_http_server(9100)

`start_http_server` answers in a thread of its own, so also while the event loop is blocked. This module
is the only one that needs prometheus_client, so `import ormscope` does not import it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ormscope.durations import BOUNDS, Durations
from ormscope.figures import check_names, figures_of
from ormscope.loop import LoopScope
from ormscope.pool import PoolScope
from ormscope.verdict import Cause

ALERTS = Path(__file__).with_name("alerts.yml")
"""Two alert rules for these metrics: a file for Prometheus's `rule_files`."""
DASHBOARD = Path(__file__).with_name("dashboard.json")
"""A dashboard of these metrics: a file for Grafana to import, or to be provisioned with."""

_GAUGES = {
    "checked_out": "Connections checked out.",
    "checked_in": "Connections that are open and idle in the pool.",
    "capacity": "The most connections that can be checked out at once; absent where there is no limit.",
    "waiting": "Tasks or threads that wait for a connection.",
    "oldest_hold_seconds": "How long the connection that is out longest has been checked out; 0 if none is.",
    "oldest_wait_seconds": "How long who has been waiting longest has been waiting; 0 if nobody is.",
}
_COUNTERS = {
    "timeouts": "Waits that ended in sqlalchemy.exc.TimeoutError.",
    "checkouts": "Connections handed out.",
    "deadlocks": "Deadlocks proved.",
    # Not "created": OpenMetrics keeps that ending of a name for itself.
    "connections_opened": "Connections to the server that were opened.",
    "connections_closed": "Connections to the server that were closed.",
    "connects_failed": "Connections to the server that could not be opened.",
}


class PoolCollector(Collector):
    """The state of pools, and of the event loop that uses them, read whenever Prometheus asks.

    Each pool's name is its label, so the names must differ: `PoolScope(engine, "orders")`. `lag_window` is
    how many seconds a stall of the loop stays visible, 60 at most: no less than the scrape interval, so that
    each of several scrapers sees it.

    Raises ValueError where two pools have the same name.
    """

    def __init__(
        self, *pools: PoolScope, loop: LoopScope | None = None, lag_window: float = 60.0
    ) -> None:
        check_names(*pools)
        self._pools, self._loop, self._lag_window = pools, loop, lag_window

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment; may be called from any thread, also while the event loop is blocked."""
        numbers = {scope.name: figures_of(scope) for scope in self._pools}
        for kind, metrics in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for metric, about in metrics.items():
                family = kind(f"sqlalchemy_pool_{metric}", about, labels=["pool"])
                for pool, values in numbers.items():
                    if metric in values:
                        family.add_metric([pool], values[metric])
                if family.samples:
                    yield family
        waits = HistogramMetricFamily(
            "sqlalchemy_pool_wait_seconds",
            "How long requests waited for a connection, in vain or not; 0 where one was free.",
            labels=["pool"],
        )
        holds = HistogramMetricFamily(
            "sqlalchemy_pool_hold_seconds",
            "How long connections were checked out, once they came back.",
            labels=["pool"],
        )
        verdicts = GaugeMetricFamily(
            "sqlalchemy_pool_verdict",
            "What the pool suffers from: 1 for its cause, 0 for all others.",
            labels=["pool", "cause"],
        )
        for scope in self._pools:
            waits.add_metric([scope.name], _buckets(scope.waits), scope.waits.total)
            holds.add_metric([scope.name], _buckets(scope.holds), scope.holds.total)
            found = scope.cause()
            for cause in get_args(Cause):
                verdicts.add_metric([scope.name, cause], cause == found)
        yield from (waits, holds, verdicts)
        if self._loop is not None:
            yield GaugeMetricFamily(
                "event_loop_lag_seconds",
                f"The longest lag of the event loop in the last {self._lag_window:g} s, the present one included.",
                self._loop.longest_lag_within(self._lag_window),
            )


def _buckets(durations: Durations) -> list[tuple[str, float]]:
    """The buckets of a histogram: upper bound, and how many lasted no longer."""
    return list(zip([*map(str, BOUNDS), "+Inf"], durations.cumulative(), strict=True))
