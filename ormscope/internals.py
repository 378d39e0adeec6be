"""The private names of SQLAlchemy, asyncio, anyio and the drivers that PoolScope reads: here, and nowhere else.

Each is read by a function of its own, and `missing()` looks for all of them once, when the first scope is made:
where a name is gone, the part that needs it is switched off and the verdict says so, instead of guessing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FrameType, ModuleType
from typing import Any

from sqlalchemy.engine import ExecutionContext
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection, QueuePool
from sqlalchemy.pool import base as pool_base
from sqlalchemy.util import ScopedRegistry

# What a pool is watched by. Each may be replaced on the pool itself, so its class stays what it was.
POOL_HOOKS = (
    "connect",
    "recreate",
    "_do_get",
    "_do_return_conn",
    "_create_connection",
    "_invoke_creator",
    "_close_connection",
)
STATEMENT_HOOKS = ("do_execute", "do_executemany", "do_execute_no_params")

# SQLAlchemy.


def capacity_of(pool: Pool) -> int | None:
    """The most connections that can be checked out of a pool at once; None where there is no limit."""
    if not isinstance(pool, QueuePool) or pool._max_overflow == -1:
        return None
    return pool.size() + pool._max_overflow


def must_wait(pool: Any) -> bool:
    """Whether a request finds neither an idle connection nor room for another."""
    return (
        isinstance(pool, QueuePool)
        and pool._overflow >= pool._max_overflow > -1
        and pool._pool.empty()
    )


def is_asynchronous(pool: Pool) -> bool:
    """Whether whoever waits for a pool awaits; else a thread sleeps."""
    return pool._is_asyncio


def record_of(fairy: PoolProxiedConnection) -> ConnectionPoolEntry:
    """The place in its pool that a connection occupies while it is checked out."""
    record: ConnectionPoolEntry = fairy._connection_record
    return record


def record_of_statement(context: ExecutionContext) -> ConnectionPoolEntry | None:
    """The place in its pool of the connection that a statement goes to; None where it has none."""
    fairy = context.root_connection._dbapi_connection
    return None if fairy is None else record_of(fairy)


def parameters_of(context: ExecutionContext) -> Iterator[Any]:
    """The values that are sent with a statement."""
    for row in context.parameters:
        yield from row.values() if isinstance(row, Mapping) else row


def handle_of(record: ConnectionPoolEntry) -> weakref.ref[PoolProxiedConnection]:
    """A weak reference to what the program holds of a connection that is checked out."""
    return record.fairy_ref  # type: ignore[attr-defined,no-any-return]


def creator_of(pool: Pool) -> Any:
    """What opens the connections of a pool."""
    return pool._creator


def idle_records(pool: Pool) -> list[ConnectionPoolEntry]:
    """The connections of a pool that are open and that nobody holds."""
    if not isinstance(pool, QueuePool):
        return []
    queue: Any = pool._pool
    waiting = queue._queue._queue if hasattr(queue, "_queue") else queue.queue
    return [record for record in list(waiting) if record.dbapi_connection is not None]


# asyncio.


def awaited_future(task: asyncio.Task[Any]) -> asyncio.Future[Any] | None:
    """The future that a suspended task sleeps on; None when it is about to run."""
    future: asyncio.Future[Any] | None = getattr(task, "_fut_waiter", None)
    return None if future is None or future.done() else future


def last_awaited(task: asyncio.Task[Any]) -> object:
    """The future that a suspended task sleeps on, or has just been woken by."""
    return getattr(task, "_fut_waiter", None)


def gathered(future: asyncio.Future[Any]) -> list[asyncio.Future[Any]] | None:
    """What a future of `asyncio.gather` waits for; None for any other future."""
    return list(future._children) if type(future) is _GATHERING else None  # type: ignore[attr-defined]


def shielded(future: asyncio.Future[Any]) -> asyncio.Future[Any] | None:
    """What a future of `asyncio.shield` waits for; None for any other future."""
    for callback, _ in callbacks_of(future):
        if getattr(callback, "__code__", None) in _SHIELD_CODES:
            inner = _closure(callback).get("inner")
            return inner if isinstance(inner, asyncio.Future) else None
    return None


def comes_from_a_thread(future: asyncio.Future[Any]) -> bool:
    """Whether a future is set by a thread's future, as `asyncio.to_thread` has it."""
    codes = {getattr(callback, "__code__", None) for callback, _ in callbacks_of(future)}
    return not codes.isdisjoint(_CHAIN_CODES)


def callbacks_of(future: asyncio.Future[Any]) -> list[tuple[Any, Any]]:
    """What is called when a future is done, with its context."""
    return list(future._callbacks or ())


def _closure(function: Any) -> dict[str, Any]:
    """The variables that a function takes from around it."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            found[name] = cell.cell_contents
    return found


def awaited_by_group(
    frame: FrameType, variables: Callable[[FrameType], dict[str, Any]], future: object
) -> set[asyncio.Future[Any]] | None:
    """The tasks of the TaskGroup, asyncio's or anyio's, that waits in `frame` by `future`; None if none does."""
    if frame.f_code.co_filename not in _group_files():
        return None
    group = variables(frame).get("self")
    if getattr(group, "_on_completed_fut", None) is not future:
        return None
    return set(group._tasks)  # type: ignore[union-attr]


def awaited_by_wait(
    frame: FrameType, variables: Callable[[FrameType], dict[str, Any]], future: object
) -> tuple[set[asyncio.Future[Any]], bool] | None:
    """What `asyncio.wait` or `wait_for` waits for in `frame` by `future`, and whether it has a timeout; else None."""
    if frame.f_code not in _WAIT_CODES:
        return None
    found = variables(frame)
    if found.get("waiter") is not future:
        return None
    awaited = {found["fut"]} if "fut" in found else set(found["fs"])
    return awaited, found.get("timeout_handle") is not None


def awaited_by_as_completed(
    frame: FrameType,
    caller: FrameType | None,
    variables: Callable[[FrameType], dict[str, Any]],
    referents: Callable[[Any], Iterable[Any]],
) -> tuple[set[asyncio.Future[Any]], bool] | None:
    """What `asyncio.as_completed` waits for in `frame`, which `caller` awaits, and whether it has a timeout."""
    if (
        frame.f_code.co_filename != asyncio.tasks.__file__
        or frame.f_code.co_name != "_wait_for_one"
    ):
        return None
    found = variables(frame)
    if "self" in found:  # from Python 3.13 on
        return set(found["self"]._todo), found["self"]._timeout_handle is not None
    for value in () if caller is None else referents(caller):
        inner = getattr(value, "gi_frame", None)
        if inner is not None and inner.f_code is asyncio.as_completed.__code__:
            todo = variables(inner)
            if todo.get("done") is found.get("done"):
                return set(todo["todo"]), todo.get("timeout") is not None
    return None


def timers(loop: asyncio.AbstractEventLoop) -> list[asyncio.TimerHandle] | None:
    """What an event loop will do later; None where it does not tell (uvloop)."""
    scheduled = getattr(loop, "_scheduled", None)
    return (
        None
        if scheduled is None
        else [handle for handle in list(scheduled) if not handle.cancelled()]
    )


def ready_handles(loop: asyncio.AbstractEventLoop) -> list[asyncio.Handle] | None:
    """What an event loop is about to do; None where it does not tell, or is just changing it."""
    ready = getattr(loop, "_ready", None)
    try:
        return None if ready is None else list(ready)
    except RuntimeError:  # changed while it was copied: another thread's loop
        return None


def callback_of(handle: asyncio.Handle) -> tuple[Any, tuple[Any, ...]]:
    """What an event loop will call, and with which arguments; None for a call that was cancelled."""
    return handle._callback, tuple(handle._args or ())  # type: ignore[attr-defined]


def limits_of(value: object) -> bool:
    """Whether an object is a time limit that is running: `asyncio.timeout`, or a cancel scope of anyio."""
    if isinstance(value, asyncio.Timeout):
        return value.when() is not None and not value.expired()
    # A module that is just being imported has nothing yet.
    scope = getattr(_anyio(), "CancelScope", None)
    return scope is not None and isinstance(value, scope) and value._deadline != float("inf")


def _anyio() -> ModuleType | None:
    return sys.modules.get("anyio._backends._asyncio")


def _group_files() -> tuple[str | None, ...]:
    anyio = _anyio()
    return asyncio.taskgroups.__file__, None if anyio is None else anyio.__file__


def _inner_codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner_codes(constant)


def _codes(*functions: Any) -> frozenset[CodeType]:
    return frozenset(code for function in functions for code in _inner_codes(function.__code__))


_GATHERING = getattr(asyncio.tasks, "_GatheringFuture", None)
_SHIELD_CODES = _codes(asyncio.shield)
_CHAIN_CODES = _codes(getattr(asyncio.futures, "_chain_future", asyncio.shield)) - _SHIELD_CODES
_WAIT = vars(asyncio.tasks).get("_wait")
_WAIT_CODES = frozenset(function.__code__ for function in (_WAIT, asyncio.wait_for) if function)
LOOP_STEP = asyncio.Handle._run.__code__

# The drivers.


def is_still_waiting(frame: FrameType, variables: Callable[[FrameType], dict[str, Any]]) -> bool:
    """Whether a statement of psycopg waits in `frame`, and the server has said nothing, though it may look up."""
    code = frame.f_code
    if code.co_name != "wait_async" or frame.f_globals.get("__name__") != "psycopg.waiting":
        return False
    return variables(frame).get("ready") == 0


def wakes(handle: asyncio.Handle) -> asyncio.Task[Any] | None:
    """The task that a callback of a loop wakes because what it awaited is done; None for any other callback."""
    callback, _ = callback_of(handle)
    task = getattr(callback, "__self__", None)
    is_wakeup = str(getattr(callback, "__name__", "")).endswith("wakeup")
    return task if is_wakeup and isinstance(task, asyncio.Task) else None


def command_timeout_of(driver: object) -> float | None:
    """After how many seconds asyncpg gives up a statement; None where it does not, or for another driver."""
    seconds: float | None = getattr(getattr(driver, "_config", None), "command_timeout", None)
    return seconds


def only_looks_up(handle: asyncio.Handle) -> bool:
    """Whether a callback of a loop is psycopg's, by which a statement in progress looks ten times a second whether it
    has been interrupted, and waits on."""
    callback, _ = callback_of(handle)
    return (
        getattr(callback, "__module__", None) == "psycopg.waiting"
        and getattr(callback, "__qualname__", None) == "wait_async.<locals>.timedout"
    )


# The self-test.

_NEEDED: dict[str, list[tuple[object, str]]] = {
    "watching": [
        *((Pool, name) for name in POOL_HOOKS if name != "_invoke_creator"),
        (QueuePool, "_inc_overflow"),
        (pool_base._ConnectionFairy, "_connection_record"),
        (pool_base._ConnectionRecord, "fairy_ref"),
    ],
    "proof": [
        (asyncio.Task, "_fut_waiter"),
        (asyncio.Future, "_callbacks"),
        (asyncio.tasks, "_GatheringFuture"),
        (asyncio.tasks, "_wait"),
        (asyncio.futures, "_chain_future"),
        (ScopedRegistry, "__call__"),
    ],
}


@functools.cache
def missing() -> dict[str, str]:
    """The parts that cannot work here, and the name that each lacks: "watching", "proof"."""
    found: dict[str, str] = {}
    for part, names in _NEEDED.items():
        for owner, name in names:
            annotated = getattr(owner, "__annotations__", {})
            if not hasattr(owner, name) and name not in annotated:
                found.setdefault(part, f"{getattr(owner, '__name__', owner)}.{name}")
    wait = None if _WAIT is None else _WAIT.__code__
    variables = () if wait is None else (*wait.co_varnames, *wait.co_cellvars)
    if not {"waiter", "fs", "timeout_handle"} <= set(variables):
        found.setdefault("proof", "the variables of asyncio.tasks._wait")
    return found
