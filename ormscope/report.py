"""What `PoolScope.report()` says: the verdict, and everything that is held and waited for at this moment."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from ormscope.hooks import logger
from ormscope.places import own_line
from ormscope.verdict import Holding, Verdict, Waiting

if TYPE_CHECKING:
    from ormscope.pool import PoolScope

_MOST_GROUPS = 12  # of those that hold, and of those that wait
_MOST_NAMES = 3
_MOST_CALLERS = 3
_MOST_CHARACTERS = 160  # of a statement, and of a line
_LAG_SECONDS = 60.0  # what LoopScope remembers

_Entry = TypeVar("_Entry", Holding, Waiting)


def report_of(scope: PoolScope) -> str:
    """The report of a scope. Raises nothing: an error is logged, and stands in the text."""
    try:
        return "\n".join(_lines(scope))
    except Exception as error:
        logger.exception("the report of PoolScope %r failed", scope.name)
        return (
            f"POOL {scope.name}: the report failed ({type(error).__qualname__}: {error});"
            " the log has its traceback."
        )


def _lines(scope: PoolScope) -> Iterator[str]:
    verdict = scope.verdict()
    limit = "no limit" if verdict.capacity is None else f"{verdict.capacity:,}"
    yield (
        f"POOL {scope.name}: {verdict.checked_out:,} of {limit} checked out,"
        f" {len(verdict.waiting):,} waiting"
    )
    if scope.is_closed:
        yield "  This PoolScope is closed and watches nothing any more."
    yield from (f"  {line}" for line in _figures(scope, verdict))
    yield str(verdict)
    yield from _section("HELD", verdict.holding, _alike, _does)
    yield from _section("WAITING", verdict.waiting, lambda waiting: waiting.places, lambda _: ())


def _figures(scope: PoolScope, verdict: Verdict) -> Iterator[str]:
    hold = max((holding.age for holding in verdict.holding), default=None)
    wait = max((waiting.age for waiting in verdict.waiting), default=None)
    yield f"now     longest hold {_seconds(hold)}, longest wait {_seconds(wait)}"
    yield (
        f"so far  {scope.checkouts:,} checkouts, {scope.timeouts:,} timeouts,"
        f" {scope.deadlock_count:,} deadlocks, {scope.connects_failed:,} failed connects,"
        f" longest wait that ended {_seconds(scope.longest_wait)}"
    )
    if scope.loop is not None:
        longest = scope.loop.longest_lag_within(_LAG_SECONDS)
        yield (
            f"loop    {_seconds(scope.loop.lag())} late,"
            f" {_seconds(longest)} at most in the last minute"
        )


def _alike(holding: Holding) -> Hashable:
    """What those share that are told of in one entry."""
    return holding.places, holding.last_sql, tuple(_does(holding))


def _section(
    title: str,
    entries: Sequence[_Entry],
    key: Callable[[_Entry], Hashable],
    details: Callable[[_Entry], Iterable[str]],
) -> Iterator[str]:
    """What is alike together, the largest group first, and the oldest first within it and among equals."""
    if not entries:
        return
    groups: dict[Hashable, list[_Entry]] = {}
    for entry in sorted(entries, key=lambda entry: -entry.age):
        groups.setdefault(key(entry), []).append(entry)
    largest = sorted(groups.values(), key=lambda group: -len(group))
    yield f"{title} by"
    for group in largest[:_MOST_GROUPS]:
        first = group[0]
        yield f"  {_names(group)} at {_shortened(str(own_line(first.places)))}"
        # A framework's lines between two of the program's say nothing to who reads them.
        own = [place.short for place in first.places if not place.in_library]
        if callers := own[1 : 1 + _MOST_CALLERS]:
            yield f"      called by {', by '.join(callers)}"
        yield from (f"      {detail}" for detail in details(first))
    rest = largest[_MOST_GROUPS:]
    if rest:
        yield f"  and {sum(map(len, rest)):,} more, at {len(rest):,} other places"


def _names(group: Sequence[Holding | Waiting]) -> str:
    """Who they are and for how long, the oldest first. All waiters at the same lines have the name of the first."""
    names = list(dict.fromkeys(entry.owner for entry in group))
    if len(group) == 1:
        return f"{names[0]} for {_seconds(group[0].age)}"
    known = ", ".join(names[:_MOST_NAMES])
    others = len(group) - len(names[:_MOST_NAMES])
    more = f" and {others:,} more" if others else ""
    return f"{len(group):,} ({known}{more}) for {_seconds(group[0].age)} at most"


def _does(holding: Holding) -> Iterator[str]:
    """The last statement of a holder, and what it does or waits for."""
    if holding.last_sql is not None:
        yield f"last SQL: {_shortened(' '.join(holding.last_sql.split()))}"
    activity, waits = holding.activity, holding.waits
    if not holding.alive:
        yield "its task or thread has ended: nobody is left to give it back"
    if holding.kept_by:
        yield f"kept by {holding.kept_by}"
    if holding.in_server is not None:
        yield f"waits for a lock in the server, at {holding.in_server.short}"
    if waits is not None:
        how = "waits for a task that waits" if holding.through_tasks else "waits"
        yield f"{how} for a connection of {waits.pool}, at {own_line(waits.places).short}"
    elif activity is None:
        if holding.alive and holding.in_server is None:
            yield "what it does cannot be seen"
    elif activity.doing == "elsewhere":
        whom = f" that {activity.owner} has" if activity.owner else ""
        what = f" for {activity.what}{whom}" if activity.what else ""
        yield f"waits{what}, not for the database, at {activity.place.short}"
    else:
        yield _DOING[activity.doing]


_DOING = {
    "running": "runs, or used the connection a moment ago",
    "database": "waits for the database",
    "idle": "its thread has nothing to do",
}


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "none"
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 60 else f"{hours:.1f} h"
