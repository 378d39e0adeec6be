"""What can be wrong with how a job uses memory, as far as it shows; shared by the exercises on memory."""

from __future__ import annotations

from ormscope import Recording
from workshop.checks.task import Finding

_MANY_COLLECTIONS = (
    10  # full ones; the collector itself comes to two or three in a job of this size
)


def wrong_use_of_memory(run: Recording, objects: int, mebibytes: float) -> Finding | None:
    """The wrong idea that a run shows, the most telling first; None where there is none.

    `objects` is how many mapped objects may be alive at once, and `mebibytes` how much memory the run may take
    beyond what it began with.
    """
    noted = run.result
    if noted is not None and noted["collections"] > _MANY_COLLECTIONS:
        return Finding("collects-garbage", "Your code ran the garbage collector again and again.")
    if any("identity map is no longer valid" in one.error for one in run.requests):
        return Finding(
            "expunge-all-in-a-stream",
            "The second batch raised InvalidRequestError: this identity map is no longer valid.",
        )
    if run.most_objects > objects:
        return Finding(
            "loads-everything",
            f"More than {objects:,} objects were alive at the same time.",
        )
    if run.extra_memory > mebibytes or run.ended == "memory limit":
        return Finding(
            "keeps-everything-in-another-shape",
            f"Hardly an object was alive, and your code still took more than {mebibytes:g} MiB.",
        )
    return None
