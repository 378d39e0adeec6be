"""What PostgreSQL and the pool know only together: whose statement waits for whose lock, and whether that can end.

A task has a lock in the server and waits for a connection, while all the connections wait for its lock: the pool sees
statements, the server an idle transaction. The scope knows who has which backend, `pg_blocking_pids` which backend
blocks which. Both are joined here, over a connection outside of the pool that is closed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from sqlalchemy import event
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import greenlet_spawn

from ormscope import internals, proof, waitgraph
from ormscope.hooks import logger
from ormscope.ledger import Holder
from ormscope.owners import TaskOrThread
from ormscope.places import NOWHERE, Place, is_library, place, sleeping_places

if TYPE_CHECKING:
    from ormscope.pool import PoolScope

_SECONDS = 5.0  # that asking may take, the connect included
_PAUSE = 0.05  # seconds between the two looks of a proof
_LONG_SECONDS = 1.0  # a shorter statement, or pause in a transaction, is not worth a headline
_MOST_LINES = 10
_MOST_CHARACTERS = 80  # of a statement
_NAMED_BY_PYTHON = re.compile(r"(Task|Thread|MainThread|asyncio|ThreadPoolExecutor)[-_\d]*( .*)?")

# The server's own time limits, and the state of a backend in which each of them runs.
_LIMITS = {
    "lock_timeout": "active",
    "statement_timeout": "active",
    "transaction_timeout": "active",
    "idle_in_transaction_session_timeout": "idle in transaction",
    "idle_session_timeout": "idle",
}
_SETTINGS = "select pg_backend_pid(), " + ", ".join(
    f"current_setting('{name}', true)" for name in _LIMITS
)
_PATIENCE = f"select set_config('statement_timeout', '{_SECONDS:g}s', false)"
_BACKENDS = """\
select pid, coalesce(state, ''), coalesce(wait_event_type || ' ' || wait_event, ''), coalesce(query, ''),
    coalesce(nullif(application_name, ''), backend_type, ''),
    coalesce(extract(epoch from clock_timestamp() - state_change), 0)::float8, state_change::text,
    case when wait_event_type = 'Lock' or pid = any('{%s}'::int[])
        then array_to_string(pg_blocking_pids(pid), ',') end
from pg_stat_activity"""
_LOCKS = """\
with locks as (
    select pid, locktype, mode, granted, classid::int8, objid::int8, objsubid::int,
        case when database = (select oid from pg_database where datname = current_database())
            then relation::regclass::text end,
        concat_ws(' ', locktype, database, relation, page, tuple, virtualxid, transactionid, classid, objid, objsubid)
            as tag
    from pg_locks)
select * from locks where not granted or locktype in ('advisory', 'tuple')
    or tag in (select tag from locks where not granted)"""

_Result = TypeVar("_Result")

Cause = Literal[
    "deadlock", "deadlock until a timer", "lock left behind", "blocked", "idle in transaction", "slow", "quiet",
    "unknown",
]  # fmt: skip


@dataclass(frozen=True)
class Session:
    """A connection to the server, as the server and the scope see it; `owner` is empty where no watched pool has it.

    `seconds` is how long it has been in its `state`, `lock` what it waits for, `blockers` the process ids of those who
    have that lock, and as what. `taken` is where the connection was taken, `place` where its user is now, `asks` where
    that one waits for a connection of the pool `asked`. `left` are the advisory locks that it has though it lies in
    the pool; `stuck` says that a proved deadlock goes through it.
    """

    pid: int
    state: str
    event: str
    seconds: float
    statement: str
    program: str
    lock: str
    blockers: dict[int, str]
    owner: str = ""
    taken: Place = NOWHERE
    place: Place = NOWHERE
    asks: Place | None = None
    asked: str = ""
    left: tuple[str, ...] = ()
    stuck: bool = False

    @property
    def who(self) -> str:
        """Whose it is, and the line where that one took it."""
        if self.left:
            return f"a connection that lies in the pool, last taken by {self.owner} at {self.taken}"
        if self.owner:
            return f"{self.owner} at {self.taken}"
        if not self.pid:
            return "a prepared transaction (pg_prepared_xacts)"
        return f"pid {self.pid}, outside of this program ({self.program or 'unknown'})"

    @property
    def does(self) -> str:
        """What it does now."""
        if self.asks is not None:
            return f"waits for a connection of {self.asked} at {self.asks.short}"
        if self.lock:
            return f"waits itself for {self.lock}"
        if not self.state:
            return "what it does may not be seen"
        return f"{self.state} for {self.seconds:.1f} s ({self.statement})"


@dataclass(frozen=True, kw_only=True)
class ServerReport:
    """What the server and a pool know together at one moment; `str()` is the report.

    `sessions` are the connections that are checked out, those that block them, and those that have locks left behind.
    `ends` are the time limits that end a deadlock, `timeout` the pool's, in seconds. `problem` is why nothing is known.
    The report of a deadlock has no times, so that it reads the same in every run.
    """

    pool: str
    cause: Cause
    state: str = ""
    sessions: tuple[Session, ...] = ()
    ends: tuple[str, ...] = ()
    timeout: float | None = None
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"UNKNOWN what the server does for {self.pool}: {self.problem}"
        return "\n".join(_deadlock_report(self) if "deadlock" in self.cause else _report(self))


async def ask(scope: PoolScope) -> ServerReport:
    """Ask the server about a pool. Raises nothing: what goes wrong is the report's `problem`."""
    dialect, problem = scope.engine.dialect, ""
    try:
        if dialect.name != "postgresql":
            raise _CannotTell(f"only PostgreSQL says who waits for whom; this is {dialect.name}")
        if "server" in scope.lacking:
            raise _CannotTell(f"{scope.lacking['server']} is gone")
        if scope.failure:
            raise _CannotTell(f"this PoolScope has stepped aside ({scope.failure})")
        async with asyncio.timeout(_SECONDS):
            if dialect.is_async:
                return await greenlet_spawn(_ask, scope, await_only)
            return await _in_thread(lambda: _ask(scope, asyncio.run))
    except _CannotTell as reason:
        problem = f"cannot tell, {reason}."
    except TimeoutError:
        problem = f"no answer within {_SECONDS:g} s."
    except Exception as error:
        logger.debug("the server could not be asked", exc_info=True)
        problem = f"no answer. {type(error).__qualname__}: {' '.join(str(error).split())}"
    return ServerReport(pool=scope.name, cause="unknown", problem=problem)


class _CannotTell(Exception):
    """Why the server's answers would be of no use."""


async def _in_thread(work: Callable[[], _Result]) -> _Result:
    """Work in a thread of its own: those of `asyncio.to_thread` may all be waiting for the pool."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_Result | Exception] = loop.create_future()

    def run() -> None:
        outcome: _Result | Exception
        try:
            outcome = work()
        except Exception as error:
            outcome = error
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(lambda: None if done.done() else done.set_result(outcome))

    threading.Thread(target=run, name="ormscope server", daemon=True).start()
    outcome = await done
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _ask(scope: PoolScope, wait: Callable[[Coroutine[Any, Any, Any]], Any]) -> ServerReport:
    """Look at the server, and again where it looks like a deadlock, over a connection of our own."""
    pool = scope.pool
    own = NullPool(internals.creator_of(pool), dialect=scope.engine.dialect)
    # What the program does with each new connection may set its role, or the time limits that end a wait.
    event.listen(own, "connect", lambda *about: pool.dispatch.connect(*about))
    connection = own.connect()
    try:
        ((pid, *values),) = _rows(connection, _SETTINGS)
        if pid != _pid_of(connection):
            raise _CannotTell("a proxy (PgBouncer?) or the driver hides which connection is whose")
        limits = {name: value for name, value in zip(_LIMITS, values, strict=True) if value}
        seen = _look(connection, scope)
        found = _suspect(scope, seen, wait)
        if found is not None:
            wait(asyncio.sleep(_PAUSE))
            again = _look(connection, scope)
            found = found if found.still_holds(scope, seen, again) else None
            seen = again
    except BaseException:
        connection.invalidate()  # closes it, for which the driver has a time limit
        raise
    connection.close()
    return _told(scope, seen, found, limits)


def _rows(connection: Any, query: str) -> list[Any]:
    cursor = connection.cursor()
    try:
        cursor.execute(query)
        return list(cursor.fetchall())
    finally:
        cursor.close()


def _pid_of(connection: Any) -> int:
    """The process id of a connection's backend, as the driver knows it; 0 where it does not, or it is closed."""
    try:
        driver = connection.driver_connection
        asyncpgs = getattr(driver, "get_server_pid", None)
        return int(driver.info.backend_pid if asyncpgs is None else asyncpgs())
    except Exception:
        return 0


# One look.


class _Lock(NamedTuple):
    """A row of pg_locks; those with the same `tag` are for the same thing."""

    pid: int
    locktype: str
    mode: str
    granted: bool
    classid: int | None
    objid: int | None
    objsubid: int | None
    relation: str | None
    tag: str

    def words(self, row_of: str | None = None) -> str:
        """What is locked; `row_of` is the table in which its waiter has a row in hand."""
        if self.locktype == "advisory":
            high, low = self.classid or 0, self.objid or 0
            if self.objsubid == 2:  # two numbers of four bytes
                return f"advisory lock ({_signed(high, 32)}, {_signed(low, 32)})"
            return f"advisory lock {_signed((high << 32) + low, 64)}"
        if self.locktype == "relation":
            return f"table {self.relation or 'of another database'}, {self.mode}"
        if self.locktype == "transactionid" and row_of is None:
            return "a row or key that another transaction has written"
        if self.locktype in ("transactionid", "tuple"):
            return f"row of table {row_of or self.relation}"
        return self.locktype + (f" of {self.relation}" if self.relation else "")


def _signed(number: int, bits: int) -> int:
    return number - (1 << bits) if number >> (bits - 1) else number


@dataclass
class _Seen:
    """The server at one moment: its sessions, and who has those of the watched pools, by process id.

    `marks` tell what a session waits for, and since when. `idle` lie in a pool, with who had them last.
    """

    sessions: dict[int, Session]
    marks: dict[int, object]
    holders: dict[int, Holder]
    idle: dict[int, Holder | None]


def _look(connection: Any, scope: PoolScope) -> _Seen:
    before, lay = _ours(scope)
    _rows(connection, _PATIENCE)
    backends = _rows(connection, _BACKENDS % ",".join(map(str, before)))
    locks = [_Lock(*row) for row in _rows(connection, _LOCKS)]
    connection.rollback()  # within a transaction, the server would show the same sessions again
    after, lies = _ours(scope)
    idle = {pid: holder for pid, holder in lies.items() if pid in lay}
    wanted = {lock.pid: lock for lock in locks if not lock.granted}
    rows = {lock.pid: lock.relation for lock in locks if lock.locktype == "tuple"}
    modes = {(lock.pid, lock.tag): lock.mode for lock in locks if lock.granted}
    sessions: dict[int, Session] = {}
    marks: dict[int, object] = {}
    for pid, state, what, query, program, seconds, since, blocking in backends:
        lock = wanted.get(pid)
        tag = lock.tag if lock else ""
        before_it = set(map(int, blocking.split(","))) if blocking and lock else set()
        # Who only stands before it in line does not matter where somebody has the lock.
        having = {it for it in before_it if it not in wanted or wanted[it].tag != tag}
        blockers = {
            other: modes.get((other, tag), "") if tag.startswith("relation") else ""
            for other in having or before_it
        }
        left = [
            other.words() for other in locks if other.pid == pid and other.locktype == "advisory"
        ]
        sessions[pid] = Session(
            pid, state, what, seconds, _short(query), program,
            lock.words(rows.get(pid)) if lock else "", blockers, left=tuple(left if pid in idle else ()),
        )  # fmt: skip
        marks[pid] = (since, lock and lock.tag, sorted(blockers))
    holders = {pid: holder for pid, holder in after.items() if before.get(pid) is holder}
    return _Seen(sessions, marks, holders, idle)


def _ours(scope: PoolScope) -> tuple[dict[int, Holder], dict[int, Holder | None]]:
    """Who has which session of the same server, and who had those last that lie in a watched pool."""
    holders: dict[int, Holder] = {}
    idle: dict[int, Holder | None] = {}
    for other in list(proof.scopes):
        if other is scope or _address(other) == _address(scope):
            holders |= {_pid_of(holder.handle()): holder for holder in other.holders}
            for record in internals.idle_records(other.pool):
                idle[_pid_of(record)] = other.ledger.last_taken.get(record)
    holders.pop(0, None)
    return holders, idle


def _address(scope: PoolScope) -> object:
    url = scope.engine.url
    return url.host, url.port, url.query


def _short(statement: str) -> str:
    words = " ".join(statement.split())
    return words if len(words) <= _MOST_CHARACTERS else words[: _MOST_CHARACTERS - 1] + "…"


# The proof.


@dataclass
class _Found:
    """What is stuck, through which sessions, and the lines of the time limits that end it."""

    stuck: waitgraph.Stuck
    pids: set[int]
    timers: tuple[Place, ...]
    returned: dict[int, int]

    def still_holds(self, scope: PoolScope, seen: _Seen, again: _Seen) -> bool:
        """Whether a second look finds the same, and nothing has moved in between."""
        found = _stuck(scope, again)
        return (
            found is not None
            and found[0].signature == self.stuck.signature
            and found[1] == self.pids
            and all(again.marks.get(pid) == seen.marks.get(pid) for pid in self.pids)
            and proof.returned_to(list(proof.scopes), self.stuck.pools) == self.returned
        )


def _suspect(
    scope: PoolScope, seen: _Seen, wait: Callable[[Coroutine[Any, Any, Any]], Any]
) -> _Found | None:
    """What looks stuck through the server, held against everybody who can use one of the connections."""
    first = _stuck(scope, seen)
    if first is None:
        return None
    watched, (stuck, pids) = list(proof.scopes), first
    returned = proof.returned_to(watched, stuck.pools)
    holders = [it for other in watched for it in other.holders if it.pool in stuck.pools]
    holders += [it for pid, it in seen.holders.items() if pid in pids and it not in holders]
    tasks = [who for who in stuck.members if isinstance(who, asyncio.Task)]
    wait(_in_thread(lambda: proof.look_for_users(holders, tasks)))
    found = _stuck(scope, seen)
    if found is None:
        return None
    timers, _ = proof.timers_of(found[0], proof.waits_of(watched, dict(_edges(seen).values())))
    return _Found(*found, timers, returned)


def _stuck(scope: PoolScope, seen: _Seen) -> tuple[waitgraph.Stuck, set[int]] | None:
    """What is stuck, if this pool is, and through which sessions; None where the server has no part in it."""
    edges = _edges(seen)
    stuck = waitgraph.find_stuck(proof.waits_of(list(proof.scopes), dict(edges.values())))
    if stuck is None or scope.pool not in stuck.pools:
        return None
    pids = {pid for pid, (who, _) in edges.items() if who in stuck.members}
    if not pids:
        return None
    pids |= {blocker for pid in pids for blocker in seen.sessions[pid].blockers}
    return stuck, pids | {pid for pid, it in seen.holders.items() if it.pool in stuck.pools}


def _edges(seen: _Seen) -> dict[int, tuple[TaskOrThread, set[TaskOrThread]]]:
    """Whose statements wait in the server for connections that are all ours, and for whose, by process id."""
    edges: dict[int, tuple[TaskOrThread, set[TaskOrThread]]] = {}
    for pid, holder in seen.holders.items():
        who, session = holder.last_user.subject, seen.sessions.get(pid)
        if session is None or who is None or not holder.statements:
            continue
        if isinstance(who, asyncio.Task) and internals.awaited_future(who) is None:
            continue  # it has been woken
        known = [seen.holders[it] for it in session.blockers if it in seen.holders]
        wakers = proof.wakers_of(known) if len(known) == len(session.blockers) else None
        if wakers:
            edges[pid] = who, wakers
    return edges


# What is told.


def _told(
    scope: PoolScope, seen: _Seen, found: _Found | None, limits: dict[str, str]
) -> ServerReport:
    sessions: dict[int, Session] = {}
    unseen = [pid for pid, holder in seen.holders.items() if holder.pool is scope.pool]
    unseen += [pid for pid, session in seen.sessions.items() if session.left]
    while unseen:
        pid = unseen.pop(0)
        if pid not in sessions:
            stuck = found is not None and pid in found.pids
            sessions[pid] = replace(_joined(seen, pid), stuck=stuck)
            unseen += sessions[pid].blockers
    known = tuple(sessions.values())
    states = {session.state.removesuffix(" (aborted)") for session in known if session.stuck}
    ends = [
        f"{name} ({value})"
        for name, value in limits.items()
        if value != "0" and states & {_LIMITS[name], ""}  # empty where it may not be seen
    ]
    ends += [f"a time limit in {line.short}" for line in sorted(set(found.timers))] if found else []
    limit = "no limit" if scope.capacity is None else scope.capacity
    return ServerReport(
        pool=scope.name,
        cause=_cause(known, bool(ends)),
        state=f"{scope.checked_out} of {limit} checked out, {len(scope.waiters)} waiting",
        sessions=known,
        ends=tuple(ends),
        timeout=scope.timeout,
    )


def _joined(seen: _Seen, pid: int) -> Session:
    """A session with what the scope knows of it."""
    session = seen.sessions.get(pid) or Session(pid, "", "", 0.0, "", "", "", {})
    holder = seen.holders.get(pid) or seen.idle.get(pid)
    if holder is None:
        owner = "somebody before the PoolScope was made" if session.left else ""
        return replace(session, owner=owner)
    taken = next(map(place, holder.frames), NOWHERE)
    session = replace(session, owner=holder.owner.name, taken=taken, place=taken)
    if session.left:
        return session
    queued = {
        who: (scope.name, waiter)
        for scope in list(proof.scopes)
        for who, waiter in list(scope.ledger.waiters.items())
        if waiter.waits(time.perf_counter())
    }
    for user in proof.live_users(holder):
        for who in (user, *waitgraph.below(user)):
            if who in queued:
                asked, waiter = queued[who]
                asks = next(map(place, waiter.frames), NOWHERE)
                return replace(session, asks=asks, asked=asked, place=asks)
    last_user = holder.last_user.subject
    frames = () if last_user is None else sleeping_places(last_user)
    own = (frame for frame in frames if not is_library(frame[0].co_filename))
    statement = _short(holder.last_sql or "") if holder.statements else session.statement
    return replace(session, statement=statement, place=next(map(place, own), taken))


def _cause(sessions: tuple[Session, ...], has_limits: bool) -> Cause:
    ours = [session for session in sessions if session.owner and not session.left]
    long = {session.state for session in ours if session.seconds >= _LONG_SECONDS}
    left = {session.pid for session in sessions if session.left}
    blockers = {pid for session in ours for pid in session.blockers}
    if any(session.stuck for session in sessions):
        return "deadlock until a timer" if has_limits else "deadlock"
    if left and (left & blockers or not blockers):
        return "lock left behind"
    if blockers:
        return "blocked"
    if any(state.startswith("idle in transaction") for state in long):
        return "idle in transaction"
    return "slow" if "active" in long else "quiet"


def _lines(title: str, texts: Iterable[str]) -> list[str]:
    """One line for each text, the most frequent first, with how often it is there where that is more than once."""
    counts = sorted(Counter(texts).items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{count} × {text}" if count > 1 else text for text, count in counts[:_MOST_LINES]]
    texts += [f"and {len(counts) - _MOST_LINES} more"] * (len(counts) > _MOST_LINES)
    return [f"  {'' if number else title:<9} {text}" for number, text in enumerate(texts)]


def _deadlock_report(report: ServerReport) -> list[str]:
    stuck = [session for session in report.sessions if session.stuck]
    blocked = [session for session in stuck if session.blockers]
    asking = [session for session in stuck if session.asks is not None]
    blockers = {pid for session in blocked for pid in session.blockers}
    has_it = [session for session in asking if session.pid in blockers]
    others = [session for session in asking if session.pid not in blockers]
    limits = [*report.ends, *([f"pool_timeout ({report.timeout:g} s)"] if report.timeout else [])]
    never = "never: pool_timeout is None, and connections begin without a lock_timeout"
    return [
        f"{report.cause.upper()} through the server in {report.pool}: {report.state}",
        "Who has the lock waits for a connection; who could give one back waits in the server for the lock.",
        *_lines("lock", {session.lock for session in blocked}),
        *_lines("has it", (f"{_name(it)}at {it.taken}" for it in has_it)),
        *_lines("held too", (f"{_name(it)}at {it.taken}" for it in others)),
        *_lines("they ask", (f"{it.asked} at {it.asks}" for it in asking)),
        *_lines("blocked", (f"{_name(it)}at {it.place} ({it.statement})" for it in blocked)),
        *_lines("ends", [f"when {' or '.join(limits)} ends it" if limits else never]),
        *_lines("fix", {_fix(session) for session in has_it}),
    ]


def _name(session: Session) -> str:
    """How the program named who has a connection; Python numbers the others as they come."""
    return "" if _NAMED_BY_PYTHON.fullmatch(session.owner) else f"{session.owner} "


def _report(report: ServerReport) -> list[str]:
    ours = [it for it in report.sessions if it.owner and not it.left]
    blocked = [it for it in ours if it.lock]
    idle = [it for it in ours if it.state.startswith("idle in transaction") and it.asks is None]
    active = [it for it in ours if it.state == "active" and not it.lock]
    left = [it for it in report.sessions if it.left]
    modes = {pid: mode for it in report.sessions for pid, mode in it.blockers.items()}
    blocking = [it for it in report.sessions if it.pid in modes]
    culprits = {
        "blocked": [it for it in blocking if not it.lock],
        "lock left behind": left,
        "idle in transaction": sorted(idle, key=lambda it: -it.seconds),
        "slow": sorted(active, key=lambda it: -it.seconds),
    }.get(report.cause, [])
    began = [f"{_now(it)} in a transaction begun at {it.taken} ({it.statement})" for it in idle]
    return [
        f"{report.cause.upper()} in the server, {report.pool}: {report.state}",
        *_lines("blocked", (f"{_now(it)} for {it.lock} ({it.statement})" for it in blocked)),
        *_lines("by", (f"{it.who}{_as(modes[it.pid])}; {it.does}" for it in blocking)),
        *_lines("left", (f"{', '.join(it.left)}, by {it.who}" for it in left)),
        *_lines("idle", began),
        *_lines("works", (f"{_now(it)} {it.event} ({it.statement})" for it in active)),
        *_lines("fix", [_fix(it) for it in culprits[:1]]),
    ]


def _now(session: Session) -> str:
    since = (
        f", {session.seconds:.1f} s" if session.state else ""
    )  # hidden from a role without rights
    return f"{session.owner} at {session.place}{since}"


def _as(mode: str) -> str:
    return f", with {mode}" if mode else ""


def _fix(session: Session) -> str:
    """What is to be done about a session that others wait for."""
    taken, asks = session.taken, session.asks
    if session.left:
        return f"pg_advisory_unlock in a finally in {taken.function}, or pg_advisory_xact_lock, which ends by itself"
    if asks is not None and asks.function == taken.function:
        return f"{taken.function}: use the connection it holds (line {taken.line}) also at line {asks.line}"
    if asks is not None:
        return f"hand the session that {taken.function} holds on to {asks.function}, or finish with it first"
    if not session.owner:
        return f"end it (select pg_terminate_backend({session.pid})), and let its like begin with set lock_timeout"
    if session.state == "active":
        return f"make the statement in {session.place.short} shorter: look at its plan with EXPLAIN (ANALYZE)"
    return f"end the transaction before {session.place.short}: commit, or leave the session's block"
