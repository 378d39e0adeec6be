"""storm: many requests at once, and how each of them ended."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ormscope.tracebacks import outcome_of, users_traceback


class Request(NamedTuple):
    """One request of a storm. `start` and `end` are in seconds, at first of `time.perf_counter()`.

    `outcome` is "ok", or the name of the exception's class with its module ("sqlalchemy.exc.TimeoutError");
    `error` then is the traceback as text, as far as it leads through the user's code.
    """

    number: int
    start: float
    end: float
    outcome: str
    error: str = ""


class StormLog:
    """What the storms of this process have done: `announced` requests in all, `ended` not yet collected."""

    def __init__(self) -> None:
        self.announced = 0
        self.ended: deque[Request] = deque(maxlen=100_000)


log = StormLog()


async def storm(
    request: Callable[[int], Any], count: int, *, threads: int | None = None
) -> Counter[str]:
    """Start `request(0)` … `request(count - 1)` all at once; return how many ended how.

    `request` is an `async def`, and each of them runs as a task. With `threads` it is an ordinary function, and
    that many of them run at once, each in a thread. An exception ends only its own request, and is counted by
    the name of its class.
    """
    log.announced += count
    ended: list[Request] = []

    def note(number: int, start: float, error: BaseException | None) -> None:
        outcome = "ok" if error is None else outcome_of(error)
        text = "" if error is None else "\n".join(users_traceback(error))
        ended.append(Request(number, start, time.perf_counter(), outcome, text))
        log.ended.append(ended[-1])

    async def run_task(number: int) -> None:
        start = time.perf_counter()
        failed: BaseException | None = None
        try:
            await request(number)
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # somebody has cancelled it; else the request itself let a cancellation through
            failed = error
        note(number, start, failed)

    def run_thread(number: int) -> None:
        start, failed = time.perf_counter(), None
        try:
            request(number)
        except Exception as error:
            failed = error
        note(number, start, failed)

    def run_threads(threads: int) -> None:
        # Not on the event loop, which whoever starts a thread keeps until it runs: on a busy machine that takes long.
        with ThreadPoolExecutor(threads, thread_name_prefix="thread") as executor:
            list(executor.map(run_thread, range(count)))

    if threads is None:
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(run_task(number), name=f"request {number}")
    else:
        await asyncio.to_thread(run_threads, threads)
    return Counter(request.outcome for request in ended)
