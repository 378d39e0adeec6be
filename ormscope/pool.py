"""PoolScope: who holds a connection of a SQLAlchemy pool, who waits for one, and whether that can end."""

from __future__ import annotations

import asyncio
import math
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExecutionContext
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, Pool, QueuePool

from ormscope import waitgraph
from ormscope.durations import Durations
from ormscope.owners import Owner, TaskOrThread, current, name_of
from ormscope.places import (
    NOWHERE,
    Place,
    RawPlace,
    calling_places,
    foreign_place,
    place,
    running_places,
    sleeping_places,
)
from ormscope.stacks import awaited_future
from ormscope.tracebacks import outcome_of
from ormscope.verdict import TROUBLES, Cause, Holding, Verdict, Waiting, judge

# The dialect's events, not the engine's: those would slow down each BEGIN, COMMIT and result as well.
_STATEMENT_EVENTS = ("do_execute", "do_executemany", "do_execute_no_params")
# calling_places, PoolScope._takes, Watched._do_get, and three of SQLAlchemy's pool, up to Pool.connect.
_POOL_FRAMES = 6
_RECHECK_SECONDS = 0.025
# The look for a deadlock is also the loop's heartbeat. A storm's first step may take a quarter of a second.
_BLOCKED_SECONDS = 0.5
_FOREIGN_SECONDS = (
    0.1  # a holder that has not used its connection for so long, and waits for something else
)
_UNFAIR_TURNS = (
    5  # connections taken past the queue, in units of the capacity, while nobody in it was served
)
# Nothing has come back for so long that "busy, but moving" would be a guess.
_STILL_SECONDS = 3.0
_KEPT_SAMPLES = 100_000
_KEPT_DEADLOCKS = 100  # a service that deadlocks anew each half minute does so for days

_scopes: weakref.WeakSet[PoolScope] = weakref.WeakSet()


class Sample(NamedTuple):
    """The pool at one moment: `time.perf_counter()` seconds, connections checked out, tasks waiting."""

    time: float
    checked_out: int
    waiting: int


@dataclass(eq=False, slots=True)
class Holder:
    """A connection that is checked out. `since` is in `time.perf_counter()` seconds."""

    owner: Owner
    since: float
    frames: tuple[RawPlace, ...]
    pool: Pool
    last_user: Owner
    last_used: float
    last_sql: str | None = None


@dataclass(eq=False, slots=True)
class Waiter:
    """A task or thread in the pool's queue. `since` is in `time.perf_counter()` seconds."""

    since: float
    connecting: bool = False


class PoolScope:
    """Watches the pool of one engine from now on, until `close()`.

    `engine` is an `AsyncEngine` or an `Engine`. SQLAlchemy has no event for *waiting*, so the pool's
    class is replaced by a subclass of itself that notes who asks; `recreate()`, and so `dispose()`,
    keeps that class, and the scope goes on with the engine's new pool.

    `samples` holds the curve (a `Sample` for each change, the last 100,000), `deadlocks` a `Verdict`
    for each deadlock that was proved (the first 100 of `deadlock_count`), `timeouts` how many waits ended
    in `sqlalchemy.exc.TimeoutError`, `longest_wait` seconds, `most_held_by_one` the most connections that
    one task or thread had at once.

    `waits` counts the requests for a connection by how long they waited, 0 where one was free and with a
    connect at the end included, `holds` the connections that came back by how long they were checked out;
    `opened` and `closed` are connections to the server.
    """

    def __init__(self, engine: AsyncEngine | Engine, name: str | None = None) -> None:
        self.engine = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        self.name = name or self.engine.pool.logging_name or "pool"
        self.samples: deque[Sample] = deque(maxlen=_KEPT_SAMPLES)
        self.deadlocks: list[Verdict] = []
        self.deadlock_count = 0
        self.waits = Durations()
        self.holds = Durations()
        self.checkouts = 0
        self.opened = 0
        self.closed = 0
        self.timeouts = 0
        self.served_after_wait = 0
        self.longest_wait = 0.0
        self.most_held_by_one = 0
        self._holders: dict[ConnectionPoolEntry, Holder] = {}
        self._waiters: dict[TaskOrThread, Waiter] = {}
        self._waiting = 0  # of the waiters, those that do not connect yet
        self._held_by: Counter[int] = Counter()  # connections checked out, by their owner's key
        self._deadlock: Verdict | None = None
        self._deadlock_seen: list[asyncio.Future[Verdict]] = []
        self._check_due = False
        self._checked_at = 0.0
        self._loop_thread = 0
        self._returned = 0  # connections that came back
        self._returned_at = time.perf_counter()
        self._connect_error: str | None = None  # of the last attempt to connect, where it failed
        # Connections that were out before anybody looked, so that nobody knows whose they are.
        self._unseen = self.checked_out
        self._overtaken = 0  # connections taken past the queue since somebody in it was served
        self._lock = threading.RLock()
        self._class = type(self.engine.pool)
        self.engine.pool.__class__ = _watched(self._class, self)
        _make_queue(self.engine.pool)
        self._listeners = {
            **dict.fromkeys(_STATEMENT_EVENTS, self._executes),
            "connect": self._opens,
            "close": self._closes,
            "close_detached": self._closes,
        }
        for name, listener in self._listeners.items():
            event.listen(self.engine, name, listener)
        _scopes.add(self)

    def close(self) -> None:
        """Stop watching; the pool gets its own class back."""
        if self in _scopes:
            self.engine.pool.__class__ = self._class
            for name, listener in self._listeners.items():
                event.remove(self.engine, name, listener)
            _scopes.discard(self)

    @property
    def pool(self) -> Pool:
        """The engine's pool now; `dispose()` gives the engine a new one."""
        return self.engine.pool

    @property
    def capacity(self) -> int | None:
        """The most connections that can be checked out at once; None where there is no limit."""
        pool = self.pool
        if not isinstance(pool, QueuePool) or pool._max_overflow == -1:
            return None
        return pool.size() + pool._max_overflow

    @property
    def timeout(self) -> float | None:
        """Seconds that a wait may last (`pool_timeout`); None where it lasts for ever."""
        pool = self.pool
        if not isinstance(pool, QueuePool):
            return None
        seconds: float | None = pool.timeout()
        return None if seconds is None or math.isinf(seconds) else seconds

    @property
    def checked_out(self) -> int:
        """Connections checked out, connect attempts in progress included, as the pool counts them."""
        pool = self.pool
        return pool.checkedout() if isinstance(pool, QueuePool) else len(self._holders)

    @property
    def holders(self) -> list[Holder]:
        """The connections that are checked out, oldest first."""
        with self._lock:
            return list(self._holders.values())

    @property
    def waiters(self) -> list[Waiter]:
        """Who is in the queue for a connection, oldest first."""
        with self._lock:
            return [one for one in self._waiters.values() if not one.connecting]

    def verdict(self) -> Verdict:
        """What the pool suffers from at this moment.

        May be called from any thread; only another one can see that the event loop is blocked now.
        """
        return self._judge(self._is_stuck_now())

    def cause(self) -> Cause:
        """The verdict's cause, without the lines that explain it: cheap, for who asks all the time, from any thread."""
        return self._judge(self._is_stuck_now(), report=False).cause

    def trouble(self, known: Collection[Cause]) -> Verdict | None:
        """The verdict, if those who wait now wait for one of the TROUBLES that is not `known`; cheap where they do not.

        `deadlocks` has the deadlocks, and a leak is there at the end, too.
        """
        if not self._waiting:
            return None
        now = time.perf_counter()
        suspected = (
            self._overtaken > _UNFAIR_TURNS * (self.capacity or 0)
            or self._blocked(now) is not None
            or self._connect_error is not None
            or any(self._elsewhere(one, now) is not None for one in self.holders)
        )
        wanted = set(TROUBLES) - set(known)
        # A whole verdict looks at the stack of everybody who waits, and they may be thousands.
        if not suspected or self.cause() not in wanted:
            return None
        verdict = self.verdict()
        return verdict if verdict.cause in wanted else None

    async def deadlock(self) -> Verdict:
        """Wait until a deadlock of this pool is proved, and return it."""
        if self._deadlock is not None:
            return self._deadlock
        seen: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._deadlock_seen.append(seen)
        try:
            return await seen
        finally:
            self._deadlock_seen.remove(seen)

    # What the watched pool reports.

    def _waits(self, who: TaskOrThread, pool: Pool) -> None:
        now = time.perf_counter()
        with self._lock:
            self._waiters[who] = Waiter(now)
            self._waiting += 1
            self._sample(now, pool)
        self._check_soon(who)

    def _connects(self, who: TaskOrThread, pool: Pool) -> None:
        with self._lock:
            waiter = self._waiters.get(who)
            if waiter is not None and not waiter.connecting:
                waiter.connecting = True
                self._waiting -= 1
            self._sample(time.perf_counter(), pool)

    def _leaves(self, who: TaskOrThread, now: float) -> float | None:
        """Take somebody out of the queue; return the seconds in it, None for who was not there."""
        waiter = self._waiters.pop(who, None)
        if waiter is None:
            return None
        self._waiting -= not waiter.connecting
        waited = now - waiter.since
        self.longest_wait = max(self.longest_wait, waited)
        return waited

    def _takes(self, who: TaskOrThread, record: ConnectionPoolEntry, pool: Pool) -> None:
        now = time.perf_counter()
        with self._lock:
            waited = self._leaves(who, now)
            if waited is not None:
                self.served_after_wait += 1
                self._overtaken = 0
            elif self._waiting:
                self._overtaken += 1
            if record in self._holders:  # counted by the attempt within this one
                return
            self._connect_error = None
            self.checkouts += 1
            self.waits.add(waited or 0.0)
            owner = Owner(who)
            holder = Holder(owner, now, calling_places(_POOL_FRAMES), pool, owner, now)
            self._holders[record] = record.info[self] = holder
            self._held_by[owner.key] += 1
            self.most_held_by_one = max(self.most_held_by_one, self._held_by[owner.key])
            self._sample(now, pool)

    def _gives_up(self, who: TaskOrThread, error: BaseException, pool: Pool) -> None:
        now = time.perf_counter()
        with self._lock:
            self.timeouts += isinstance(error, PoolTimeoutError)
            waiter = self._waiters.get(who)
            waited = self._leaves(who, now)
            could_not_connect = waiter is None or waiter.connecting
            # A cancelled attempt harms only those in the queue, whom nobody wakes now.
            if could_not_connect and (isinstance(error, Exception) or self._waiting):
                lines = str(error).splitlines()
                self._connect_error = ": ".join([outcome_of(error), *lines[:1]])
            if waited is not None:
                self.waits.add(waited)
            self._sample(now, pool)

    def _gives_back(self, record: ConnectionPoolEntry, pool: Pool) -> None:
        now = time.perf_counter()
        with self._lock:
            holder = self._holders.pop(record, None)
            if holder is not None:
                self.holds.add(now - holder.since)
                self._held_by[holder.owner.key] -= 1
                if not self._held_by[holder.owner.key]:
                    del self._held_by[holder.owner.key]
            elif self._unseen:
                self._unseen -= 1
            self._deadlock = None  # a connection came back, so the circle is broken
            self._returned += 1
            self._returned_at = now
            self._sample(now, pool)

    def _opens(self, *about: Any) -> None:
        with self._lock:
            self.opened += 1

    def _closes(self, *about: Any) -> None:
        with self._lock:
            self.closed += 1

    def _executes(self, cursor: Any, statement: str, *rest: Any) -> None:
        context: ExecutionContext = rest[-1]
        try:
            holder: Holder | None = context.root_connection.info.get(self)
        except NotImplementedError:
            return  # the dialect's first look at the server, before the pool hands the connection out
        if holder is not None:
            holder.last_sql, holder.last_used = statement, time.perf_counter()
            who = current()
            if holder.last_user.subject is not who:
                holder.last_user = Owner(who)

    def _sample(self, now: float, pool: Pool) -> None:
        if pool is self.engine.pool:  # not one that `dispose()` has replaced
            out = pool.checkedout() if isinstance(pool, QueuePool) else len(self._holders)
            self.samples.append(Sample(now, out, self._waiting))

    # The proof.

    def _check_soon(self, who: TaskOrThread) -> None:
        """Look for a deadlock once this step of the event loop is over: by then the asker sleeps."""
        if isinstance(who, threading.Thread):
            self._check()  # it goes to sleep right after this
            return
        loop = who.get_loop()
        self._loop_thread = threading.get_ident()
        if self._held_by[id(who)]:
            loop.call_soon(self._check)
        if not self._check_due:
            # The circle may also close later, through a task that holds and falls asleep on another.
            self._check_due = True
            self._checked_at = time.perf_counter()
            loop.call_later(_RECHECK_SECONDS, self._check_again, loop)

    def _check_again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._checked_at = time.perf_counter()
        self._check()
        self._check_due = bool(self._waiters)
        if self._check_due:
            loop.call_later(_RECHECK_SECONDS, self._check_again, loop)

    def _check(self) -> None:
        if self._deadlock is not None:
            return
        if self._is_stuck():
            with self._lock:
                self._deadlock = self._judge(stuck=True)
                self.deadlock_count += 1
                if len(self.deadlocks) < _KEPT_DEADLOCKS:
                    self.deadlocks.append(self._deadlock)
            for seen in self._deadlock_seen:
                if not seen.done():
                    seen.set_result(self._deadlock)

    def _wakers(self) -> set[TaskOrThread] | None:
        """Who can give a connection of this pool back; None when the pool can serve without them."""
        pool, capacity = self.pool, self.capacity
        holders = [one for one in self.holders if one.pool is pool]
        if capacity is None or len(holders) < capacity:
            return None
        wakers: set[TaskOrThread] = set()
        for holder in holders:
            # The task that took the connection may have handed it on: either can give it back.
            for owner in {holder.owner, holder.last_user}:
                subject = owner.subject
                if subject is None or not owner.alive:
                    return None  # nobody owns it: a leak, which the garbage collector may end
                wakers.add(subject)
        return wakers

    def _is_stuck(self) -> bool:
        """Whether somebody waits, and no owner of a connection can ever give one back."""
        wakers = self._wakers()
        if wakers is None or not self._waiters:
            return False
        scope_wakers = {scope: scope._wakers() for scope in list(_scopes)}

        def pool_wakers(who: TaskOrThread) -> set[TaskOrThread] | None:
            for scope, holders in scope_wakers.items():
                waiter = scope._waiters.get(who)
                if waiter is not None and holders is not None and not waiter.connecting:
                    asleep = isinstance(who, threading.Thread) or awaited_future(who)
                    return holders if asleep else None
            return None

        return waitgraph.are_stuck(wakers, pool_wakers)

    def _is_stuck_now(self) -> bool:
        """`_is_stuck`, asked from another thread perhaps.

        Then the pool may move between the looks at two holders, and each be seen at a moment when it waits.
        """
        before = self._returned
        return self._is_stuck() and self._returned == before

    def _judge(self, stuck: bool, report: bool = True) -> Verdict:
        """The verdict; without a `report` it lacks places and contenders, which take long to find."""
        now = time.perf_counter()
        with self._lock:
            waiters = {who: one for who, one in self._waiters.items() if not one.connecting}
            holders = list(self._holders.values())
        waiting = {
            who: Waiting(
                name_of(who),
                now - one.since,
                tuple(map(place, self._standing(who))) if report else (),
            )
            for who, one in waiters.items()
        }
        everyone = {*waiters, *(one.owner.subject for one in holders if one.owner.subject)}
        holding = []
        for one in holders:
            subject = one.owner.subject
            chain = [] if subject is None else [subject, *_below(subject)]
            asked = next((waiting[who] for who in chain if who in waiting), None)
            holding.append(
                Holding(
                    owner=one.owner.name,
                    age=now - one.since,
                    places=tuple(map(place, one.frames)) if report else (),
                    alive=one.owner.alive,
                    waits=asked,
                    elsewhere=self._elsewhere(one, now) if asked is None else None,
                    last_sql=one.last_sql,
                )
            )
        return judge(
            pool=self.name,
            at=now,
            capacity=self.capacity,
            checked_out=self.checked_out,
            timeout=self.timeout,
            holding=tuple(holding),
            waiting=tuple(waiting.values()),
            deadlock=stuck,
            blocked=self._blocked(now),
            overtaken=self._overtaken > _UNFAIR_TURNS * (self.capacity or 0),
            connect_error=self._connect_error,
            unseen=self._unseen,
            still=self._is_still(now),
            # A task and those that it awaits compete as one.
            contenders=len(everyone - {below for who in everyone for below in _below(who)})
            if report
            else 0,
        )

    def _standing(self, who: TaskOrThread) -> tuple[RawPlace, ...]:
        """Where somebody stands in the queue; on the loop itself, if a synchronous pool makes it wait there."""
        return sleeping_places(who) or running_places(self._loop_thread)

    def _is_still(self, now: float) -> bool:
        """Whether somebody waits, and no connection has come back for long."""
        since = max((one.since for one in self.waiters[:1]), default=now)
        return now - max(since, self._returned_at) > _STILL_SECONDS

    def _late(self, now: float) -> float:
        """How long ago the event loop should have come round, in seconds; 0 where nobody waits on it."""
        return now - self._checked_at if self._check_due else 0.0

    def _blocked(self, now: float) -> Place | None:
        """Where the event loop is blocked, if somebody waits and the loop has not come round for long."""
        if self._late(now) < _BLOCKED_SECONDS:
            return None
        return next(map(place, running_places(self._loop_thread)), NOWHERE)

    def _elsewhere(self, holder: Holder, now: float) -> Place | None:
        """Where the last user of a connection waits, long since, for something that is not the database."""
        subject = holder.last_user.subject
        # A loop that does not come round may be why it still waits.
        late = max(self._late(now) - _RECHECK_SECONDS, 0.0)
        if subject is None or now - late - holder.last_used < _FOREIGN_SECONDS:
            return None
        return foreign_place(subject)


def _below(task: TaskOrThread) -> set[TaskOrThread]:
    """The tasks that a task awaits, and those that they await; none for a thread."""
    unseen: list[TaskOrThread] = [task]
    seen: set[TaskOrThread] = set()
    while unseen:
        one = unseen.pop()
        children = waitgraph.awaited_tasks(one) if isinstance(one, asyncio.Task) else set()
        unseen.extend(children - seen)
        seen |= children
    return seen


def _watched(base: type[Any], scope: PoolScope) -> type[Any]:
    """A subclass of a pool's class that tells `scope` what happens to it."""

    class Watched(base):  # type: ignore[misc]
        def recreate(self) -> Any:
            pool = super().recreate()
            _make_queue(pool)
            return pool

        def _do_get(self) -> ConnectionPoolEntry:
            who = current()
            if who in scope._waiters:  # SQLAlchemy's second attempt within one request
                return super()._do_get()  # type: ignore[no-any-return]
            if _must_wait(self):
                scope._waits(who, self)
            try:
                record: ConnectionPoolEntry = super()._do_get()
            except BaseException as error:
                scope._gives_up(who, error, self)
                raise
            scope._takes(who, record, self)
            return record

        def _create_connection(self) -> ConnectionPoolEntry:
            scope._connects(current(), self)
            return super()._create_connection()  # type: ignore[no-any-return]

        def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
            try:
                super()._do_return_conn(record)
            finally:
                scope._gives_back(record, self)

    return Watched


def _make_queue(pool: Any) -> None:
    """Have an asynchronous pool make its queue now: at the first look at it, two threads might make one each."""
    if isinstance(pool, QueuePool):
        pool.checkedin()


def _must_wait(pool: Any) -> bool:
    """Whether a request finds neither an idle connection nor room for another."""
    return (
        isinstance(pool, QueuePool)
        and pool._max_overflow > -1
        and pool._overflow >= pool._max_overflow
        and pool._pool.empty()
    )
