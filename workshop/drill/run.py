"""What a load has shown: every answer, and what the instruments saw meanwhile."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from workshop.drill.documents import Document

OK = 200
NO_ANSWER = 0
EXPORT = "POST /export"
_NO_REPORT = (
    "There is no report: this system has no SIGUSR1, or no worker wrote one in time.\n"
    "While a load runs, `python -m ormscope console PID` tells the same."
)


class Answer(NamedTuple):
    """What was asked, when (seconds since the load began), how long it took, and the status; 0 is no answer."""

    request: str
    asked: float
    waited: float
    status: int


class Look(NamedTuple):
    """What a worker's metrics said at `time`, in seconds since the load began; `memory` is in MiB.

    So many waits have ended, and so many of them within a second.

    `connections` are the server's, of the service as a whole, and `idle_in_transaction` those of them that are.
    """

    time: float
    worker: str
    cause: str
    checked_out: float
    waiting: float
    oldest_wait: float
    oldest_hold: float
    timeouts: float
    deadlocks: float
    lag: float
    memory: float
    waits_ended: float
    waits_in_time: float
    connections: int
    idle_in_transaction: int


@dataclass
class Run:
    """A load of so many `clients` for so many `seconds`.

    `found` are properties that have to hold whatever the load: see `workshop.drill.load`. `activity` is
    pg_stat_activity at the bad moment with most open transactions, as (what it waits for, last statement, how many);
    `reports` are what the workers wrote on a signal, each at its first bad moment. `alerts` are the names of those
    that fired. Of the time of all processors, other programs had the share `others`, and nobody the share `idle`.
    """

    clients: int
    seconds: float
    answers: list[Answer] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    activity: list[tuple[str, str, int]] = field(default_factory=list)
    reports: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    alerts: list[str] = field(default_factory=list)
    others: float = 0.0
    idle: float = 1.0

    @classmethod
    def of(cls, data: dict[str, Any]) -> Run:
        """From what `to_json` gave."""
        data["answers"] = [Answer(*answer) for answer in data["answers"]]
        data["looks"] = [Look(*look) for look in data["looks"]]
        data["activity"] = [tuple(row) for row in data["activity"]]
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @property
    def statuses(self) -> Counter[int]:
        """How many answers there were of each status."""
        return Counter(answer.status for answer in self.answers)

    @property
    def served(self) -> int:
        """How many got what they asked for."""
        return self.statuses[OK]

    @property
    def failed(self) -> int:
        """How many did not."""
        return len(self.answers) - self.served

    @property
    def p99(self) -> float:
        """99 of 100 customers waited for their answer for at most so many seconds; the export is nobody's customer."""
        waits = [answer.waited for answer in self.answers if answer.request != EXPORT]
        return percentile(waits, 0.99)

    @property
    def connections(self) -> int:
        """The most that the server had of the service at once."""
        return max((look.connections for look in self.looks), default=0)

    def most(self, name: str) -> float:
        """The highest value of a number of `Look`, over all workers."""
        return float(max((getattr(look, name) for look in self.looks), default=0))

    @property
    def timeouts(self) -> float:
        """How many waits for a connection have ended in vain, in all workers."""
        last = {look.worker: look.timeouts for look in self.looks}
        first = {look.worker: look.timeouts for look in reversed(self.looks)}
        return sum(last.values()) - sum(first.values())

    @property
    def grown(self) -> float:
        """By how many MiB a worker's memory has grown from its first look to its last, at most."""
        workers = {look.worker for look in self.looks}
        curves = [[look.memory for look in self.looks if look.worker == name] for name in workers]
        return max((curve[-1] - curve[0] for curve in curves), default=0.0)

    @property
    def report(self) -> Document:
        """The report of the worker in which most were waiting."""
        reports = sorted(self.reports, key=_waiting)
        return Document("report", reports[-1] if reports else _NO_REPORT)

    @property
    def causes(self) -> Counter[str]:
        """How often each verdict was seen."""
        return Counter(look.cause for look in self.looks)


def _waiting(report: str) -> int:
    """How many wait, by the first line of a report."""
    return int("0" + (re.findall(r"^POOL .* (\d+) waiting$", report, re.MULTILINE) or [""])[0])


def percentile(values: list[float], share: float) -> float:
    """The smallest value that so large a share of the values do not exceed; 0 where there are none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
