"""Processors: what share of their time a load, its service and its database had, and what share everybody else."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

import psutil


class Shares(NamedTuple):
    """Shares of the time of all processors, from 0 to 1: of other programs, and of nobody."""

    others: float
    idle: float


class Processors:
    """Measures from now on. `ours` are the processes of the load; of those with children, these count as well."""

    def __init__(self, ours: Iterable[psutil.Process]) -> None:
        self._ours = list(ours)
        self._all, self._idle, self._used = self._now()

    def shares(self) -> Shares:
        """What the others had since then, and what nobody had."""
        everything, idle, used = (
            after - before
            for after, before in zip(self._now(), (self._all, self._idle, self._used), strict=True)
        )
        if everything <= 0:
            return Shares(0.0, 0.0)
        return Shares(max(0.0, everything - idle - used) / everything, idle / everything)

    def _now(self) -> tuple[float, float, float]:
        """Seconds of all processors since the machine began: all of them, those of nobody, those of ours."""
        times = psutil.cpu_times()._asdict()
        # Linux counts a guest's time twice.
        everything = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
        idle = times["idle"] + times.get("iowait", 0.0)
        return everything, idle, sum(map(_seconds_of, self._ours))


def _seconds_of(process: psutil.Process) -> float:
    """What a process and its children had, also those of them that have ended, as far as the system tells."""
    used = 0.0
    with suppress(psutil.Error):
        for child in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):  # it has just ended
                times = child.cpu_times()
                used += times.user + times.system
                if child == process:
                    used += times.children_user + times.children_system
    return used


def server_of(pid: int) -> psutil.Process | None:
    """The database server one of whose processes has this id; None where it is not on this machine."""
    with suppress(psutil.Error):
        parent = psutil.Process(pid).parent()
        if parent is not None and parent.name().startswith("postgres"):
            return parent
    return None
