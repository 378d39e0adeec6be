"""Exercise 06, task 1: a payment that holds its connection while somebody else takes their time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ormscope.lab import Recording
from workshop.checks.calls import (
    unless_raised,
)
from workshop.checks.catalogue import Finding
from workshop.checks.lent import connections
from workshop.checks.rules import USE_OF_POOLS, expired_objects, lock_without_an_end
from workshop.checks.session_lifetimes.payments import Payments, pay_orders
from workshop.checks.task import Task
from workshop.checks.unpooled import NO_OTHER_CONNECTIONS


def asks_the_provider_otherwise(run: Recording, seen: Payments) -> Iterator[Finding]:
    """Whoever does not wait for the answer, or asks again, does not know what has become of the money."""
    asked, most = seen.asked, max(seen.asked.calls.values(), default=0)
    if asked.left_waiting and seen.ended:
        yield Finding(
            "no-answer-is-no-refusal",
            f"{asked.left_waiting} calls stopped waiting for the provider before it had answered.",
        )
    if most > 1:
        yield Finding("asks-again", f"One call asked the provider {most} times.")
    if asked.held:
        yield Finding(
            "holds-while-it-waits", "While the provider was asked, the call had a connection."
        )


def demands(run: Recording, seen: Payments) -> Iterator[Finding]:
    """An order is claimed before the provider is asked, charged once, and its status tells what came of it."""
    charged = {fate.before for fate in seen.those("left alone") if fate.charged}
    if charged - {"paying"}:
        told = "Orders were charged that were cancelled, or paid already."
        yield Finding("asks-before-it-looks", told)
    statuses = seen.asked.statuses
    if statuses["new"] > statuses["paying"]:
        yield _meanwhile("new")
    if any(fate.charged > 1 for fate in seen.fates):
        yield Finding("claim-that-races", "Some orders were charged twice.")
    if charged:
        yield Finding(
            "asks-before-it-looks",
            'Orders were charged that were "paying" already: somebody else was asking for the money.',
        )
    yield from map(_meanwhile, sorted(statuses.keys() - {"paying"}, key=str))
    for fate in seen.those("left alone"):
        if fate.after != fate.before:
            told = (
                f'An order to be left alone was "{fate.before}", and {_was(fate.after)} afterwards.'
            )
            yield Finding("more-than-asked", told)
    for fate in seen.fates:
        is_known = fate.role == "accepted" or (fate.role == "given up" and fate.charged)
        if fate.after == "paid" != fate.before and not is_known:
            why = f"whose payment was {fate.role}"
            yield Finding("paid-before-the-money", f'An order {why} is "paid" at the end.')
    if unpaid := sum(not fate.charged for fate in seen.those("accepted")):
        yield Finding(
            "success-without-work", f"{unpaid} orders that could be paid were never charged."
        )
    yield from _wrong_ends(seen)
    for name in seen.renamed:
        yield Finding(
            "raises-another-error",
            f"When the provider raised Declined, `pay` raised {name} instead.",
        )
    if silent := [fate for fate in seen.fates if not fate.told]:
        yield Finding(
            "swallows-the-timeout",
            f"{len(silent)} calls ended as if all had gone well: the provider had raised an error,"
            " or the call was cancelled.",
        )


def _meanwhile(status: str | None) -> Finding:
    ideas = {"new": "claims-nothing", "paid": "paid-before-the-money"}
    seen = f"While the provider was asked, other processes saw that the order {_was(status)}"
    return Finding(
        ideas.get(str(status), "not-what-was-asked"), f'{seen}; the task wants "paying".'
    )


def _was(status: str | None) -> str:
    return "was not in the table" if status is None else f'was "{status}"'


def _wrong_ends(seen: Payments) -> Iterator[Finding]:
    """Orders that do not tell in the end what came of them."""
    idea = "forgets-to-commit" if seen.written else "not-what-was-asked"
    idea = "changes-a-detached-object" if seen.detached else idea
    for role, wanted in (("accepted", "paid"), ("declined", "new")):
        ends = Counter(fate.after for fate in seen.those(role))
        if role == "declined":
            idea = "claim-that-stays" if {*ends} <= {"new", "paying"} else "not-what-was-asked"
        for other in ends.keys() - {wanted}:
            yield Finding(
                idea,
                f"Of {ends.total()} orders whose payment was {role}, {ends[wanted]} are"
                f' "{wanted}". One {_was(other)} at the end.',
            )


def prove(run: Recording, seen: Payments) -> str:
    """What a run of a right answer has shown."""
    lost = [fate.after for fate in seen.those("unanswered") if fate.charged]
    then = '"new" again: the next click pays'
    if "new" not in lost:
        then = 'not "new": the next click does not pay'
    paid = len(seen.those("accepted"))
    return (
        f"{paid} of {paid} orders charged once and paid, {len(seen.those('declined'))} declined, with"
        f" {connections(run)}, and none of them held while the provider worked.\n"
        f"{len(lost)} times the provider's answer was lost after the money had gone, and these orders"
        f" are {then} twice."
    )


pay_without_a_connection: Task[Payments] = Task(
    "06",
    "pay_without_a_connection",
    "pay",
    load=pay_orders,
    trials=({"orders": 30, "capacity": 4}, {"orders": 12, "capacity": 1}),
    rules=unless_raised(
        lock_without_an_end,
        *NO_OTHER_CONNECTIONS,
        *USE_OF_POOLS,
        expired_objects,
        asks_the_provider_otherwise,
    ),
    demands=(demands,),
    proof=prove,
    hints=(
        "Without the connection the lock on the row is gone. What else could tell all other calls, also those in other "
        "processes, that this order is being paid?",
        'Three short steps: write "paying" and commit, ask the provider, write what came of it and commit. How does '
        "the first step make sure that only one call succeeds in it?",
        'update(Order).where(Order.id == number, Order.status == "new").values(status="paying")'
        ".returning(Order.household_id) gives a row to one call and None to all others. And in except Declined: "
        'back to "new", and raise.',
    ),
)
