"""LoopScope: how late the event loop is."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque

_INTERVAL_SECONDS = 0.02
_REMEMBERED_SECONDS = 60.0


class LoopScope:
    """Watches the running event loop until `close()`; create it in a coroutine or callback of that loop.

    `event_loop` is that loop, `thread` the identifier of its thread.

    A callback runs every 20 ms, when the loop lets it. `lag()` may be called from any thread, so a
    loop that is blocked *now* shows its lag now, not only once it is over.
    """

    def __init__(self) -> None:
        self.event_loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        self._longest_finished = 0.0
        # When a lag ended and how long it was. One that a later and longer one outdoes is left out, so they fall.
        self._recent: deque[tuple[float, float]] = deque()
        self._lock = threading.Lock()
        self._due = time.perf_counter()
        self._handle = self.event_loop.call_soon(self._beat)

    def _beat(self) -> None:
        now = time.perf_counter()
        lag = now - self._due
        self._longest_finished = max(self._longest_finished, lag)
        with self._lock:
            while self._recent and self._recent[-1][1] <= lag:
                self._recent.pop()
            self._recent.append((now, lag))
            while self._recent[0][0] < now - _REMEMBERED_SECONDS:
                self._recent.popleft()
        self._due = now + _INTERVAL_SECONDS
        self._handle = self.event_loop.call_later(_INTERVAL_SECONDS, self._beat)

    def lag(self) -> float:
        """Seconds that the loop is behind at this moment; 0 when it is on time."""
        return max(0.0, time.perf_counter() - self._due)

    def longest_lag(self) -> float:
        """The longest lag since the last call of this method, the present one included, in seconds."""
        longest, self._longest_finished = max(self._longest_finished, self.lag()), 0.0
        return longest

    def longest_lag_within(self, seconds: float) -> float:
        """The longest lag of the last `seconds` (60 at most), the present one included, in seconds.

        It forgets nothing, so any number of readers get the same answer.
        """
        since = time.perf_counter() - seconds
        with self._lock:
            finished = next((lag for end, lag in self._recent if end >= since), 0.0)
        return max(finished, self.lag())

    def close(self) -> None:
        """Stop watching."""
        self._handle.cancel()
