"""Exercise 06, task 1: a payment that holds its connection while somebody else takes their time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg
from sqlalchemy import event, insert, select
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
from workshop.checks.session_lifetimes.calls import Holds, close_sessions, current_call, dsn
from workshop.checks.session_lifetimes.provider import DeclinedError, Provider
from workshop.checks.task import Task, Trials
from workshop.shop import Order


@dataclass(kw_only=True)
class Payments(Work):
    """What became of orders: those `accepted` by the provider, those `declined`, and those that are not owed.

    `charged`, `twice` and `not_owed` is how many of them were charged at all, more than once, and although nobody
    owes them; `paid`, `paid_in_vain` and `open_again` how many have that status at the end, and `told` how many
    refusals were reported. `held` says whether a call had a connection while the provider worked, `statuses` which
    ones others could see then, and `written` is how often "paid" was written, be it committed or not.
    """

    held: bool
    accepted: int
    charged: int
    twice: int
    not_owed: int
    statuses: Counter[str]
    paid: int
    paid_in_vain: int
    open_again: int
    declined: int
    told: int
    written: int


async def pay_orders(
    pay: Callable[..., Any], conditions: Conditions, *, orders: int, capacity: int
) -> Payments:
    """Pay so many orders, each of them twice at once, and some that nobody owes."""
    engine, customers = conditions.engine(capacity), own_households()
    ours = Order.household_id.between(customers[0], customers[-1])
    found = select(Order.id, Order.household_id, Order.status).where(ours).order_by(Order.id)
    made = [
        {"household_id": customers[index], "status": status}
        for index, status in enumerate(["new"] * orders + ["cancelled", "paid"] * 2)
    ]
    async with engine.begin() as connection:
        await connection.execute(insert(Order), made)
        before = (await connection.execute(found)).all()
    await engine.dispose()
    new = [order.id for order in before if order.status == "new"]
    not_owed = [order.id for order in before if order.status != "new"]
    clicks = [number for number in new for _ in range(2)] + not_owed
    declined, told = {*new[::6]}, set[int]()
    holds, written = Holds(engine), Counter[str]()
    event.listen(engine.sync_engine, "before_cursor_execute", partial(_note_paid, written))
    async with asyncpg.create_pool(dsn(engine), min_size=2, max_size=2) as others:
        owed = {order.id: order.household_id for order in before}
        provider = Provider(holds, others, owed, declined)

        async def click(number: int) -> None:
            current_call.set(number)
            try:
                await pay(sessions, clicks[number], provider)
            except DeclinedError:
                told.add(clicks[number])

        async with evidence(conditions, engine) as noted:
            sessions = async_sessionmaker(engine)
            await storm(click, len(clicks))
    await close_sessions(noted)
    await engine.dispose()
    async with engine.connect() as connection:
        after = {order.id: order.status for order in await connection.execute(found)}
        await forget_orders(connection, customers)
    accepted = [number for number in new if number not in declined]
    charged = provider.charged
    right = {number for number in accepted if after[number] == "paid" and charged[number] == 1}
    right |= {number for number in declined if after[number] == "new" and number in told}
    right |= {number for number in not_owed if not charged[number]}
    return Payments(
        **vars(noted),
        done=sum(number in right for number in clicks),
        held=provider.held,
        accepted=len(accepted),
        charged=sum(charged[number] > 0 for number in accepted),
        twice=sum(charged[number] > 1 for number in new),
        not_owed=sum(charged[number] > 0 for number in not_owed),
        statuses=provider.seen,
        paid=sum(after[number] == "paid" for number in accepted),
        paid_in_vain=sum(after[number] == "paid" for number in declined),
        open_again=sum(after[number] == "new" for number in declined),
        declined=len(declined),
        told=len(told),
        written=written["paid"],
    )


def _note_paid(
    written: Counter[str], connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any
) -> None:
    written["paid"] += statement.startswith("UPDATE") and "paid" in f"{statement}{parameters}"


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
    if seen.statuses["paid"]:
        yield Finding(
            "paid-before-the-money",
            'While the provider was still working, the order\'s status was "paid" already.',
        )
    if seen.paid_in_vain:
        yield Finding(
            "paid-before-the-money", 'Orders whose payment was declined have the status "paid".'
        )
    if seen.charged < seen.accepted:
        yield Finding(
            "success-without-work",
            f"Of {seen.accepted} orders that could be paid, {seen.charged} were charged.",
        )
    if seen.paid < seen.accepted:
        yield Finding(
            "forgets-to-commit" if seen.written else "changes-a-detached-object",
            f'{seen.accepted} orders were charged, and {seen.paid} have the status "paid".',
        )
    if seen.open_again < seen.declined:
        yield Finding(
            "claim-that-stays",
            f'Of {seen.declined} orders whose payment was declined, {seen.open_again} are "new" again.',
        )
    if seen.told < seen.declined:
        yield Finding(
            "swallows-the-timeout",
            f"{seen.declined} payments were declined, and {seen.told} calls said so.",
        )


def prove(trials: Trials[Payments]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{seen.paid} of {seen.accepted} orders charged once and paid, {seen.declined}"
        f" declined, with {connections(run)}, and none of them held while the provider worked."
        for run, seen in trials
    )


pay_without_a_connection = Task(
    "06",
    "pay_without_a_connection",
    "pay",
    load=pay_orders,
    trials=({"orders": 30, "capacity": 4}, {"orders": 12, "capacity": 1}),
    rules=(
        waits_in_line,
        *USE_OF_POOLS,
        expired_objects,
        another_pool,
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
        ".returning(Order.household_id) gives a row to one call and None to all others. And in except: back to "
        '"new", and raise.',
    ),
)
