"""The private names of SQLAlchemy's pool, asyncio, anyio and the drivers that PoolScope reads: here, and nowhere else.

Those of the ORM and of IPython, which SessionCensus reads, are in `orm_internals`. Each is read by a function of
its own, and `missing()` looks for all of them whenever a scope or a census is made: where a name is gone, the part
that needs it is switched off and the report says so, instead of guessing.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import CellType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any, Literal, NamedTuple

from sqlalchemy.engine import Connection, ExecutionContext
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection, QueuePool
from sqlalchemy.pool import base as pool_base
from sqlalchemy.util import ScopedRegistry
from sqlalchemy.util.concurrency import greenlet_spawn
from sqlalchemy.util.queue import AsyncAdaptedQueue, Queue

from ormscope import orm_internals

# What a pool is watched by. Each may be replaced on the pool itself, so its class stays what it was.
TAKE, GIVE_BACK, CLOSE = "_do_get", "_do_return_conn", "_close_connection"
OPEN, CONNECT_ANEW = "_create_connection", "_invoke_creator"
POOL_HOOKS = ("recreate", TAKE, GIVE_BACK, OPEN, CONNECT_ANEW, CLOSE)
STATEMENT_HOOKS = ("do_execute", "do_executemany", "do_execute_no_params")


def _code(owner: object, name: str) -> CodeType | None:
    """The code of a method; None if it is gone, and then no frame is one of it."""
    return getattr(getattr(owner, name, None), "__code__", None)


# SQLAlchemy's pool.

IN_LINE = _code(QueuePool, TAKE)


def capacity_of(pool: Pool) -> int | None:
    """The most connections that can be checked out of a pool at once; None where there is no limit."""
    if not isinstance(pool, QueuePool) or pool._max_overflow == -1:
        return None
    return pool.size() + pool._max_overflow


def must_wait(pool: Any) -> bool:
    """Whether a request finds neither an idle connection nor room for another."""
    if not isinstance(pool, QueuePool) or not pool._overflow >= pool._max_overflow > -1:
        return False
    queue: Any = pool._pool
    if isinstance(queue, AsyncAdaptedQueue):
        queue = queue._queue  # asyncio's own, which it would ask
    return bool(queue.empty())


def is_asynchronous(pool: Pool) -> bool:
    """Whether whoever waits for a pool awaits; else a thread sleeps."""
    return pool._is_asyncio


def record_of(fairy: PoolProxiedConnection) -> ConnectionPoolEntry:
    """The place in its pool that a connection occupies while it is checked out."""
    record: ConnectionPoolEntry = fairy._connection_record
    return record


def record_of_statement(context: ExecutionContext) -> ConnectionPoolEntry | None:
    """The place in its pool of the connection that a statement goes to; None where it has none."""
    fairy: Any = context.root_connection._dbapi_connection
    return None if fairy is None else fairy._connection_record  # as `record_of`: for each statement


def parameters_of(context: ExecutionContext) -> Iterator[Any]:
    """The values that are sent with a statement."""
    for row in context.parameters:
        yield from row.values() if isinstance(row, Mapping) else row


def handle_of(record: ConnectionPoolEntry) -> PoolProxiedConnection | None:
    """What the program holds of a connection that is checked out; None while nobody does."""
    reference: weakref.ref[PoolProxiedConnection] | None = record.fairy_ref  # type: ignore[attr-defined]
    return None if reference is None else reference()


def creator_of(pool: Pool) -> Any:
    """What opens the connections of a pool."""
    return pool._creator


def pool_below(pool: Pool) -> Any:
    """The pool of psycopg_pool from which a pool takes its connections, as by `async_creator=pool.getconn`.

    None where the connections come from a driver, or from a function that does not say from where.
    """
    creator = pool._creator
    cells = getattr(creator, "__closure__", None) or ()
    for function in (creator, *map(_content_of, cells)):
        found = getattr(function, "__self__", None)
        if any(kind.__module__.startswith("psycopg_pool.") for kind in type(found).__mro__):
            return found
    return None


def _content_of(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that nothing was assigned to yet
        return None


def idle_records(pool: Pool) -> list[ConnectionPoolEntry]:
    """The connections of a pool that are open and that nobody holds."""
    if not isinstance(pool, QueuePool):
        return []
    queue: Any = pool._pool
    waiting = queue._queue._queue if hasattr(queue, "_queue") else queue.queue
    return [record for record in list(waiting) if record.dbapi_connection is not None]


def greenlet_of(variables: dict[str, Any]) -> Any:
    """The greenlet in which `greenlet_spawn`, whose variables are given, runs SQLAlchemy's synchronous code."""
    return variables.get("context")


# FastAPI.


def is_fastapis_own(key: object) -> bool:
    """Whether a key of an ASGI scope is FastAPI's: there it keeps what closes the dependencies of a request.

    The server that keeps the scope does not look there: the task that answers the request leaves these stacks. Where
    the keys have other names, it is said that who could give a connection back cannot be followed.
    """
    return isinstance(key, str) and key.startswith("fastapi_")


# asyncio and anyio.


# The event loop that runs in this thread; None where none does. Asked for each request and for each statement; the
# public function raises where none runs, which costs a thread more.
running_loop: Callable[[], asyncio.AbstractEventLoop | None] = getattr(
    asyncio, "_get_running_loop", lambda: None
)
# The task that runs on a loop; None where none does. In Python 3.11 the public function is not written in C.
current_task: Callable[[asyncio.AbstractEventLoop], asyncio.Task[Any] | None] = (
    asyncio.current_task
    if sys.version_info >= (3, 12)
    else getattr(asyncio.tasks, "_current_tasks", {}).get
)


def awaited_future(task: asyncio.Task[Any]) -> asyncio.Future[Any] | None:
    """The future that a suspended task sleeps on; None when it is about to run."""
    future: asyncio.Future[Any] | None = getattr(task, "_fut_waiter", None)
    return None if future is None or future.done() else future


def last_awaited(task: asyncio.Task[Any]) -> object:
    """The future that a suspended task sleeps on, or has just been woken by."""
    return getattr(task, "_fut_waiter", None)


class Together(NamedTuple):
    """Futures that are waited for together: what ends the waiting, and when a timeout does, on the loop's clock.

    A "failure" is an exception or a cancellation; whatever it says, the waiting ends when all are done.
    """

    futures: Collection[asyncio.Future[Any]]
    ended_by: Literal["all", "any", "exception", "failure"] = "all"
    wakes_at: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended, although the callback that tells of it may not have been called yet."""
        done = [future for future in self.futures if future.done()]
        if not done or self.ended_by == "any":
            return bool(done)
        if len(done) == len(self.futures):
            return True
        # Asked by its public name, an exception counts as retrieved, and asyncio would not log it.
        failed = [
            future
            for future in done
            if (future.cancelled() and self.ended_by == "failure") or future._exception is not None
        ]
        return self.ended_by != "all" and bool(failed)


def gathered(future: asyncio.Future[Any]) -> Together | None:
    """What a future of `asyncio.gather` waits for; None for any other future."""
    if type(future) is not _GATHERING:
        return None
    children = list(future._children)  # type: ignore[attr-defined]
    keeps_failures = any(child.done() for child in children) and _keeps_failures(children, future)
    return Together(children, "all" if keeps_failures else "failure")


def _keeps_failures(children: list[asyncio.Future[Any]], outer: object) -> bool:
    """Whether a `gather` was called with return_exceptions=True."""
    waiting = next((child for child in children if not child.done()), None)
    for callback, _ in () if waiting is None else callbacks_of(waiting):
        if getattr(callback, "__code__", None) in _GATHER_CODES:
            variables = _closure(callback)
            if variables.get("outer") is outer:
                return bool(variables.get("return_exceptions"))
    return False


def shielded(future: asyncio.Future[Any]) -> Together | None:
    """What a future of `asyncio.shield` waits for; None for any other future."""
    for callback, _ in callbacks_of(future):
        if getattr(callback, "__code__", None) in _SHIELD_CODES:
            inner = _closure(callback).get("inner")
            return Together([inner]) if isinstance(inner, asyncio.Future) else None
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
) -> Together | None:
    """The tasks of the TaskGroup, asyncio's or anyio's, that waits in `frame` by `future`; None if none does."""
    if frame.f_code.co_filename not in _group_files():
        return None
    group = variables(frame).get("self")
    if getattr(group, "_on_completed_fut", None) is not future:
        return None
    # Where anyio has another name for it, nobody knows who may end this: nothing is proved through it.
    tasks = getattr(group, "_tasks", None)
    return None if tasks is None else Together(list(tasks), "exception")


def awaited_by_wait(
    frame: FrameType, variables: Callable[[FrameType], dict[str, Any]], future: object
) -> Together | None:
    """What `asyncio.wait` or `wait_for` waits for in `frame` by `future`; None if it does not."""
    if frame.f_code not in _WAIT_CODES:
        return None
    found = variables(frame)
    if found.get("waiter") is not future:
        return None
    awaited = [found["fut"]] if "fut" in found else list(found["fs"])
    ended_by = _ENDED_BY.get(found.get("return_when"), "any")
    return Together(awaited, ended_by, _when(found.get("timeout_handle")))


def awaited_by_as_completed(
    frame: FrameType,
    caller: FrameType | None,
    variables: Callable[[FrameType], dict[str, Any]],
    referents: Callable[[Any], Iterable[Any]],
    frame_of: Callable[[Any], FrameType | None],
) -> Together | None:
    """What `asyncio.as_completed` waits for in `frame`, which `caller` awaits; None if it does not."""
    if (
        frame.f_code.co_filename != asyncio.tasks.__file__
        or frame.f_code.co_name != "_wait_for_one"
    ):
        return None
    found = variables(frame)
    if "self" in found:  # from Python 3.13 on
        return Together(list(found["self"]._todo), "any", _when(found["self"]._timeout_handle))
    for value in () if caller is None else referents(caller):
        is_iterator = getattr(value, "gi_code", None) is asyncio.as_completed.__code__
        inner = frame_of(value) if is_iterator else None
        if inner is not None:
            todo = variables(inner)
            if todo.get("done") is found.get("done"):
                return Together(list(todo["todo"]), "any", _when(todo.get("timeout_handle")))
    return None


def _when(handle: asyncio.TimerHandle | None) -> float | None:
    return None if handle is None else handle.when()


def ends_as_completed(callback: object) -> bool:
    """Whether a callback of a timer is that of `asyncio.as_completed`, which only wakes whoever awaits the next."""
    code = getattr(callback, "__code__", None)
    return code is not None and code in _AS_COMPLETED_CODES


def timers(loop: asyncio.AbstractEventLoop) -> list[asyncio.TimerHandle] | None:
    """What an event loop will do later; None where it does not tell.

    uvloop keeps that where only the garbage collector sees it, so that the whole heap has to be looked through.
    """
    scheduled = getattr(loop, "_scheduled", None)
    if scheduled is not None:
        return [handle for handle in list(scheduled) if not handle.cancelled()]
    kind = getattr(sys.modules.get("uvloop.loop"), "TimerHandle", None)
    if kind is None or not type(loop).__module__.startswith("uvloop"):
        return None
    # One that has been called, or was cancelled, has no callback any more.
    return [
        handle
        for handle in gc.get_objects()
        if type(handle) is kind
        and any(held is loop for held in gc.get_referents(handle))
        and callback_of(handle)[0] is not None
    ]


def ready_handles(loop: asyncio.AbstractEventLoop) -> list[asyncio.Handle] | None:
    """What an event loop is about to do; None where it does not tell, or is just changing it."""
    ready = getattr(loop, "_ready", None)
    try:
        return None if ready is None else list(ready)
    except RuntimeError:  # changed while it was copied: another thread's loop
        return None


def callback_of(handle: asyncio.Handle) -> tuple[Any, tuple[Any, ...]]:
    """What an event loop will call, and with which arguments; None for a call that was cancelled."""
    if not isinstance(handle, asyncio.Handle):
        # One of uvloop's, whose members can only be had in their order.
        callback, arguments, *_ = gc.get_referents(handle)
        return callback, arguments or ()
    slots = asyncio.Handle.__dict__  # asked like this, no code of the user's runs
    return slots["_callback"].__get__(handle), slots["_args"].__get__(handle) or ()


def deadline_of(value: object) -> float | None:
    """When a time limit is up, on its loop's clock: `asyncio.timeout`, or a cancel scope of anyio; else None."""
    if isinstance(value, asyncio.Timeout):
        return None if value.expired() else value.when()
    # A module that is just being imported has nothing yet.
    scope = getattr(_anyio(), "CancelScope", None)
    if scope is None or not isinstance(value, scope) or value.deadline == float("inf"):
        return None
    deadline: float = value.deadline
    return deadline


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
_GATHER_CODES = _codes(asyncio.gather)
_SHIELD_CODES = _codes(asyncio.shield)
_CHAIN_CODES = _codes(getattr(asyncio.futures, "_chain_future", asyncio.shield)) - _SHIELD_CODES
_WAIT = vars(asyncio.tasks).get("_wait")
_WAIT_CODES = frozenset(function.__code__ for function in (_WAIT, asyncio.wait_for) if function)
_ENDED_BY: dict[Any, Literal["all", "any", "exception"]] = {
    asyncio.ALL_COMPLETED: "all",
    asyncio.FIRST_EXCEPTION: "exception",
}
_AS_COMPLETED = vars(asyncio.tasks).get("_AsCompletedIterator")  # from Python 3.13 on
_AS_COMPLETED_CODES = (
    frozenset(code for code in _codes(asyncio.as_completed) if code.co_name == "_on_timeout")
    if _AS_COMPLETED is None
    else frozenset({_code(_AS_COMPLETED, "_handle_timeout")})
)
LOOP_STEP = _code(asyncio.Handle, "_run")
LOOP_RUN = _code(asyncio.Runner, "run")  # a loop written in C has no frames for its steps (uvloop)

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
    seconds: float | None = getattr(getattr(driver, _OF_ASYNCPG, None), "command_timeout", None)
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

PoolsPart = Literal["watching", "proof", "anyio's groups", "server"]
Part = PoolsPart | orm_internals.Part
if sys.version_info >= (3, 13):
    _ITERATOR = getattr(asyncio.tasks, "_AsCompletedIterator", None)
    _OF_AS_COMPLETED = [
        (asyncio.tasks, "_AsCompletedIterator"),
        (_ITERATOR, "_wait_for_one"),
        (getattr(_ITERATOR, "__init__", None), "_todo"),
        (getattr(_ITERATOR, "__init__", None), "_timeout_handle"),
        (_ITERATOR, "_handle_timeout"),
    ]
else:
    _OF_AS_COMPLETED = [
        (asyncio.as_completed, name)
        for name in ("_wait_for_one", "_on_timeout", "todo", "done", "timeout_handle")
    ]
_OF_ASYNCPG = "_config"
_OF_GROUPS = ("_on_completed_fut", "_tasks")
# A function stands for its variables, and for the attributes that it reads and sets.
_NEEDED: dict[Part, list[tuple[object, str]]] = {
    "watching": [
        *((Pool, name) for name in POOL_HOOKS),
        (Pool, "_is_asyncio"),
        (QueuePool, "_inc_overflow"),
        (QueuePool.__init__, "_overflow"),
        (QueuePool.__init__, "_max_overflow"),
        (QueuePool.__init__, "_pool"),
        (AsyncAdaptedQueue, "_queue"),
        (pool_base, "_ConnectionFairy"),
        (getattr(pool_base, "_ConnectionFairy", None), "_connection_record"),
        (pool_base, "_ConnectionRecord"),
        (getattr(pool_base, "_ConnectionRecord", None), "fairy_ref"),
        (Connection, "_dbapi_connection"),
        (asyncio, "_get_running_loop"),
        *([(asyncio.tasks, "_current_tasks")] if sys.version_info < (3, 12) else []),
    ],
    "proof": [
        (asyncio.Task, "_fut_waiter"),
        (asyncio.Future, "_callbacks"),
        (asyncio.Future, "_exception"),
        (asyncio.tasks, "_GatheringFuture"),
        (getattr(_GATHERING, "__init__", None), "_children"),
        (asyncio.tasks, "_wait"),
        *((_WAIT, name) for name in ("waiter", "fs", "timeout_handle", "return_when")),
        *((asyncio.gather, name) for name in ("outer", "return_exceptions")),
        (asyncio.shield, "inner"),
        *_OF_AS_COMPLETED,
        (asyncio.futures, "_chain_future"),
        *((asyncio.TaskGroup.__init__, name) for name in _OF_GROUPS),
        (asyncio.BaseEventLoop.__init__, "_ready"),
        (asyncio.BaseEventLoop.__init__, "_scheduled"),
        (asyncio.Handle, "_run"),
        (asyncio.Handle, "_callback"),
        (asyncio.Handle, "_args"),
        (ScopedRegistry, "__call__"),
        (greenlet_spawn, "context"),
    ],
    "server": [
        (Pool, "_creator"),
        (Queue, "queue"),
        (AsyncAdaptedQueue, "_queue"),
        (asyncio.Queue, "_init"),
        (getattr(asyncio.Queue, "_init", None), "_queue"),
    ],
    "callbacks": [(asyncio.Handle, "_callback"), (asyncio.Handle, "_args")],
    **orm_internals.NEEDED,
}


def missing() -> dict[Part, str]:
    """The parts that cannot work here, and the name that each lacks."""
    found: dict[Part, str] = {}
    for part, names in _NEEDED.items():
        for owner, name in names:
            if not _has(owner, name):
                found.setdefault(part, _called(owner, name))
    group = getattr(_anyio(), "TaskGroup", None)
    if group is not None:
        for name in _OF_GROUPS:
            if not _has(group.__init__, name):
                found.setdefault("anyio's groups", _called(group.__init__, name))
    connection = getattr(sys.modules.get("asyncpg.connection"), "Connection", None)
    if connection is not None and not _has(connection, _OF_ASYNCPG):
        found.setdefault("server", _called(connection, _OF_ASYNCPG))
    return found | orm_internals.missing()


def _has(owner: object, name: str) -> bool:
    if isinstance(owner, FunctionType):
        code = owner.__code__
        return name in {*code.co_varnames, *code.co_cellvars, *code.co_names}
    # Some names are nowhere but in the annotations of a class. They are not evaluated: that may need a type checker.
    return hasattr(owner, name) or any(
        name in annotated for annotated in map(_annotated, getattr(owner, "__mro__", (owner,)))
    )


if sys.version_info >= (3, 14):
    from annotationlib import Format, get_annotations

    def _annotated(owner: Any) -> Iterable[str]:
        return get_annotations(owner, format=Format.FORWARDREF) if isinstance(owner, type) else ()

else:

    def _annotated(owner: Any) -> Iterable[str]:
        return getattr(owner, "__annotations__", ())


def _called(owner: object, name: str) -> str:
    if isinstance(owner, FunctionType):
        return f"{owner.__module__}.{owner.__qualname__}'s {name}"
    return f"{getattr(owner, '__name__', owner)}.{name}"
