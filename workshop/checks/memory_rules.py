"""What can be wrong with how a job uses memory, as far as it shows; shared by the exercises on memory."""

from __future__ import annotations

from ormscope.lab import Recording
from workshop.checks.task import Finding

_MANY_COLLECTIONS = 20  # full ones; the collector itself comes to nine in a job of 100,000 objects
SAMPLED_SECONDS = 0.2
"""How long a load stands still after each call: memory is looked at every 20 ms, on a busy machine less often."""


def wrong_use_of_memory(
    run: Recording, objects: int, mebibytes: float, growth: float | None = None
) -> Finding | None:
    """The wrong idea that a run shows, the most telling first; None where there is none.

    `objects` is how many mapped objects may be alive at once, and `mebibytes` how much memory the run may take
    beyond what it began with. `growth` is how many MiB more its last call may take than those before it, where
    the last has more to do.
    """
    if (finding := wrong_remedy(run)) is not None:
        return finding
    if run.most_objects > objects:
        return Finding(
            "loads-everything",
            f"More than {objects:,} objects were alive at the same time.",
        )
    if run.extra_memory > mebibytes or run.ended == "memory limit":
        return Finding(
            "keeps-everything-in-another-shape",
            f"No more than {objects:,} objects were alive, and your code still took more than {mebibytes:g} MiB.",
        )
    if growth is not None and _growth_at_the_end(run) > growth:
        return Finding(
            "keeps-everything-in-another-shape",
            f"No more than {objects:,} objects were alive, and more to do still took more memory.",
        )
    return None


def wrong_remedy(run: Recording) -> Finding | None:
    """A call that was to free memory, and that does harm instead; None where there is none."""
    noted = run.result
    if noted is not None and noted["collections"] > _MANY_COLLECTIONS:
        return Finding("collects-garbage", "Your code ran the garbage collector again and again.")
    if any("identity map is no longer valid" in one.error for one in run.requests):
        return Finding(
            "expunge-all-in-a-stream",
            "The second batch raised InvalidRequestError: this identity map is no longer valid.",
        )
    return None


def _growth_at_the_end(run: Recording) -> float:
    """How many MiB more the last of several calls took than all that was before it."""
    if len(run.requests) < 2:
        return 0.0
    last = max(run.requests, key=lambda one: one.start)
    until = last.end + SAMPLED_SECONDS
    before = max(one.mebibytes for one in run.memory if one.time <= last.start)
    return max(one.mebibytes for one in run.memory if one.time <= until) - before
