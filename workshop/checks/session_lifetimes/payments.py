"""Orders that are paid, and what became of each, for exercise 06, task 1."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import event, insert, inspect, select
from sqlalchemy.ext.asyncio import async_sessionmaker

from ormscope.lab import storm
from workshop.checks.calls import (
    Holds,
    close_sessions,
    current_call,
    raise_own,
)
from workshop.checks.evidence import Work, evidence
from workshop.checks.lent import Conditions, forget_orders, own_households
from workshop.checks.session_lifetimes.provider import Asked, Provider, UnansweredError
from workshop.checks.unpooled import Unpooled, backends, of_the_check
from workshop.payment import Declined
from workshop.shop import Order

_UNCERTAIN = ("unanswered",) * 2 + ("given up",) * 2
# Nobody clicks on those of these that are new.
_LEFT_ALONE = ("new",) * 2 + ("cancelled", "paid", "paying") * 2
_SECONDS_TO_GO_ON = 0.5  # for a task behind a shield, when the customer has given up


@dataclass
class Fate:
    """What became of an order: its status `before` and `after`, and how often it was `charged`.

    Its `role` is "accepted" or "declined" by the provider, "unanswered", "given up" by the customer, or "left alone".
    `told` says whether the call raised what it had to.
    """

    role: str
    before: str
    told: bool
    after: str | None = None
    charged: int = 0

    @property
    def is_right(self) -> bool:
        """Whether all was done that was asked for."""
        if self.role == "accepted":
            return (self.after, self.charged) == ("paid", 1)
        return self.told and (self.after, self.charged) == (self.before, 0)


@dataclass(kw_only=True)
class Payments(Work, Unpooled):
    """What became of the orders, and what the provider noted when it was `asked`.

    `renamed` are the errors that were raised in place of the provider's. `written` says whether "paid" was written, be
    it committed or not, and `detached` whether an order was set to it in no session.
    """

    fates: list[Fate]
    asked: Asked
    renamed: set[str]
    written: bool
    detached: bool

    def those(self, role: str) -> list[Fate]:
        """The orders of one role."""
        return [fate for fate in self.fates if fate.role == role]


async def pay_orders(
    pay: Callable[..., Any], conditions: Conditions, *, orders: int, capacity: int
) -> Payments:
    """Pay so many orders, each of them twice at once, and some that nobody owes; after that some that go wrong."""
    # A shop has so many orders that each is found by its key: else a SERIALIZABLE payment fails for its neighbours.
    engine, customers = conditions.engine(capacity, enable_seqscan="off"), own_households()
    ours = Order.household_id.between(customers[0], customers[-1])
    found = select(Order.id, Order.household_id, Order.status).where(ours).order_by(Order.id)
    roles = ["accepted" if number % 6 else "declined" for number in range(orders)]
    roles += [*_UNCERTAIN, *("left alone" for _ in _LEFT_ALONE)]
    statuses = ["new"] * (orders + len(_UNCERTAIN)) + [*_LEFT_ALONE]
    made = [
        {"household_id": household, "status": status}
        for household, status in zip(customers, statuses, strict=False)
    ]
    holds, renamed, detached = Holds(engine), set[str](), list[Order]()

    def note_detached(order: Order, status: Any, *_: Any) -> None:
        if status == "paid" and inspect(order).detached:
            detached.append(order)

    event.listen(Order.status, "set", note_detached)
    async with backends(conditions) as server, of_the_check(conditions, 2) as others:
        async with engine.begin() as connection:
            await connection.execute(insert(Order), made)
            rows = (await connection.execute(found)).all()
        await engine.dispose()
        fates = dict[int, Fate]()
        for order in rows:
            role = roles[order.household_id - customers[0]]
            fates[order.id] = Fate(role, order.status, told=role != "declined")
        by_role = {role: [n for n in fates if fates[n].role == role] for role in roles}
        owed = by_role["accepted"] + by_role["declined"]
        not_owed = [number for number, fate in fates.items() if fate.before != "new"]
        clicks = [number for number in sorted(owed) for _ in range(2)] + not_owed
        uncertain = by_role["unanswered"] + by_role["given up"]
        provider = Provider(holds, others, {order.id: order.household_id for order in rows})
        provider.declined |= {*by_role["declined"]}
        provider.unanswered |= {*by_role["unanswered"]}

        async def click(number: int) -> None:
            current_call.set(number)
            try:
                await pay(sessions, clicks[number], provider)
            except Declined:
                fates[clicks[number]].told = True
            except Exception as error:
                if not _is_renamed(error):
                    raise_own(error)
                renamed.add(type(error).__name__)

        async def go_wrong(number: int) -> None:
            """The network fails, or the customer gives up."""
            order, call = uncertain[number], len(clicks) + number
            current_call.set(call)
            payment = asyncio.create_task(pay(sessions, order, provider))
            if order in by_role["given up"]:
                provider.given_up[call] = payment.cancel
            await asyncio.wait([payment])
            error = None if payment.cancelled() else payment.exception()
            if error and not (isinstance(error, UnansweredError) or _is_renamed(error)):
                raise error
            is_told = payment.cancelled() or error is not None
            fates[order].told = is_told or not provider.noted.calls[call]

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
    for number, fate in fates.items():
        fate.after, fate.charged = after.get(number), provider.noted.charged[number]
    return Payments(
        **vars(noted),
        backends=server,
        done=sum(fates[number].is_right for number in clicks),
        fates=[*fates.values()],
        asked=provider.noted,
        renamed=renamed,
        written=any("paid" in update for update in holds.updates),
        detached=bool(detached),
    )


def _is_renamed(error: BaseException) -> bool:
    """Whether it was raised instead of the provider's error: from it, or with it in a group."""
    within = error.exceptions if isinstance(error, BaseExceptionGroup) else (error.__cause__,)
    return any(
        isinstance(each, (Declined, UnansweredError)) or (each and _is_renamed(each))
        for each in within
    )
