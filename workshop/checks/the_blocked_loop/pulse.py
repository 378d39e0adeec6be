"""The pulse of an event loop: for how long it stands still, and what its thread does meanwhile."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FrameType

from sqlalchemy.util.queue import Queue as PoolQueue

from ormscope.places import place
from ormscope.stacks import thread_frames
from workshop.checks.unheard import is_learners

_BEAT_SECONDS = 0.005
_LOOK_SECONDS = 0.01
_LATE_SECONDS = 0.07  # that the loop must be late before anybody asks why; a report takes longer
_LOOP_STEP = asyncio.Handle._run.__code__
_POOL_WAIT = PoolQueue.get.__code__
_THREAD_WAITS: set[CodeType] = {
    function.__code__
    for function in (
        futures.Future.result,
        futures.Future.exception,
        futures.wait,
        threading.Thread.join,
        queue.Queue.get,
    )
}


@dataclass
class Beats:
    """What is noted of an event loop, and of what its thread does in the learner's code while it stands still.

    `stood_still` is how many seconds the loop stood still within the learner's code, and `places` counts where. `waits`
    counts what it was seen to stand still for: the "pool", a "thread", a call "in a greenlet", or a "call" of the
    task's own. `longest_work` is the longest time that the loop's thread worked in one step of the loop, in seconds of
    its own: while the machine is busy with others, it does not work. `steps` is how many steps it took without the
    beats, and `threads` the most threads at once, beyond those at the beginning.
    """

    stood_still: float = 0.0
    places: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    longest_work: float = 0.0
    steps: int = 0
    threads: int = 0


class Pulse:
    """The pulse of the running event loop."""

    def __init__(self) -> None:
        self.noted = Beats()
        self._closed = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._beaten = time.perf_counter()
        self._began = time.thread_time()  # of the step in which this is made
        self._seen_at: float | None = None  # the beat after which the learner's code was seen
        self._handle = self._loop.call_soon(self._beat)
        self._threads_before = threading.active_count() + 1  # with the one that looks
        self._looker = threading.Thread(target=self._look, name="the check", daemon=True)
        self._looker.start()

    def close(self) -> None:
        """Stop, and count what is going on."""
        self._count()
        self._note_work()
        self._handle.cancel()
        self._closed.set()
        self._looker.join()

    def step(self, run: Callable[[], None]) -> None:
        """Take a step of a loop, and note how long it took if it is this one."""
        is_mine = threading.get_ident() == self._loop_thread
        if is_mine:
            self.noted.steps += 1
            self._began = time.thread_time()
        run()
        if is_mine:
            self._note_work()

    def _note_work(self) -> None:
        self.noted.longest_work = max(self.noted.longest_work, time.thread_time() - self._began)

    def _beat(self) -> None:
        self.noted.steps -= 1  # this one
        self._count()
        self._handle = self._loop.call_later(_BEAT_SECONDS, self._beat)

    def _count(self) -> None:
        now = time.perf_counter()
        if self._seen_at == self._beaten:
            self.noted.stood_still += now - self._beaten
        self._beaten = now

    def _look(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            self.noted.threads = max(
                self.noted.threads, threading.active_count() - self._threads_before
            )
            beaten = self._beaten
            if time.perf_counter() - beaten < _LATE_SECONDS:
                continue
            frames = thread_frames(self._loop_thread)
            own = [frame for frame in frames if _is_learners(frame)]
            if not own:
                continue
            self._seen_at = beaten
            code = {frame.f_code for frame in frames}
            if _POOL_WAIT in code:
                self.noted.waits["pool"] += 1
            elif code & _THREAD_WAITS:
                self.noted.waits["thread"] += 1
            elif _LOOP_STEP not in code:  # a stack of its own, that begins below the loop
                self.noted.waits["in a greenlet"] += 1
            else:
                self.noted.waits["call"] += 1
            self.noted.places[place((own[-1].f_code, own[-1].f_lineno)).short] += 1


def _is_learners(frame: FrameType) -> bool:
    filename = frame.f_code.co_filename
    return filename != "<string>" and is_learners(filename)  # with which the process began


@contextmanager
def pulse() -> Iterator[Beats]:
    """Measure the pulse of the running event loop from here to the end of the block."""
    measured, run = Pulse(), asyncio.Handle._run

    def step(handle: asyncio.Handle) -> None:
        measured.step(partial(run, handle))

    asyncio.Handle._run = step  # type: ignore[assignment, method-assign]
    try:
        yield measured.noted
    finally:
        asyncio.Handle._run = run  # type: ignore[method-assign]
        measured.close()
