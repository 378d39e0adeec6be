"""PoolInstruments: what PoolScope and LoopScope see, for OpenTelemetry.

    set_meter_provider(MeterProvider([reader]))
    PoolInstruments(PoolScope(engine, "orders"), loop=LoopScope())

Under the names of the semantic conventions for pools (`db.client.connection.*`, of which all are "in development"):

    count               connections, by `db.client.connection.state`: used, those being opened included, or idle
    max, idle.max       the most that may be used at once, and the most that are kept idle; absent without a limit
    pending_requests    who waits for a connection
    timeouts            waits that ended in sqlalchemy.exc.TimeoutError

each with the attribute `db.client.connection.pool.name`. Of the conventions are not given: `idle.min`, for
SQLAlchemy has no such setting, and the histograms `create_time`, `wait_time` and `use_time`. OpenTelemetry has no
histogram that is read when somebody asks: each value would have to be handed over within the request that it
belongs to, and the SDK takes some ten microseconds for one. Their sums and numbers are there instead, with what has no
name in the conventions, as `ormscope.pool.*` and `ormscope.loop.lag`: see INSTRUMENTS. Who wants quantiles lets the
OpenTelemetry Collector scrape `ormscope.metrics.PoolCollector` (its receiver `prometheus`): that has histograms of
waits and uses.

This module is the only one that needs opentelemetry (its API, not the SDK), so `import ormscope` does not import it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, get_args

from opentelemetry.metrics import (
    CallbackOptions,
    Meter,
    MeterProvider,
    Observation,
    get_meter_provider,
)

from ormscope.figures import check_names, figures_of
from ormscope.loop import LoopScope
from ormscope.pool import PoolScope
from ormscope.verdict import Cause

POOL = "db.client.connection.pool.name"
STATE = "db.client.connection.state"
CAUSE = "ormscope.cause"

_Values = Iterable[tuple[float, dict[str, str]]]


class Instrument(NamedTuple):
    """What is asked of each pool. `kind` is "counter" (only grows), "up-down counter" (adds up) or "gauge"."""

    kind: str
    unit: str
    about: str
    values: Callable[[PoolScope], _Values]


def _figure(name: str) -> Callable[[PoolScope], _Values]:
    def values(scope: PoolScope) -> _Values:
        figures = figures_of(scope)
        return [(figures[name], {})] if name in figures else []

    return values


def _connections(scope: PoolScope) -> _Values:
    figures = figures_of(scope)
    yield figures["checked_out"], {STATE: "used"}
    if "checked_in" in figures:
        yield figures["checked_in"], {STATE: "idle"}


def _causes(scope: PoolScope) -> _Values:
    found = scope.cause()
    return [(int(cause == found), {CAUSE: cause}) for cause in get_args(Cause)]


INSTRUMENTS: dict[str, Instrument] = {
    "db.client.connection.count": Instrument(
        "up-down counter",
        "{connection}",
        "Connections that are in the state of the attribute.",
        _connections,
    ),
    "db.client.connection.max": Instrument(
        "up-down counter",
        "{connection}",
        "The most connections that may be open at once.",
        _figure("capacity"),
    ),
    "db.client.connection.idle.max": Instrument(
        "up-down counter",
        "{connection}",
        "The most connections that are kept idle.",
        _figure("most_checked_in"),
    ),
    "db.client.connection.pending_requests": Instrument(
        "up-down counter",
        "{request}",
        "Tasks or threads that wait for a connection.",
        _figure("waiting"),
    ),
    "db.client.connection.timeouts": Instrument(
        "counter",
        "{timeout}",
        "Waits that ended in sqlalchemy.exc.TimeoutError.",
        _figure("timeouts"),
    ),
    "ormscope.pool.requests": Instrument(
        "counter",
        "{request}",
        "Requests for a connection that have ended, in vain or not.",
        lambda scope: [(scope.waits.count, {})],
    ),
    "ormscope.pool.waited": Instrument(
        "counter",
        "s",
        "How long these requests waited, together; by their number it is the average wait.",
        lambda scope: [(scope.waits.total, {})],
    ),
    "ormscope.pool.returned": Instrument(
        "counter",
        "{connection}",
        "Connections that came back.",
        lambda scope: [(scope.holds.count, {})],
    ),
    "ormscope.pool.used": Instrument(
        "counter",
        "s",
        "How long these were checked out, together; by their number it is the average use.",
        lambda scope: [(scope.holds.total, {})],
    ),
    "ormscope.pool.oldest_wait": Instrument(
        "gauge",
        "s",
        "How long who has been waiting longest has been waiting; 0 if nobody is.",
        _figure("oldest_wait_seconds"),
    ),
    "ormscope.pool.oldest_use": Instrument(
        "gauge",
        "s",
        "How long the connection that is out longest has been checked out; 0 if none is.",
        _figure("oldest_hold_seconds"),
    ),
    "ormscope.pool.deadlocks": Instrument(
        "counter", "{deadlock}", "Deadlocks proved.", _figure("deadlocks")
    ),
    "ormscope.pool.opened": Instrument(
        "counter",
        "{connection}",
        "Connections to the server that were opened.",
        _figure("connections_opened"),
    ),
    "ormscope.pool.closed": Instrument(
        "counter",
        "{connection}",
        "Connections to the server that were closed.",
        _figure("connections_closed"),
    ),
    "ormscope.pool.connects_failed": Instrument(
        "counter",
        "{attempt}",
        "Connections to the server that could not be opened.",
        _figure("connects_failed"),
    ),
    "ormscope.pool.verdict": Instrument(
        "gauge",
        "1",
        "What the pool suffers from: 1 for its cause, 0 for all others.",
        _causes,
    ),
}
"""The instruments that each pool has; with a LoopScope there is the gauge `ormscope.loop.lag` as well."""


class PoolInstruments:
    """The state of pools, and of the event loop that uses them, read whenever a metric reader collects.

    Each pool's name is an attribute, so the names must differ: `PoolScope(engine, "orders")`. `lag_window` is
    how many seconds a stall of the loop stays visible, 60 at most: no less than the interval of the reader.
    `meter_provider` is the global one where none is given: set it before. Readers collect in threads of their own, so
    also while the event loop is blocked.

    Raises ValueError where two pools of one provider have the same name.
    """

    def __init__(
        self,
        *pools: PoolScope,
        loop: LoopScope | None = None,
        lag_window: float = 60.0,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        self._pools, self._loop, self._lag_window = pools, loop, lag_window
        provider = get_meter_provider() if meter_provider is None else meter_provider
        with _lock:
            published = _published.get(provider)
            if published is None:
                published = _Published()
            check_names(*published.pools(), *pools)
            published.by.append(self)
            if provider not in _published:
                _published[provider] = published
                published.create(provider.get_meter("ormscope"))
        self._published = published

    def close(self) -> None:
        """Publish these pools no more. The instruments themselves stay: OpenTelemetry has no way to take one back."""
        with _lock:
            if self in self._published.by:
                self._published.by.remove(self)

    def _lag(self) -> Iterator[float]:
        if self._loop is not None:
            yield self._loop.longest_lag_within(self._lag_window)


class _Published:
    """The instruments of one provider. A second one of the same name would be left out there, so all share these."""

    def __init__(self) -> None:
        self.by: list[PoolInstruments] = []

    def pools(self) -> list[PoolScope]:
        return [scope for instruments in list(self.by) for scope in instruments._pools]

    def create(self, meter: Meter) -> None:
        creators = {
            "counter": meter.create_observable_counter,
            "up-down counter": meter.create_observable_up_down_counter,
            "gauge": meter.create_observable_gauge,
        }
        for name, (kind, unit, about, values) in INSTRUMENTS.items():
            creators[kind](name, [self._observe(values)], unit, about)
        about = "The longest lag of the event loop lately, the present one included."
        meter.create_observable_gauge("ormscope.loop.lag", [self._lags], "s", about)

    def _observe(
        self, values: Callable[[PoolScope], _Values]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return [
                Observation(value, {POOL: scope.name, **attributes})
                for scope in self.pools()
                for value, attributes in values(scope)
            ]

        return observe

    def _lags(self, _: CallbackOptions) -> Iterable[Observation]:
        lags = [lag for instruments in list(self.by) for lag in instruments._lag()]
        return [Observation(max(lags))] if lags else []


_lock = threading.Lock()
_published: weakref.WeakKeyDictionary[MeterProvider, _Published] = weakref.WeakKeyDictionary()
