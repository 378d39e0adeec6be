"""When a deadlock is proved: looks at the wait-for graph, at who can use the connections, and at what time limits run.

One look is not enough: a task that is about to be woken looks like one that sleeps. So a suspicion is held against
everybody who can still use one of the connections (in a thread of its own: that takes longer than a loop may
wait), and then, on the loop and at least one round later, looked at again: only what has not moved at all is proved.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from sqlalchemy.pool import Pool
from sqlalchemy.util.concurrency import greenlet_spawn

from ormscope import internals
from ormscope.hooks import logger, step_aside
from ormscope.ledger import BEYOND, Holder
from ormscope.loops import running_watch, watch_of
from ormscope.owners import Owner, TaskOrThread, living
from ormscope.places import NOWHERE, Place, is_users, place
from ormscope.reach import Users, users_of
from ormscope.stacks import only_looks_up, steps_of
from ormscope.waitgraph import Stuck, Waits, awaited_by, find_stuck, find_stuck_parts

if TYPE_CHECKING:
    from ormscope.pool import PoolScope

_BEYOND_SECONDS = (
    10.0  # what could not be followed is not followed again so soon, for it takes long
)
_PAUSE = 0.025  # seconds between two looks at threads, which have no loop to beat
_KNOWN_SECONDS = 1.0  # so long an answer about who can use a connection is believed
_LONGEST_PAUSE = (
    30.0  # seconds until a suspicion that was not confirmed is looked at again, if nothing moves
)
_CALLBACK_STEPS = 4
_CALLBACK_NODES = 60

_looking = threading.Lock()

# Replaced, never changed: a WeakSet cannot be listed in one thread while another adds to it.
_registered: tuple[weakref.ref[PoolScope], ...] = ()
_registering = threading.Lock()


def scopes() -> list[PoolScope]:
    """All scopes of this process that watch an engine; asked from any thread."""
    return [scope for reference in _registered if (scope := reference()) is not None]


def register(scope: PoolScope) -> None:
    """Let a scope be one of those that are asked for what they know."""
    global _registered
    with _registering:
        _registered = (*map(weakref.ref, scopes()), weakref.ref(scope))


def unregister(scope: PoolScope) -> None:
    """Leave a scope out from now on."""
    global _registered
    with _registering:
        _registered = tuple(weakref.ref(other) for other in scopes() if other is not scope)


@dataclass(eq=False)
class Proof:
    """A proved hold-and-wait: through which pools, who is part of it, and the lines of the time limits that end it.

    `timers` end it, `limits_above` only wake a task that awaits a member, and may then end it. `about` are those of the
    pools that wait for all the others, which may be stuck without them. `in_server` are the members
    that wait for a lock in the server, `server_limits` the server's own limits that may end that, in words.
    """

    pools: frozenset[int]  # their ids; whoever waits in one keeps it
    members: weakref.WeakSet[TaskOrThread]
    timers: tuple[Place, ...]
    limits_above: tuple[Place, ...]
    about: frozenset[int]
    in_server: weakref.WeakSet[TaskOrThread] = field(default_factory=weakref.WeakSet)
    server_limits: tuple[str, ...] = ()
    at: float = field(default_factory=time.perf_counter)
    broken_at: float | None = None

    @property
    def is_timed(self) -> bool:
        """Whether a time limit ends it, or may end it."""
        return bool(self.timers or self.server_limits)


@dataclass(eq=False)
class _Suspicion:
    """Pools that seem stuck, and their holders."""

    stuck: Stuck
    holders: list[Holder]
    returned: dict[int, int]

    @property
    def signature(self) -> object:
        known = {id(member): what for member, what in self.stuck.signature.items()}
        return known, self.returned, list(map(id, self.holders))


# When to look.


def begin(who: TaskOrThread, holds: bool) -> None:
    """Somebody has gone into a queue: look for deadlocks until nobody is in one."""
    if not isinstance(who, asyncio.Task):
        _thread_watch.begin()
        return
    watch = running_watch(who.get_loop())
    # Whoever holds a connection already may have closed the circle.
    if holds or watch.due is None:
        watch.begin(_look, soon=holds)


def ignore(who: TaskOrThread, holds: bool) -> None:
    """What is called in place of `begin` where nothing can be proved."""


def _look(loop: asyncio.AbstractEventLoop, soon: bool) -> bool | None:
    """Look from a loop's own thread, between two of its steps."""
    watched = scopes()
    try:
        if not any(
            isinstance(who, asyncio.Task) and who.get_loop() is loop
            for scope in watched
            for who in list(scope.ledger.waiters)
        ):
            return None
        still = watched if soon else _movement.still(watched)
        suspicion = _suspect(watched, still)
        if suspicion is not None and _investigation.begin(suspicion.signature):
            threading.Thread(
                target=_investigate, args=(suspicion, loop), name="ormscope proof", daemon=True
            ).start()
        return len(still) < len(watched)
    except Exception as error:
        _step_aside(watched, error)
        return None


def _step_aside(watched: Iterable[PoolScope], error: BaseException) -> None:
    """Let all step aside whose waiters were being looked at."""
    for scope in watched:
        if scope.ledger.waiters:
            step_aside(scope, error)


class _ThreadWatch:
    """Looks at the threads in queues, from a thread of its own, until none is left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = False

    def begin(self) -> None:
        with self._lock:
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="ormscope threads", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(_PAUSE)
            watched = scopes()
            with self._lock:
                if not any(
                    isinstance(who, threading.Thread)
                    for scope in watched
                    for who in list(scope.ledger.waiters)
                ):
                    self._running = False
                    return
            try:
                suspicion = _suspect(watched, _thread_movement.still(watched))
                if suspicion is not None and _investigation.begin(suspicion.signature):
                    _investigate(suspicion, None)
            except Exception as error:
                _step_aside(watched, error)


_thread_watch = _ThreadWatch()


class _Investigation:
    """Whether a suspicion is being looked into; one at a time, and the same one ever more seldom."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = False
        self._last: object = None
        self._again_at = 0.0
        self._pause = 0.0

    def begin(self, signature: object) -> bool:
        now = time.perf_counter()
        with self._lock:
            if self._running or (signature == self._last and now < self._again_at):
                return False
            self._pause = (
                min(max(2 * self._pause, _KNOWN_SECONDS), _LONGEST_PAUSE)
                if signature == self._last
                else 0.1
            )
            self._last, self._again_at = signature, now + self._pause
            self._running = True
            return True

    def end(self) -> None:
        with self._lock:
            self._running = False


_investigation = _Investigation()


class _Movement:
    """What has moved since the last look: a pool that gives connections out and takes them back is not stuck."""

    def __init__(self) -> None:
        self._last: weakref.WeakKeyDictionary[PoolScope, int] = weakref.WeakKeyDictionary()

    def still(self, watched: list[PoolScope]) -> list[PoolScope]:
        """Those of the scopes in whose pools nothing has moved."""
        still = []
        for scope in watched:
            moved = scope.ledger.returned + scope.ledger.counts.checkouts
            if self._last.get(scope) == moved:
                still.append(scope)
            self._last[scope] = moved
        return still


_movement = _Movement()
_thread_movement = _Movement()

# The three steps of a proof.


def waits_of(
    watched: Iterable[PoolScope], edges: dict[TaskOrThread, set[TaskOrThread]] | None = None
) -> Waits:
    """Who waits in which queue, and who can give back a connection of each exhausted pool."""
    ledgers = [scope.ledger for scope in watched]
    now = time.perf_counter()

    def queued(who: TaskOrThread) -> Pool | None:
        for ledger in ledgers:
            waiter = ledger.waiters.get(who)
            if waiter is not None and waiter.waits(now):
                return waiter.pool
        return None

    wakers: dict[Pool, set[TaskOrThread]] = {}
    for ledger in ledgers:
        for pool in ledger.pools_in_demand():
            if pool not in wakers and ledger.is_exhausted(pool):
                known = wakers_of(ledger.held(pool))
                if known is not None:
                    wakers[pool] = known
    return Waits(queued, wakers, edges or {})


def wakers_of(holders: list[Holder]) -> set[TaskOrThread] | None:
    """Who can give one of these connections back, as far as it is known; None where nobody, or everybody, can."""
    wakers: set[TaskOrThread] = set()
    for holder in holders:
        if holder.kept_by:
            return None
        subjects = live_users(holder)
        if not subjects and holder.users is not None:
            return None  # a leak, which the garbage collector may end
        wakers |= subjects
    return wakers


def live_users(holder: Holder) -> set[TaskOrThread]:
    """Those who can use a connection: found to, or else who took it and who used it last."""
    users = holder.users  # whoever uses it may set it to None at any moment
    return holder.takers() if users is None else living(users)


def _suspect(watched: list[PoolScope], still: list[PoolScope]) -> _Suspicion | None:
    """Pools of the `still` scopes that seem stuck and are not known to be, if any."""
    asked = {pool for scope in still for pool in scope.ledger.pools_in_demand()}
    if not asked:
        return None
    waits = waits_of(watched)
    known = {
        key
        for proof in [scope.proof for scope in watched]
        if proof is not None and not proof.is_timed
        for key in proof.pools
    }
    new = {pool for pool in waits.wakers if pool in asked and id(pool) not in known}
    if not new:
        return None
    # Where nobody who took a connection is left, somebody else may have it: that has to be found out first.
    orphaned = [
        holder
        for scope in watched
        for pool in new
        for holder in scope.ledger.held(pool)
        if holder.users is None and not live_users(holder)
    ]
    stuck = find_stuck(waits)
    if stuck is None and not orphaned:
        return None
    if stuck is not None and not stuck.pools & new:
        return None
    pools = set() if stuck is None else stuck.pools
    holders = [holder for scope in watched for pool in pools for holder in scope.ledger.held(pool)]
    stuck = stuck or Stuck(set(), set(), {})
    return _Suspicion(
        stuck, list(dict.fromkeys([*holders, *orphaned])), returned_to(watched, stuck.pools)
    )


def returned_to(watched: Iterable[PoolScope], pools: set[Any]) -> dict[int, int]:
    """How many connections have come back to the engines of these pools, by the id of the engine's scope."""
    return {
        id(scope): scope.ledger.returned
        for scope in watched
        if any(holder.pool in pools for holder in scope.holders)
    }


def look_for_users(holders: list[Holder], suspects: Collection[asyncio.Task[Any]] = ()) -> bool:
    """Find out who can use connections, and note it; whether nothing can have moved meanwhile."""
    with _looking:
        near = [holder for holder in holders if not _is_beyond(holder)]
        exact = _look_once(near, suspects) and near == holders
        lost = [holder for holder in near if holder.is_lost]
        if lost:
            # Whatever moved during the look may have been missed: what is lost is lost a moment later, too.
            time.sleep(_PAUSE)
            _look_once(lost, ())
    return exact


def _is_beyond(holder: Holder) -> bool:
    """Whether a search that did not come to its end has looked for a holder's users of late: it would not now."""
    return holder.kept_by == BEYOND and time.perf_counter() - holder.looked_at < _BEYOND_SECONDS


def _look_once(holders: list[Holder], suspects: Collection[asyncio.Task[Any]]) -> bool:
    found = users_of([holder.handle for holder in holders], suspects)
    now = time.perf_counter()
    for holder, users in zip(holders, found, strict=True):
        _note_users(holder, users, now)
    return all(users.exact for users in found)


def _note_users(holder: Holder, users: Users, now: float) -> None:
    subjects = set(users.everybody)
    takers = holder.takers()
    if not users.complete:  # those found so far are any that came first
        subjects = takers
    elif users.unseen:
        # A thread may have it nowhere but on the stack of its function, as `with engine.connect():` does.
        subjects |= {taker for taker in takers if isinstance(taker, threading.Thread)}
    holder.kept_by = users.elsewhere
    if holder.handle() is None:
        holder.kept_by = "the pool, to which it is just coming back"
    elif not users.complete:
        holder.kept_by = BEYOND
    elif users.unseen and not subjects:
        holder.kept_by = "a function that runs"
    holder.is_moving = users.unseen
    holder.is_lost = _is_lost(holder, users)
    if users.is_listed and not users.listed and not holder.kept_by:
        holder.kept_by = "a list"
    holder.users = tuple(map(Owner, subjects))
    holder.looked_at = now


def _is_lost(holder: Holder, users: Users) -> bool:
    """Whether nobody is left who could give a connection back: it lies in a list, in a traceback, or nowhere."""
    if any(isinstance(taker, asyncio.Task) for taker in holder.takers()):
        return False  # it may just be handing it on
    if holder.kept_by or users.subjects or users.unseen:
        return False
    if users.is_listed or users.listed:
        # A task without code of its own, such as gather makes, took it for whoever awaited it.
        return bool(holder.frames)
    return True


@dataclass(eq=False)
class _Finding:
    """What is stuck, and whether the look at it could have missed what moved."""

    parts: list[Stuck]
    exact: bool
    suspicion: _Suspicion


def _examine(suspicion: _Suspicion, watched: list[PoolScope]) -> _Finding:
    """Hold a suspicion against everybody who can use a connection."""
    tasks = [member for member in suspicion.stuck.members if isinstance(member, asyncio.Task)]
    exact = look_for_users(suspicion.holders, tasks)
    return _Finding(find_stuck_parts(waits_of(watched)), exact, suspicion)


def _investigate(suspicion: _Suspicion, loop: asyncio.AbstractEventLoop | None) -> None:
    watched = scopes()
    try:
        finding = _examine(suspicion, watched)
        if not finding.parts:
            return
        if loop is None:
            time.sleep(_PAUSE)
            _confirm(finding)
        else:
            _confirm_on(loop, finding)
    except Exception as error:
        _step_aside(watched, error)
    finally:
        _investigation.end()


def _confirm_on(loop: asyncio.AbstractEventLoop, finding: _Finding) -> None:
    try:
        loop.call_soon_threadsafe(_confirm, finding)
    except RuntimeError:
        if not loop.is_closed():
            raise
        logger.debug("the loop was closed before a deadlock could be proved")


def _confirm(finding: _Finding) -> None:
    """Look again, on the loop, where nothing moves: what has not moved since is proved."""
    watched = scopes()
    try:
        if not finding.exact:
            members = {member for part in finding.parts for member in part.members}
            tasks = [member for member in members if isinstance(member, asyncio.Task)]
            look_for_users(finding.suspicion.holders, tasks)
        for part in _unmoved(finding, watched):
            if not is_being_woken(part):
                declare(part, partial(_is_unmoved, part, finding, watched))
    except Exception as error:
        _step_aside(watched, error)


def _unmoved(finding: _Finding, watched: list[PoolScope]) -> list[Stuck]:
    """Those parts of a finding that are as they were."""
    again = {frozenset(part.pools): part.signature for part in find_stuck_parts(waits_of(watched))}
    returned = finding.suspicion.returned
    return [
        part
        for part in finding.parts
        if again.get(frozenset(part.pools)) == part.signature
        and all(
            returned.get(key) == count for key, count in returned_to(watched, part.pools).items()
        )
    ]


def _is_unmoved(part: Stuck, finding: _Finding, watched: list[PoolScope]) -> bool:
    # In this order: a thread whose time is up is seen to be so, or is not in the queue any more.
    return not is_being_woken(part) and part.pools in [
        it.pools for it in _unmoved(finding, watched)
    ]


def prove_now() -> None:
    """Try to prove a deadlock at once, for somebody who asks for a verdict."""
    watched = scopes()
    suspicion = _suspect(watched, watched)
    if suspicion is None:
        return
    finding = _examine(suspicion, watched)
    for part in _unmoved(finding, watched):
        # From another thread, a look that is not exact may have missed what moved: the loop will look itself.
        is_quiet = finding.exact or is_of_this_thread(part)
        if is_quiet and is_being_woken(part) is False:
            declare(part, partial(_is_unmoved, part, finding, watched))


def is_of_this_thread(stuck: Stuck) -> bool:
    """Whether no task that is part of it can move while this thread looks."""
    tasks = [member for member in stuck.members if isinstance(member, asyncio.Task)]
    return {watch_of(task.get_loop()).thread for task in tasks} <= {threading.get_ident()}


def _cannot_move(stuck: Stuck) -> bool:
    """Whether all who are part of it are tasks that cannot run while this thread looks."""
    are_tasks = all(isinstance(member, asyncio.Task) for member in stuck.members)
    return are_tasks and is_of_this_thread(stuck)


_declaring = threading.Lock()


def declare(
    stuck: Stuck,
    is_unmoved: Callable[[], bool],
    in_server: Collection[TaskOrThread] = (),
    server_limits: tuple[str, ...] = (),
) -> None:
    """Tell each scope whose pool is part of a proved deadlock, and who of it waits in the server.

    Where another thread may move one of them, `is_unmoved` looks once more when that would withdraw it.
    """
    timers, above = timers_of(stuck, waits_of(scopes()))
    about = frozenset(map(id, stuck.about))
    with _declaring:
        told = [
            scope
            for scope, known in [(scope, scope.proof) for scope in scopes()]
            if any(id(waiter.pool) in about for waiter in list(scope.ledger.waiters.values()))
            and (known is None or (known.is_timed and not timers and not server_limits))
        ]
        if not told:
            return
        pools = frozenset(map(id, stuck.pools))
        members = weakref.WeakSet(stuck.members)
        waiting = weakref.WeakSet(in_server)
        proof = Proof(pools, members, timers, above, about, waiting, server_limits)
        statements = [
            holder
            for scope in scopes()
            for holder in scope.holders
            if holder.statements and holder.last_user.subject in waiting
        ]
        for holder in statements:
            holder.is_stuck = True
        for scope in told:
            scope.proof = proof
        has_moved = not all(holder.is_stuck for holder in statements)
        if has_moved or not (_cannot_move(stuck) or is_unmoved()):
            withdraw(lambda known: known is proof)
            return
        for scope in told:
            scope.proved(proof)


def withdraw(is_broken: Callable[[Proof], bool]) -> None:
    """Tell each scope whose proof does not hold any more."""
    for scope in scopes():
        found = scope.proof
        if found is not None and is_broken(found):
            found.broken_at = time.perf_counter()
            scope.proof = None


# What ends it from outside.


def timers_of(stuck: Stuck, waits: Waits) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    """The lines of the time limits that end the waiting, sooner than pool_timeout; and of those that may."""
    members = {member for member in stuck.members if isinstance(member, asyncio.Task)}
    patience = _patience_of(stuck.members)
    reaching, others = _above(members)
    ending = {*members, *reaching}
    # In the queue of a pool, `wait_for` keeps the pool's own limit.
    own = _limits_of(ending, waits) + [_wakes(task) for task in ending if not waits.queued(task)]
    above = _limits_of(others, waits) + [_wakes(task) for task in others]
    return _sooner(own, patience), _sooner(above, patience)


# A time limit: where it stands, and in how many seconds it is up; None where there is none.
_Limit = tuple[Place, float] | None


def _sooner(limits: Iterable[_Limit], patience: float) -> tuple[Place, ...]:
    places = [limit[0] for limit in limits if limit is not None and limit[1] < patience]
    known = tuple(dict.fromkeys(found for found in places if found.line))
    return known or tuple(places[:1])


def _patience_of(members: Collection[TaskOrThread]) -> float:
    """Seconds until pool_timeout makes the first of those in a queue give up."""
    now = time.perf_counter()
    return min(
        (
            waiter.since + scope.timeout - now
            for scope in scopes()
            if scope.timeout is not None
            for who, waiter in list(scope.ledger.waiters.items())
            if who in members
        ),
        default=math.inf,
    )


def _limits_of(tasks: Collection[asyncio.Task[Any]], waits: Waits) -> list[_Limit]:
    """The time limits that run on the stacks of tasks, or that a loop will call, and will cancel or wake them."""
    limits: list[_Limit] = []
    targets: set[int] = set()
    pools_own: set[int] = set()
    for task in tasks:
        is_queued = waits.queued(task) is not None
        now = task.get_loop().time()
        targets.add(id(task))
        if not is_queued:
            targets.add(id(internals.awaited_future(task)))
        place_now, inside = NOWHERE, False
        for step, frame in steps_of(task):
            if is_users(frame):
                place_now = place((frame.f_code, frame.f_lineno))
            # From here on it is SQLAlchemy that waits, and for the pool with pool_timeout.
            inside |= frame.f_code is greenlet_spawn.__code__ and is_queued
            found = _limits_on(step)
            if inside:
                pools_own |= set(map(id, found))
            else:
                limits += [(place_now, deadline - now) for deadline in found.values()]
    for loop in {task.get_loop() for task in tasks}:
        now = loop.time()
        limits += [
            (NOWHERE, handle.when() - now)
            for handle in internals.timers(loop) or ()
            if _leads_to(handle, targets, pools_own)
        ]
    return limits


def _wakes(task: asyncio.Task[Any]) -> _Limit:
    """The timeout of the function of asyncio in which a task waits for others."""
    found = awaited_by(task)
    if found is None or found.wakes_at is None:
        return None
    return _place_of(task), found.wakes_at - task.get_loop().time()


def _above(
    members: set[asyncio.Task[Any]],
) -> tuple[set[asyncio.Task[Any]], set[asyncio.Task[Any]]]:
    """The tasks that await a member: those whose cancellation reaches a member, and all others."""
    reaching: set[asyncio.Task[Any]] = set()
    others: set[asyncio.Task[Any]] = set()
    unseen = list(members)
    while unseen:
        subject = unseen.pop()
        for task in _awaiting(subject) - members - reaching:
            found = awaited_by(task)
            if found is None or subject not in found.tasks:
                continue  # one that is awaited together with it
            if found.passes_on and subject not in others:
                reaching.add(task)
                unseen.append(task)
            elif task not in others:
                others.add(task)
                unseen.append(task)
    return reaching, others - reaching


def awaiting(task: asyncio.Task[Any]) -> set[asyncio.Task[Any]]:
    """The tasks that sleep until this one ends, or until another one ends that does."""
    reaching, others = _above({task})
    return reaching | others


def _awaiting(task: asyncio.Task[Any]) -> set[asyncio.Task[Any]]:
    """The tasks that are woken when a task is done, by what that calls, or the futures that it sets."""
    found: set[asyncio.Future[Any]] = {task}
    unseen: list[asyncio.Future[Any]] = [task]

    def note(value: Any) -> None:
        if isinstance(value, asyncio.Future) and value not in found and not value.done():
            found.add(value)
            unseen.append(value)

    while unseen:
        future = unseen.pop()
        if future is task or not isinstance(future, asyncio.Task):
            _follow([callback for callback, _ in internals.callbacks_of(future)], note)
    return {future for future in found if isinstance(future, asyncio.Task)} - {task}


def _place_of(task: asyncio.Task[Any]) -> Place:
    """The innermost line of the user's code in a task."""
    users = [frame for _, frame in steps_of(task) if is_users(frame)]
    return place((users[-1].f_code, users[-1].f_lineno)) if users else NOWHERE


def _limits_on(step: Any) -> dict[object, float]:
    """The time limits that run on the stack of a suspended coroutine, and when each is up."""
    found: dict[object, float] = {}
    for held in gc.get_referents(step):
        owner = getattr(held, "__self__", held) if type(held) is MethodType else held
        inner = getattr(owner, "gen", None)
        for value in (owner, *(gc.get_referents(inner) if inner is not None else ())):
            value = value.__self__ if type(value) is MethodType else value
            deadline = internals.deadline_of(value)
            if deadline is not None:
                found[value] = deadline
    return found


def is_being_woken(stuck: Stuck) -> bool | None:
    """Whether something that a loop is about to do concerns those who seem stuck; None where a loop does not tell.

    Or whether the pool's own time limit is up, of which a thread cannot be seen to have woken.
    """
    if _patience_of(stuck.members) <= 0:
        return True
    members = [member for member in stuck.members if isinstance(member, asyncio.Task)]
    targets = {id(member) for member in members}
    targets |= {id(internals.last_awaited(member)) for member in members}
    dozing = {member for member in members if only_looks_up(member)}
    for loop in {member.get_loop() for member in members}:
        handles = internals.ready_handles(loop)
        if handles is None:
            return None
        # A loop that is late has timers that are due and not among those yet.
        soon = loop.time() + _PAUSE
        due = [handle for handle in internals.timers(loop) or () if handle.when() <= soon]
        for handle in (*handles, *due):
            if internals.wakes(handle) not in dozing and _leads_to(handle, targets, set()):
                return True
    return False


def _leads_to(handle: asyncio.Handle, targets: set[int], excluded: set[int]) -> bool:
    """Whether a callback of a loop can touch one of the targets, given by their ids."""
    callback, arguments = internals.callback_of(handle)
    if (
        getattr(callback, "__module__", None) == __name__
        or internals.ends_as_completed(callback)
        or internals.only_looks_up(handle)
    ):
        return False
    seen: set[int] = set()
    _follow([callback, *arguments], lambda value: seen.add(id(value)))
    return not seen & excluded and bool(seen & targets)


def _follow(values: Iterable[Any], visit: Callable[[Any], object]) -> None:
    """Visit what can be reached from callbacks within a few steps, not going on behind a task."""
    unseen: deque[tuple[Any, int]] = deque((value, 0) for value in values)
    seen: set[int] = set()
    while unseen and len(seen) < _CALLBACK_NODES:
        value, depth = unseen.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        visit(value)
        if depth == _CALLBACK_STEPS or isinstance(
            value, (asyncio.AbstractEventLoop, ModuleType, type, asyncio.Task)
        ):
            continue
        if isinstance(value, asyncio.Future):
            # Not what asyncio does then: it knows those that are awaited together with this one.
            held: Iterable[Any] = (
                callback
                for callback, _ in internals.callbacks_of(value)
                if not str(getattr(callback, "__module__", "")).startswith("asyncio.")
            )
        elif isinstance(value, FunctionType):
            held = value.__closure__ or ()
        elif isinstance(value, functools.partial):
            held = (value.func, value.args, value.keywords)
        elif isinstance(value, (list, set, dict)) and len(value) > _CALLBACK_NODES:
            # The children of a large gather: among them, whoever awaits it would not be come to any more.
            held = ()
        else:
            held = (item for item in gc.get_referents(value) if gc.is_tracked(item))
        owner = getattr(value, "__self__", None)
        unseen.extend((item, depth + 1) for item in (*held, owner) if item is not None)
