"""A cancellation that comes when it is told to: at the first suspension of some work, or at the second, or later."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any


class Struck:
    """Work that is cancelled at the moment of its `number`-th suspension; `reached` says whether it had so many."""

    def __init__(self, work: Coroutine[Any, Any, Any], number: int) -> None:
        self._work = work
        self._left = number
        self.reached = False

    def __await__(self) -> Generator[Any, Any, Any]:
        step, error = self._work.__await__(), None
        while True:
            try:
                awaited = step.send(None) if error is None else step.throw(error)
            except StopIteration as end:
                return end.value
            error, self._left = None, self._left - 1
            if not self._left:
                self.reached = True
                task = asyncio.current_task()
                assert task is not None
                asyncio.get_running_loop().call_soon(task.cancel)
            try:
                yield awaited
            except BaseException as raised:
                error = raised


async def strike(work: Coroutine[Any, Any, Any], number: int, patience: float = 1.0) -> str:
    """Cancel some work at its `number`-th suspension, and say how it ends.

    "ended" before it was struck; "cancelled"; "failed", with another error; "went on", to its end, as if nothing had
    been; or "stuck", where it has not ended after `patience` seconds, and is cancelled once more. Raises what the work
    raises before it is struck.
    """
    struck = Struck(work, number)

    async def strike_it() -> None:
        await struck

    task = asyncio.create_task(strike_it())
    ended, _ = await asyncio.wait([task], timeout=patience)
    if not ended:
        task.cancel()
        await asyncio.wait([task], timeout=patience)
        return "stuck"
    if task.cancelled():
        return "cancelled"
    if not struck.reached:
        task.result()
        return "ended"
    return "failed" if task.exception() else "went on"
