"""What a pool suffers from, in words: the cause, the tasks and source lines, the formula, the smallest fix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ormscope.places import NOWHERE, Place

Cause = Literal[
    "healthy", "saturated", "deadlock", "leaked", "loop blocked", "unfair",
    "held across a foreign await", "connects failing", "unknown",
]  # fmt: skip

# What can pass before the run ends, so that the last verdict would not tell.
TROUBLES: tuple[Cause, ...] = (
    "loop blocked",
    "unfair",
    "held across a foreign await",
    "connects failing",
)


@dataclass(frozen=True)
class Waiting:
    """Somebody in the queue for a connection: `age` seconds so far, user frames innermost first."""

    owner: str
    age: float
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Holding:
    """Somebody who holds a connection: `age` seconds so far, user frames innermost first.

    `waits` is the queue entry that the holder sits behind, by itself or through tasks that it awaits;
    `elsewhere` the line where it waits for something that is not the database.
    """

    owner: str
    age: float
    places: tuple[Place, ...]
    alive: bool
    waits: Waiting | None
    elsewhere: Place | None
    last_sql: str | None


@dataclass(frozen=True)
class Verdict:
    """What a pool suffers from. `at` is in seconds on the clock of whoever asked; `str()` is the report.

    The report names counts, places and formula, no times, so that it reads the same in every run.
    """

    cause: Cause
    pool: str
    at: float
    capacity: int | None
    checked_out: int
    timeout: float | None
    holding: tuple[Holding, ...]
    waiting: tuple[Waiting, ...]
    blocked: Place | None
    connect_error: str | None
    unseen: int
    tasks: int
    depth: int

    @property
    def needed(self) -> int:
        """Connections that make hold-and-wait harmless: tasks × (depth - 1) + 1 (HikariCP, "About Pool Sizing")."""
        return self.tasks * (self.depth - 1) + 1

    def __str__(self) -> str:
        return "\n".join(_REPORTS[self.cause](self))


def judge(
    *,
    pool: str,
    at: float,
    capacity: int | None,
    checked_out: int,
    timeout: float | None,
    holding: tuple[Holding, ...],
    waiting: tuple[Waiting, ...],
    deadlock: bool,
    blocked: Place | None,
    overtaken: bool,
    connect_error: str | None,
    unseen: int,
    still: bool,
    contenders: int,
) -> Verdict:
    """The verdict on a pool at one moment.

    `blocked` is where the event loop is blocked, `overtaken` whether those in the queue are passed again and
    again, `connect_error` how the last attempt to connect failed, `unseen` how many connections were out before
    anybody looked, `still` whether none has come back for long, and `contenders` are the tasks that compete for
    the pool.
    """
    cause: Cause
    if deadlock:
        cause = "deadlock"
    elif any(not one.alive for one in holding):
        cause = "leaked"
    elif waiting and blocked is not None:
        cause = "loop blocked"
    elif waiting and overtaken:
        cause = "unfair"
    elif waiting and 2 * sum(one.elsewhere is not None for one in holding) > len(holding):
        cause = "held across a foreign await"
    elif connect_error is not None:
        cause = "connects failing"
    elif waiting and (unseen or still):
        cause = "unknown"
    elif waiting:
        cause = "saturated"
    else:
        cause = "healthy"
    held = Counter(one.owner for one in holding if one.waits is not None)
    return Verdict(
        cause=cause,
        pool=pool,
        at=at,
        capacity=capacity,
        checked_out=checked_out,
        timeout=timeout,
        holding=holding,
        waiting=waiting,
        blocked=blocked,
        connect_error=connect_error,
        unseen=unseen,
        tasks=contenders,
        depth=max(held.values(), default=0) + 1,
    )


def _out_of(verdict: Verdict) -> str:
    limit = "no limit" if verdict.capacity is None else str(verdict.capacity)
    return f"{verdict.checked_out} of {limit} checked out, {len(verdict.waiting)} waiting"


def _grouped(places: Iterable[Place]) -> list[str]:
    """One line for each place, the most frequent first, with how many stand there."""
    counts = Counter(places)
    width = len(str(max(counts.values(), default=0)))
    return [
        f"{count:>{width}} at {one}"
        for one, count in sorted(counts.items(), key=lambda x: (-x[1], x[0]))
    ]


def _block(title: str, places: Iterable[Place]) -> list[str]:
    lines = _grouped(places)
    return [f"  {title if number == 0 else '':<9} {line}" for number, line in enumerate(lines)]


def _innermost(places: tuple[Place, ...]) -> Place:
    return places[0] if places else NOWHERE


def _deadlock_report(verdict: Verdict) -> list[str]:
    stuck = [one for one in verdict.holding if one.waits is not None]
    behind = [one.waits for one in stuck if one.waits is not None]
    queue = [one for one in verdict.waiting if one not in behind]
    holds, asks = _innermost(stuck[0].places), _innermost(behind[0].places)
    ends = (
        "never: pool_timeout is None"
        if verdict.timeout is None
        else f"when pool_timeout ({verdict.timeout:g} s) makes a waiter give up, and not before"
    )
    return [
        f"DEADLOCK in {verdict.pool} (hold-and-wait): {_out_of(verdict)}",
        "Every connection is held by a task that waits for another connection of the same pool.",
        *_block("held", (_innermost(one.places) for one in stuck)),
        *_block("they ask", (_innermost(one.places) for one in behind)),
        *_block("in line", (_innermost(one.places) for one in queue)),
        f"  {'ends':<9} {ends}",
        f"  {'formula':<9} {verdict.tasks} tasks × ({verdict.depth} - 1) + 1 = {verdict.needed} connections"
        f" would be enough; there are {verdict.capacity}",
        f"  {'fix':<9} {_smallest_fix(holds, asks)}",
    ]


def _smallest_fix(holds: Place, asks: Place) -> str:
    if holds.function == asks.function:
        return f"{holds.function}: use the connection it holds (line {holds.line}) also at line {asks.line}"
    return f"hand the session that {holds.function} holds on to {asks.function}, or finish with it first"


def _leaked_report(verdict: Verdict) -> list[str]:
    lost = [one for one in verdict.holding if not one.alive]
    return [
        f"LEAKED in {verdict.pool}: {_out_of(verdict)}",
        f"{len(lost)} checked out by tasks that have ended; nobody is left to give them back.",
        *_block("taken", (_innermost(one.places) for one in lost)),
        f"  {'fix':<9} close the session in the task that opened it (async with, or remove() for a scoped session)",
    ]


def _saturated_report(verdict: Verdict) -> list[str]:
    return [
        f"SATURATED {verdict.pool} (busy, but moving): {_out_of(verdict)}",
        *_block("held", (_innermost(one.places) for one in verdict.holding)),
        *_block("in line", (_innermost(one.places) for one in verdict.waiting)),
    ]


def _held_report(verdict: Verdict) -> list[str]:
    foreign = [one for one in verdict.holding if one.elsewhere is not None]
    lines = [one.elsewhere for one in foreign if one.elsewhere is not None]
    (often, _), *_ = Counter(lines).most_common(1)
    return [
        f"HELD ACROSS A FOREIGN AWAIT in {verdict.pool}: {_out_of(verdict)}",
        f"{len(foreign)} of them are held by tasks that wait for something else than the database.",
        *_block("held", (_innermost(one.places) for one in foreign)),
        *_block("they wait", lines),
        *_block("in line", (_innermost(one.places) for one in verdict.waiting)),
        f"  {'fix':<9} end the transaction before {often.short}: commit, or leave the session's block",
    ]


def _unfair_report(verdict: Verdict) -> list[str]:
    return [
        f"UNFAIR {verdict.pool} (barging): {_out_of(verdict)}",
        "Connections that come back are taken by tasks that never stood in the queue, again and again.",
        *_block("held", (_innermost(one.places) for one in verdict.holding)),
        *_block("in line", (_innermost(one.places) for one in verdict.waiting)),
        f"  {'fix':<9} let the others in after each commit: await asyncio.sleep(0), or a new session for each batch",
    ]


def _blocked_report(verdict: Verdict) -> list[str]:
    where = verdict.blocked or NOWHERE
    return [
        f"LOOP BLOCKED, and {verdict.pool} with it: {_out_of(verdict)}",
        "No task can run, so none can give its connection back.",
        *_block("blocked", [where]),
        *_block("in line", (_innermost(one.places) for one in verdict.waiting)),
        f"  {'fix':<9} await an asynchronous driver in {where.short}, or send the call to a thread (asyncio.to_thread)",
    ]


def _connects_report(verdict: Verdict) -> list[str]:
    return [
        f"CONNECTS FAILING in {verdict.pool}: {_out_of(verdict)}",
        f"The last attempt to connect failed: {verdict.connect_error}",
        # SQLAlchemy's pool wakes a waiter when a connection comes back, not when an attempt has failed.
        *_block("in line", (_innermost(one.places) for one in verdict.waiting)),
        f"  {'fix':<9} look at the server: its address, whether it runs, whether max_connections is reached",
    ]


def _unknown_report(verdict: Verdict) -> list[str]:
    if verdict.unseen:
        why = (
            f"{verdict.unseen} were checked out before this PoolScope was made; nobody saw by whom."
        )
        fix = "create the PoolScope where the engine is created"
    else:
        why = "Nothing has come back for seconds. A slow statement, or a lock? Only the server can tell."
        fix = "ask it: SELECT state, wait_event_type, query FROM pg_stat_activity"
    return [
        f"UNKNOWN in {verdict.pool}: {_out_of(verdict)}",
        why,
        *_block("held", (_innermost(one.places) for one in verdict.holding)),
        *_block("in line", (_innermost(one.places) for one in verdict.waiting)),
        f"  {'fix':<9} {fix}",
    ]


def _healthy_report(verdict: Verdict) -> list[str]:
    return [f"HEALTHY {verdict.pool}: {_out_of(verdict)}"]


_REPORTS = {
    "deadlock": _deadlock_report,
    "leaked": _leaked_report,
    "loop blocked": _blocked_report,
    "unfair": _unfair_report,
    "held across a foreign await": _held_report,
    "connects failing": _connects_report,
    "unknown": _unknown_report,
    "saturated": _saturated_report,
    "healthy": _healthy_report,
}
