"""MemoryScope: the resident memory of a process over time, sampled from outside of it."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

_INTERVAL_SECONDS = 0.02


class MemorySample(NamedTuple):
    """Resident memory at one moment: `time.perf_counter()` seconds, MiB (2**20 bytes)."""

    time: float
    mebibytes: float


class MemoryScope:
    """Watches the process `pid` until `close()`, or until that process ends.

    memory-profiler takes a sample every 20 ms, in a thread of this process: the other one is not slowed down,
    and is seen also while its event loop is blocked. `samples` holds all of them, oldest first.
    """

    def __init__(self, pid: int) -> None:
        self.samples: list[MemorySample] = []
        self._pid = pid
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ormscope memory", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        import psutil
        from memory_profiler import memory_usage

        while not self._closed.wait(_INTERVAL_SECONDS):
            try:
                (mebibytes,) = memory_usage(self._pid, interval=0)
            except psutil.NoSuchProcess:
                return
            if not mebibytes:
                return  # it has ended, and only its parent has not been told yet
            self.samples.append(MemorySample(time.perf_counter(), mebibytes))

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()
