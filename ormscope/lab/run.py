"""Run: the curves, events, verdicts and outcomes of a workload that was observed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from ormscope.lab.memory import MemorySample
from ormscope.lab.storm import Request
from ormscope.ledger import Sample
from ormscope.verdict import Verdict

End = Literal["running", "returned", "raised", "fuse", "memory limit", "interrupted", "died"]
Curve = Literal["connections", "requests", "memory", "objects", "loop lag"]


class ObjectsSample(NamedTuple):
    """Objects alive in the identity maps of all sessions, at `time` seconds."""

    time: float
    alive: int


@dataclass
class PoolCurve:
    """One pool over time. `samples` is a step function: each holds until the next; times in seconds from the start.

    `deadlocks` are those that were proved, `troubles` the first verdict on each other cause that made tasks wait
    in vain for a while, and `last` is the verdict at the end. `mean_hold` is how long connections were checked out
    on average, of those that came back, in seconds.
    """

    name: str
    capacity: int | None
    samples: list[Sample] = field(default_factory=list, repr=False)
    deadlocks: list[Verdict] = field(default_factory=list, repr=False)
    troubles: list[Verdict] = field(default_factory=list, repr=False)
    last: Verdict | None = field(default=None, repr=False)
    timeouts: int = 0
    served_after_wait: int = 0
    longest_wait: float = 0.0
    mean_hold: float = 0.0
    most_held_by_one: int = 0

    @property
    def most_checked_out(self) -> int:
        """The highest point of the curve of connections checked out."""
        return max(map(attrgetter("checked_out"), self.samples), default=0)

    @property
    def most_waiting(self) -> int:
        """The highest point of the curve of tasks waiting."""
        return max(map(attrgetter("waiting"), self.samples), default=0)

    @property
    def mean_checked_out(self) -> float:
        """Connections checked out on average, from the first change of the curve to the last."""
        pairs = list(pairwise(self.samples))
        area = sum(sample.checked_out * (after.time - sample.time) for sample, after in pairs)
        return area / (self.samples[-1].time - self.samples[0].time) if pairs else 0.0

    @property
    def filled_at(self) -> float | None:
        """When the last free connection was taken for the first time, in seconds; None if that never happened."""
        times = (sample.time for sample in self.samples if sample.checked_out == self.capacity)
        return next(times, None)


@dataclass(repr=False)
class Run:
    """The curves, events, verdicts and outcomes of one run.

    All times are in seconds since the workload began. `ended` says how the run ended: it returned, it raised,
    the fuse blew, it passed its memory limit, you interrupted it, or its process died. `result` is what the
    workload returned. `memory` is resident memory; its first sample is of the start. `curves`
    are those that its picture shows.
    """

    title: str
    ended: End = "running"
    seconds: float = 0.0
    fuse: float = 0.0
    memory_limit: float | None = None
    curves: tuple[Curve, ...] = ("connections", "requests")
    pools: list[PoolCurve] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    announced: int = 0
    loop_lag: list[tuple[float, float]] = field(default_factory=list)
    memory: list[MemorySample] = field(default_factory=list)
    objects: list[ObjectsSample] = field(default_factory=list)
    result: Any = None
    printed: str = ""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.title!r}: {self.completed} of {self.announced} requests completed>"

    def __str__(self) -> str:
        """The report: title, summary and verdict."""
        verdict = self.verdict() if any(pool.last for pool in self.pools) else ""
        return "\n".join(map(str, filter(None, (self.title, self.summary(), verdict))))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What a notebook shows for it where it is not printed."""
        printer.text(str(self))

    @property
    def outcomes(self) -> Counter[str]:
        """How many requests ended how: "ok", or the name of an exception's class."""
        return Counter(request.outcome for request in self.requests)

    @property
    def completed(self) -> int:
        """How many requests ended well."""
        return self.outcomes["ok"]

    @property
    def throughput(self) -> float:
        """Requests that ended well, per second, from the first start to the last end."""
        if not self.requests:
            return 0.0
        started, ended = (
            min(request.start for request in self.requests),
            max(request.end for request in self.requests),
        )
        return self.completed / max(ended - started, 1e-9)

    @property
    def longest_wait(self) -> float:
        """The longest wait for a connection that ended, with or without one, in seconds."""
        return max((pool.longest_wait for pool in self.pools), default=0.0)

    @property
    def slowest(self) -> float:
        """The longest time that a request took from its start to its end, however it ended, in seconds."""
        return max((request.end - request.start for request in self.requests), default=0.0)

    @property
    def timeouts(self) -> int:
        """How many waits for a connection ended in `sqlalchemy.exc.TimeoutError`."""
        return sum(pool.timeouts for pool in self.pools)

    @property
    def extra_memory(self) -> float:
        """The highest resident memory beyond that at the start, in MiB."""
        if not self.memory:
            return 0.0
        return max(sample.mebibytes for sample in self.memory) - self.memory[0].mebibytes

    @property
    def kept_memory(self) -> float:
        """The resident memory at the end beyond that at the start, in MiB."""
        return self.memory[-1].mebibytes - self.memory[0].mebibytes if self.memory else 0.0

    @property
    def most_objects(self) -> int:
        """The most objects alive in identity maps, as seen 20 times a second."""
        return max((sample.alive for sample in self.objects), default=0)

    @property
    def longest_lag(self) -> float:
        """The longest time that the event loop was late, in seconds."""
        return max((lag for _, lag in self.loop_lag), default=0.0)

    @property
    def deadlocks(self) -> list[Verdict]:
        """Each deadlock that was proved, in the order of time."""
        return sorted(
            (verdict for pool in self.pools for verdict in pool.deadlocks),
            key=lambda verdict: verdict.at,
        )

    def verdict(self) -> Verdict:
        """The verdict on the run: its first deadlock, else its first other trouble, else how it was at the end.

        Raises ValueError where the run used no pool at all.
        """
        if self.deadlocks:
            return self.deadlocks[0]
        troubles = [verdict for pool in self.pools for verdict in pool.troubles]
        if troubles:
            return min(troubles, key=lambda verdict: verdict.at)
        verdicts = [pool.last for pool in self.pools if pool.last is not None]
        if not verdicts:
            raise ValueError(
                f"no verdict: {self.title!r} used no connection pool, or died before it could tell"
            )
        order = ("leaked", "unknown", "saturated", "healthy")
        return min(
            verdicts,
            key=lambda verdict: order.index(verdict.cause) if verdict.cause in order else -1,
        )

    def summary(self) -> str:
        """The picture in words: peaks, ends and outcomes, one line each; no times, so every run reads the same."""
        lines = []
        for pool in self.pools:
            limit = "no limit" if pool.capacity is None else str(pool.capacity)
            final = pool.samples[-1] if pool.samples else Sample(0.0, 0, 0)
            lines.append(
                f"{pool.name}: up to {pool.most_checked_out} of {limit} checked out, {final.checked_out} at the end; "
                f"up to {pool.most_waiting} waiting, {final.waiting} at the end"
            )
        if self.announced:
            failed = "".join(
                f", {count} {name}" for name, count in sorted(self.outcomes.items()) if name != "ok"
            )
            lines.append(f"requests: {self.completed} of {self.announced} completed{failed}")
        if self.ending:
            lines.append(self.ending)
        return "\n".join(lines)

    @property
    def ending(self) -> str:
        """How the run ended, in words; empty where the workload simply returned."""
        return _ENDINGS.get(self.ended, "").format(
            fuse=self.fuse, memory_limit=self.memory_limit or 0
        )


_ENDINGS = {
    "raised": "The workload raised an exception.",
    "fuse": "The fuse ended this run after {fuse:g} s; what it saw until then is in the recording.",
    "memory limit": "The memory limit of {memory_limit:g} MiB ended this run; what it saw before is in the recording.",
    "interrupted": "You interrupted this run; what it saw until then is in the recording.",
    "died": "The process of this run died; what it saw until then is in the recording.",
}
