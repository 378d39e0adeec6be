"""What can be wrong with a way to use a pool, as far as it shows under load; shared by the exercises on pools."""

from __future__ import annotations

from ormscope import Verdict
from ormscope.lab import Recording
from workshop.checks.task import Finding

_TIMEOUT = "sqlalchemy.exc.TimeoutError"
_SHARING = ("concurrent operations are not permitted", "another operation is in progress")
_MANY_ENGINES = 3


def wrong_use_of_pools(run: Recording, lent: int, done: int) -> Finding | None:
    """The wrong idea that a run shows, the most telling first; None where there is none.

    `lent` is how many engines the check made, the first of the recording's pools; `done` how many requests
    did all that was asked of them.
    """
    noted, pool, asked = run.result, run.pools[0], run.announced
    if noted["tampered"]:
        return Finding("changes-the-pool", "The pool came back with other settings than it had.")
    own = run.pools[lent:]
    if len(own) > _MANY_ENGINES or any(one.capacity is None for one in own):
        return Finding("engine-per-call", "Your code made engines of its own, again and again.")
    # A pool of its own for the inner work is a remedy; one for all of it is only a larger one.
    if own and pool.most_checked_out <= 1 < (pool.capacity or 0):
        total = sum(one.capacity or 0 for one in own)
        return Finding(
            "bigger-pool",
            f"Your code made an engine of its own, with {total} connections, and did all its work there.",
        )
    if noted["sharers"] or any(text in one.error for one in run.requests for text in _SHARING):
        return Finding(
            "one-session-many-tasks", "Several tasks wanted to use one connection at the same time."
        )
    if noted["sleepers"] > asked // 10:
        return Finding("sleeps", f"Most calls slept in {noted['sleeps_at']}.")
    few = pool.most_checked_out <= (pool.capacity or 0) // 4
    if noted["ended"] and noted["queuers"] > asked // 2 and few:
        return Finding(
            "one-at-a-time",
            f"Nearly all calls stood before {noted['queues_at']}, while at most"
            f" {pool.most_checked_out} of {pool.capacity} connections were in use.",
        )
    if pool.timeouts and not run.outcomes[_TIMEOUT]:
        if done < run.completed:
            return Finding(
                "swallows-the-timeout",
                "The pool raised TimeoutError, no call reported one, and what those calls were asked for is missing.",
            )
        return Finding("retries", "The pool raised TimeoutError, and your code tried again.")
    if run.deadlocks:
        return _deadlock(run.deadlocks[0], noted["queuers"], noted["queues_at"])
    if noted["left_running"]:
        return Finding(
            "fire-and-forget",
            "Tasks that your code had started were still at work when all calls had ended.",
        )
    if noted["left_out"]:
        return Finding(
            "leaves-it-checked-out",
            "Connections were still checked out when all calls had ended.",
        )
    return None


def _deadlock(verdict: Verdict, queuers: int, queues_at: str) -> Finding:
    stuck = [one for one in verdict.holding if one.waits is not None]
    holder, asked = stuck[0], stuck[0].waits
    assert asked is not None
    evidence = (
        f"{asked.places[0].short}, asked for a connection while {holder.places[0].short}, held one:"
        f" {len(stuck)} of {verdict.capacity} connections were held by calls that waited for another."
    )
    if queuers:
        return Finding("door-for-one-size", f"{evidence} Others stood before {queues_at}.")
    if any(one.waits.owner != one.owner for one in stuck if one.waits is not None):
        return Finding("children-count-too", evidence)
    return Finding("holds-and-waits", evidence)
