"""PoolScope: who holds a connection of a SQLAlchemy pool, who waits for one, and whether that can end."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Collection
from typing import get_args

from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import Pool, QueuePool

from ormscope import internals, proof, waitgraph
from ormscope.activity import Activity, activity_of
from ormscope.durations import Durations
from ormscope.hooks import attach, detach, logger, step_aside
from ormscope.ledger import Attempt, Holder, Ledger, Sample, Waiter
from ormscope.loop import LoopScope
from ormscope.loops import watch_of
from ormscope.owners import TaskOrThread, current, name_of
from ormscope.places import (
    Place,
    is_users,
    own_line,
    own_place,
    places,
    running_places,
)
from ormscope.proof import Proof
from ormscope.report import report_of
from ormscope.server import ServerReport, ask
from ormscope.stacks import thread_frames
from ormscope.verdict import TROUBLES, Cause, Holding, Snapshot, Verdict, Waiting, judge

# The look for a deadlock is also the loop's heartbeat. A storm's first step may take a quarter of a second.
_BLOCKED_SECONDS = 0.5
_BLOCKED_LOOKS = 3  # at what the loop does, 5 ms apart: it is blocked if that is always the same
# A holder that has not used its connection for so long, and waits for something else.
_FOREIGN_SECONDS = 0.1
_IDLE_SECONDS = (
    1.0  # a connection that nobody has used for so long may be lost, though nobody misses it
)
_LOST_SECONDS = 10.0  # what was lost is not looked for again so soon, unless somebody uses it
# Connections taken past the queue, in units of the capacity, while nobody in it was served; and how long ago at most.
_UNFAIR_TURNS = 5
_UNFAIR_SECONDS = 0.5
_MOVING_SECONDS = 1.0  # something came back so recently that the pool is moving
_STILL_SECONDS = 3.0  # nothing has come back for so long that "busy" would be a guess
_FAILING_SECONDS = 10.0  # attempts to connect that are older say nothing about now
_KNOWN_SECONDS = 60.0  # the last attempt of all is remembered longer
_KEPT_DEADLOCKS = 100  # a service that deadlocks anew each half minute does so for days
_TOLD_SECONDS = 60.0  # so long who was in a broken deadlock is told of it


class PoolScope:
    """Watches the pool of one engine from now on, until `close()`.

    `engine` is an `AsyncEngine` or an `Engine`; `dispose()` gives it another pool, which is watched as well. With a
    `loop`, what blocks the event loop is named also while nobody waits for a connection. `samples=True` keeps the
    curve: a `Sample` for each change, the last 100,000.

    `deadlocks` has a `Verdict` for each deadlock that was proved (the first 100 of `deadlock_count`); each is
    logged, too (`logging.getLogger("ormscope")`). `timeouts` is how many waits ended in
    `sqlalchemy.exc.TimeoutError`, `longest_wait` seconds, `most_held_by_one` the most connections that one task or
    thread had at once. `waits` counts the requests for a connection by how long they waited, 0 where one was free and
    with a connect at the end included, `holds` the connections that came back by how long they were checked out;
    `opened` and `closed` are connections to the server.

    What fails in a PoolScope costs the application nothing: it is logged, and the scope steps aside; `failure` then
    says why, and every verdict is "unknown".
    """

    def __init__(
        self,
        engine: AsyncEngine | Engine,
        name: str | None = None,
        *,
        loop: LoopScope | None = None,
        samples: bool = False,
    ) -> None:
        self.engine = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        self.name = name or self.engine.pool.logging_name or "pool"
        self.loop = loop
        self.deadlocks: list[Verdict] = []
        self.deadlock_count = 0
        self.failure: str | None = None
        self.proof: Proof | None = None
        self.lacking = internals.missing()
        on_queue = proof.ignore if "proof" in self.lacking else proof.begin
        self.ledger = Ledger(self.engine, samples, on_queue, self._on_answer)
        self._last: tuple[Proof, Verdict] | None = None
        self._awaiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[Verdict | None]]] = []
        self._closed = False
        self._lock = threading.Lock()
        if "watching" in self.lacking:
            self.failure = f"{self.lacking['watching']} is gone from SQLAlchemy"
            logger.error("PoolScope %r watches nothing: %s", self.name, self.failure)
            return
        for part in get_args(internals.PoolsPart):
            if part in self.lacking:
                name = self.lacking[part]
                logger.warning("PoolScope %r works without %s: %s is gone", self.name, part, name)
        proof.register(self)
        attach(self, self.engine)

    def close(self) -> None:
        """Stop watching; the engine is as it was."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        detach(self, self.engine)
        proof.unregister(self)
        self.proof = self._last = None
        with self.ledger.lock:
            self.ledger.holders.clear()
            self.ledger.waiters.clear()
        self._tell(None)

    # What has been seen.

    @property
    def is_closed(self) -> bool:
        """Whether it watches no more, because of `close()` or because it has stepped aside."""
        return self._closed

    @property
    def pool(self) -> Pool:
        """The engine's pool now; `dispose()` gives the engine a new one."""
        return self.engine.pool

    @property
    def capacity(self) -> int | None:
        """The most connections that can be checked out at once; None where there is no limit."""
        return internals.capacity_of(self.pool)

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
        return self.ledger.checked_out

    @property
    def holders(self) -> list[Holder]:
        """The connections that are checked out, oldest first."""
        with self.ledger.lock:
            return list(self.ledger.holders.values())

    @property
    def waiters(self) -> list[Waiter]:
        """Who is in the queue for a connection, oldest first."""
        return self.ledger.queue(self.pool)

    @property
    def samples(self) -> deque[Sample]:
        """The curve. Raises ValueError where the scope was made without `samples=True`."""
        if self.ledger.samples is None:
            raise ValueError(
                "no samples were kept; make the scope with PoolScope(engine, samples=True)"
            )
        return self.ledger.samples

    @property
    def waits(self) -> Durations:
        """The requests for a connection, by how long they waited."""
        return self.ledger.counts.waits

    @property
    def holds(self) -> Durations:
        """The connections that came back, by how long they were checked out."""
        return self.ledger.counts.holds

    @property
    def checkouts(self) -> int:
        """Connections handed out."""
        return self.ledger.counts.checkouts

    @property
    def opened(self) -> int:
        """Connections to the server that were opened."""
        return self.ledger.counts.opened

    @property
    def closed(self) -> int:
        """Connections to the server that were closed."""
        return self.ledger.counts.closed

    @property
    def timeouts(self) -> int:
        """Waits that ended in `sqlalchemy.exc.TimeoutError`."""
        return self.ledger.counts.timeouts

    @property
    def connects_failed(self) -> int:
        """Attempts to connect that failed; those that were cancelled are not among them."""
        return self.ledger.counts.connects_failed

    @property
    def served_after_wait(self) -> int:
        """Requests that got a connection after they had waited for one."""
        return self.ledger.counts.served_after_wait

    @property
    def longest_wait(self) -> float:
        """The longest wait that ended, in seconds."""
        return self.ledger.counts.longest_wait

    @property
    def most_held_by_one(self) -> int:
        """The most connections that one task or thread had at once."""
        return self.ledger.counts.most_held_by_one

    # What it means.

    def verdict(self) -> Verdict:
        """What the pool suffers from at this moment.

        May be called from any thread; only another one can see that the event loop is blocked now. A task whose wait
        has just ended in a timeout, because of a deadlock, is told of that deadlock.
        """
        return self._verdict(thorough=True)

    def _verdict(self, thorough: bool) -> Verdict:
        """The verdict; only where it is to be `thorough` is a leak looked for that nobody suffers from yet."""
        try:
            if not self.failure and not self._closed:
                told = self._broken_for(current())
                if told is not None:
                    return told
                if self.ledger.waiters and "proof" not in self.lacking:
                    proof.prove_now()
            return judge(self._snapshot(thorough))
        except Exception as error:
            step_aside(self, error)
            return judge(self._bare_snapshot())

    def verdict_now(self) -> Verdict:
        """The verdict, for who asks all the time: it finds a leak once somebody suffers from it, or after a second."""
        return self._verdict(thorough=False)

    def cause(self) -> Cause:
        """The verdict's cause, for who asks all the time, from any thread."""
        return self.verdict_now().cause

    def trouble(self, known: Collection[Cause]) -> Verdict | None:
        """The verdict, if it is one of the TROUBLES that is not `known`; cheap where nobody waits.

        `deadlocks` has the deadlocks, and a leak is there at the end, too.
        """
        if not self.ledger.waiters and (self.loop is None or self.loop.lag() < _BLOCKED_SECONDS):
            return None
        verdict = self.verdict_now()
        return verdict if verdict.cause in set(TROUBLES) - set(known) else None

    def report(self) -> str:
        """Everything that is held and waited for at this moment, as text, with times in seconds, minutes or hours.

        The verdict's report; each holder with its name, its age, the line where it took the connection, the last SQL,
        and what it does or waits for; each waiter with its name, age and line. Those at the same lines share an entry,
        and after twelve the rest are counted, so the text stays short whatever the load. Names of tasks, lines of code
        and SQL stand in it (without parameters): show it to those who may read your logs. May be called from any
        thread, also while the event loop is blocked. Raises nothing.
        """
        return report_of(self)

    async def deadlock(self) -> Verdict | None:
        """Wait until a deadlock of this pool is proved, among tasks or threads; None once the scope is closed."""
        found = self.proof
        if found is not None and not found.is_timed and self.deadlocks:
            return self.deadlocks[-1]
        if self._closed or self.failure:
            return None
        loop = asyncio.get_running_loop()
        seen: asyncio.Future[Verdict | None] = loop.create_future()
        entry = (loop, seen)
        with self._lock:
            self._awaiting.append(entry)
        try:
            return await seen
        finally:
            with self._lock:
                if entry in self._awaiting:
                    self._awaiting.remove(entry)

    def proved(self, found: Proof) -> None:
        """Called once for each proof that this pool is part of."""
        verdict = judge(self._snapshot(thorough=False))
        self._last = (found, verdict)
        if found.is_timed:
            return
        self.deadlock_count += 1
        if len(self.deadlocks) < _KEPT_DEADLOCKS:
            self.deadlocks.append(verdict)
        logger.error("%s", verdict)
        self._tell(verdict)

    def _tell(self, verdict: Verdict | None) -> None:
        with self._lock:
            awaiting, self._awaiting = self._awaiting, []
        for loop, seen in awaiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_set, seen, verdict)

    async def ask_server(self) -> ServerReport:
        """Ask PostgreSQL, over a connection outside of the pool, who waits there for whom; it takes 5 s at most.

        Finds who is blocked, slow, or idle in a transaction, and deadlocks through a lock in the server. What it
        proves is from then on known to `verdict()`, `deadlock()` and `deadlocks` as if it had been proved without the
        server, until a connection comes back or a statement ends. Raises nothing: the report says what could not be
        asked.
        """
        return await ask(self)

    # What the hooks and the ledger tell.

    def released(self, pool: Pool) -> None:
        """Called for each connection that comes back while a deadlock is proved: its pool is stuck no more."""
        proof.withdraw(lambda found: id(pool) in found.pools)

    def _on_answer(self, holder: Holder) -> None:
        proof.withdraw(lambda found: holder.last_user.subject in found.in_server)

    def _broken_for(self, who: TaskOrThread) -> Verdict | None:
        """The deadlock that somebody was part of until a moment ago."""
        last = self._last
        if last is None:
            return None
        found, verdict = last
        if found.broken_at is None:
            return None
        if time.perf_counter() - found.broken_at > _TOLD_SECONDS:
            self._last = None
            return None
        if who not in found.members and who not in self.ledger.timed_out:
            return None
        # Whoever has got a connection since is concerned with something else.
        since = any(
            holder.owner.subject is who and holder.since > found.broken_at
            for holder in self.holders
        )
        return None if since else verdict

    # The snapshot.

    def _bare_snapshot(self) -> Snapshot:
        return Snapshot(
            pool=self.name,
            at=time.perf_counter(),
            capacity=self.capacity,
            checked_out=self.checked_out,
            timeout=self.timeout,
            holding=(),
            waiting=(),
            failure=self.failure or "",
            lacking=self.lacking.get("proof", ""),
            database=self.engine.dialect.name,
        )

    def _snapshot(self, thorough: bool) -> Snapshot:
        if self.failure:
            return self._bare_snapshot()
        now, pool, ledger = time.perf_counter(), self.pool, self.ledger
        queue = ledger.queue(pool)
        self._look_for_orphans(now, thorough or bool(queue))
        holding, behind = self._holding(now)
        attempts = [
            attempt for attempt in list(ledger.attempts) if now - attempt.time < _FAILING_SECONDS
        ]
        error = self._connect_error(now, bool(queue))
        held: Counter[str] = Counter(holder.owner for holder in holding if holder.waits is not None)
        found, below = self.proof, internals.pool_below(pool)
        return Snapshot(
            below="" if below is None else f"{type(below).__name__} {below.name!r}",
            below_waiting=0 if below is None else below.get_stats().get("requests_waiting", 0),
            pool=self.name,
            at=now,
            capacity=self.capacity,
            checked_out=self.checked_out,
            timeout=self.timeout,
            holding=holding,
            waiting=_in_line(queue, now, self.name),
            proved=found is not None and id(pool) in found.pools,
            timers=found.timers if found is not None else (),
            limits_above=found.limits_above if found is not None else (),
            behind=_names_of(found.pools - found.about) if found is not None else (),
            through_server=found is not None and bool(found.in_server),
            server_limits=found.server_limits if found is not None else (),
            blocked=self._blocked(now, queue),
            overtaken=self._is_overtaken(now, queue),
            threads=bool(queue) and not isinstance(queue[0].who, asyncio.Task),
            moved=ledger.last_movement > ledger.waiting_began
            and now - ledger.last_movement < _MOVING_SECONDS,
            still=bool(queue)
            and now - max(ledger.last_movement, ledger.waiting_began) > _STILL_SECONDS,
            connect_error=None if error is None else error.error,
            attempts=len(attempts),
            failed=sum(bool(attempt.error) for attempt in attempts),
            cancelled=error is not None and error.cancelled,
            connecting=sum(waiter.connecting for waiter in list(ledger.waiters.values())),
            unseen=ledger.unseen,
            replaced=sum(holder.pool is not pool for holder in self.holders)
            + sum(waiter.pool is not pool for waiter in list(ledger.waiters.values())),
            tasks=self._contenders(queue, behind),
            depth=max(held.values(), default=0) + 1,
            lacking=self.lacking.get("proof", ""),
            database=self.engine.dialect.name,
        )

    def _holding(self, now: float) -> tuple[tuple[Holding, ...], set[TaskOrThread]]:
        """The holders of the present pool, and the tasks that somebody else who competes awaits."""
        holders = self.ledger.held(self.pool)
        below: set[TaskOrThread] = set()
        proved = self.proof
        stopped = set() if proved is None else set(proved.in_server)
        holding = []
        for holder in holders:
            subjects = proof.live_users(holder)
            waits, in_server, through_tasks = None, None, False
            activities: list[Activity] = []
            for subject in subjects:
                children = waitgraph.below(subject)
                below |= children
                entry = next(
                    filter(None, (_queued(who, now) for who in (subject, *children))), None
                )
                locked_out = next((who for who in (subject, *children) if who in stopped), None)
                if locked_out is not None:
                    in_server = own_place(locked_out)
                if entry is not None:
                    if waits is None:
                        pool, waiter = entry
                        waits = _waiting(waiter, now, pool)
                        through_tasks = waiter.who is not subject
                elif holder.statements:
                    activities.append(Activity("database"))
                else:
                    activities.append(activity_of(subject, self.engine.dialect))
            if holder.kept_by and not subjects:
                takers = holder.takers()
                activities += self._idle(takers)
                entry = next(filter(None, (_queued(who, now) for who in takers)), None)
                if entry is not None:
                    waits = _waiting(entry[1], now, entry[0])
            activity = min(activities, key=lambda found: _ORDER.index(found.doing), default=None)
            if activity is not None and not self._is_long_since(holder, now):
                activity = Activity("running") if activity.doing == "elsewhere" else activity
            is_stuck = proved is not None or activity is None
            holding.append(
                Holding(
                    owner=holder.owner.name,
                    age=now - holder.since,
                    places=places(holder.frames),
                    alive=not holder.is_lost,
                    waits=waits if is_stuck else None,
                    in_server=in_server,
                    activity=activity,
                    last_sql=holder.last_sql,
                    kept_by=holder.kept_by,
                    through_tasks=through_tasks,
                )
            )
        return tuple(holding), below

    def _idle(self, takers: set[TaskOrThread]) -> list[Activity]:
        """What those do who took a connection that only a module keeps now, where they are threads without work."""
        found = [
            activity_of(taker, self.engine.dialect)
            for taker in takers
            if isinstance(taker, threading.Thread)
        ]
        return [activity for activity in found if activity.doing == "idle"]

    def _look_for_orphans(self, now: float, thorough: bool) -> None:
        """Find out who has the connections whose takers have ended, or are threads without work."""
        orphans = []
        for holder in self.ledger.held(self.pool):
            if holder.statements or not (thorough or now - holder.last_used > _IDLE_SECONDS):
                continue
            is_sure = holder.users is not None and not holder.is_moving
            if is_sure and now - holder.looked_at < (
                _LOST_SECONDS if holder.is_lost else _FOREIGN_SECONDS
            ):
                continue
            if all(
                not isinstance(subject, asyncio.Task)
                and activity_of(subject, self.engine.dialect).doing == "idle"
                for subject in proof.live_users(holder)
            ):
                orphans.append(holder)
        if orphans:
            proof.look_for_users(orphans)

    def _is_long_since(self, holder: Holder, now: float) -> bool:
        # A loop that does not come round may be why it still waits.
        subject = holder.last_user.subject
        late = watch_of(subject.get_loop()).late(now) if isinstance(subject, asyncio.Task) else 0.0
        return now - late - holder.last_used >= _FOREIGN_SECONDS

    def _contenders(self, queue: list[Waiter], below: set[TaskOrThread]) -> int:
        """How many compete for the pool; a task and those that it awaits compete as one."""
        everyone: set[TaskOrThread] = {waiter.who for waiter in queue}
        for holder in self.ledger.held(self.pool):
            everyone |= proof.live_users(holder)
        return len(everyone - below)

    def _is_overtaken(self, now: float, queue: list[Waiter]) -> bool:
        ledger = self.ledger
        return (
            bool(queue)
            and ledger.overtaken > _UNFAIR_TURNS * (self.capacity or 0)
            and now - ledger.overtaken_at < _UNFAIR_SECONDS
        )

    def _connect_error(self, now: float, waited_for: bool) -> Attempt | None:
        """The last attempt to connect that failed, if they fail now; one that went well in between is no cure."""
        attempts = list(self.ledger.attempts)
        lately = [attempt for attempt in attempts if now - attempt.time < _FAILING_SECONDS]
        failed = [attempt for attempt in attempts if attempt.error and not attempt.cancelled]
        if failed and (
            (attempts[-1] is failed[-1] and (waited_for or now - failed[-1].time < _KNOWN_SECONDS))
            or 2 * sum(attempt in lately for attempt in failed) >= max(len(lately), 1)
        ):
            return failed[-1]
        cancelled = [attempt for attempt in attempts if attempt.cancelled]
        # Whoever is cancelled while connecting wakes nobody, though there is room again.
        has_room = self.capacity is not None and self.checked_out < self.capacity
        return cancelled[-1] if cancelled and waited_for and has_room else None

    def _blocked(self, now: float, queue: list[Waiter]) -> Place | None:
        """Where the event loop is blocked, seen from another thread."""
        loops = {waiter.who.get_loop() for waiter in queue if isinstance(waiter.who, asyncio.Task)}
        for loop in loops:
            watch = watch_of(loop)
            if watch.late(now) >= _BLOCKED_SECONDS and (found := _stands_at(loop, watch.thread)):
                return found
        if self.loop is not None and self.loop.lag() >= _BLOCKED_SECONDS:
            return _stands_at(self.loop.event_loop, self.loop.thread)
        return None


_ORDER = ("running", "database", "elsewhere", "idle")


def _set(seen: asyncio.Future[Verdict | None], verdict: Verdict | None) -> None:
    if not seen.done():
        seen.set_result(verdict)


def _stands_at(loop: asyncio.AbstractEventLoop, thread: int) -> Place | None:
    """Where a loop's thread stands; None if it moves, or if it is the one that asks."""
    if thread == threading.get_ident():
        return None
    seen: set[object] = set()
    for number in range(_BLOCKED_LOOKS):
        if number:
            time.sleep(0.005)
        # Thousands of tasks that each do a little keep a loop busy, but do not block it.
        seen.add(_step_of(loop, thread))
    if len(seen) > 1 or _looks(thread):
        return None
    # The program's own line, not that of the driver below it.
    return own_line(places(running_places(thread)))


def _step_of(loop: asyncio.AbstractEventLoop, thread: int) -> object:
    """What tells one step of a loop from another: its task, or else the frame of its callback."""
    task = asyncio.current_task(loop)
    if task is not None:
        return id(task)
    frames = reversed(thread_frames(thread))
    return id(next((frame for frame in frames if frame.f_code is internals.LOOP_STEP), None))


def _looks(thread: int) -> bool:
    """Whether a loop's thread is in a look of ours, which on a busy machine takes long: no fault of the program."""
    ours = False
    for frame in reversed(thread_frames(thread)):
        if frame.f_code is internals.LOOP_STEP or frame.f_code is internals.LOOP_RUN:
            break
        if is_users(frame):
            return False
        ours = ours or frame.f_globals.get("__package__") == __package__
    return ours


def _names_of(pools: frozenset[int]) -> tuple[str, ...]:
    """The names of the scopes of these pools, which are given by their ids."""
    return tuple(sorted(scope.name for scope in proof.scopes() if id(scope.pool) in pools))


def _queued(who: TaskOrThread, now: float) -> tuple[str, Waiter] | None:
    """Where a task or thread stands in the queue of any watched engine, and the name of its scope."""
    for scope in proof.scopes():
        waiter = scope.ledger.waiters.get(who)
        if waiter is not None and waiter.waits(now):
            return scope.name, waiter
    return None


def _waiting(waiter: Waiter, now: float, pool: str) -> Waiting:
    return Waiting(name_of(waiter.who), now - waiter.since, places(waiter.frames), pool)


def _in_line(queue: list[Waiter], now: float, pool: str) -> tuple[Waiting, ...]:
    """An entry for each, the same for all at the same lines: they may be thousands, and the verdict be kept."""
    # By the id of the places: they are one tuple for the same places, and to hash it takes long.
    entries: dict[int, Waiting] = {}
    for waiter in queue:  # oldest first
        if id(waiter.frames) not in entries:
            entries[id(waiter.frames)] = _waiting(waiter, now, pool)
    return tuple([entries[id(waiter.frames)] for waiter in queue])
