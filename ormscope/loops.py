"""The event loops whose tasks have waited for a connection: each is watched by itself.

A callback looks for deadlocks every 25 ms while one of the loop's tasks is in a queue, at longer intervals while
nothing has changed. It is the loop's heartbeat as well: where it is overdue, the loop is blocked.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable

_SHORTEST, _LONGEST = 0.025, 0.2  # seconds between two looks

Look = Callable[[asyncio.AbstractEventLoop, bool], bool | None]
"""Looks at what concerns a loop, also at what moves where it is asked `soon`; returns whether anything has changed,
None where nobody waits any more."""


class LoopWatch:
    """The heartbeat of one event loop, while somebody waits on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = weakref.ref(loop)
        self.thread = threading.get_ident()
        self.due: float | None = None  # when it should beat next, in `time.perf_counter()` seconds
        self._pause = _SHORTEST
        self._looks_soon = False

    def begin(self, look: Look, soon: bool) -> None:
        """Beat from now on, and at once where a look is due `soon`."""
        loop = self.loop()
        if loop is None:
            return
        self.thread = threading.get_ident()
        if soon and not self._looks_soon:
            self._looks_soon = True
            loop.call_soon(self._look_soon, look)
        self._pause = _SHORTEST
        if self.due is None:
            self.due = time.perf_counter() + self._pause
            loop.call_later(self._pause, self._beat, look)

    def _look_soon(self, look: Look) -> None:
        self._looks_soon = False
        loop = self.loop()
        if loop is not None:
            look(loop, True)

    def _beat(self, look: Look) -> None:
        loop = self.loop()
        changed = None if loop is None else look(loop, False)
        if loop is None or changed is None:
            self.due = None
            return
        self._pause = _SHORTEST if changed else min(2 * self._pause, _LONGEST)
        self.due = time.perf_counter() + self._pause
        loop.call_later(self._pause, self._beat, look)

    def late(self, now: float) -> float:
        """Seconds by which the heartbeat is overdue; 0 where none is."""
        due, loop = self.due, self.loop()
        if due is None or loop is None or loop.is_closed() or not loop.is_running():
            return 0.0
        return max(0.0, now - due)


_watches: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopWatch] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()


def watch_of(loop: asyncio.AbstractEventLoop) -> LoopWatch:
    """The heartbeat of a loop."""
    with _lock:
        if loop not in _watches:
            _watches[loop] = LoopWatch(loop)
        return _watches[loop]


_last = threading.local()


def running_watch(loop: asyncio.AbstractEventLoop) -> LoopWatch:
    """The heartbeat of the loop that runs in this thread; asked for each request that has to wait."""
    watch: LoopWatch | None = getattr(_last, "watch", None)
    if watch is None or watch.loop() is not loop:
        watch = _last.watch = watch_of(loop)
    return watch


def known_loops() -> list[tuple[asyncio.AbstractEventLoop, int]]:
    """The loops that run, and the identifiers of their threads."""
    with _lock:
        return [(loop, watch.thread) for loop, watch in _watches.items() if loop.is_running()]
