"""The stack of a task or thread while it sleeps.

To note the stack whenever somebody begins to wait would cost the waiter, and the garbage collector, far
more than the wait itself; a sleeper's stack can be read later, when somebody asks for it.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import sys
import threading
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any

import greenlet
from sqlalchemy.util.concurrency import greenlet_spawn

from ormscope.owners import TaskOrThread

_STEPS = (CoroutineType, GeneratorType, AsyncGeneratorType)
_FRAME = ("cr_frame", "gi_frame", "ag_frame")
_AWAITED = ("cr_await", "gi_yieldfrom", "ag_await")


def awaited_future(task: asyncio.Task[Any]) -> asyncio.Future[Any] | None:
    """The future that a suspended task sleeps on; None when it is about to run."""
    future: asyncio.Future[Any] | None = getattr(task, "_fut_waiter", None)
    return None if future is None or future.done() else future


def sleeping_frames(subject: TaskOrThread) -> list[FrameType]:
    """The frames in which a task or thread sleeps, outermost first.

    Of a task that runs at this moment only the outermost frame is known.
    """
    if not isinstance(subject, asyncio.Task):
        return thread_frames(subject.ident or 0)
    frames: list[FrameType] = []
    step: Any = subject.get_coro()
    while step is not None:
        frame = _first(step, _FRAME)
        if frame is not None:
            frames.append(frame)
            if frame.f_code is greenlet_spawn.__code__:
                # SQLAlchemy runs its synchronous code, and the user's that it calls, on a stack of its own.
                # Asked from another thread, the task may have woken and gone on meanwhile.
                context = locals_of(frame).get("context")
                frames += _down_from(context.gr_frame if context is not None else None)
        step = _awaited(step)
    return frames


def thread_frames(thread: int) -> list[FrameType]:
    """The frames of a thread, given by its identifier, at this moment, outermost first."""
    return _down_from(sys._current_frames().get(thread))


def calling_frames() -> list[FrameType]:
    """The frames that led to ormscope, and those of all other threads and waiting greenlets, innermost first.

    Not ormscope's own: whoever keeps a reference to his own frame makes a cycle that only the collector can undo.
    """
    me = threading.get_ident()
    frames = [*reversed(_down_from(_caller()))]
    for ident in [one for one in sys._current_frames() if one != me]:
        frames += reversed(_down_from(sys._current_frames().get(ident)))
    waiting = greenlet.getcurrent().parent
    while waiting is not None:
        frames += reversed(_down_from(waiting.gr_frame))
        waiting = waiting.parent
    return frames


def _caller() -> FrameType | None:
    """The innermost frame that is not ormscope's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__package__") == __package__:
        frame = frame.f_back
    return frame


def locals_of(frame: FrameType) -> dict[str, Any]:
    """A copy of a frame's local variables.

    Before Python 3.13 a frame keeps the dict that `f_locals` makes, and so all that was in it, until it ends.
    """
    found = frame.f_locals
    copy = dict(found)
    if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        found.clear()
    return copy


def _awaited(step: Any) -> Any:
    """The coroutine or generator that another one awaits; None at the end of the chain."""
    if isinstance(step, _STEPS):
        return _first(step, _AWAITED)
    # Python puts objects in between that tell nobody what they wrap: for `async for`, for `__await__`.
    return next((one for one in gc.get_referents(step) if isinstance(one, _STEPS)), None)


def _first(step: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(step, name) for name in names if hasattr(step, name)), None)


def _down_from(frame: FrameType | None) -> list[FrameType]:
    """A frame and all that called it, outermost first."""
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames[::-1]
