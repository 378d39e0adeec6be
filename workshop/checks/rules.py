"""What can be wrong with a try, whatever its task: the rules that the checks share, in the order of asking.

A rule looks at one run and at what was noted in it, and yields the wrong ideas that show there. Only the first counts,
so the most telling comes first: a pool that was changed explains all that is seen after it. A task asks for a tuple of
these rules, or for single ones of them, and puts its own where they belong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ormscope import Verdict
from ormscope.lab import Recording
from ormscope.lab.run import PoolCurve
from ormscope.lab.storm import Request
from ormscope.verdict import Holding, Waiting
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, Work

Noted = TypeVar("Noted", bound=Evidence)
Rule = Callable[[Recording, Noted], Iterator[Finding]]

POOL_TIMEOUT_ERROR = "sqlalchemy.exc.TimeoutError"
_SHARING = ("concurrent operations are not permitted", "another operation is in progress")
_READ_TOO_LATE = ("MissingGreenlet", "DetachedInstanceError")
_MANY_ENGINES = 3
_MOST_NAMED = 3  # of places or calls in a sentence


# What was called


def never_awaited(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """A call that only made a coroutine; asked before all else, for it explains what is missing then."""
    calls = seen.unheard.never_awaited
    if calls:
        failed = next((request for request in run.requests if request.error), None)
        then = f" Then this was raised: {_last_line(failed)}" if failed is not None else ""
        yield Finding("never-awaited", f"Nobody awaited {'; '.join(calls[:_MOST_NAMED])}.{then}")


def _last_line(request: Request) -> str:
    """What a request has raised, without its traceback and without what a library says after it."""
    lines = reversed(request.error.splitlines())
    return next((line for line in lines if line.startswith(request.outcome)), request.outcome)


# Engines and pools


def changes_the_pool(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """A pool that was lent was exchanged, or given other settings."""
    if seen.tampered:
        yield Finding(
            "changes-the-pool",
            "A pool was exchanged, as by dispose(), or came back with other settings.",
        )


def engine_per_call(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """Engines without end, or one without a limit."""
    own = own_pools(run, seen)
    if len(own) > _MANY_ENGINES:
        yield Finding("engine-per-call", f"Your code made {len(own)} engines of its own.")
    if any(pool.capacity is None for pool in own):
        yield Finding("engine-per-call", "Your code made an engine that has no limit of its own.")


def bigger_pool(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """A larger pool of its own for all the work; for the inner work, beside the one that was lent, it is a remedy."""
    lent = run.pools[0]
    capacity, total = lent.capacity or 0, sum(pool.capacity or 0 for pool in own_pools(run, seen))
    if total > capacity and lent.most_checked_out < min(2, capacity):
        yield Finding(
            "bigger-pool",
            f"Your code made an engine of its own, with {total} connections, and did all its work there.",
        )


def another_pool(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """For tasks that need no engine beside those that are lent."""
    if own_pools(run, seen):
        yield Finding("another-pool", "Your code made an engine of its own.")


def own_pools(run: Recording, seen: Evidence) -> list[PoolCurve]:
    """Those that the learner's code made for itself."""
    return run.pools[seen.lent :]


# How the connections are used


def one_session_many_tasks(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """Tasks that use one connection at the same time."""
    if seen.sharers or any(text in request.error for request in run.requests for text in _SHARING):
        yield Finding(
            "one-session-many-tasks", "Several tasks wanted to use one connection at the same time."
        )


def sleeps(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """Calls that wait by the clock, so that they do not meet."""
    if seen.sleepers > run.announced // 10:
        yield Finding("sleeps", f"Most calls slept in {seen.sleeps_at}.")


def one_at_a_time(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """A lock before work that could go on side by side."""
    pool = run.pools[0]
    few = pool.most_checked_out <= (pool.capacity or 0) // 4
    if seen.ended and seen.queuers > run.announced // 2 and few:
        yield Finding(
            "one-at-a-time",
            f"Nearly all calls waited at {seen.queues_at}, while at most"
            f" {pool.most_checked_out} of {pool.capacity} connections were in use.",
        )


def lock_without_an_end(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """Where a load stands before a lock, it may not come to its end at all, although it moves."""
    if run.completed and seen.queuers > run.announced // 2 and not seen.ended:
        yield Finding("one-at-a-time", f"Nearly all calls waited at {seen.queues_at}.")


def swallows_the_timeout(run: Recording, seen: Work) -> Iterator[Finding]:
    """The pool refused a connection, and a call that did not do its work ended as if it had."""
    if _hides_timeouts(run) and seen.done < run.completed:
        yield Finding(
            "swallows-the-timeout",
            "The pool raised TimeoutError, no call reported one, and the work of those calls is missing.",
        )


def retries(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """The pool refused a connection, and the call asked again until it had one."""
    if _hides_timeouts(run):
        yield Finding("retries", "The pool raised TimeoutError, and your code tried again.")


def _hides_timeouts(run: Recording) -> bool:
    return bool(run.pools[0].timeouts) and not run.outcomes[POOL_TIMEOUT_ERROR]


def deadlock(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """Calls that hold a connection while they wait for another, or for who has to get one first.

    Where a lock of the learner's is part of it, nothing is proved; then it counts that waits ended in vain.
    """
    verdict = run.deadlocks[0] if run.deadlocks else seen.crowd if _refuses(run, seen) else None
    if verdict is None:
        return
    stuck = [holder for holder in verdict.holding if holder.waits is not None]
    if stuck:
        evidence = who_holds_and_waits(verdict, stuck)
        if seen.queuers:
            yield Finding("door-for-one-size", f"{evidence} Others waited at {seen.queues_at}.")
        # A waiter without a line of the learner's is a task of SQLAlchemy's own: it closes a session in one.
        children = (holder for holder in stuck if holder.waits and holder.waits.places)
        if any(holder.waits and holder.waits.owner != holder.owner for holder in children):
            yield Finding("children-count-too", evidence)
        yield Finding("holds-and-waits", evidence)
    elsewhere = Counter(holder.elsewhere for holder in verdict.holding if holder.elsewhere)
    if sum(elsewhere.values()) > (verdict.capacity or 0) // 2 and verdict.waiting:
        place, _ = elsewhere.most_common(1)[0]
        yield Finding(
            "holds-while-it-waits",
            f"{sum(elsewhere.values())} of {verdict.capacity} connections were held by calls that waited in "
            f"{place.short}, not for the database, while {_asking(verdict.waiting[0])}, waited for a "
            "connection in vain.",
        )


def _refuses(run: Recording, seen: Evidence) -> bool:
    return bool(run.timeouts) or not seen.ended


def who_holds_and_waits(verdict: Verdict, stuck: Sequence[Holding]) -> str:
    """In words: the first of the holders that are `stuck`, and how many they are."""
    holder, waiter = stuck[0], stuck[0].waits
    assert waiter is not None
    return (
        f"{_asking(waiter)}, asked for a connection while {holder.places[0].short}, held one:"
        f" {len(stuck)} of {verdict.capacity} connections were held by calls that waited for another."
    )


def _asking(waiter: Waiting) -> str:
    """Where it stands; a block of Session.begin() commits in a task of SQLAlchemy's own."""
    return waiter.places[0].short if waiter.places else "the end of a session's block"


# What is left when all calls have ended


def forgets_to_commit(run: Recording, seen: Work) -> Iterator[Finding]:
    """Work that is missing from the database, whose transactions have written and were rolled back."""
    if seen.done < run.completed and seen.rolled_back and not seen.committed:
        yield Finding(
            "forgets-to-commit",
            f"{seen.rolled_back} transactions had written something, and none of them was committed.",
        )


def fire_and_forget(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """Tasks that nobody waits for. Where a call has failed, they may be what it would have waited for."""
    if seen.left_running and run.completed == run.announced:
        yield Finding(
            "fire-and-forget",
            "Tasks that your code had started were still at work when all calls had ended.",
        )


def leaves_it_checked_out(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """Connections that nobody gives back, so that others may wait for them in vain. What else is raised comes first.

    A task that is still at work may give its own back.
    """
    raised = set(run.outcomes) - {"ok", POOL_TIMEOUT_ERROR}
    if seen.left_checked_out and not seen.left_running and not raised:
        yield Finding(
            "leaves-it-checked-out", "Connections were still checked out when all calls had ended."
        )


# What a call raised


def expired_objects(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """An attribute that is read when its session can no longer load it."""
    raised = {request.outcome.rpartition(".")[2] for request in run.requests}
    name = next((name for name in _READ_TOO_LATE if name in raised), None)
    if name is not None:
        yield Finding("expired-objects", f"Reading an attribute of an object raised {name}.")


def sync_engine_in_async_code(run: Recording, seen: Evidence) -> Iterator[Finding]:
    """The synchronous engine within an asynchronous one, used where nobody awaits for its driver."""
    if any("MissingGreenlet" in request.outcome for request in run.requests):
        yield Finding(
            "sync-face-of-an-async-engine",
            "The call raised MissingGreenlet: its driver wanted to await, and there was nobody to do it.",
        )


ENGINES: tuple[Rule[Evidence], ...] = (changes_the_pool, engine_per_call, bigger_pool)
LEFT_OVER: tuple[Rule[Evidence], ...] = (fire_and_forget, leaves_it_checked_out)
USE_OF_POOLS: tuple[Rule[Work], ...] = (
    one_session_many_tasks,
    sleeps,
    one_at_a_time,
    swallows_the_timeout,
    retries,
    deadlock,
    *LEFT_OVER,
)
