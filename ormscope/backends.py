"""A PostgreSQL server at one moment: what each backend does, for which lock it waits, and whose of ours it is."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ormscope import internals, proof, waitgraph
from ormscope.ledger import Holder
from ormscope.owners import TaskOrThread
from ormscope.places import NOWHERE, own_place, place
from ormscope.server_report import Session
from ormscope.stacks import only_looks_up

if TYPE_CHECKING:
    from ormscope.pool import PoolScope

_SECONDS = 5.0  # that one look may take
_MOST_CHARACTERS = 80  # of a statement
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
class Backends:
    """The server at one moment: its sessions, and who has those of the watched pools, by process id.

    `marks` tell what a session waits for, and since when. `idle` lie in a pool, with who had them last. `scopes` are
    those of the pools that the others come from.
    """

    sessions: dict[int, Session]
    marks: dict[int, object]
    holders: dict[int, Holder]
    idle: dict[int, Holder | None]
    scopes: dict[int, PoolScope]


def look(connection: Any, scope: PoolScope) -> Backends:
    """Look at the server over a connection of our own."""
    before, lay, _ = _ours(scope)
    rows(connection, _PATIENCE)
    backends = rows(connection, _BACKENDS % ",".join(map(str, before)))
    locks = [_Lock(*row) for row in rows(connection, _LOCKS)]
    connection.rollback()  # within a transaction, the server would show the same sessions again
    after, lies, whose = _ours(scope)
    idle = {pid: holder for pid, holder in lies.items() if pid in lay}
    wanted = {lock.pid: lock for lock in locks if not lock.granted}
    tables = {lock.pid: lock.relation for lock in locks if lock.locktype == "tuple"}
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
            lock.words(tables.get(pid)) if lock else "", blockers, left=tuple(left if pid in idle else ()),
        )  # fmt: skip
        marks[pid] = (since, lock and lock.tag, sorted(blockers))
    holders = {pid: holder for pid, holder in after.items() if before.get(pid) is holder}
    return Backends(sessions, marks, holders, idle, whose)


def rows(connection: Any, query: str) -> list[Any]:
    """What a query says, over a connection that is not SQLAlchemy's to wrap."""
    cursor = connection.cursor()
    try:
        cursor.execute(query)
        return list(cursor.fetchall())
    finally:
        cursor.close()


def pid_of(connection: Any) -> int:
    """The process id of a connection's backend, as the driver knows it; 0 where it does not, or it is closed."""
    try:
        driver = connection.driver_connection
        asyncpgs = getattr(driver, "get_server_pid", None)
        return int(driver.info.backend_pid if asyncpgs is None else asyncpgs())
    except Exception:
        return 0


def _ours(
    scope: PoolScope,
) -> tuple[dict[int, Holder], dict[int, Holder | None], dict[int, PoolScope]]:
    """Who has which session of the same server, who had those last that lie in a watched pool, and of whose pool."""
    holders: dict[int, Holder] = {}
    scopes: dict[int, PoolScope] = {}
    idle: dict[int, Holder | None] = {}
    for other in proof.scopes():
        if other is scope or _address(other) == _address(scope):
            held = {pid_of(holder.handle()): holder for holder in other.holders}
            holders |= held
            scopes |= dict.fromkeys(held, other)
            for record in internals.idle_records(other.pool):
                idle[pid_of(record)] = other.ledger.last_taken.get(record)
    holders.pop(0, None)
    return holders, idle, scopes


def _address(scope: PoolScope) -> object:
    url = scope.engine.url
    return url.host, url.port, url.query


def _short(statement: str) -> str:
    words = " ".join(statement.split())
    return words if len(words) <= _MOST_CHARACTERS else words[: _MOST_CHARACTERS - 1] + "…"


def edges_of(seen: Backends) -> dict[int, tuple[TaskOrThread, set[TaskOrThread]]]:
    """Whose statements wait in the server for connections that are all ours, and for whose, by process id."""
    edges: dict[int, tuple[TaskOrThread, set[TaskOrThread]]] = {}
    for pid, holder in seen.holders.items():
        who, session = holder.last_user.subject, seen.sessions.get(pid)
        if session is None or who is None or not holder.statements:
            continue
        if isinstance(who, asyncio.Task) and (
            who.cancelling() or (internals.awaited_future(who) is None and not only_looks_up(who))
        ):
            continue  # it has been woken, or its driver asks the server to end the statement
        if pid in _behind(seen, pid):
            continue  # a circle within the server, which ends that after its deadlock_timeout
        known = [
            seen.holders[it]
            for it in session.blockers
            if it in seen.holders and not _works_on(seen.sessions.get(it))
        ]
        wakers = proof.wakers_of(known) if len(known) == len(session.blockers) else None
        if wakers:
            edges[pid] = who, wakers
    return edges


def _works_on(session: Session | None) -> bool:
    """Whether the server is busy for a session, whatever its client waits for: with a statement that was given up."""
    if session is None or session.lock or not session.state:  # a state that may not be seen
        return False
    return not session.state.startswith("idle")


def _behind(seen: Backends, pid: int) -> set[int]:
    """The sessions that one waits for in the server, and those that they wait for."""
    found: set[int] = set()
    unseen = [pid]
    while unseen:
        session = seen.sessions.get(unseen.pop())
        new = set(session.blockers) - found if session is not None else set()
        found |= new
        unseen += new
    return found


def joined(seen: Backends, pid: int) -> Session:
    """A session with what the scopes know of it."""
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
        for scope in proof.scopes()
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
    now_at = NOWHERE if last_user is None else own_place(last_user)
    statement = _short(holder.last_sql or "") if holder.statements else session.statement
    return replace(session, statement=statement, place=now_at if now_at.line else taken)
