"""LoopScope sees a loop that is blocked now, not only after."""

from __future__ import annotations

import asyncio
import threading
import time

from ormscope import LoopScope


def test_lag_is_seen_from_another_thread_while_the_loop_is_blocked() -> None:
    seen: list[float] = []

    async def main() -> None:
        scope = LoopScope()
        await asyncio.sleep(0.05)
        scope.longest_lag()
        blocked, read = threading.Event(), threading.Event()

        def look() -> None:
            blocked.wait()
            time.sleep(0.3)
            seen.append(scope.lag())
            read.set()

        threading.Thread(target=look, daemon=True).start()
        blocked.set()
        read.wait()  # blocks the loop until the thread has looked
        await asyncio.sleep(0.05)
        assert scope.longest_lag() >= 0.25, "and afterwards it is remembered"
        assert scope.longest_lag() < 0.25, "once"
        scope.close()

    asyncio.run(main())
    assert seen[0] >= 0.25


def test_a_loop_on_time_has_next_to_no_lag() -> None:
    async def main() -> float:
        scope = LoopScope()
        shortest = 1.0
        for _ in range(20):  # the best of twenty, on a machine that does other things too
            await asyncio.sleep(0.02)
            shortest = min(shortest, scope.longest_lag())
        scope.close()
        return shortest

    assert asyncio.run(main()) < 0.05
