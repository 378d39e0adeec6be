"""LoopScope: how late the event loop is."""

from __future__ import annotations

import asyncio
import time

_INTERVAL_SECONDS = 0.02


class LoopScope:
    """Watches the running event loop until `close()`; create it in a coroutine or callback of that loop.

    A callback runs every 20 ms, when the loop lets it. `lag()` may be called from any thread, so a
    loop that is blocked *now* shows its lag now, not only once it is over.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._longest_finished = 0.0
        self._due = time.perf_counter()
        self._handle = self._loop.call_soon(self._beat)

    def _beat(self) -> None:
        now = time.perf_counter()
        self._longest_finished = max(self._longest_finished, now - self._due)
        self._due = now + _INTERVAL_SECONDS
        self._handle = self._loop.call_later(_INTERVAL_SECONDS, self._beat)

    def lag(self) -> float:
        """Seconds that the loop is behind at this moment; 0 when it is on time."""
        return max(0.0, time.perf_counter() - self._due)

    def longest_lag(self) -> float:
        """The longest lag since the last call of this method, the present one included, in seconds."""
        longest, self._longest_finished = max(self._longest_finished, self.lag()), 0.0
        return longest

    def close(self) -> None:
        """Stop watching."""
        self._handle.cancel()
