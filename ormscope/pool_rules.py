"""PoolRules: what a test may not do with a pool's connections, watched while it runs.

Every request of an engine for a connection goes through `Engine.raw_connection`, which stands in for it on the class
while a test runs: so each engine is found when it is used first, whenever it was made, and gets a PoolScope until the
test is over.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Dialect, Engine
from sqlalchemy.pool import Pool, PoolProxiedConnection, SingletonThreadPool, StaticPool

from ormscope import internals, proof, waitgraph
from ormscope.activity import activity_of
from ormscope.hooks import logger
from ormscope.ledger import Holder
from ormscope.owners import TaskOrThread, current, living
from ormscope.places import NOWHERE, Place, calling_places, is_library, is_users, own_line, places
from ormscope.pool import PoolScope
from ormscope.stacks import steps_of

if TYPE_CHECKING:
    from ormscope.pytest_plugin import Rules

_GRACE_SECONDS = 1.0  # for another thread, such as that of a server, to end what it does
_GRACE_PAUSE = 0.01
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.025  # seconds between two looks at who waits
_KEPT_CHECKOUTS = 1000  # before those that have come back are forgotten


class PoolRuleError(AssertionError):
    """A request for a second connection that would have had to wait, perhaps for ever; nothing was checked out."""


@dataclass(frozen=True)
class Violation:
    """A rule that was broken: its name, the pool's, and the report. `taken` and `line` are the two lines.

    `line` is where the second connection was asked for, or where the foreign await was; for a connection that was not
    given back it is the same as `taken`. `count` is how often that happened there.
    """

    rule: str
    pool: str
    taken: Place
    line: Place
    what: str
    count: int = 1

    def __str__(self) -> str:
        times = f", {self.count} times" if self.count > 1 else ""
        return _REPORTS[self.rule](self, times)


class _Checkout:
    """A connection that was handed out while the test ran."""

    def __init__(
        self, holder: Holder, scope: PoolScope, fairy: PoolProxiedConnection, lost: list[_Checkout]
    ) -> None:
        self.holder = holder
        self.scope = scope
        self.thread = threading.current_thread()
        # Called before SQLAlchemy's own, which takes what was lost back to the pool: the newest is called first.
        self._handle = weakref.ref(fairy, lambda _: None if self.is_back else lost.append(self))

    @property
    def is_back(self) -> bool:
        return self.holder.record is None


class PoolRules:
    """Watches one test: `start()`, `end_call()` when it has run, `stop()` when its fixtures are down.

    `violations` are what was seen so far. What fails in the watching costs the test nothing: `failure` then says what,
    it is logged, and from then on nothing is watched.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.failure: BaseException | None = None
        self._found: dict[tuple[str, str, Place, Place, str], int] = {}
        self._scopes: dict[Pool, PoolScope] = {}
        self._checkouts: list[_Checkout] = []
        self._lost: list[_Checkout] = []
        self._lost_told = 0
        # Replaced, never changed: it is asked in a thread of its own.
        self.loop_threads: frozenset[threading.Thread] = frozenset()
        self._lock = threading.RLock()
        self._in_call = False
        self._since = 0.0
        self._thread = threading.current_thread()
        self._watch: _AwaitWatch | None = None
        self._restore: Callable[[], None] | None = None

    def start(self) -> None:
        """Watch from now on; connections that are checked out already are nobody's fault."""
        if self._restore is None:
            self._since, self._in_call = time.perf_counter(), True
            self._restore = _stand_in(self)

    def end_call(self, decide: bool) -> None:
        """The test has run: what its fixtures do now is theirs. With `decide`, there are none to give anything back."""
        self._in_call = False
        if self._watch is not None:
            self._watch.stop()
        self._guarded(self._note_lost)
        if decide:
            self._guarded(self._note_left)

    def stop(self) -> None:
        """Stop watching; all engines are as they were."""
        self._in_call = False
        if self._restore is not None:
            self._restore()
        self._guarded(self._note_lost)
        self._guarded(self._note_left)
        self._checkouts.clear()
        for scope in self._scopes.values():
            scope.close()
        self._scopes.clear()

    @property
    def violations(self) -> tuple[Violation, ...]:
        """What was seen so far, one entry for each pair of lines."""
        self._guarded(self._note_lost)
        with self._lock:
            return tuple(Violation(*key, count=count) for key, count in self._found.items())

    def check(self) -> None:
        """Raise AssertionError, with the report, if a rule was broken so far."""
        found = self.violations
        if found:
            raise AssertionError("\n".join(map(str, found)))

    # What `Engine.raw_connection` tells.

    def asks(self, engine: Engine) -> PoolScope | None:
        """Somebody asks for a connection; None where that need not be watched.

        Raises PoolRuleError where it is a second one and would have to wait: the test has failed already.
        """
        __tracebackhide__ = True
        refused: Violation | None = None
        scope: PoolScope | None = None
        try:
            # They have one connection for all, or for all of a thread, and no request ever waits.
            if (
                self._in_call
                and self.failure is None
                and not isinstance(engine.pool, (StaticPool, SingletonThreadPool))
            ):
                scope = self._scope_of(engine)
                if self.rules.second_connection:
                    broken = self._second(scope, engine.pool)
                    refused = broken if internals.must_wait(engine.pool) else None
        except Exception as error:
            self._fails(error)
            return None
        if refused is not None:
            raise PoolRuleError(f"refused, because none is free: {refused}")
        return scope

    def acquired(self, scope: PoolScope, fairy: PoolProxiedConnection) -> None:
        """Somebody has got a connection."""
        self._guarded(lambda: self._keep(scope, fairy))

    def _keep(self, scope: PoolScope, fairy: PoolProxiedConnection) -> None:
        if scope.failure is not None:
            raise RuntimeError(f"its PoolScope has stepped aside: {scope.failure}")
        holder = scope.ledger.holders.get(internals.record_of(fairy))
        if holder is None or not self._in_call:
            return
        with self._lock:
            if len(self._checkouts) >= _KEPT_CHECKOUTS:
                self._checkouts = [checkout for checkout in self._checkouts if not checkout.is_back]
            self._checkouts.append(_Checkout(holder, scope, fairy, self._lost))
            if internals.running_loop() is not None:
                self.loop_threads |= {threading.current_thread()}
                limit = self.rules.held_across_await
                if limit is not None and self._watch is None:
                    self._watch = _AwaitWatch(self, limit)

    def _scope_of(self, engine: Engine) -> PoolScope:
        pool = engine.pool
        with self._lock:
            scope = self._scopes.get(pool)
            if scope is None:
                # dispose() gives an engine another pool, which its scope watches already.
                for known in self._scopes.values():
                    if known.pool is pool:
                        scope = known
                self._scopes[pool] = scope = scope or PoolScope(engine, _name_of(engine))
            return scope

    # A second connection.

    def _second(self, scope: PoolScope, pool: Pool) -> Violation | None:
        held = [holder for holder in scope.ledger.held(pool) if holder.since >= self._since]
        if not held:
            return None
        who = current()
        above = proof.awaiting(who) if isinstance(who, asyncio.Task) else set()
        family: set[TaskOrThread] = {who, *above}
        asks = own_line(places(calling_places()))
        mine = [
            holder
            for holder in held
            if family & users_of(holder)
            # To look who else has it takes a while; once seen, it need not be looked for again.
            and (
                self._is_known(own_line(places(holder.frames)), asks)
                or not _is_handed_on(holder, family, self.loop_threads)
            )
        ]
        if not mine:
            return None
        holder = max(mine, key=lambda known: known.since)
        by = "the same thread" if isinstance(who, threading.Thread) else "the same task"
        if who not in users_of(holder):
            by = "a task that the holder awaits"
        return self._note("second_connection", scope, own_line(places(holder.frames)), asks, by)

    def _is_known(self, taken: Place, asks: Place) -> bool:
        with self._lock:
            return any(
                key[0] == "second_connection" and key[2:4] == (taken, asks) for key in self._found
            )

    # Connections that do not come back.

    def _note_lost(self) -> None:
        """Those whose last reference has gone: the garbage collector has taken them back, nobody else would have."""
        lost = self._lost[self._lost_told :]
        self._lost_told += len(lost)
        for checkout in lost:
            self._note_not_returned(checkout, "the garbage collector took it back")

    def _note_left(self) -> None:
        """Those that are still out, and that nobody who is still at work has."""
        if not self.rules.left_checked_out:
            return
        self._wait_for_other_threads()
        left = self._left()
        # Where those who had it are over, to look who else may have it is not worth seconds in a large heap.
        in_use = [checkout.holder for checkout in left if self._others(checkout.holder)]
        if in_use:
            proof.look_for_users(in_use)
        for checkout in left:
            # What a task or thread that is not over can still use, it can still give back.
            if not checkout.is_back and not self._others(checkout.holder):
                self._note_not_returned(checkout, "still checked out")
        self._checkouts = [checkout for checkout in self._checkouts if checkout not in left]

    def _others(self, holder: Holder) -> set[TaskOrThread]:
        """Who can use a connection and is not over, but for the thread of the test."""
        return proof.live_users(holder) - {self._thread}

    def _left(self) -> list[_Checkout]:
        with self._lock:
            return [checkout for checkout in self._checkouts if not checkout.is_back]

    def _wait_for_other_threads(self) -> None:
        end = time.perf_counter() + _GRACE_SECONDS
        while time.perf_counter() < end and any(
            checkout.thread is not self._thread and checkout.thread.is_alive()
            for checkout in self._left()
        ):
            time.sleep(_GRACE_PAUSE)

    def _note_not_returned(self, checkout: _Checkout, what: str) -> None:
        if self.rules.left_checked_out:
            line = own_line(places(checkout.holder.frames))
            self._note("left_checked_out", checkout.scope, line, line, what)

    # A foreign await.

    def watched(self) -> list[tuple[PoolScope, Holder]]:
        """The connections that are checked out now, and were taken by the test."""
        with self._lock:
            scopes = set(self._scopes.values())
        return [
            (scope, holder)
            for scope in scopes
            for holder in scope.holders
            if holder.since >= self._since
        ]

    def held_across(self, scope: PoolScope, holder: Holder, line: Place, what: str) -> None:
        """Somebody has held a connection for too long across an await of something else."""
        self._note("held_across_await", scope, own_line(places(holder.frames)), line, what)

    # What fails.

    def _note(self, rule: str, scope: PoolScope, taken: Place, line: Place, what: str) -> Violation:
        key = (rule, scope.name, taken, line, what)
        with self._lock:
            self._found[key] = count = self._found.get(key, 0) + 1
        return Violation(*key, count=count)

    def _guarded(self, step: Callable[[], object]) -> None:
        if self.failure is None:
            try:
                step()
            except Exception as error:
                self._fails(error)

    def _fails(self, error: Exception) -> None:
        if self.failure is None:
            self.failure, self._in_call = error, False
            logger.error("the rules of a pool could not be watched", exc_info=error)

    def watch_failed(self, error: Exception) -> None:
        """The look at who waits has failed; nothing more is watched."""
        self._fails(error)


# Every engine's requests.


def _stand_in(rules: PoolRules) -> Callable[[], None]:
    """Let rules hear of every engine's requests; returns what undoes that."""
    original = Engine.raw_connection

    def raw_connection(engine: Engine) -> PoolProxiedConnection:
        __tracebackhide__ = True
        scope = rules.asks(engine)
        fairy = original(engine)
        if scope is not None:
            rules.acquired(scope, fairy)
        return fairy

    def restore() -> None:
        # Where somebody has put his own before it meanwhile, it stays below that, and does nothing any more.
        if Engine.raw_connection is raw_connection:
            Engine.raw_connection = original  # type: ignore[method-assign]

    Engine.raw_connection = raw_connection  # type: ignore[method-assign,assignment]
    return restore


# Who has a connection.


def users_of(holder: Holder) -> set[TaskOrThread]:
    """Who has a connection, as far as its use tells: who took it, and who used it last.

    Only the latter where that is somebody on his own, for whom the taker does not wait: it was handed on.
    """
    owner, last = holder.owner.subject, holder.last_user.living
    if owner is not None and last is not None and last is not owner:
        is_child = holder.owner.living is not None and last in waitgraph.below(owner)
        return {owner, last} if is_child else {last}
    return proof.live_users(holder)


def _is_handed_on(
    holder: Holder, family: set[TaskOrThread], loop_threads: Iterable[threading.Thread]
) -> bool:
    """Whether somebody outside of the family, for whom none of them waits, can use a connection, too."""
    tasks = [member for member in family if isinstance(member, asyncio.Task)]
    proof.look_for_users([holder], tasks)
    found = living(holder.users or ())
    # What was found is true for this moment only: the next who asks shall look himself.
    holder.users = None
    known = family | {child for member in family for child in waitgraph.below(member)}
    # A thread that runs a loop can reach what its tasks have, and does nothing with it.
    return bool(found - known - (set(loop_threads) if tasks else set()))


def _name_of(engine: Engine) -> str:
    return engine.pool.logging_name or engine.url.render_as_string(hide_password=True)


# Who waits for something else.


@dataclass
class _Wait:
    """An await that a holder is in: what it awaits there, and how many seconds that has been seen to last."""

    awaited: tuple[weakref.ref[Any], ...]
    seen: float
    limit: float
    seconds: float = 0.0
    is_told: bool = False

    def is_of(self, awaited: tuple[weakref.ref[Any], ...]) -> bool:
        return len(awaited) == len(self.awaited) and all(
            before() is not None and before() is now()
            for before, now in zip(self.awaited, awaited, strict=True)
        )


class _AwaitWatch:
    """Looks from a thread of its own at those who hold a connection, and measures their foreign awaits.

    An await counts from the first look that sees it to the last, and only the time in which its loop answered: so it
    has lasted at least as long, and a blocked loop is not taken for it.
    """

    def __init__(self, rules: PoolRules, limit: float) -> None:
        self._rules = rules
        self._limit = limit
        self._pause = min(max(limit / 8, _SHORTEST_PAUSE), _LONGEST_PAUSE)
        self._waits: dict[Holder, _Wait] = {}
        self._answered: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._asked: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._ended = threading.Event()
        self._runner = threading.Thread(target=self._run, name="ormscope rules", daemon=True)
        self._runner.start()

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        self._runner.join()

    def _run(self) -> None:
        while not self._ended.wait(self._pause):
            try:
                self._look()
            except Exception as error:
                self._rules.watch_failed(error)
                return

    def _look(self) -> None:
        waits: dict[Holder, _Wait] = {}
        answered = {loop for loop in list(self._asked) if loop in self._answered}
        for scope, holder in self._rules.watched():
            found = _foreign_await(holder, scope.engine.dialect)
            if found is None:
                continue
            awaited, loops, line, what = found
            now = time.perf_counter()
            wait = self._waits.get(holder)
            if wait is None or not wait.is_of(awaited):
                wait = _Wait(awaited, now, self._limit)
            elif loops <= answered:
                wait.seconds += now - wait.seen
            wait.seen = now
            waits[holder] = wait
            if wait.seconds > wait.limit and not wait.is_told:
                wait.is_told = self._tell(scope, holder, line, what)
                wait.limit *= 2  # until it is looked at again who has it
            for loop in loops:
                self._ask(loop)
        self._waits = waits

    def _ask(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let a loop answer until the next look."""
        if loop in self._asked and loop not in self._answered:
            return
        self._answered.discard(loop)
        self._asked.add(loop)
        try:
            loop.call_soon_threadsafe(self._answered.add, loop)
        except RuntimeError:
            if not loop.is_closed():
                raise
            logger.debug("a loop was closed before it could answer")

    def _tell(self, scope: PoolScope, holder: Holder, line: Place, what: str) -> bool:
        """Say so, unless somebody else has the connection, too; returns whether it was said."""
        users = users_of(holder)
        family = set(users)
        for user in users:
            if isinstance(user, asyncio.Task):
                family |= proof.awaiting(user)
        if _is_handed_on(holder, family, self._rules.loop_threads):
            return False
        self._rules.held_across(scope, holder, line, what)
        return True


def _foreign_await(
    holder: Holder, dialect: Dialect
) -> tuple[tuple[weakref.ref[Any], ...], frozenset[asyncio.AbstractEventLoop], Place, str] | None:
    """What those who have a connection await, on which loops, in which line; None where one of them is at work."""
    if holder.statements:
        return None
    users = sorted(users_of(holder), key=id)
    awaited = []
    line, what = NOWHERE, ""
    for user in users:
        if not isinstance(user, asyncio.Task):
            return None  # whether a thread waits, or computes, cannot be seen
        activities = [activity_of(task, dialect) for task in (user, *waitgraph.below(user))]
        # In the queue of a pool, it waits for the database as well.
        if any(seen.doing != "elsewhere" or seen.what == "another pool" for seen in activities):
            return None
        step = _awaited_in_own_code(user)
        if step is None:
            return None
        awaited.append(weakref.ref(step))
        if not line.line or activities[0].what != "tasks":
            line, what = activities[0].place, activities[0].what
    loops = frozenset(user.get_loop() for user in users if isinstance(user, asyncio.Task))
    return (tuple(awaited), loops, line, what) if awaited else None


def _awaited_in_own_code(task: asyncio.Task[Any]) -> Any:
    """What the innermost function of the program's own awaits, so that one await can be told from the next."""
    steps = steps_of(task)
    own = [
        number
        for number, (_, frame) in enumerate(steps)
        if is_users(frame) and not is_library(frame.f_code.co_filename)
    ]
    following = own[-1] + 1 if own else 0
    return steps[following][0] if following < len(steps) else internals.awaited_future(task)


# The reports.


def _second_report(found: Violation, times: str) -> str:
    return (
        f"asks for a second connection while it holds one (rule second_connection{times})\n"
        f"  pool   {found.pool}\n"
        f"  holds  {found.taken}\n"
        f"  asks   {found.line}\n"
        f"  by     {found.what}\n"
        f"  fix    use the connection that is held, or give it back first"
    )


def _left_report(found: Violation, times: str) -> str:
    return (
        f"a connection was not given back (rule left_checked_out{times})\n"
        f"  pool   {found.pool}\n"
        f"  taken  {found.taken}\n"
        f"  state  {found.what}\n"
        f"  fix    close it where it was opened (with, async with)"
    )


def _held_report(found: Violation, times: str) -> str:
    return (
        f"holds a connection across a foreign await (rule held_across_await{times})\n"
        f"  pool   {found.pool}\n"
        f"  holds  {found.taken}\n"
        f"  waits  {found.line}{f', for {found.what}' if found.what else ''}\n"
        f"  fix    give the connection back before it waits: commit the session, or leave the block"
    )


_REPORTS: dict[str, Callable[[Violation, str], str]] = {
    "second_connection": _second_report,
    "left_checked_out": _left_report,
    "held_across_await": _held_report,
}
