"""What somebody who can use a connection does at this moment."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import sqlalchemy
from sqlalchemy.engine import Dialect

from ormscope import internals
from ormscope.internals import awaited_future
from ormscope.owners import TaskOrThread, name_of
from ormscope.places import NOWHERE, Place, is_library, is_users, place
from ormscope.stacks import locals_of, sleeping_frames, steps_of
from ormscope.waitgraph import awaited_tasks

_SQLALCHEMY = os.path.join(os.path.dirname(sqlalchemy.__file__), "")
# How SQLAlchemy comes from its own synchronous code to an await, whoever asks for that.
_SQLALCHEMYS_BRIDGE = os.path.join(_SQLALCHEMY, "util", "")
_ASYNCIO = os.path.join(os.path.dirname(asyncio.__file__), "")
# What the program itself must do before the waiting ends: by the function of asyncio or threading in which it waits.
_OWN_WAITS = {
    "Lock.acquire": "a lock",
    "Semaphore.acquire": "a semaphore",
    "Condition.wait": "a condition",
    "Event.wait": "an event",
    "Barrier.wait": "a barrier",
    "Queue.get": "a queue",
    "Queue.put": "a queue",
    "Queue.join": "a queue",
}

Doing = Literal["running", "database", "elsewhere", "idle"]


@dataclass(frozen=True)
class Activity:
    """What a task or thread does: it runs, uses the database, waits `elsewhere`, or is an idle thread.

    `place` is the line of the user's code where it waits, `what` names what the program itself must do first,
    where that can be seen; `owner` who has the lock.
    """

    doing: Doing
    place: Place = NOWHERE
    what: str = ""
    owner: str = ""


def activity_of(subject: TaskOrThread, dialect: Dialect) -> Activity:
    """What a task or thread does at this moment. A connection's driver at work counts as the database.

    A framework may run the user's code in a task of its own, for which this one waits; then the line is there.
    """
    if isinstance(subject, asyncio.Task) and awaited_future(subject) is None:
        return Activity("running")
    frames = sleeping_frames(subject)
    what = ""
    for frame in reversed(frames):
        filename = frame.f_code.co_filename
        if filename.startswith(_SQLALCHEMYS_BRIDGE):
            continue
        if frame.f_code is internals.IN_LINE:
            what = "another pool"  # that of this engine has its own list of those in line
            break
        if filename.startswith((_SQLALCHEMY, *_driver_folders(dialect))):
            return Activity("database")
        if is_users(frame):
            break
        what = what or _OWN_WAITS.get(frame.f_code.co_qualname, "")
    else:
        if not isinstance(subject, asyncio.Task):
            return Activity("idle")  # of an executor: it has no work
    return _foreign_wait(subject, frames, what, dialect)


def _foreign_wait(
    subject: TaskOrThread, frames: list[FrameType], what: str, dialect: Dialect
) -> Activity:
    users = [frame for frame in frames if is_users(frame)]
    own = [frame for frame in users if not is_library(frame.f_code.co_filename)]
    tasks = awaited_tasks(subject) if isinstance(subject, asyncio.Task) else set()
    future = awaited_future(subject) if isinstance(subject, asyncio.Task) else None
    if tasks:
        what = what or "tasks"
    elif future is not None and internals.comes_from_a_thread(future):
        what = what or "a thread"
    owner = _owner_of_lock(subject, frames) if what == "a lock" else ""
    if own:
        return Activity("elsewhere", place((own[-1].f_code, own[-1].f_lineno)), what, owner)
    # Else the framework itself waits: for the browser to hang up, say.
    below = [activity_of(task, dialect) for task in tasks]
    known = [found.place for found in below if found.doing == "elsewhere" and found.place.line]
    fallback = place((users[-1].f_code, users[-1].f_lineno)) if users else NOWHERE
    return Activity("elsewhere", min(known, default=fallback), what, owner)


def _owner_of_lock(subject: TaskOrThread, frames: list[FrameType]) -> str:
    """The name of the task that has entered `async with lock`, where exactly one can be seen to have; else nothing."""
    lock = locals_of(frames[-1]).get("self") if frames else None
    if not isinstance(lock, asyncio.Lock) or not isinstance(subject, asyncio.Task):
        return ""
    inside = []
    for task in asyncio.all_tasks(subject.get_loop()):
        steps = steps_of(task)
        waits = bool(steps) and steps[-1][1].f_code is asyncio.Lock.acquire.__code__
        if not waits and any(_is_inside(step, lock) for step, _ in steps):
            inside.append(task)
    return name_of(inside[0]) if len(inside) == 1 else ""


def _is_inside(step: Any, lock: asyncio.Lock) -> bool:
    """Whether a suspended coroutine has on its stack what leaves `async with lock`."""
    leave = type(lock).__aexit__
    stack = gc.get_referents(step)
    # Since Python 3.14 not as a bound method, but the function and, next to it, whose it is.
    return any(
        (held is leave and following is lock)
        or (getattr(held, "__func__", None) is leave and getattr(held, "__self__", None) is lock)
        for held, following in zip(stack, [*stack[1:], None], strict=True)
    )


def _driver_folders(dialect: Dialect) -> Iterable[str]:
    """Where the code of a dialect's driver stands."""
    name = getattr(dialect.dbapi, "__name__", None) or type(dialect.dbapi).__module__
    folders = []
    for package in {name.split(".")[0], dialect.driver, f"{dialect.driver}_binary"}:
        module = sys.modules.get(package)
        if package != "sqlalchemy" and module is not None and getattr(module, "__file__", None):
            folders.append(os.path.join(os.path.dirname(str(module.__file__)), ""))
    return folders
