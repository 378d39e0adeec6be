"""What a console is told: the pools at one moment, as a dictionary of bounded size for JSON."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from ormscope.ledger import Waiter
from ormscope.loop import LoopScope
from ormscope.owners import name_of
from ormscope.places import NOWHERE, Place, places
from ormscope.pool import PoolScope
from ormscope.verdict import Holding, Verdict

_MOST_POOLS = 50
_MOST_ROWS = 100
_MOST_GROUPS = 10
_LONGEST_TEXT = 240
_LONGEST_REPORT = 200_000
_WINDOW_SECONDS = 60.0


def key_of(scope: PoolScope) -> str:
    """What a console calls a pool: names need not differ."""
    return f"{id(scope):x}"


def state_of(
    scopes: Sequence[PoolScope], loops: Iterable[LoopScope], key: str | None
) -> dict[str, Any]:
    """All pools, and who holds and waits in one of them: that with this key, else the first that is in trouble.

    `age`, `lag` and `longest_lag` (of the last 60 s) are in seconds. Of holders and waiters the 100 oldest are there;
    the other waiters are grouped by line, and what has been left out is counted.
    """
    shown = scopes[:_MOST_POOLS]
    verdicts = {key_of(scope): scope.verdict_now() for scope in shown}
    if key not in verdicts:
        troubled = (name for name, verdict in verdicts.items() if verdict.cause != "healthy")
        key = next(troubled, next(iter(verdicts), None))
    chosen = next((scope for scope in shown if key_of(scope) == key), None)
    lags = [(loop.lag(), loop.longest_lag_within(_WINDOW_SECONDS)) for loop in set(loops)]
    return {
        "pid": os.getpid(),
        "program": _cut(_program()),
        "loop": {"lag": max(lags)[0], "longest_lag": max(longest for _, longest in lags)}
        if lags
        else None,
        "pools": [
            {
                "key": name,
                "name": _cut(verdict.pool),
                "capacity": verdict.capacity,
                "checked_out": verdict.checked_out,
                "waiting": len(verdict.waiting),
                "connecting": verdict.connecting,
                "cause": verdict.cause,
            }
            for name, verdict in verdicts.items()
        ],
        "more_pools": len(scopes) - len(shown),
        "detail": None if chosen is None else _detail(chosen, verdicts[key_of(chosen)]),
    }


def _program() -> str:
    """What the process runs, without its arguments: there may be a password in one."""
    path = os.path.abspath(sys.argv[0])
    name = os.path.basename(path)
    return os.path.basename(os.path.dirname(path)) if name == "__main__.py" else name


def report_of(scope: PoolScope) -> str:
    """The full report on a pool."""
    text = scope.report()
    return text if len(text) <= _LONGEST_REPORT else text[:_LONGEST_REPORT] + "\n… (cut here)"


def _detail(scope: PoolScope, verdict: Verdict) -> dict[str, Any]:
    now, waiters = time.perf_counter(), scope.waiters
    groups: dict[Place, list[Waiter]] = {}
    for waiter in waiters[_MOST_ROWS:]:  # the oldest of each group is its first
        groups.setdefault(_line(places(waiter.frames)), []).append(waiter)
    largest = sorted(groups.items(), key=lambda item: -len(item[1]))[:_MOST_GROUPS]
    return {
        "key": key_of(scope),
        "says": [
            _cut(line).replace("fix ", "Fix: ", 1) if line.startswith("  ") else _cut(line)
            for line in str(verdict).splitlines()[1:]
            if not line.startswith("  ") or line.startswith("  fix ")
        ],
        "holding": [
            {
                "owner": _cut(holder.owner),
                "age": holder.age,
                "line": _cut(_without_text(_line(holder.places))),
                "sql": None if holder.last_sql is None else _cut(holder.last_sql),
                "waits": _cut(_waits_for(holder)),
            }
            for holder in verdict.holding[:_MOST_ROWS]
        ],
        "more_holding": len(verdict.holding[_MOST_ROWS:]),
        "waiting": [
            {
                "owner": _cut(name_of(waiter.who)),
                "age": now - waiter.since,
                "line": _cut(str(_line(places(waiter.frames)))),
            }
            for waiter in waiters[:_MOST_ROWS]
        ],
        "grouped": [
            {"count": len(group), "age": now - group[0].since, "line": _cut(str(line))}
            for line, group in largest
        ],
        "more_waiting": sum(map(len, groups.values())) - sum(len(group) for _, group in largest),
    }


def _waits_for(holder: Holding) -> str:
    """What a holder waits for, in words."""
    activity = holder.activity
    if not holder.alive:
        return "nobody is left to give it back" + (
            f": {holder.kept_by} keeps it" if holder.kept_by else ""
        )
    if holder.waits is not None:
        by = ", by a task that it awaits" if holder.through_tasks else ""
        asks = _line(holder.waits.places).short
        return f"a connection of {holder.waits.pool}, in {asks}{by}"
    if holder.in_server is not None:
        return f"a lock in the server, in {holder.in_server.short}"
    if activity is None:
        return "not known"
    if activity.doing == "elsewhere":
        whose = f" that {activity.owner} has" if activity.owner else ""
        return f"{activity.what or 'something else'}{whose}, in {activity.place.short}"
    return {
        "running": "nothing: it runs",
        "database": "the database",
        "idle": "nothing: a thread without work",
    }[activity.doing]


def _without_text(line: Place) -> str:
    """Where a holder took its connection: beside it stand statement and what it waits for, so it has to be short."""
    return f"{line.file}:{line.line}, {line.function}" if line.file else line.short


def _line(frames: tuple[Place, ...]) -> Place:
    return frames[0] if frames else NOWHERE


def _cut(text: str, longest: int = _LONGEST_TEXT) -> str:
    """A text in one line of a bounded length."""
    line = " ".join(text[: 10 * longest].split())
    return line if len(line) <= longest else line[: longest - 1] + "…"
