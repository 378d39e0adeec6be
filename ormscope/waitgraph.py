"""The wait-for graph: who can only go on after whom.

A deadlock is proved from it, not guessed from a timeout: a task is *stuck* when every task that
could wake it is stuck. A task that waits for a pool is woken by any holder of a connection of that
pool; a task that awaits other tasks is woken by them. Whoever waits for something else (a socket,
a timer, an Event) can be woken from outside, so is never called stuck.

Limits: a task that waits for a Lock, Event, Semaphore or Queue, or behind `asyncio.shield`, has no
edge, because asyncio does not record who will release it. A deadlock through one of those is not
found; none is ever invented.

asyncio has no public way to ask what a task awaits before Python 3.14, so this module reads
`_GatheringFuture._children` and `TaskGroup._tasks`, and stacks `Task._fut_waiter`. They are read nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Set
from typing import Any

from ormscope.owners import TaskOrThread
from ormscope.stacks import awaited_future, locals_of, sleeping_frames


def awaited_tasks(task: asyncio.Task[Any]) -> set[asyncio.Task[Any]]:
    """The unfinished tasks that `task` awaits: directly, by gather, TaskGroup, wait or wait_for."""
    future = awaited_future(task)
    if future is None:
        return set()
    if isinstance(future, asyncio.Task):
        return {future}
    awaited: Iterable[Any] = getattr(future, "_children", ())  # asyncio.gather
    if not awaited:
        awaited = _awaited_by_frames(task)
    return {one for one in awaited if isinstance(one, asyncio.Task) and not one.done()}


def _awaited_by_frames(task: asyncio.Task[Any]) -> Iterable[Any]:
    """Tasks that a library function on the task's await chain waits for by a future of its own."""
    for frame in sleeping_frames(task):
        name = frame.f_code.co_name
        if name in ("__aexit__", "_aexit"):  # asyncio.TaskGroup, and anyio's
            tasks = getattr(locals_of(frame).get("self"), "_tasks", None)
            if isinstance(tasks, set):
                return set(tasks)
        elif frame.f_code.co_filename == asyncio.tasks.__file__:
            if name == "_wait":
                return set(locals_of(frame).get("fs", ()))
            if name == "wait_for":
                return {locals_of(frame).get("fut")}
    return ()


def are_stuck(
    starts: Set[TaskOrThread],
    pool_wakers: Callable[[TaskOrThread], set[TaskOrThread] | None],
) -> bool:
    """Whether none of `starts` (tasks and threads) can ever be woken but by one another.

    `pool_wakers` tells, for a task or thread that sleeps in a full pool's queue, the holders of that
    pool's connections; None for any other.
    """
    wakers: dict[TaskOrThread, set[TaskOrThread]] = {}
    unseen = list(starts)
    while unseen:
        one = unseen.pop()
        if one in wakers:
            continue
        by: set[TaskOrThread] | None = pool_wakers(one)
        if by is None:
            by = set(awaited_tasks(one)) if isinstance(one, asyncio.Task) else set()
        if not by and one in starts:
            return False  # as in every pool that is merely busy, so look no further
        wakers[one] = by
        unseen.extend(by)
    # The greatest fixed point: believe all of them stuck, then free whoever can be woken by one that is not.
    candidates = {one for one, by in wakers.items() if by}
    while free := {one for one in candidates if not wakers[one] <= candidates}:
        candidates -= free
    return starts <= candidates
