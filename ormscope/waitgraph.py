"""The wait-for graph: who can only go on after whom.

A deadlock is proved from it, not guessed from a timeout: a task is *stuck* when everything that could wake it is
stuck. A task in the queue of an exhausted pool is woken by whoever can give a connection of that pool back; a task
that awaits tasks is woken by them. These kinds of waiting are followed:

- awaiting a task, `asyncio.gather` (of tasks, of other gathers), `asyncio.shield`, `asyncio.wait`, `wait_for`,
  `as_completed`, and the end of an `asyncio.TaskGroup` or of one of anyio's;
- a place in the queue of a pool that has a PoolScope, for tasks and for threads;
- a statement that waits in PostgreSQL for a lock, where `ask_server()` has found who has it.

Whatever else is awaited, alone or beside tasks (a socket, an Event, a Lock, a Queue, a thread, a plain future), can
wake a task at any time, so nothing is proved through it. A deadlock through one of those is not found; none is
invented.

A time limit that runs out before `pool_timeout` does, of a stuck task (`asyncio.timeout`, `wait_for`,
`wait(timeout=)`, anyio's scopes, `loop.call_later` with its own cancel) or of a task that awaits one and passes its
cancellation on, or a limit of the server's that runs there or may run, makes it a "deadlock until a timer": named,
with the line, but not counted among the deadlocks, and no alert that says "restart" fires. Who awaits a stuck task by
`asyncio.wait(timeout=)`, `as_completed` or `shield` will go on by himself, and may then cancel it or not: it stays a
deadlock, whose report says that he may. Somebody else may always cancel a task from outside: that is not counted, as
a restart is not.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from sqlalchemy.pool import Pool

from ormscope import internals
from ormscope.internals import awaited_future
from ormscope.owners import TaskOrThread
from ormscope.stacks import frame_of, locals_of, sleeping_frames, steps_of


@dataclass(slots=True)
class Awaited:
    """What a sleeping task waits for: the unfinished `tasks`; whether `others` may wake it.

    `wakes_at` is when a timer does, on the loop's clock. `passes_on` is whether a cancellation of the task reaches
    those it awaits, as it does through `await`, `gather` and a TaskGroup.
    """

    future: object
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    others: bool = False
    wakes_at: float | None = None
    passes_on: bool = True


def awaited_by(task: asyncio.Task[Any]) -> Awaited | None:
    """What a task sleeps on; None where it is about to run, or runs."""
    future = awaited_future(task)
    if future is None:
        return None
    found = Awaited(future)
    _resolve(future, found, task)
    return found


def awaited_tasks(task: asyncio.Task[Any]) -> set[asyncio.Task[Any]]:
    """The unfinished tasks that a task awaits, whatever else may wake it."""
    found = awaited_by(task)
    return set() if found is None else found.tasks


def below(task: TaskOrThread) -> set[asyncio.Task[Any]]:
    """The tasks that a task awaits, and those that they await; none for a thread."""
    unseen: list[TaskOrThread] = [task]
    seen: set[asyncio.Task[Any]] = set()
    while unseen:
        subject = unseen.pop()
        children = awaited_tasks(subject) if isinstance(subject, asyncio.Task) else set()
        unseen.extend(children - seen)
        seen |= children
    return seen


def _resolve(
    future: asyncio.Future[Any], found: Awaited, sleeper: asyncio.Task[Any] | None
) -> None:
    """Add the tasks behind a future; `sleeper` is the task that awaits this very future."""
    if future.done():
        return  # whoever waits for it and for others has been told, or will be
    if isinstance(future, asyncio.Task):
        found.tasks.add(future)
        return
    together = internals.gathered(future)
    if together is None and (together := internals.shielded(future)) is not None:
        found.passes_on = False
    if together is None and sleeper is not None:
        together = _awaited_in_frames(sleeper, future, found)
    if together is None or together.is_over:
        found.others = True
        return
    for child in together.futures:
        _resolve(child, found, None)


def _awaited_in_frames(
    sleeper: asyncio.Task[Any], future: asyncio.Future[Any], found: Awaited
) -> internals.Together | None:
    """What a function of asyncio on a task's await chain waits for by a future of its own; None if none does."""
    caller: FrameType | None = None
    for frame in sleeping_frames(sleeper):
        group = internals.awaited_by_group(frame, locals_of, future)
        if group is not None:
            return group
        waited = internals.awaited_by_wait(
            frame, locals_of, future
        ) or internals.awaited_by_as_completed(
            frame, caller, locals_of, _referents(sleeper), frame_of
        )
        if waited is not None:
            found.wakes_at = waited.wakes_at
            found.passes_on = (
                frame.f_code is asyncio.wait_for.__code__
            )  # a task of its own before Python 3.12
            return waited
        caller = frame
    return None


def _referents(sleeper: asyncio.Task[Any]) -> Callable[[Any], Iterable[Any]]:
    """What is on the stack of a frame of a task: only its coroutine can be asked for that."""

    def referents(frame: FrameType) -> Iterable[Any]:
        steps = [step for step, own in steps_of(sleeper) if own is frame]
        return gc.get_referents(*steps)

    return referents


# Who is stuck.


@dataclass
class Waits:
    """Everything that the proof knows at one moment.

    `queued` tells the pool in whose queue a task or thread stands, `wakers` for each exhausted pool the tasks and
    threads that can give a connection back. A pool that is not in `wakers` can serve somebody by itself, or
    nobody knows who has its connections. `edges` are additional: a task that waits in the server, and for whom.
    """

    queued: Callable[[TaskOrThread], Pool | None]
    wakers: Mapping[Pool, Collection[TaskOrThread]]
    edges: Mapping[TaskOrThread, Collection[TaskOrThread]] = field(default_factory=dict)


@dataclass
class Stuck:
    """Pools that are stuck for good, and the tasks and threads that the proof goes through.

    `about` are those of the pools that wait for all the others. `signature` tells for each member what it waits for,
    so that two looks can be compared.
    """

    pools: set[Pool]
    members: set[TaskOrThread]
    signature: dict[TaskOrThread, object]
    about: frozenset[Pool] = frozenset()


def find_stuck_parts(waits: Waits) -> list[Stuck]:
    """The stuck pools, each with no more than what its own proof goes through: two deadlocks are two."""
    stuck = find_stuck(waits)
    if stuck is None:
        return []
    search = _Search(waits)
    about: dict[frozenset[Pool], set[Pool]] = {}
    for pool in stuck.pools:
        about.setdefault(frozenset(search.needed(pool)), set()).add(pool)
    parts = []
    for pools, own in about.items():
        part = search.stuck(set(pools))
        part.about = frozenset(own)
        parts.append(part)
    return parts


def find_stuck(waits: Waits) -> Stuck | None:
    """The pools whose connections can only come back after one of them has come back; None if there are none."""
    search = _Search(waits)
    pools = {pool for pool in waits.wakers if search.may_be_stuck(pool)}
    while True:
        # The greatest fixed point: believe all of them stuck, then free whoever can be woken by one that is not.
        free = {pool for pool in pools if not search.is_stuck(pool, pools)}
        if not free:
            break
        pools -= free
    if not pools:
        return None
    return search.stuck(pools)


class _Search:
    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        self.awaited: dict[TaskOrThread, Awaited | None] = {}

    def may_be_stuck(self, pool: Pool) -> bool:
        """Whether no waker of a pool is free at first sight, as one is in every pool that is merely busy."""
        wakers = self.waits.wakers[pool]
        return bool(wakers) and all(self._next(waker) is not None for waker in wakers)

    def is_stuck(self, pool: Pool, pools: set[Pool]) -> bool:
        """Whether every waker of a pool is stuck, if these pools are."""
        stuck = self._stuck_tasks(self.waits.wakers[pool], pools)
        return all(waker in stuck for waker in self.waits.wakers[pool])

    def _stuck_tasks(self, starts: Iterable[TaskOrThread], pools: set[Pool]) -> set[TaskOrThread]:
        reached: dict[TaskOrThread, tuple[set[TaskOrThread], Pool | None]] = {}
        free: set[TaskOrThread] = set()
        unseen = list(starts)
        while unseen:
            subject = unseen.pop()
            if subject in reached or subject in free:
                continue
            following = self._next(subject)
            if following is None or (following[1] is not None and following[1] not in pools):
                free.add(subject)
                continue
            reached[subject] = following
            unseen.extend(following[0])
        stuck = set(reached)
        # Those that only wait for one another, and not for a pool, are stuck too: they never end.
        while loose := {subject for subject in stuck if not reached[subject][0] <= stuck}:
            stuck -= loose
        return stuck

    def _next(self, subject: TaskOrThread) -> tuple[set[TaskOrThread], Pool | None] | None:
        """Who wakes somebody: these tasks, or the wakers of this pool; None where others may, or nothing has to."""
        pool = self.waits.queued(subject)
        if pool is not None:
            if pool not in self.waits.wakers:
                return None
            if isinstance(subject, asyncio.Task) and awaited_future(subject) is None:
                return None  # it has been woken
            return set(), pool
        if subject in self.waits.edges:
            return set(self.waits.edges[subject]), None
        if not isinstance(subject, asyncio.Task):
            return None
        if subject not in self.awaited:
            self.awaited[subject] = awaited_by(subject)
        found = self.awaited[subject]
        if found is None or found.others or not found.tasks:
            return None
        return set(found.tasks), None

    def needed(self, pool: Pool) -> set[Pool]:
        """The pools one of whose connections must come back first, this one included."""
        pools, unseen = {pool}, [pool]
        while unseen:
            for member in self.members({unseen.pop()}):
                following = self._next(member)
                further = following[1] if following is not None else None
                if further is not None and further not in pools:
                    pools.add(further)
                    unseen.append(further)
        return pools

    def stuck(self, pools: set[Pool]) -> Stuck:
        """These pools, which are stuck, with everybody through whom that goes."""
        members = self.members(pools)
        signature = {member: self.waiting_for(member) for member in members}
        return Stuck(pools, members, signature, frozenset(pools))

    def members(self, pools: set[Pool]) -> set[TaskOrThread]:
        """Everybody through whom the proof that these pools are stuck goes."""
        members: set[TaskOrThread] = set()
        unseen = [waker for pool in pools for waker in self.waits.wakers[pool]]
        while unseen:
            subject = unseen.pop()
            if subject not in members:
                members.add(subject)
                following = self._next(subject)
                unseen.extend(following[0] if following is not None else ())
        return members

    def waiting_for(self, subject: TaskOrThread) -> object:
        """What somebody waits for, such that it differs once it has been woken in between."""
        if subject in self.waits.edges:
            # Its driver may wake and wait on as it likes; whether the server has answered, only the server tells.
            return frozenset(map(id, self.waits.edges[subject]))
        if isinstance(subject, asyncio.Task):
            return id(awaited_future(subject))
        return id(self.waits.queued(subject))
