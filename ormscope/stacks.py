"""The stack of a task or thread while it sleeps.

To note the stack whenever somebody begins to wait would cost the waiter, and the garbage collector, far
more than the wait itself; a sleeper's stack can be read later, when somebody asks for it.

Python 3.14 has `asyncio.capture_call_graph(task)` for this, which also tells who awaits the task. It is as fast as
the walk here (3,000 tasks in the queue of a pool: 23 to 43 ms, the walk 34 to 67 ms), and neither the walk nor the
proof's way up from a stuck task (`proof.py`) can be made with it, as of 3.14.10; tests/test_call_graph.py holds that:

- Each call also goes up to all who await the task, and cannot be told not to. It goes there once for each path: with
  two tasks in each of 16 layers that wait for the layer below, one call takes 0.27 s, and twice that for each layer
  more. Where tasks await one another, as in the deadlocks looked for here, or in a chain of 1,000, it raises
  RecursionError. A proof runs on the loop, and has to end.
- It stops before an `async for`, at an object's `__await__`, and before SQLAlchemy's greenlet, where the user's own
  line may be behind that; and it has the frames, not the coroutines, from whose stacks time limits are read.
- Of who awaits a task it knows what asyncio itself notes, not who is woken by a callback of the program's; so it
  could only be a second answer beside the proof's own, not take its place.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from types import AsyncGeneratorType, CellType, CoroutineType, FrameType, GeneratorType
from typing import Any

import greenlet
from sqlalchemy.util.concurrency import greenlet_spawn

from ormscope import internals
from ormscope.owners import TaskOrThread

STEPS = (CoroutineType, GeneratorType, AsyncGeneratorType)
_FRAME = ("cr_frame", "gi_frame", "ag_frame")


def is_sleeping(task: asyncio.Task[Any]) -> bool:
    """Whether a task waits for something, and is not about to run."""
    return internals.awaited_future(task) is not None


def sleeping_frames(subject: TaskOrThread) -> list[FrameType]:
    """The frames in which a task or thread sleeps, outermost first.

    Of a task that runs at this moment only the outermost frame is known.
    """
    if not isinstance(subject, asyncio.Task):
        return thread_frames(subject.ident or 0)
    frames: list[FrameType] = []
    for _, frame in steps_of(subject):
        frames.append(frame)
        frames += greenlet_frames(frame)
    return frames


def only_looks_up(task: asyncio.Task[Any]) -> bool:
    """Whether a task that has been woken, as it seems, only looks up, and will wait on for the server's answer."""
    frames = [frame for _, frame in steps_of(task)]
    return bool(frames) and internals.is_still_waiting(frames[-1], locals_of)


def steps_of(task: asyncio.Task[Any]) -> list[tuple[Any, FrameType]]:
    """The coroutines and generators of which each awaits the next, with their frames, outermost first."""
    steps: list[tuple[Any, FrameType]] = []
    step: Any = task.get_coro()
    with COLLECTOR_RESTS:
        while step is not None:
            frame = _frame_of(step)
            if frame is not None:
                steps.append((step, frame))
            step = awaited_step(step)
    return steps


def greenlet_frames(frame: FrameType) -> list[FrameType]:
    """The frames of the greenlet that SQLAlchemy runs from this one, outermost first; none for other frames.

    SQLAlchemy runs its synchronous code, and the user's that it calls, on a stack of its own.
    """
    if frame.f_code is not greenlet_spawn.__code__:
        return []
    # Asked from another thread, the task may have woken and gone on meanwhile.
    context = internals.greenlet_of(locals_of(frame))
    return down_from(context.gr_frame if context is not None else None)


def thread_frames(thread: int) -> list[FrameType]:
    """The frames of a thread, given by its identifier, at this moment, outermost first; not ormscope's own."""
    with COLLECTOR_RESTS:
        is_mine = thread == threading.get_ident()
        return down_from(_caller() if is_mine else sys._current_frames().get(thread))


def frames_of_threads() -> dict[int, list[FrameType]]:
    """The frames of all threads at this moment, outermost first, by the identifiers of the threads.

    Not ormscope's own: whoever keeps a reference to his own frame makes a cycle that only the collector can undo.
    """
    me = threading.get_ident()
    with COLLECTOR_RESTS:
        return {
            ident: down_from(_caller() if ident == me else frame)
            for ident, frame in sys._current_frames().items()
        }


def calling_frames() -> list[FrameType]:
    """The frames that led to ormscope, and those of all other threads and waiting greenlets, innermost first."""
    threads = frames_of_threads()
    frames = [*reversed(threads.pop(threading.get_ident()))]
    for others in threads.values():
        frames += reversed(others)
    waiting = greenlet.getcurrent().parent
    while waiting is not None:
        frames += reversed(down_from(waiting.gr_frame))
        waiting = waiting.parent
    return frames


def _caller() -> FrameType | None:
    """The innermost frame that is not ormscope's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__package__") == __package__:
        frame = frame.f_back
    return frame


def locals_of(frame: FrameType) -> dict[str, Any]:
    """A copy of a frame's local variables, made without a trace in the program.

    Before Python 3.13 a function's frame has one dict for `f_locals`, which `locals()`, debuggers and loggers hand out:
    to read that attribute writes into what they keep. So the variables are read where the frame itself has them.
    """
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        # Of a module or a class: what it defines. A metaclass may give a mapping that is the user's code.
        names = frame.f_locals
        return dict(dict.items(names)) if type.__subclasscheck__(dict, type(names)) else {}
    return dict(frame.f_locals if sys.version_info >= (3, 13) else _variables_in(frame))


if sys.version_info < (3, 13):
    import ctypes

    class _Frame(ctypes.Structure):
        """The beginning of a frame object, which in 3.11 and 3.12 points to where the interpreter has its variables."""

        _fields_ = (
            ("head", ctypes.c_byte * object.__basicsize__),
            ("back", ctypes.c_void_p),
            ("interpreters", ctypes.POINTER(ctypes.py_object)),
        )

    def _words_before_variables() -> int | None:
        """At which word of the interpreter's frame its variables begin: looked up where the answer is known."""
        known = object()
        frame = sys._getframe()
        pointer = ctypes.POINTER(ctypes.c_size_t)
        words = ctypes.cast(_Frame.from_address(id(frame)).interpreters, pointer)
        del frame  # else it would hold itself
        # Not in a generator expression: what that shares with its function is no longer in the frame itself.
        for at in range(5, 16):
            if words[at] == id(known):
                return at
        return None

    _BEFORE_VARIABLES = _words_before_variables()

    def _variables_in(frame: FrameType) -> Iterator[tuple[str, Any]]:
        """The names and values of a function's variables, those of the functions around it included."""
        if _BEFORE_VARIABLES is None:
            return  # an interpreter that is laid out in another way: no names are better than wrong ones
        code = frame.f_code
        shared = {*code.co_cellvars, *code.co_freevars}
        own = code.co_varnames
        cells = (name for name in code.co_cellvars if name not in own)
        interpreters = _Frame.from_address(id(frame)).interpreters
        for at, name in enumerate((*own, *cells, *code.co_freevars), _BEFORE_VARIABLES):
            try:
                # One instruction follows the pointer and takes a reference: a thread may end its call in between two.
                value = interpreters[at]
                if name in shared and type(value) is CellType:
                    value = value.cell_contents
            except ValueError:
                continue  # it has no value now
            yield name, value


def awaited_step(step: Any) -> Any:
    """The coroutine or generator that another one awaits; None at the end of the chain."""
    # Where another thread runs a step, Python 3.11 would return what lies at the place of the awaited one, and crash.
    # Between the two looks stands no call, at which that thread could be let in.
    if isinstance(step, CoroutineType):
        return None if step.cr_running else step.cr_await
    if isinstance(step, GeneratorType):
        return None if step.gi_running else step.gi_yieldfrom
    if isinstance(step, AsyncGeneratorType):
        # `ag_running` is also true of one that awaits; what runs has a caller.
        with COLLECTOR_RESTS:
            frame = frame_of(step)
            return None if frame is not None and frame.f_back is not None else step.ag_await
    # Python puts objects in between that tell nobody what they wrap: for `async for`, for `__await__`.
    return next((held for held in gc.get_referents(step) if isinstance(held, STEPS)), None)


def frame_of(step: Any) -> FrameType | None:
    """The frame of a coroutine or generator; None once it has ended."""
    with COLLECTOR_RESTS:
        return _frame_of(step)


def _frame_of(step: Any) -> FrameType | None:
    if isinstance(step, CoroutineType):  # nearly all
        return step.cr_frame
    return next((getattr(step, name) for name in _FRAME if hasattr(step, name)), None)


def down_from(frame: FrameType | None) -> list[FrameType]:
    """A frame and all that called it, outermost first."""
    frames: list[FrameType] = []
    with COLLECTOR_RESTS:
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
    return frames[::-1]


class _CollectorRests:
    """Keeps the garbage collector away while frames of other threads are looked up.

    Until Python 3.12 to ask for a frame may make one, which may start a collection within that very step; what it
    calls lets other threads run, and where one of these returns from the frame, that is made of freed memory, and the
    process crashes. (`sys._current_frames` of CPython 3.12 does the same: gh-106883.)
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a collection that is going on may call us
        self._inside = 0
        self._was_on = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._was_on = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._was_on:
                gc.enable()


COLLECTOR_RESTS = nullcontext() if sys.version_info >= (3, 12) else _CollectorRests()
