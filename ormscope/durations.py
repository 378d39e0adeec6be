"""Durations: how long something took, counted in fixed buckets, as Prometheus wants it."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

# Upper bounds in seconds: those of Prometheus's own clients, and half a minute, which is SQLAlchemy's pool_timeout.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Durations:
    """A histogram of seconds. Not locked: whoever adds to it holds a lock already."""

    __slots__ = ("_counts", "total")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self._counts)

    def cumulative(self) -> list[int]:
        """How many lasted no longer than each of BOUNDS, and at last how many there were."""
        return list(accumulate(self._counts))
