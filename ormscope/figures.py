"""The numbers of a pool at one moment, by their names: what PoolCollector and PoolInstruments publish."""

from __future__ import annotations

import time

from sqlalchemy.pool import QueuePool

from ormscope.pool import PoolScope


def figures_of(scope: PoolScope) -> dict[str, float]:
    """The gauges and counters of one pool, without those that it has not. Times are in seconds."""
    pool = scope.pool  # read anew each time: `dispose()` gives the engine another one
    now, holders, waiters = time.perf_counter(), scope.holders, scope.waiters
    figures: dict[str, float] = {
        "checked_out": scope.checked_out,
        "waiting": len(waiters),
        "oldest_hold_seconds": max(now - holders[0].since, 0) if holders else 0,
        "oldest_wait_seconds": max(now - waiters[0].since, 0) if waiters else 0,
        "timeouts": scope.timeouts,
        "checkouts": scope.checkouts,
        "deadlocks": scope.deadlock_count,
        "connections_opened": scope.opened,
        "connections_closed": scope.closed,
        "connects_failed": scope.connects_failed,
    }
    if isinstance(pool, QueuePool):
        figures["checked_in"] = pool.checkedin()
        if pool.size():  # 0 is SQLAlchemy's word for no limit
            figures["most_checked_in"] = pool.size()
    if scope.capacity is not None:
        figures["capacity"] = scope.capacity
    return figures


def check_names(*scopes: PoolScope) -> None:
    """A pool's name tells its figures from those of another. Raises ValueError where two have the same."""
    names = [scope.name for scope in scopes]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two pools have the same name in {names}; name them: PoolScope(engine, 'orders')"
        )
