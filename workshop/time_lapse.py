"""A clock that runs fast: what takes half a minute is over in a moment, and nothing but the time is played."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TICK_SECONDS = 0.01


@contextmanager
def time_lapse(step: float = 1.0) -> Iterator[None]:
    """Let the running event loop's clock go on by `step` seconds each hundredth of a second, to the end of the block.

    All timers of the loop go by it: sleep, timeout, wait_for. The network does not, nor do threads and the database. It
    ticks when the loop comes round, so on a busy machine, or where the loop is blocked, it waits.
    """
    loop, over, ticked = asyncio.get_running_loop(), threading.Event(), threading.Event()
    before, now = loop.time, loop.time()

    def tick() -> None:
        nonlocal now
        now += step
        ticked.set()

    def keep_ticking() -> None:
        while not over.wait(_TICK_SECONDS):
            ticked.clear()
            loop.call_soon_threadsafe(tick)
            while not ticked.wait(_TICK_SECONDS) and not over.is_set():
                pass

    loop.time = lambda: now  # type: ignore[method-assign]
    ticking = threading.Thread(target=keep_ticking, name="time lapse", daemon=True)
    ticking.start()
    try:
        yield
    finally:
        over.set()
        ticking.join()
        loop.time = before  # type: ignore[method-assign]
