"""Ledger: who holds a connection of an engine, and who waits for one, as the engine's hooks tell it."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy.engine import Engine, ExecutionContext
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection, QueuePool

from ormscope.durations import Durations
from ormscope.internals import (
    capacity_of,
    handle_of,
    parameters_of,
    record_of,
    record_of_statement,
)
from ormscope.owners import Owner, TaskOrThread, current
from ormscope.places import RawPlace, calling_places
from ormscope.server_limits import Setting, settings_in
from ormscope.tracebacks import outcome_of

_KEPT_SAMPLES = 100_000
_KEPT_ATTEMPTS = 100  # of connecting
# A thread that has asked for so long is in the queue, whatever it saw before.
_CERTAIN_SECONDS = 0.005


class Sample(NamedTuple):
    """The pool at one moment: `time.perf_counter()` seconds, connections checked out, tasks waiting."""

    time: float
    checked_out: int
    waiting: int


@dataclass(eq=False, slots=True)
class Holder:
    """A connection that is checked out. `since` is in `time.perf_counter()` seconds.

    `users` are the tasks and threads that were found to be able to use it, None where nobody has looked since
    it was used last; `kept_by` says what else keeps it, `is_lost` whether nobody is left who could give it back,
    `is_moving` whether a function that ran just then had it. `settings` are the server's time limits that statements
    may have set on it, by name; None where not all that it ever executed was seen. `is_stuck`: a proved deadlock goes
    through the statement that it executes.
    """

    owner: Owner
    since: float
    frames: tuple[RawPlace, ...]
    pool: Pool
    handle: weakref.ref[Any]  # to what the program holds of the connection
    last_user: Owner
    last_used: float
    last_sql: str | None = None
    statements: int = 0  # being executed at this moment
    users: tuple[Owner, ...] | None = None
    kept_by: str = ""
    is_lost: bool = False
    is_moving: bool = False
    looked_at: float = 0.0
    settings: dict[str, Setting] | None = None
    is_stuck: bool = False


@dataclass(eq=False, slots=True)
class Waiter:
    """A task or thread that asked for a connection. `since` is in `time.perf_counter()` seconds."""

    who: TaskOrThread
    since: float
    frames: tuple[RawPlace, ...]
    pool: Pool
    certain: bool
    in_queue: bool = True  # not any more once it connects, or looks whether its connection is alive
    connecting: bool = False

    def waits(self, now: float) -> bool:
        """Whether it stands in the queue at this moment."""
        return self.in_queue and (self.certain or now - self.since > _CERTAIN_SECONDS)


class Attempt(NamedTuple):
    """An attempt to connect that has ended: `time.perf_counter()` seconds; `error` is empty where it went well."""

    time: float
    error: str
    cancelled: bool


@dataclass
class Counts:
    """What has happened since the scope was made."""

    checkouts: int = 0
    opened: int = 0
    closed: int = 0
    timeouts: int = 0
    connects_failed: int = 0
    served_after_wait: int = 0
    longest_wait: float = 0.0
    most_held_by_one: int = 0
    waits: Durations = field(default_factory=Durations)
    holds: Durations = field(default_factory=Durations)


class Ledger:
    """The holders and waiters of one engine's pools. Its methods are called by the hooks, from any thread.

    `waiting_began` and `last_movement` are in `time.perf_counter()` seconds: since when there has been a queue
    without a break, and when a connection last came back or was handed out.
    """

    def __init__(
        self,
        engine: Engine,
        samples: bool,
        on_queue: Callable[[Waiter], None],
        on_return: Callable[[Pool], None],
        on_answer: Callable[[Holder], None],
    ) -> None:
        self.engine = engine
        self.lock = threading.RLock()
        self.holders: dict[ConnectionPoolEntry, Holder] = {}
        self.waiters: dict[TaskOrThread, Waiter] = {}
        self.counts = Counts()
        self.samples: deque[Sample] | None = deque(maxlen=_KEPT_SAMPLES) if samples else None
        self.attempts: deque[Attempt] = deque(maxlen=_KEPT_ATTEMPTS)
        self.returned = 0  # connections that came back
        self.last_movement = self.waiting_began = time.perf_counter()
        # Connections taken past the queue since somebody in it was served, and when the last of them was.
        self.overtaken = 0
        self.overtaken_at = 0.0
        # Where a connection that lies in the pool was taken last, and by whom.
        self.last_taken: weakref.WeakKeyDictionary[ConnectionPoolEntry, Holder] = (
            weakref.WeakKeyDictionary()
        )
        # The time limits that statements may have set on each connection that was seen from its beginning on.
        self._settings: weakref.WeakKeyDictionary[ConnectionPoolEntry, dict[str, Setting]] = (
            weakref.WeakKeyDictionary()
        )
        # Whose last wait ended in a timeout.
        self.timed_out: weakref.WeakSet[TaskOrThread] = weakref.WeakSet()
        self._queue_lengths: Counter[int] = Counter()  # by the pool's id
        self._unseen = self.checked_out
        self._taken: weakref.WeakSet[ConnectionPoolEntry] = weakref.WeakSet()
        self._held_by: Counter[int] = Counter()  # connections checked out, by their owner's key
        self._failed_as = 0
        self._on_queue, self._on_return, self._on_answer = on_queue, on_return, on_answer

    # What the hooks tell.

    def queued(self, pool: Pool, certain: bool) -> None:
        """Somebody asks for a connection, and waits where it is `certain` that none is free."""
        who = current()
        if who in self.waiters:  # SQLAlchemy's second attempt within one request
            return
        now = time.perf_counter()
        waiter = Waiter(who, now, calling_places(), pool, certain)
        with self.lock:
            if not self.waiters:
                self.waiting_began = now
            self.waiters[who] = waiter
            if certain:
                self._queue_lengths[id(pool)] += 1
                self._sample(now, pool)
        self._on_queue(waiter)

    def unqueued(self) -> None:
        """Whoever asked has left the queue; the pool may still look whether the connection is alive."""
        waiter = self.waiters.get(current())
        if waiter is not None:
            with self.lock:
                self._leaves_queue(waiter)

    def connecting(self, pool: Pool) -> None:
        """Somebody opens a connection."""
        waiter = self.waiters.get(current())
        with self.lock:
            if waiter is not None:
                waiter.connecting = True
                self._leaves_queue(waiter)
            self._sample(time.perf_counter(), pool)

    def connected(self, record: ConnectionPoolEntry) -> None:
        """A connection to the server was opened, for this place in the pool."""
        self.counts.opened += 1
        self._settings[record] = {}
        self.attempts.append(Attempt(time.perf_counter(), "", False))

    def connect_failed(self, error: BaseException) -> None:
        """A connection to the server could not be opened or set up."""
        if self._failed_as == id(error):  # told by the attempt within this one
            return
        self._failed_as = id(error)
        cancelled = not isinstance(error, Exception)
        self.counts.connects_failed += not cancelled
        text = ": ".join([outcome_of(error), *str(error).splitlines()[:1]])
        self.attempts.append(Attempt(time.perf_counter(), text, cancelled))

    def acquired(self, pool: Pool, fairy: PoolProxiedConnection) -> None:
        """A connection was checked out."""
        record, who, now = record_of(fairy), current(), time.perf_counter()
        waiter = self.waiters.pop(who, None)
        frames = calling_places() if waiter is None else waiter.frames
        owner = Owner(who)
        holder = Holder(owner, now, frames, pool, handle_of(record), owner, now)
        holder.settings = self._settings.get(record)
        with self.lock:
            self._count_wait(waiter, now)
            if waiter is not None and waiter.certain:
                self._leaves_queue(waiter)
                self.counts.served_after_wait += 1
                self.overtaken = 0
            elif self._queue_lengths[id(pool)]:
                self.overtaken += 1
                self.overtaken_at = now
            self.last_movement = now
            if self.timed_out:
                self.timed_out.discard(who)
            self.counts.checkouts += 1
            self.holders[record] = holder
            if self._unseen:
                self._taken.add(record)
            held = self._held_by[owner.key] = self._held_by[owner.key] + 1
            self.counts.most_held_by_one = max(self.counts.most_held_by_one, held)
            self._sample(now, pool)

    def acquire_failed(self, pool: Pool, error: BaseException) -> None:
        """Whoever asked for a connection got none."""
        now = time.perf_counter()
        who = current()
        waiter = self.waiters.pop(who, None)
        with self.lock:
            if isinstance(error, PoolTimeoutError):
                self.counts.timeouts += 1
                self.timed_out.add(who)
            if waiter is not None:
                self._leaves_queue(waiter)
                self._count_wait(waiter, now)
            self._sample(now, pool)

    def released(self, pool: Pool, record: ConnectionPoolEntry) -> None:
        """A connection is about to come back to its pool."""
        now = time.perf_counter()
        with self.lock:
            holder = self.holders.pop(record, None)
            if holder is not None:
                self.counts.holds.add(now - holder.since)
                key = holder.owner.key
                self._held_by[key] -= 1
                if not self._held_by[key]:
                    del self._held_by[key]
                self.last_taken[record] = holder
            elif self._unseen and record not in self._taken and current() not in self.waiters:
                self._unseen -= 1
            self.returned += 1
            self.last_movement = now
        self._on_return(pool)

    def available(self, pool: Pool) -> None:
        """A connection has come back to its pool."""
        self._sample(time.perf_counter(), pool)

    def closed(self) -> None:
        """A connection to the server is closed."""
        self.counts.closed += 1

    def recreated(self, pool: Pool) -> None:
        """The engine gets another pool: what happened to the queue of the old one is over."""
        if isinstance(pool, QueuePool):
            pool.checkedin()  # makes its queue now: at the first look, two threads might make one each
        self.overtaken = 0

    def statement_begins(self, context: ExecutionContext | None, statement: str) -> Holder | None:
        """A statement goes to the server; returns whose connection carries it, where that is known."""
        record = None if context is None else record_of_statement(context)
        holder = None if record is None else self.holders.get(record)
        if context is not None and record is not None and holder is not None:
            for setting in settings_in(statement, lambda: parameters_of(context)):
                self._note_setting(record, holder, setting)
            holder.last_sql, holder.users, holder.is_lost = statement, None, False
            holder.statements += 1
            who = current()
            if holder.last_user.subject is not who:
                holder.last_user = Owner(who)
        return holder

    def statement_ends(self, holder: Holder | None) -> None:
        """The server has answered, or will not."""
        if holder is not None:
            holder.statements -= 1
            holder.last_used = time.perf_counter()
            if holder.is_stuck:
                holder.is_stuck = False
                self._on_answer(holder)

    def _note_setting(self, record: ConnectionPoolEntry, holder: Holder, setting: Setting) -> None:
        """A statement may set a time limit: for as long as the connection is open, or out of the pool."""
        known = self._settings.get(record)
        if known is not None and not setting.is_local:
            self._settings[record] = {**known, setting.name: setting}
        if holder.settings is not None:
            holder.settings = {**holder.settings, setting.name: setting}

    def _count_wait(self, waiter: Waiter | None, now: float) -> None:
        waited = 0.0 if waiter is None else now - waiter.since
        self.counts.waits.add(waited)
        self.counts.longest_wait = max(self.counts.longest_wait, waited)

    def _leaves_queue(self, waiter: Waiter) -> None:
        if waiter.in_queue:
            waiter.in_queue = False
            self._queue_lengths[id(waiter.pool)] -= waiter.certain

    def _sample(self, now: float, pool: Pool) -> None:
        # Not of a pool that `dispose()` has replaced.
        if self.samples is not None and pool is self.engine.pool:
            self.samples.append(Sample(now, self.checked_out, self._queue_lengths[id(pool)]))

    # What can be asked.

    @property
    def checked_out(self) -> int:
        """Connections checked out of the engine's pool, attempts to connect included, as the pool counts them."""
        pool = self.engine.pool
        return pool.checkedout() if isinstance(pool, QueuePool) else len(self.holders)

    @property
    def unseen(self) -> int:
        """Connections that were out before anybody looked, so that nobody knows whose they are."""
        return max(0, min(self._unseen, self.checked_out - len(self.holders)))

    def holds(self, who: TaskOrThread) -> bool:
        """Whether a task or thread has taken a connection that is still out."""
        return self._held_by[id(who)] > 0

    def held(self, pool: Pool) -> list[Holder]:
        """The connections of a pool that are checked out, oldest first."""
        with self.lock:
            return [holder for holder in self.holders.values() if holder.pool is pool]

    def pools_in_demand(self) -> set[Pool]:
        """The pools that connections are out of, while somebody waits for one."""
        with self.lock:
            return {holder.pool for holder in self.holders.values()} if self.waiters else set()

    def queue(self, pool: Pool) -> list[Waiter]:
        """Who stands in a pool's queue, oldest first."""
        now = time.perf_counter()
        with self.lock:
            return [w for w in self.waiters.values() if w.pool is pool and w.waits(now)]

    def is_exhausted(self, pool: Pool) -> bool:
        """Whether a pool can serve nobody before a connection comes back, and all who have one are known."""
        capacity = capacity_of(pool)
        return capacity is not None and len(self.held(pool)) >= capacity
