"""Ledger: who holds a connection of an engine, and who waits for one, as the engine's hooks tell it."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from sqlalchemy.engine import Engine, ExecutionContext
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection, QueuePool

from ormscope.durations import Durations
from ormscope.internals import capacity_of, handle_of, parameters_of
from ormscope.owners import Owner, TaskOrThread, current, living
from ormscope.places import RawPlace
from ormscope.server_limits import Setting, settings_in
from ormscope.tracebacks import outcome_of

BEYOND = "more than can be followed"  # by whom a connection is kept
_KEPT_SAMPLES = 100_000
_KEPT_ATTEMPTS = 100  # of connecting
# A thread that has asked for so long is in the queue, whatever it saw before.
_CERTAIN_SECONDS = 0.005


class Sample(NamedTuple):
    """The pool at one moment: `time.perf_counter()` seconds, connections checked out, tasks waiting."""

    time: float
    checked_out: int
    waiting: int


class Holder:
    """A connection that is checked out. `since` and `last_used` are in `time.perf_counter()` seconds.

    `frames` is where it was asked for, `last_sql` what went over it last, `statements` how many are being executed at
    this moment. `users` are the tasks and threads that were found to be able to use it, None where nobody has looked
    since it was used last; `kept_by` says what else keeps it, `is_lost` whether nobody is left who could give it back,
    `is_moving` whether a function that ran just then had it. `local_settings` are the server's time limits that
    statements may have set on it since, by name. `is_stuck`: a proved deadlock goes through the statement that it
    executes.
    """

    # On the class, until they are set: a holder is made for each request, and most are never looked at.
    last_sql: str | None = None
    statements = 0
    users: tuple[Owner, ...] | None = None
    kept_by = ""
    is_lost = False
    is_moving = False
    looked_at = 0.0
    local_settings: dict[str, Setting] | None = None
    is_stuck = False

    def __init__(
        self,
        pool: Pool,
        who: TaskOrThread,
        frames: tuple[RawPlace, ...],
        since: float,
        record: ConnectionPoolEntry,
    ) -> None:
        self.owner = self.last_user = Owner(who)
        self.since = self.last_used = since
        self.frames = frames
        self.pool = pool
        self.record: ConnectionPoolEntry | None = record  # None once it has come back

    def handle(self) -> PoolProxiedConnection | None:
        """What the program holds of the connection; None while it is handed over, or comes back."""
        record = self.record
        return None if record is None else handle_of(record)

    def takers(self) -> set[TaskOrThread]:
        """Who took it and who used it last, as far as they can still run."""
        return living((self.owner, self.last_user))


@dataclass(eq=False)
class Waiter:
    """A task or thread that asked for a connection. `since` is in `time.perf_counter()` seconds, `frames` where it did.

    It is not in the queue any more once it connects.
    """

    pool: Pool
    who: TaskOrThread
    frames: tuple[RawPlace, ...]
    since: float
    certain: bool
    in_queue: bool = True
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
        on_queue: Callable[[TaskOrThread, bool], object],
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
        self._has_timed_out = False  # a WeakSet is slow to say
        self._queue_lengths: Counter[int] = Counter()  # by the pool's id
        self._unseen = self.checked_out
        self._taken: weakref.WeakSet[ConnectionPoolEntry] = weakref.WeakSet()
        self._held_by: dict[int, int] = {}  # connections checked out, by their owner's key
        self._failed_as = 0
        self._on_queue, self._on_answer = on_queue, on_answer

    # What the hooks tell.

    def queued(
        self,
        pool: Pool,
        who: TaskOrThread,
        frames: tuple[RawPlace, ...],
        since: float,
        certain: bool,
    ) -> None:
        """Somebody asks for a connection, and waits where it is `certain` that none is free."""
        waiters = self.waiters
        if who in waiters:  # SQLAlchemy's second attempt within one request
            return
        with self.lock:
            if not waiters:
                self.waiting_began = since
            waiters[who] = Waiter(pool, who, frames, since, certain)
            if certain:
                self._queue_lengths[id(pool)] += 1
                if self.samples is not None:
                    self._sample(since, pool)
        self._on_queue(who, id(who) in self._held_by)

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
        self._failed_as = 0
        self._settings[record] = {}
        self.attempts.append(Attempt(time.perf_counter(), "", False))

    def connect_failed(self, error: BaseException, is_the_attempt: bool) -> None:
        """A connection to the server could not be opened (`is_the_attempt`), or not be made ready."""
        if not is_the_attempt and self._failed_as == id(error):  # told by the attempt within
            self._failed_as = 0
            return
        self._failed_as = id(error) if is_the_attempt else 0
        cancelled = not isinstance(error, Exception)
        self.counts.connects_failed += not cancelled
        text = ": ".join([outcome_of(error), *str(error).splitlines()[:1]])
        self.attempts.append(Attempt(time.perf_counter(), text, cancelled))

    def acquired(
        self,
        pool: Pool,
        who: TaskOrThread,
        frames: tuple[RawPlace, ...],
        record: ConnectionPoolEntry,
    ) -> None:
        """A connection was checked out; SQLAlchemy may still look whether it is alive."""
        if record in self.holders:
            if isinstance(pool, QueuePool):
                return  # told by the attempt within this one
            with self.lock:
                self._drop(record)  # several use the one connection of a StaticPool
        counts = self.counts
        now = time.perf_counter()
        holder = Holder(pool, who, frames, now, record)
        key = holder.owner.key
        with self.lock:
            waiter = self.waiters.pop(who, None)
            waited = 0.0 if waiter is None else now - waiter.since
            self.last_movement = now
            counts.checkouts += 1
            counts.waits.add(waited)
            if waited > counts.longest_wait:
                counts.longest_wait = waited
            if waiter is not None and waiter.certain:
                if waiter.in_queue:  # as `_leaves_queue` has it, without a call for each checkout
                    waiter.in_queue = False
                    self._queue_lengths[id(waiter.pool)] -= 1
                counts.served_after_wait += 1
                self.overtaken = 0
            elif self._queue_lengths[id(pool)]:
                self.overtaken += 1
                self.overtaken_at = now
            if self._has_timed_out:
                self.timed_out.discard(who)
                self._has_timed_out = bool(self.timed_out)
            if self._unseen:
                self._taken.add(record)
            self.holders[record] = holder
            held = self._held_by[key] = self._held_by.get(key, 0) + 1
            if held > counts.most_held_by_one:
                counts.most_held_by_one = held
            if self.samples is not None:
                self._sample(now, pool)

    def acquire_failed(self, pool: Pool, error: BaseException) -> None:
        """Whoever asked for a connection got none."""
        now, who = time.perf_counter(), current()
        waiter = self.waiters.pop(who, None)
        with self.lock:
            # Else it did not wait, or was told by the attempt within this one.
            if waiter is not None:
                if isinstance(error, PoolTimeoutError):
                    self.counts.timeouts += 1
                    self.timed_out.add(who)
                    self._has_timed_out = True
                self._leaves_queue(waiter)
                waited = now - waiter.since
                self.counts.waits.add(waited)
                self.counts.longest_wait = max(self.counts.longest_wait, waited)
            self._sample(now, pool)

    def released(self, record: ConnectionPoolEntry) -> None:
        """A connection is about to come back to its pool."""
        now = time.perf_counter()
        with self.lock:
            holder = self._drop(record)
            if holder is not None:
                self.counts.holds.add(now - holder.since)
                self.last_taken[record] = holder
            elif self._unseen and record not in self._taken and current() not in self.waiters:
                self._unseen -= 1
            self.returned += 1
            self.last_movement = now

    def available(self, pool: Pool) -> None:
        """A connection has come back to its pool."""
        if self.samples is not None:
            self._sample(time.perf_counter(), pool)

    def closed(self) -> None:
        """A connection to the server is closed."""
        self.counts.closed += 1

    def recreated(self, pool: Pool) -> None:
        """The engine gets another pool: what happened to the queue of the old one is over."""
        if isinstance(pool, QueuePool):
            pool.checkedin()  # makes its queue now: at the first look, two threads might make one each
        self.overtaken = 0

    def statement_begins(
        self, record: ConnectionPoolEntry, statement: str, context: ExecutionContext
    ) -> None:
        """A statement goes to the server."""
        holder = self.holders.get(record)
        if holder is None:
            return
        lowered = statement.lower()
        # As `settings_in` asks, but without a call for each statement.
        if "timeout" in lowered or "set_config" in lowered:
            for setting in settings_in(statement, parameters_of(context)):
                self._note_setting(holder, setting)
        holder.last_sql = statement
        holder.statements += 1
        if holder.users is not None:
            holder.users, holder.is_lost = None, False
        who = current()
        if holder.last_user.reference() is not who:
            holder.last_user = Owner(who)

    def statement_ends(self, record: ConnectionPoolEntry) -> None:
        """The server has answered, or will not."""
        holder = self.holders.get(record)
        if holder is not None and holder.statements:
            holder.statements -= 1
            holder.last_used = time.perf_counter()
            if holder.is_stuck:
                holder.is_stuck = False
                self._on_answer(holder)

    def _note_setting(self, holder: Holder, setting: Setting) -> None:
        """A statement may set a time limit: for as long as the connection is open, or out of the pool."""
        record = holder.record
        known = None if record is None else self._settings.get(record)
        if known is not None and not setting.is_local:
            known[setting.name] = setting
        holder.local_settings = {**(holder.local_settings or {}), setting.name: setting}

    def _drop(self, record: ConnectionPoolEntry) -> Holder | None:
        holder = self.holders.pop(record, None)
        if holder is not None:
            key = holder.owner.key
            held = self._held_by[key] - 1
            if held:
                self._held_by[key] = held
            else:
                del self._held_by[key]
            holder.record = None
        return holder

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

    def held(self, pool: Pool) -> list[Holder]:
        """The connections of a pool that are checked out, oldest first."""
        with self.lock:
            return [holder for holder in self.holders.values() if holder.pool is pool]

    def settings(self, holder: Holder) -> dict[str, Setting] | None:
        """The server's time limits that statements may have set on a connection; None where not all were seen."""
        record = holder.record
        known = None if record is None else self._settings.get(record)
        return None if known is None else {**known, **(holder.local_settings or {})}

    def pools_in_demand(self) -> set[Pool]:
        """The pools that connections are out of, while somebody waits for one."""
        with self.lock:
            return {holder.pool for holder in self.holders.values()} if self.waiters else set()

    def queue(self, pool: Pool) -> list[Waiter]:
        """Who stands in a pool's queue, oldest first."""
        now = time.perf_counter()
        # A copy, for who has waited leaves without the lock: whoever asks from another thread would meet that.
        return [w for w in list(self.waiters.values()) if w.pool is pool and w.waits(now)]

    def is_exhausted(self, pool: Pool) -> bool:
        """Whether a pool can serve nobody before a connection comes back, and all who have one are known."""
        capacity = capacity_of(pool)
        return capacity is not None and len(self.held(pool)) >= capacity
