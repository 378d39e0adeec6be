"""Exercise 07, task 2: workers that give their connection back, and take it again before anybody else can."""

from __future__ import annotations

from collections.abc import Iterator

from ormscope.lab import Recording
from workshop.checks.calls import (
    unless_raised,
)
from workshop.checks.catalogue import Finding
from workshop.checks.rules import (
    LEFT_OVER,
    deadlock,
    one_session_many_tasks,
    retries,
)
from workshop.checks.shared_lost_unfair.jobs import Jobs, work_and_ask
from workshop.checks.task import Task
from workshop.checks.unpooled import NO_OTHER_CONNECTIONS

_MOST_TURNS = 4  # that customers may have to wait, in units of the capacity; fair is one or two


def wrong_way_of_working(run: Recording, seen: Jobs) -> Iterator[Finding]:
    """Workers that do not commit job by job, take the same one twice, or do not work side by side."""
    has_failed = any(request.error for request in run.requests if request.number < seen.workers)
    statuses, asked = seen.statuses, seen.asked
    if statuses and not statuses["done"] and not has_failed:
        is_lost = seen.written and {*statuses} == {"queued"}
        yield Finding(
            "forgets-to-commit" if is_lost else "not-what-was-asked",
            f"{statuses.total()} jobs were exported, and they are"
            f' {" and ".join(f"{status!r}" for status in statuses)} at the end; the task wants "done".',
        )
    again = max((fate.by for fate in seen.fates), key=lambda by: (len({*by}), len(by)))
    if len(again) > 1:
        yield Finding(
            "claim-that-races" if len({*again}) > 1 else "not-what-was-asked",
            f"A job was exported {len(again)} times, by {len({*again})} of the workers.",
        )
    if seen.done_before:
        yield Finding(
            "done-before-it-is-done",
            'When a job was exported, others could see already that it was "done".',
        )
    if seen.unfinished:
        yield Finding(
            "one-transaction-for-all",
            'When a worker exported a job, others could not yet see that its job before was "done".',
        )
    if seen.pauses.total() > len(asked) // 4:
        ((where, _),) = seen.pauses.most_common(1)
        yield Finding(
            "waits-by-the-clock", f"The workers slept {seen.pauses.total()} times, in {where}."
        )
    if statuses and seen.queuers >= seen.workers - 1:
        yield Finding(
            "one-at-a-time",
            f"{seen.queuers} of {seen.workers} workers waited at {seen.queues_at}.",
        )
    if seen.waiting > seen.workers / 2:
        yield Finding(
            "stands-in-the-lock-queue",
            f"Of {seen.workers} workers, more than half waited in the server, most of the time,"
            " for a row that another had locked.",
        )


def overtakes_the_queue(run: Recording, seen: Jobs) -> Iterator[Finding]:
    """Workers who are always there first, or some who do not work."""
    most = _MOST_TURNS * seen.workers
    if max(seen.waited, default=0) > most or run.pools[0].timeouts:
        yield Finding(
            "overtakes-the-queue",
            "While customers waited, connections came back again and again, more than"
            f" {_MOST_TURNS} times as many as there are, and workers took them.",
        )
    idle = seen.workers - len({call for fate in seen.fates for call in fate.by})
    if idle and all(fate.by for fate in seen.asked):
        where = f" Up to {seen.queuers} waited at {seen.queues_at}." if seen.queuers else ""
        yield Finding(
            "leaves-it-to-the-others",
            f"Of {seen.workers} workers, {idle} exported nothing.{where}",
        )


def demands(run: Recording, seen: Jobs) -> Iterator[Finding]:
    """All jobs that were asked for are exported and done, and no other."""
    asked, statuses = len(seen.asked), seen.statuses
    if any(fate.is_changed or fate.by for fate in seen.fates if not fate.asked):
        yield Finding("more-than-asked", "Jobs were changed, or exported, that nobody asked for.")
    if statuses.total() < asked:
        yield Finding("part-of-the-rows", f"Of {asked} jobs, {statuses.total()} were exported.")
    for other in statuses.keys() - {"done"}:
        yield Finding(
            "not-what-was-asked",
            f'{asked} jobs were exported, and {statuses["done"]} are "done".'
            f" One {'was gone' if other is None else f'has the status {other!r}'}.",
        )


def prove(run: Recording, seen: Jobs) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{seen.statuses['done']} of {len(seen.asked)} jobs done once by {seen.workers} workers"
        f" on {run.pools[0].capacity} connections, and {len(seen.waited)} of {seen.customers}"
        " customers served between them."
    )


let_others_in = Task(
    "07",
    "let_others_in",
    "work_through",
    load=work_and_ask,
    trials=(
        {"workers": 8, "customers": 10, "jobs": 72},
        {"workers": 3, "customers": 6, "jobs": 36},
    ),
    rules=unless_raised(
        *NO_OTHER_CONNECTIONS,
        wrong_way_of_working,
        one_session_many_tasks,
        retries,
        deadlock,
        *LEFT_OVER,
        overtakes_the_queue,
    ),
    demands=(demands,),
    proof=prove,
    hints=(
        "Each commit does give the connection back. Who is the first to ask for one after that, and in which step of "
        "the event loop?",
        "Whoever waits in the queue is woken by the commit, and needs one step of the event loop to take the "
        "connection. How can the worker let that step pass before it asks again, without the clock?",
        "await asyncio.sleep(0) after the commit; or async with Session() inside of the loop, for each job.",
    ),
)
