"""Exercise 02, task 2: an audit log that tells also of the orders that were rolled back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, event, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import Session

from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import evidence
from workshop.checks.lent import Conditions, forget_orders, own_households
from workshop.checks.nesting import ONE_AT_A_TIME, Nested, Nesting
from workshop.checks.task import Task
from workshop.checks.unpooled import NO_OTHER_CONNECTIONS, backends, of_the_check
from workshop.shop import AuditEntry, Order

_PLACED = "SELECT count(*) FROM orders WHERE household_id = $1"


@dataclass(kw_only=True)
class Charges(Nested):
    """Of orders whose card was `accepted` or `declined`, how many are placed and in the audit log.

    `asked` is for how many orders a card was charged, `charged_again` for how many more than once, and `early` how
    many of those that were `looked_at` were committed when their card was charged. `sent` are those for which the
    learner's code wrote the order, and `sent_to_log` those for which it wrote an entry, be it committed or not;
    `sent_although_declined` the same of declined ones. `other_detail` is that of an entry with something else for a
    detail. `too_many` is how many rows there are more than one for each call.
    """

    accepted: int
    declined: int
    asked: int
    charged_again: int
    early: int
    looked_at: int
    placed: int
    placed_although_declined: int
    logged: int
    logged_although_declined: int
    sent: int
    sent_to_log: int
    sent_although_declined: int
    other_detail: str
    too_many: int


class Written:
    """What the learner's code writes, be it committed or not: rows that it sent, and objects that nobody flushed."""

    def __init__(self, *engines: AsyncEngine) -> None:
        self.orders = set[int]()
        self.details = set[str]()
        for engine in engines:
            event.listen(engine.sync_engine, "before_cursor_execute", self._sends)
        event.listen(Session, "pending_to_transient", self._drops)

    def _sends(self, _: Any, __: Any, statement: str, ___: Any, context: Any, ____: Any) -> None:
        for row in getattr(context, "compiled_parameters", None) or ():
            if "into orders" in statement.lower():
                self.orders.update(value for value in row.values() if isinstance(value, int))
            if "into audit_log" in statement.lower():
                self.details.add(str(row.get("detail", row)))

    def _drops(self, _: Session, written: object) -> None:
        if isinstance(written, Order):
            self.orders.add(written.household_id)
        if isinstance(written, AuditEntry):
            self.details.add(str(written.detail))


async def charge_cards(
    place_order: Callable[..., Any],
    conditions: Conditions,
    *,
    orders: int,
    capacity: int,
    audit: int,
) -> Charges:
    """Place so many orders at once, every third of which is declined."""
    shop, log = conditions.engine(capacity), conditions.engine(audit, "audit")
    customers = own_households()
    declined = {customers[number] for number in range(0, orders, 3)}
    charged, early = Counter[int](), set[int]()
    # Not at all of them: that would slow down the orders, and what runs beside them would be done in time by chance.
    looked_at = {customers[number] for number in range(0, orders, 6)}
    nesting, written = Nesting(shop, log), Written(shop, log)
    async with backends(conditions) as server, of_the_check(conditions, 1) as others:

        async def charge(number: int) -> bool:
            charged[number] += 1
            await asyncio.sleep(0)  # a card terminal in the same process answers at once
            if number in looked_at and await others.fetchval(_PLACED, number):
                early.add(number)
            return number not in declined

        async with evidence(conditions, shop, log) as noted:
            sessions, logs = async_sessionmaker(shop), async_sessionmaker(log)
            await storm(
                lambda number: place_order(sessions, logs, customers[number], charge), orders
            )
    await log.dispose()
    await shop.dispose()
    async with shop.connect() as connection:
        ours = Order.household_id.between(customers[0], customers[-1])
        placed = list(await connection.scalars(select(Order.household_id).where(ours)))
        wanted = {str(customers[number]): customers[number] for number in range(orders)}
        entries = select(AuditEntry.detail).where(AuditEntry.detail.in_(wanted))
        logged = [wanted[str(detail)] for detail in await connection.scalars(entries)]
        await connection.execute(delete(AuditEntry).where(AuditEntry.detail.in_(wanted)))
        await forget_orders(connection, customers)
    accepted = set(wanted.values()) - declined
    sent_to_log = {wanted[detail] for detail in written.details if detail in wanted}
    return Charges(
        **vars(noted),
        **nesting.noted(),
        backends=server,
        done=len(accepted.intersection(placed)) + len(declined),
        accepted=len(accepted),
        declined=len(declined),
        asked=len(charged),
        charged_again=sum(count > 1 for count in charged.values()),
        early=len(early),
        looked_at=len(looked_at),
        placed=len(accepted.intersection(placed)),
        placed_although_declined=len(declined.intersection(placed)),
        logged=len(accepted.intersection(logged)),
        logged_although_declined=len(declined.intersection(logged)),
        sent=len(accepted & written.orders),
        sent_to_log=len(accepted & sent_to_log),
        sent_although_declined=len(declined & sent_to_log),
        other_detail=min(written.details - set(wanted), default=""),
        too_many=len(placed) + len(logged) - len(set(placed)) - len(set(logged)),
    )


def one_charge_each(run: Recording, seen: Charges) -> Iterator[Finding]:
    """Each card is charged once, and its answer decides."""
    if seen.charged_again:
        yield Finding(
            "twice", f"Of {run.announced} cards, {seen.charged_again} were charged again."
        )
    if seen.early:
        yield Finding(
            "commits-what-should-roll-back",
            f"When their card was charged, {seen.early} of {seen.looked_at} orders were committed already.",
        )
    if seen.placed_although_declined:
        yield Finding(
            "ignores-the-answer",
            f"Cards were charged for {seen.asked} orders. Of {seen.declined} that were declined,"
            f" {seen.placed_although_declined} are placed; of {seen.accepted} that were accepted, {seen.placed}.",
        )


def one_entry_each(run: Recording, seen: Charges) -> Iterator[Finding]:
    """Accepted orders are placed, and those and declined ones are in the audit log, once."""
    rows = (
        f"Of {seen.accepted} orders whose card was accepted, {seen.placed} are placed and {seen.logged} are in the"
        f" audit log; of {seen.declined} that were declined, {seen.logged_although_declined} are in the log."
    )
    logged = seen.logged + seen.logged_although_declined
    sent = seen.sent_to_log + seen.sent_although_declined
    if logged < run.announced and seen.other_detail:
        yield Finding(
            "another-detail", f"{rows} There are entries with the detail {seen.other_detail!r}."
        )
    if seen.logged == seen.accepted and seen.logged_although_declined < seen.declined:
        if seen.logged_although_declined < seen.sent_although_declined:
            yield Finding("audit-rolls-back-too", rows)
        yield Finding("logs-one-outcome", rows)
    if not seen.logged and seen.logged_although_declined == seen.declined and not seen.sent_to_log:
        yield Finding("logs-one-outcome", rows)
    if seen.placed < seen.sent or logged < sent:
        yield Finding("forgets-to-commit", f"{rows} What is missing was added and never committed.")
    if seen.placed < seen.accepted or logged < run.announced:
        yield Finding("success-without-work", rows)
    if seen.too_many:
        yield Finding(
            "twice",
            f"There are {seen.too_many} rows more than {run.announced} calls should leave.",
        )


def prove(run: Recording, seen: Charges) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{seen.placed} orders placed, {seen.declined} declined, {run.announced} in the audit log,"
        f" with {run.pools[0].capacity} + {run.pools[1].capacity} connections, 0 deadlocks, 0 timeouts."
    )


keep_the_audit = Task(
    "02",
    "keep_the_audit",
    "place_order",
    load=charge_cards,
    trials=(
        {"orders": 60, "capacity": 10, "audit": 2},
        {"orders": 20, "capacity": 1, "audit": 1},
    ),
    rules=(
        *NO_OTHER_CONNECTIONS,
        *ONE_AT_A_TIME,
    ),
    demands=(one_charge_each, one_entry_each),
    proof=prove,
    hints=(
        "Two things are asked of the entry: it must survive the rollback, and it must not need the orders' pool while "
        "an order holds a connection of it.",
        "Audit makes sessions on a pool of its own. Who waits for it, and does any of its holders wait for an order?",
        "Write the entry in a session of Audit, or write it when the order's session is closed.",
    ),
    load_seconds=5.0,
)
