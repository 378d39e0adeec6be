"""How much memory a task's code may take, and what is wrong where it takes more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from ormscope.lab import Recording
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence

SAMPLED_SECONDS = 0.2
"""How long a load stands still after each call: memory is looked at every 20 ms, on a busy machine less often."""
_MANY_COLLECTIONS = 20  # full ones; the collector itself comes to nine in a job of 100,000 objects


@dataclass(frozen=True)
class MemoryBudget:
    """What a run may take beyond what it began with; its methods are rules, in the order in which they are asked.

    `container` is at how many MiB the run is ended, and `mebibytes` how many are too many. `objects` is how many
    mapped objects may be alive at once. `growth` is how many MiB more the last call may take than those before it,
    where the last has more to do.
    """

    container: float
    objects: int
    mebibytes: float
    growth: float | None = None

    def loads_everything(self, run: Recording, seen: Evidence | None) -> Iterator[Finding]:
        """More objects than there may be."""
        if run.most_objects > self.objects:
            yield Finding(
                "loads-everything",
                f"More than {self.objects:,} objects were alive at the same time.",
            )

    def keeps_everything(self, run: Recording, seen: Evidence | None) -> Iterator[Finding]:
        """Few objects, and too much memory, or more and more of it."""
        few = f"No more than {self.objects:,} objects were alive, and"
        if run.extra_memory > self.mebibytes or run.ended == "memory limit":
            yield Finding(
                "keeps-everything-in-another-shape",
                f"{few} your code still took more than {self.mebibytes:g} MiB.",
            )
        if self.growth is not None and _growth_at_the_end(run) > self.growth:
            yield Finding(
                "keeps-everything-in-another-shape", f"{few} more to do still took more memory."
            )

    def exceeded(self, run: Recording) -> Finding | None:
        """The first of the rules that is broken: all that can be known of a run that passed its limit."""
        return next(chain(self.loads_everything(run, None), self.keeps_everything(run, None)), None)


def collects_garbage(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """A call that costs much, and frees nothing that is referred to."""
    if seen.collections > _MANY_COLLECTIONS:
        yield Finding("collects-garbage", "Your code ran the garbage collector again and again.")


def expunge_all_in_a_stream(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """A call that takes away what the stream still needs."""
    if any("identity map is no longer valid" in request.error for request in run.requests):
        yield Finding(
            "expunge-all-in-a-stream",
            "The second batch raised InvalidRequestError: this identity map is no longer valid.",
        )


def _growth_at_the_end(run: Recording) -> float:
    """How many MiB more the last of several calls took than all that was before it."""
    if len(run.requests) < 2:
        return 0.0
    last = max(run.requests, key=lambda request: request.start)
    until = last.end + SAMPLED_SECONDS
    before = max(sample.mebibytes for sample in run.memory if sample.time <= last.start)
    return max(sample.mebibytes for sample in run.memory if sample.time <= until) - before
