"""What a pool suffers from, in words: the cause, the tasks and source lines, the formula, the smallest fix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from ormscope.activity import Activity
from ormscope.ledger import BEYOND
from ormscope.places import NOWHERE, Place, own_line
from ormscope.server_limits import NEVER

Cause = Literal[
    "healthy", "saturated", "deadlock", "deadlock until a timer", "leaked", "loop blocked", "unfair",
    "held across a foreign await", "connects failing", "unknown",
]  # fmt: skip

# What can pass before the run ends, so that the last verdict would not tell.
TROUBLES: tuple[Cause, ...] = (
    "deadlock until a timer",
    "loop blocked",
    "unfair",
    "held across a foreign await",
    "connects failing",
)


@dataclass(frozen=True)
class Waiting:
    """Somebody in the queue of `pool`, user frames innermost first.

    All that stand at the same lines share one entry; `owner` and `age` are those of the first: its name, and how long
    it has been waiting, in seconds.
    """

    owner: str
    age: float
    places: tuple[Place, ...]
    pool: str


@dataclass(frozen=True)
class Holding:
    """Somebody who holds a connection: `age` seconds so far, user frames innermost first.

    `alive` is false where nobody is left who could give it back. `waits` is the queue entry that it sits behind, by
    itself or, if `through_tasks`, through tasks that it awaits, in this pool or another; `in_server` the line whose
    statement waits for a lock in the server, where a deadlock is proved through that; `activity` what else its
    user does, None where that is not known. `kept_by` tells what keeps the connection, where no running function does.
    """

    owner: str
    age: float
    places: tuple[Place, ...]
    alive: bool
    waits: Waiting | None
    activity: Activity | None
    last_sql: str | None
    kept_by: str = ""
    through_tasks: bool = False
    in_server: Place | None = None

    @property
    def elsewhere(self) -> Place | None:
        """The line where it waits for something that is not the database, long since; None where it does not."""
        activity = self.activity
        return activity.place if activity is not None and activity.doing == "elsewhere" else None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A pool at one moment, as far as a PoolScope knows it. `at` is in seconds on the clock of whoever asked.

    `waiting` are those in line, those that hold a connection included. `proved` is whether
    a deadlock is, `timers` are the lines of the time limits that end it before `timeout` does, `limits_above` those
    of tasks that await a member without ending it, and may then do so; `behind` are the pools that are stuck without
    this one, which only waits for them. `through_server` is whether it goes through a lock in the server,
    `server_limits` the server's own limits that may end it. `blocked` is where the event
    loop is blocked. `overtaken`: whether those in line are passed again and again; `threads`: whether
    they are threads. `moved` is whether a connection came back or was handed out a moment ago, `still` whether none
    has for long. `connect_error` is how the last attempts to connect failed, of which `attempts` were made in the last
    seconds and `failed` failed; `cancelled` whether that was by a cancellation. `connecting` are attempts in progress,
    `unseen` the connections that were out before anybody looked, `replaced` those who hold or wait in pools that
    `dispose()` has replaced. `tasks` compete for the pool, of which one holds up to `depth` - 1 connections and asks
    for another. `failure` is why the instrument has stepped aside, `lacking` what it cannot see here.
    `below` is a pool of psycopg_pool from which the connections come, and `below_waiting` how many wait there;
    `database` is SQLAlchemy's name for its kind.
    """

    pool: str
    at: float
    capacity: int | None
    checked_out: int
    timeout: float | None
    holding: tuple[Holding, ...]
    waiting: tuple[Waiting, ...]
    proved: bool = False
    timers: tuple[Place, ...] = ()
    limits_above: tuple[Place, ...] = ()
    behind: tuple[str, ...] = ()
    through_server: bool = False
    server_limits: tuple[str, ...] = ()
    blocked: Place | None = None
    overtaken: bool = False
    threads: bool = False
    moved: bool = False
    still: bool = False
    connect_error: str | None = None
    attempts: int = 0
    failed: int = 0
    cancelled: bool = False
    connecting: int = 0
    unseen: int = 0
    replaced: int = 0
    tasks: int = 0
    depth: int = 1
    failure: str = ""
    lacking: str = ""
    below: str = ""
    below_waiting: int = 0
    database: str = "postgresql"

    @property
    def needed(self) -> int:
        """Connections that make hold-and-wait harmless at the `depth` that was seen: tasks × (depth - 1) + 1.

        HikariCP, "About Pool Sizing". Whoever goes deeper later needs more.
        """
        return self.tasks * (self.depth - 1) + 1


@dataclass(frozen=True, kw_only=True)
class Verdict(Snapshot):
    """What a pool suffers from; `str()` is the report.

    The report names counts, places and formula, no times, so that it reads the same in every run.
    """

    cause: Cause

    def __str__(self) -> str:
        return "\n".join(_REPORTS[self.cause](self))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What a notebook shows for it where it is not printed."""
        printer.text(str(self))


def judge(snapshot: Snapshot) -> Verdict:
    """The verdict on a pool at one moment."""
    known = {field.name: getattr(snapshot, field.name) for field in fields(Snapshot)}
    return Verdict(cause=_cause(snapshot), **known)


def _cause(pool: Snapshot) -> Cause:
    waiting = bool(pool.waiting)
    elsewhere = sum(holding.elsewhere is not None for holding in pool.holding)
    if pool.failure:
        return "unknown"
    if pool.proved:
        return "deadlock until a timer" if pool.timers or pool.server_limits else "deadlock"
    if any(not holding.alive for holding in pool.holding):
        return "leaked"
    if pool.blocked is not None:
        return "loop blocked"
    if waiting and pool.overtaken:
        return "unfair"
    if waiting and 2 * elsewhere > len(pool.holding):
        return "held across a foreign await"
    if pool.connect_error is not None:
        return "connects failing"
    if waiting and (pool.unseen or pool.still or 2 * _idle(pool) > len(pool.holding)):
        return "unknown"
    if pool.below_waiting or (waiting and _all_ask(pool)):
        return "unknown"
    return "saturated" if waiting else "healthy"


def _idle(pool: Snapshot) -> int:
    """How many are held by threads of an executor that have nothing to do, and may go on with them, or not."""
    return sum(
        holder.activity is not None and holder.activity.doing == "idle" for holder in pool.holding
    )


def _all_ask(pool: Snapshot) -> bool:
    """Whether all who hold a connection wait for another one, and something keeps some that others might reach, too."""
    all_ask = all(holder.waits is not None for holder in pool.holding)
    return all_ask and any(holder.kept_by for holder in pool.holding)


def _out_of(verdict: Verdict) -> str:
    limit = "no limit" if verdict.capacity is None else str(verdict.capacity)
    return f"{verdict.checked_out} of {limit} checked out, {len(verdict.waiting)} waiting"


def _block(title: str, places: Iterable[Place] | Counter[Place]) -> list[str]:
    """One line for each place, the most frequent first, with how many stand there."""
    counts = Counter(places)
    width = len(str(max(counts.values(), default=0)))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [
        f"  {title if number == 0 else '':<9} {count:>{width}} at {place}"
        for number, (place, count) in enumerate(ordered)
    ]


def _held(holding: Iterable[Holding]) -> list[str]:
    return _block("held", (own_line(holder.places) for holder in holding))


def _in_line(waiting: Iterable[Waiting]) -> list[str]:
    return _block("in line", (own_line(waiter.places) for waiter in waiting))


def _deadlock_report(verdict: Verdict) -> list[str]:
    stuck = [holder for holder in verdict.holding if holder.waits is not None]
    asked = [holder.waits for holder in stuck if holder.waits is not None]
    blocked = [holder for holder in verdict.holding if holder.in_server is not None]
    others = sorted({waits.pool for waits in asked} - {verdict.pool})
    behind = Counter(own_line(waits.places) for waits in asked if waits.pool == verdict.pool)
    queue = Counter(own_line(waiter.places) for waiter in verdict.waiting) - behind
    if verdict.through_server:
        why = (
            "Every connection is held by a task that waits for another one, or in the server for a lock that such a "
            "task has."
        )
    elif not stuck:
        why = "Whoever could give a connection back waits for another one."
    elif others:
        names = " and ".join(others)
        why = f"Every connection is held by a task that waits for a connection of {names}, where it is the same."
    else:
        why = (
            "Every connection is held by a task that waits for another connection of the same pool."
        )
    name = "DEADLOCK" if verdict.cause == "deadlock" else "DEADLOCK UNTIL A TIMER"
    return [
        f"{name} in {verdict.pool} (hold-and-wait): {_out_of(verdict)}",
        why,
        *_held(holder for holder in verdict.holding if holder in stuck or holder in blocked),
        *_asked(asked, verdict.pool),
        *_block("in server", (holder.in_server or NOWHERE for holder in blocked)),
        *_block("in line", queue),
        f"  {'ends':<9} {_end(verdict)}",
        *_formula(verdict, bool(others)),
        f"  {'fix':<9} {_smallest_fix(verdict, stuck, others)}",
    ]


def time_limits(timers: Iterable[Place]) -> list[str]:
    """The time limits of the program itself, by the lines that set them, in words."""
    return [
        f"a time limit in {line.short}" if line.line else f"a time limit set {line.short}"
        for line in sorted(set(timers))
    ]


def _asked(asked: list[Waiting], pool: str) -> list[str]:
    lines = []
    for name in sorted({waits.pool for waits in asked}, key=lambda name: (name != pool, name)):
        title = "they ask" if name == pool else f"ask {name}"
        lines += _block(title, (own_line(w.places) for w in asked if w.pool == name))
    return lines


def _end(verdict: Verdict) -> str:
    limits = [*verdict.server_limits, *time_limits(verdict.timers)[:3]]
    if limits:
        also = "" if verdict.timeout is None or not verdict.server_limits else ", or pool_timeout"
        return f"when {' or '.join(limits)} ends it{also}"
    ends = []
    if verdict.timeout is not None:
        ends.append(f"pool_timeout ({verdict.timeout:g} s) makes a waiter give up")
    if verdict.limits_above:
        places = " and ".join(place.short for place in sorted(set(verdict.limits_above))[:3])
        ends.append(f"{places}, which awaits it with a time limit, may cancel it")
    if verdict.through_server:
        return f"when {' or '.join(ends)}; no time limit of the server is known" if ends else NEVER
    if not ends:
        return "never: pool_timeout is None"
    return f"when {' or '.join(ends)}, and not before"


def _formula(verdict: Verdict, several_pools: bool) -> list[str]:
    # How many would be enough depends on how many can come to wait for the lock.
    if several_pools or verdict.depth < 2 or verdict.through_server:
        return []
    tasks, depth = verdict.tasks, verdict.depth
    if _takes_one_after_another(verdict):
        return [
            f"  {'formula':<9} none: one task takes a connection after another, and no number is enough for more"
        ]
    deeper = tasks * depth + 1
    return [
        f"  {'formula':<9} {tasks} tasks × ({depth} - 1) + 1 = {verdict.needed} connections,"
        f" or {deeper} if one asks for {depth + 1} at once; there are {verdict.capacity}"
    ]


def _takes_one_after_another(verdict: Verdict) -> bool:
    """Whether somebody holds several connections that were all taken at the line where it asks for the next."""
    taken: dict[str, set[tuple[Place, ...]]] = {}
    for holder in verdict.holding:
        taken.setdefault(holder.owner, set()).add(holder.places)
    held = Counter(holder.owner for holder in verdict.holding)
    # Not one that goes deeper each time, as a recursion does: there each stands behind more calls.
    return any(
        held[holder.owner] > 1 and taken[holder.owner] == {holder.waits.places}
        for holder in verdict.holding
        if holder.waits is not None
    )


def _smallest_fix(verdict: Verdict, stuck: list[Holding], others: list[str]) -> str:
    if verdict.behind:
        names = " and ".join(verdict.behind)
        return f"what the verdict on {names} says: {verdict.pool} only waits for it"
    if others:
        # Two connections of one pool would be a hold-and-wait again.
        names = ", ".join([verdict.pool, *others])
        return f"take connections of {names} in one order everywhere, or one connection of one pool for all of it"
    if not stuck or stuck[0].waits is None:
        return "let whoever holds a connection finish with it before anybody whom it waits for asks for one"
    first, waits = stuck[0], stuck[0].waits
    holds, asks = own_line(first.places), own_line(waits.places)
    if first.through_tasks:
        # Several may run at once, and a session is for one at a time.
        return (
            f"finish with the session that {holds.function} holds before {asks.function} runs in tasks of its own,"
            f" or hand it on to one {asks.function} after the other"
        )
    if _takes_one_after_another(verdict) or first.places == waits.places:
        return f"{asks.short}: give each connection back before the next is taken, or use one for all of it"
    if holds == asks:
        return (
            f"hand the session that {holds.function} holds on to the {asks.function} that it calls"
        )
    if holds.function == asks.function:
        return f"{holds.function}: use the connection it holds (line {holds.line}) also at line {asks.line}"
    return f"hand the session that {holds.function} holds on to {asks.function}, or finish with it first"


def _leaked_report(verdict: Verdict) -> list[str]:
    lost = [holder for holder in verdict.holding if not holder.alive]
    kept = sorted({holder.kept_by for holder in lost if holder.kept_by})
    return [
        f"LEAKED in {verdict.pool}: {_out_of(verdict)}",
        f"{len(lost)} checked out by tasks that have ended; nobody is left to give them back.",
        *_block("taken", (own_line(holder.places) for holder in lost)),
        *(f"  {'kept by':<9} {what}" for what in kept),
        f"  {'fix':<9} close the session in the task that opened it (async with, or remove() for a scoped session)",
    ]


def _foreign_waits(verdict: Verdict, title: str = "elsewhere") -> list[str]:
    """Who waits for something that is not the database, and for what, as far as it can be seen."""
    lines: list[str] = []
    waits: Counter[tuple[Place, str, str]] = Counter()
    for holder in verdict.holding:
        activity = holder.activity
        if activity is not None and activity.doing == "elsewhere":
            waits[activity.place, activity.what, activity.owner] += 1
    for number, ((place, what, owner), count) in enumerate(
        sorted(waits.items(), key=lambda item: (-item[1], item[0]))
    ):
        for_what = f", for {what}" if what else ""
        by_whom = f" that {owner} has" if owner else ""
        lines.append(
            f"  {title if number == 0 else '':<9} {count} in {place.short}{for_what}{by_whom}"
        )
    return lines


def _known(verdict: Verdict) -> list[str]:
    """What holders do, where that says more than that the database works."""
    doing = Counter(holder.activity.doing for holder in verdict.holding if holder.activity)
    queues = Counter(holder.waits.pool for holder in verdict.holding if holder.waits is not None)
    lines = _foreign_waits(verdict)
    beyond = sum(holder.kept_by == BEYOND for holder in verdict.holding)
    if beyond:
        lines.append(
            f"  {'not seen':<9} who could give back {beyond} of them: more refers to them than can be followed"
        )
    for pool, count in sorted(queues.items()):
        lines.append(
            f"  {'ask too':<9} {count} of the holders are in line for a connection of {pool}"
        )
    if doing["database"] and (lines or doing["database"] < len(verdict.holding)):
        lines.append(f"  {'database':<9} {doing['database']} wait for the database")
    if verdict.connecting:
        lines.append(f"  {'connect':<9} {verdict.connecting} are being opened")
    return lines


def _saturated_report(verdict: Verdict) -> list[str]:
    how = "busy, but moving" if verdict.moved else "busy; nothing has come back yet"
    return [
        f"SATURATED {verdict.pool} ({how}): {_out_of(verdict)}",
        *_held(verdict.holding),
        *_known(verdict),
        *_in_line(verdict.waiting),
    ]


def _held_report(verdict: Verdict) -> list[str]:
    foreign = [holder for holder in verdict.holding if holder.elsewhere is not None]
    lines = [holder.elsewhere for holder in foreign if holder.elsewhere is not None]
    (often, _), *_ = Counter(lines).most_common(1)
    own = {holder.activity.what for holder in foreign if holder.activity} - {""}
    what = (
        f"{' or '.join(sorted(own))}: perhaps for one of those in line"
        if own
        else "something else than the database"
    )
    return [
        f"HELD ACROSS A FOREIGN AWAIT in {verdict.pool}: {_out_of(verdict)}",
        f"{len(foreign)} of them are held by tasks that wait for {what}.",
        *_held(foreign),
        *_block("they wait", lines),
        *_in_line(verdict.waiting),
        # A session gives its connection back at the end of a transaction, a Connection is one until its block ends.
        f"  {'fix':<9} give the connection back before {often.short}: commit the session, or leave the block",
    ]


def _unfair_report(verdict: Verdict) -> list[str]:
    who = "threads" if verdict.threads else "tasks"
    pause = "time.sleep(0.001)" if verdict.threads else "await asyncio.sleep(0)"
    return [
        f"UNFAIR {verdict.pool} (barging): {_out_of(verdict)}",
        f"Connections that come back are taken by {who} that never stood in the queue, again and again.",
        *_held(verdict.holding),
        *_in_line(verdict.waiting),
        f"  {'fix':<9} let the others in after each commit: {pause}",
    ]


def _blocked_report(verdict: Verdict) -> list[str]:
    where = verdict.blocked or NOWHERE
    return [
        f"LOOP BLOCKED, and {verdict.pool} with it: {_out_of(verdict)}",
        "No task can run, so none can give its connection back.",
        *_block("blocked", [where]),
        *_in_line(verdict.waiting),
        f"  {'fix':<9} await an asynchronous driver in {where.short}, or send the call to a thread (asyncio.to_thread)",
    ]


def _connects_report(verdict: Verdict) -> list[str]:
    if verdict.cancelled:
        # SQLAlchemy's pool wakes a waiter when a connection comes back, not when an attempt has failed.
        what = f"An attempt to connect was cancelled ({verdict.connect_error}), which wakes nobody in line."
        fix = "open the pool's connections before the load comes, so that nobody is cancelled while connecting"
    else:
        what = f"The last attempt to connect failed: {verdict.connect_error}"
        fix = (
            "look at the file: whether its path is right, its folder there, and the rights to it"
            if verdict.database == "sqlite"
            else "look at the server: its address, whether it runs, whether max_connections is reached"
        )
    more = (
        [f"{verdict.failed} of the last {verdict.attempts} attempts failed."]
        if verdict.attempts > 1
        else []
    )
    return [
        f"CONNECTS FAILING in {verdict.pool}: {_out_of(verdict)}",
        what,
        *more,
        *_in_line(verdict.waiting),
        f"  {'fix':<9} {fix}",
    ]


def _unknown_report(verdict: Verdict) -> list[str]:
    if verdict.failure:
        why = f"This PoolScope has failed ({verdict.failure}) and stepped aside; the log has its traceback."
        fix = "report it; the engine goes on without it"
    elif verdict.unseen:
        why = (
            f"{verdict.unseen} were checked out before this PoolScope was made; nobody saw by whom."
        )
        fix = "create the PoolScope where the engine is created"
    elif idle := _idle(verdict):
        why = f"{idle} of them are held by threads of an executor that have nothing to do."
        fix = "close the session where the thread's work ends (with, or remove() for a scoped session)"
    elif _all_ask(verdict):
        stuck = [holder for holder in verdict.holding if holder.waits is not None]
        others = {holder.waits.pool for holder in stuck if holder.waits} - {verdict.pool}
        kept = " and ".join(sorted({holder.kept_by for holder in stuck} - {""}))
        why = (
            "All who hold a connection wait for another: a deadlock, unless somebody gives one back "
            f"who reaches it through {kept}."
        )
        fix = _smallest_fix(verdict, stuck, sorted(others))
    elif verdict.below_waiting and not verdict.waiting:
        why = (
            f"{verdict.below_waiting} wait in the pool below, {verdict.below}, which only counts them: whether they"
            " are ever served is not seen here."
        )
        fix = "give each piece of work one connection; while you look for it, a shorter timeout in the pool below"
    elif verdict.database != "postgresql":
        why = "Nothing has come back for seconds. A slow statement, or a lock?"
        statements = Counter(holder.last_sql for holder in verdict.holding if holder.last_sql)
        what = "".join(f": {' '.join(sql.split())}" for sql, _ in statements.most_common(1))
        fix = f"look at what the holders execute{what}"
    else:
        why = "Nothing has come back for seconds. A slow statement, or a lock? Only the server can tell."
        fix = "await scope.ask_server(), or SELECT state, wait_event_type, query FROM pg_stat_activity"
    return [
        f"UNKNOWN in {verdict.pool}: {_out_of(verdict)}",
        why,
        *(
            [f"Without {verdict.lacking} no deadlock can be proved here."]
            if verdict.lacking
            else []
        ),
        *_held(verdict.holding),
        *_known(verdict),
        *_in_line(verdict.waiting),
        f"  {'fix':<9} {fix}",
    ]


def _healthy_report(verdict: Verdict) -> list[str]:
    lines = [f"HEALTHY {verdict.pool}: {_out_of(verdict)}"]
    if verdict.replaced:
        lines.append(
            f"{verdict.replaced} hold or wait in a pool that dispose() has replaced; it cannot help them."
        )
    return lines


_REPORTS = {
    "deadlock": _deadlock_report,
    "deadlock until a timer": _deadlock_report,
    "leaked": _leaked_report,
    "loop blocked": _blocked_report,
    "unfair": _unfair_report,
    "held across a foreign await": _held_report,
    "connects failing": _connects_report,
    "unknown": _unknown_report,
    "saturated": _saturated_report,
    "healthy": _healthy_report,
}
