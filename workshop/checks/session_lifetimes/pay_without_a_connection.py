"""Exercise 06, task 1: a payment that holds its connection while somebody else takes their time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import event, insert, inspect, select
from sqlalchemy.ext.asyncio import async_sessionmaker

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Work, evidence
from workshop.checks.lent import Conditions, connections, forget_orders, own_households
from workshop.checks.rules import (
    USE_OF_POOLS,
    another_pool,
    expired_objects,
    lock_without_an_end,
)
from workshop.checks.session_lifetimes.calls import (
    Holds,
    Seen,
    close_sessions,
    current_call,
    is_own,
    to_be_told,
    unless_raised,
)
from workshop.checks.session_lifetimes.provider import Provider, UnansweredError
from workshop.checks.task import Task, Trials
from workshop.checks.unpooled import backends, connects_past_the_pools, of_the_check
from workshop.payment import Declined
from workshop.shop import Order

# Orders that nobody is to touch: those that are not new, some of which are paid for, and some that nobody pays for.
_OTHERS = ("cancelled", "paid", "paying") * 2
_NOT_CLICKED = 2
_UNANSWERED, _GIVEN_UP = 2, 2
_SECONDS_TO_GO_ON = (
    0.5  # for a task that is awaited behind a shield, when the customer has given up
)


@dataclass(kw_only=True)
class Payments(Work, Seen):
    """What became of orders: those `accepted` by the provider, those `declined`, and those that are not owed.

    `charged`, `twice`, `not_owed` and `others_claim` is how many of them were charged at all, more than once, although
    nobody owes them, and although somebody else was about it; `touched` tells of each order that was to be left alone
    what became of it. `ended_as` counts the statuses of accepted orders at the end, `declined_ended` those of the
    declined, and `told` is how many refusals were reported, `renamed` as which other errors.

    Of so many `unanswered` payments, `unanswered_told` were reported; `unanswered_ended` and `given_up_ended` are the
    statuses of their orders, and of those whose customer has given up, without those that were charged; and
    `given_up_not_told` how many of these calls ended as if they had not been cancelled.

    `held` says whether a call had a connection while the provider worked, `statuses` which ones others could see
    then, `most_asked` is how often one call asked it, and `left_waiting` how many did not wait for it. `written` is how
    often "paid" was written, be it committed or not, and `detached` how often an order was set to it in no session.
    """

    held: bool
    accepted: int
    charged: int
    twice: int
    not_owed: int
    others_claim: int
    touched: list[tuple[str, str | None]]
    statuses: Counter[str | None]
    most_asked: int
    left_waiting: int
    ended_as: Counter[str | None]
    declined: int
    declined_ended: Counter[str | None]
    told: int
    renamed: Counter[str]
    unanswered: int
    unanswered_told: int
    given_up_not_told: int
    unanswered_ended: Counter[str | None]
    given_up_ended: Counter[str | None]
    written: int
    detached: int


async def pay_orders(
    pay: Callable[..., Any], conditions: Conditions, *, orders: int, capacity: int
) -> Payments:
    """Pay so many orders, each of them twice at once, and some that nobody owes; after that some that go wrong."""
    # A shop has so many orders that each is found by its key: else a SERIALIZABLE payment fails for its neighbours.
    engine, customers = conditions.engine(capacity, enable_seqscan="off"), own_households()
    ours = Order.household_id.between(customers[0], customers[-1])
    found = select(Order.id, Order.household_id, Order.status).where(ours).order_by(Order.id)
    new_ones = orders + _UNANSWERED + _GIVEN_UP + _NOT_CLICKED
    made = [
        {"household_id": customers[index], "status": status}
        for index, status in enumerate(["new"] * new_ones + [*_OTHERS])
    ]
    renamed, written, told, unanswered_told = Counter[str](), Counter[str](), set[int](), set[int]()
    raised, not_told = False, set[int]()
    holds = Holds(engine)
    event.listen(engine.sync_engine, "before_cursor_execute", partial(_note_paid, written))
    event.listen(Order.status, "set", partial(_note_detached, written))
    async with backends(conditions) as server, of_the_check(conditions, 2) as others:
        async with engine.begin() as connection:
            await connection.execute(insert(Order), made)
            before = (await connection.execute(found)).all()
        await engine.dispose()
        new = [order.id for order in before if order.status == "new"]
        not_owed = [order.id for order in before if order.status != "new"]
        new, uncertain, not_clicked = new[:orders], new[orders:-_NOT_CLICKED], new[-_NOT_CLICKED:]
        clicks = [number for number in new for _ in range(2)] + not_owed
        provider = Provider(holds, others, {order.id: order.household_id for order in before})
        provider.declined |= {*new[::6]}
        provider.unanswered |= {*uncertain[:_UNANSWERED]}
        given_up = uncertain[_UNANSWERED:]

        async def click(number: int) -> None:
            nonlocal raised
            current_call.set(number)
            try:
                await pay(sessions, clicks[number], provider)
            except Declined:
                told.add(clicks[number])
            except Exception as error:
                if not _is_renamed(error):
                    mistake = to_be_told(error)
                    raised = raised or is_own(mistake)
                    raise mistake from mistake.__cause__
                renamed[type(error).__name__] += 1

        async def go_wrong(number: int) -> None:
            """The network fails, or the customer gives up."""
            order, call = uncertain[number], len(clicks) + number
            current_call.set(call)
            payment = asyncio.create_task(pay(sessions, order, provider))
            if order in given_up:
                provider.given_up[call] = payment.cancel
            await asyncio.wait([payment])
            if payment.cancelled():
                return
            try:
                payment.result()
            except Exception as error:
                if not (isinstance(error, UnansweredError) or _is_renamed(error)):
                    raise
                unanswered_told.add(order)
            else:
                not_told.add(order)

        async with evidence(conditions, engine) as noted:
            sessions = async_sessionmaker(engine)
            known = asyncio.all_tasks()
            went_well = (await storm(click, len(clicks)))["ok"] == len(clicks)
            if went_well and not asyncio.all_tasks() - known:
                await storm(go_wrong, len(uncertain))
                if left := asyncio.all_tasks() - known:
                    await asyncio.wait(left, timeout=_SECONDS_TO_GO_ON)
    await close_sessions(noted)
    await engine.dispose()
    async with engine.connect() as connection:
        after = {order.id: order.status for order in await connection.execute(found)}
        await forget_orders(connection, customers)

    def ended_as(numbers: Sequence[int]) -> Counter[str | None]:
        return Counter(after.get(number) for number in numbers)

    accepted = [number for number in new if number not in provider.declined]
    charged, declined = provider.charged, sorted(provider.declined)
    was = {order.id: order.status for order in before}
    touched = [number for number in not_owed + not_clicked if after.get(number) != was[number]]
    right = {number for number in accepted if after.get(number) == "paid" and charged[number] == 1}
    right |= {number for number in declined if after.get(number) == "new" and number in told}
    right |= {number for number in not_owed if not charged[number] and number not in touched}
    return Payments(
        **vars(noted),
        backends=server,
        raised=raised,
        done=sum(number in right for number in clicks),
        held=provider.held,
        accepted=len(accepted),
        charged=sum(charged[number] > 0 for number in accepted),
        twice=sum(charged[number] > 1 for number in new),
        not_owed=sum(charged[number] > 0 for number in not_owed if was[number] != "paying"),
        others_claim=sum(charged[number] > 0 for number in not_owed if was[number] == "paying"),
        touched=[(was[number], after.get(number)) for number in touched],
        statuses=provider.seen,
        most_asked=max(provider.asked.values(), default=0),
        left_waiting=provider.left_waiting,
        ended_as=ended_as(accepted),
        declined=len(declined),
        declined_ended=ended_as(declined),
        told=len(told),
        renamed=renamed,
        unanswered=sum(charged[number] > 0 for number in uncertain[:_UNANSWERED]),
        unanswered_told=len(unanswered_told),
        given_up_not_told=len(not_told.intersection(given_up)),
        unanswered_ended=ended_as(uncertain[:_UNANSWERED]),
        given_up_ended=ended_as([number for number in given_up if not charged[number]]),
        written=written["paid"],
        detached=written["detached"],
    )


def _note_paid(
    written: Counter[str], connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any
) -> None:
    is_update = statement.lstrip().upper().startswith("UPDATE")
    written["paid"] += is_update and "paid" in f"{statement}{parameters}"


def _note_detached(written: Counter[str], order: Order, status: Any, *_: Any) -> None:
    written["detached"] += status == "paid" and inspect(order).detached


def _is_renamed(error: BaseException) -> bool:
    """Whether it was raised instead of the provider's error: from it, or with it in a group."""
    within = error.exceptions if isinstance(error, BaseExceptionGroup) else (error.__cause__,)
    return any(
        isinstance(each, (Declined, UnansweredError)) or (each and _is_renamed(each))
        for each in within
    )


def waits_in_line(run: Recording, seen: Payments) -> Iterator[Finding]:
    """Calls before a lock, if that is all: with a connection in their hands it is the lesser evil."""
    if not seen.held:
        yield from lock_without_an_end(run, seen)


def holds_while_it_waits(run: Recording, seen: Payments) -> Iterator[Finding]:
    """A connection that waits for somebody else."""
    if seen.held:
        yield Finding(
            "holds-while-it-waits", "While the provider was asked, the call had a connection."
        )


def asks_for_too_long_or_twice(run: Recording, seen: Payments) -> Iterator[Finding]:
    """Whoever does not wait for the answer, or asks again, does not know what has become of the money."""
    if seen.left_waiting and seen.ended:
        yield Finding(
            "no-answer-is-no-refusal",
            f"{seen.left_waiting} calls stopped waiting for the provider before it had answered.",
        )
    if seen.most_asked > 1:
        yield Finding("asks-again", f"One call asked the provider {seen.most_asked} times.")


def demands(run: Recording, seen: Payments) -> Iterator[Finding]:
    """An order is claimed before the provider is asked, charged once, and its status tells what came of it."""
    if seen.not_owed:
        yield Finding(
            "asks-before-it-looks", "Orders were charged that were cancelled, or paid already."
        )
    if seen.statuses["new"]:
        yield Finding(
            "claims-nothing",
            'While the provider was asked, the status in the database was still "new":'
            " any other process would have asked, too.",
        )
    if seen.twice:
        yield Finding("claim-that-races", "Some orders were charged twice.")
    if seen.others_claim:
        yield Finding(
            "asks-before-it-looks",
            'Orders were charged that were "paying" already: somebody else was asking for the money.',
        )
    if seen.statuses["paid"]:
        yield Finding(
            "paid-before-the-money",
            'While the provider was still working, the order\'s status was "paid" already.',
        )
    for status in seen.statuses.keys() - {"paying"}:
        yield Finding(
            "not-what-was-asked",
            f'While the provider was asked, the order {_was(status)}; asked for was "paying".',
        )
    for before, after in seen.touched:
        yield Finding(
            "more-than-asked",
            f'An order that was "{before}" and that nobody was to touch {_was(after)} afterwards.',
        )
    yield from _paid_in_vain(seen)
    if seen.charged < seen.accepted:
        yield Finding(
            "success-without-work",
            f"Of {seen.accepted} orders that could be paid, {seen.charged} were charged.",
        )
    if seen.ended_as["paid"] < seen.accepted:
        yield _not_paid(seen)
    yield from _declined(seen)
    if seen.unanswered_told < seen.unanswered:
        yield Finding(
            "swallows-the-timeout",
            f"{seen.unanswered} times the provider raised because its answer was lost,"
            f" and {seen.unanswered_told} calls said so.",
        )
    if seen.given_up_not_told:
        yield Finding(
            "swallows-the-timeout",
            f"{seen.given_up_not_told} calls were cancelled, and ended as if all had gone well.",
        )


def _was(status: str | None) -> str:
    return "was not in the table" if status is None else f'was "{status}"'


def _paid_in_vain(seen: Payments) -> Iterator[Finding]:
    for ended, why in (
        (seen.declined_ended, "whose payment was declined"),
        (seen.unanswered_ended, "for which the provider gave no answer"),
        (seen.given_up_ended, "whose customer gave up, and that were never charged,"),
    ):
        if ended["paid"]:
            yield Finding("paid-before-the-money", f'Orders {why} have the status "paid".')


def _not_paid(seen: Payments) -> Finding:
    others = [status for status in seen.ended_as if status != "paid"]
    evidence = (
        f"{seen.accepted} orders were charged, and"
        f' {seen.ended_as["paid"]} have the status "paid". One {_was(others[0])} at the end.'
    )
    if seen.detached:
        return Finding("changes-a-detached-object", evidence)
    return Finding("forgets-to-commit" if seen.written else "not-what-was-asked", evidence)


def _declined(seen: Payments) -> Iterator[Finding]:
    """What becomes of an order, and of its call, when the provider declines."""
    others = [status for status in seen.declined_ended if status != "new"]
    if others:
        yield Finding(
            "claim-that-stays" if others == ["paying"] else "not-what-was-asked",
            f"Of {seen.declined} orders whose payment was declined, {seen.declined_ended['new']}"
            f' are "new" again. One {_was(others[0])} at the end.',
        )
    for name in seen.renamed:
        yield Finding(
            "raises-another-error",
            f"When the provider raised Declined, `pay` raised {name} instead.",
        )
    if seen.told < seen.declined:
        yield Finding(
            "swallows-the-timeout",
            f"{seen.declined} payments were declined, and {seen.told} calls said so.",
        )


def prove(trials: Trials[Payments]) -> str:
    """What the runs of a right answer have shown."""
    lines = [
        f"{seen.ended_as['paid']} of {seen.accepted} orders charged once and paid, {seen.declined}"
        f" declined, with {connections(run)}, and none of them held while the provider worked."
        for run, seen in trials
    ]
    _, seen = trials[0]
    return "\n".join((*lines, _remark(seen)))


def _remark(seen: Payments) -> str:
    """What was seen of those of which nobody knows whether the money has gone."""
    count = f"{seen.unanswered} times the provider's answer was lost after the money had gone"
    if seen.unanswered_ended["new"]:
        return (
            f'One thing more: {count}, and these orders are "new" again, so that the next click pays twice.'
            ' What would leave them "paying"?'
        )
    return f'{count}, and these orders are not "new": the next click does not pay twice.'


pay_without_a_connection = Task(
    "06",
    "pay_without_a_connection",
    "pay",
    load=pay_orders,
    trials=({"orders": 30, "capacity": 4}, {"orders": 12, "capacity": 1}),
    rules=unless_raised(
        waits_in_line,
        *USE_OF_POOLS,
        expired_objects,
        another_pool,
        connects_past_the_pools("another-pool"),
        asks_for_too_long_or_twice,
        holds_while_it_waits,
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
