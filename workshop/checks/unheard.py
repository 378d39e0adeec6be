"""What Python itself would say of the learner's code, on standard error, where nobody reads it."""

from __future__ import annotations

import asyncio
import gc
import re
import sys
import traceback
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ormscope.places import is_library, is_user_code
from ormscope.tracebacks import users_traceback

_NEVER_AWAITED = re.compile(r"coroutine '(?P<coroutine>[^']+)' was never awaited")
_MADE_IN = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)$', re.M)
_SLIPS = (NameError, AttributeError, TypeError, ImportError)  # which no program means to raise
_INNER = "<locals>."
_WORKSHOP = str(Path(__file__).parents[1])


def is_learners(filename: str) -> bool:
    """Whether code of this file is the learner's: neither a library's, nor the workshop's own."""
    return is_user_code(filename) and not (is_library(filename) or filename.startswith(_WORKSHOP))


@dataclass(kw_only=True)
class Unheard:
    """`never_awaited` are the calls that only made a coroutine, each with its line; `raised` is the traceback of an
    exception with which a task ended that nobody asked for its result, empty where there was none.
    """

    never_awaited: list[str] = field(default_factory=list)
    raised: str = ""


@contextmanager
def listening() -> Iterator[Unheard]:
    """Hear what is said from here to the end of the block, with what its garbage says when it is collected."""
    unheard = Unheard()
    loop = asyncio.get_running_loop()
    started: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()

    def start(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
        started.add(task)
        return task

    def show(message: Warning | str, *_where: Any, **_more: Any) -> None:
        if (call := _call(str(message))) and call not in unheard.never_awaited:
            unheard.never_awaited.append(call)

    def handle(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # A wait in vain for a connection is told by the pool; a driver may complain of its own task.
        if error is None or unheard.raised or isinstance(error, PoolTimeoutError):
            return
        if any(is_learners(frame.filename) for frame in traceback.extract_tb(error.__traceback__)):
            unheard.raised = "\n".join(users_traceback(error))

    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        setattr(warnings, "showwarning", show)  # noqa: B010  # its type names each argument
        loop.set_exception_handler(handle)
        loop.set_task_factory(start)
        sys.set_coroutine_origin_tracking_depth(1)
        try:
            yield unheard
            gc.collect()
            unheard.raised = unheard.raised or _slip_of(started)
        finally:
            loop.set_task_factory(None)
            sys.set_coroutine_origin_tracking_depth(0)
            loop.set_exception_handler(None)


def _slip_of(tasks: Iterable[asyncio.Task[Any]]) -> str:
    """The traceback of a slip that ended a task which somebody still has; of others Python has told itself."""
    for task in list(tasks):
        if task.done() and not task.cancelled() and isinstance(error := task.exception(), _SLIPS):
            return "\n".join(users_traceback(error))
    return ""


def _call(message: str) -> str:
    """The call of which Python says that its coroutine was never awaited; empty where it is not the learner's."""
    never_awaited, made_in = _NEVER_AWAITED.search(message), _MADE_IN.search(message)
    if never_awaited is None or made_in is None:
        return ""
    if not is_learners(made_in["file"]):
        return ""
    coroutine = never_awaited["coroutine"].rpartition(_INNER)[2]
    function = made_in["function"].rpartition(_INNER)[2]
    return f"{coroutine}(), called in {function}, line {made_in['line']}"
