"""Exercise 09, task 2: a service with a crowd before it, a colleague who locks its rows, and an end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import asyncpg
from fastapi import FastAPI
from sqlalchemy import Connection, Engine, event

from ormscope import PoolScope
from ormscope.lab import Recording, storm
from ormscope.lab.run import PoolCurve
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import THE_CHECK, evidence
from workshop.checks.lent import Conditions, connections, own_households
from workshop.checks.production_settings.crowd import (
    SIZE,
    Customers,
    Service,
    Watched,
    connections_left,
    forget_customers,
    note_orders,
)
from workshop.checks.rules import (
    engine_per_call,
    expired_objects,
    own_pools,
    who_holds_and_waits,
)
from workshop.checks.task import Task
from workshop.checks.unpooled import of_the_check
from workshop.service import serving

if TYPE_CHECKING:
    from ormscope.lab.picture import Picture

_AFTER_THEM = 0.1  # seconds, until those who have come first have what they wait with
_SUSPICIOUS = 1.0  # seconds in line, after which it is asked who holds and who waits
_LOAD_SECONDS = 8.0  # of which a right answer needs two


async def serve(
    shop: Callable[[str], Any],
    conditions: Conditions,
    *,
    orders: int,
    payments: int,
    bystanders: int,
) -> Service:
    """So many customers at once, some of whom pay then; payers of locked orders, with bystanders; and the end."""
    made = list[Any]()
    seen = Service(
        slowness=conditions.slowness, orders=orders, payments=payments, bystanders=bystanders
    )

    async def start(number: int) -> None:
        made.append(shop(conditions.url))

    async with of_the_check(conditions, 4) as others, evidence(conditions) as noted:
        await storm(start, 1)
        if made and not isinstance(made[0], FastAPI):
            seen.returned = type(made[0]).__name__
        elif made:
            watched = Watched(made[0], others, seen)
            try:
                async with serving(watched) as browser:  # type: ignore[arg-type]  # it is an app
                    await _visit(Customers(browser, watched, seen), others, seen)
                seen.left = await connections_left(others)
                await note_orders(others, seen)
            finally:
                await forget_customers(others)
    vars(seen).update(vars(noted))
    return seen


async def _visit(customers: Customers, others: asyncpg.Pool, seen: Service) -> None:
    households = own_households()
    numbers: list[Any] = []

    async def order(number: int) -> None:
        numbers.append(await customers.order(households[number]))

    async def pay(number: int) -> None:
        await customers.pay(numbers[number])

    async def order_alone(number: int) -> None:
        await customers.order(households[seen.orders])

    with _engines() as engines:
        if not (await storm(order_alone, 1))["ok"]:
            return
    scopes = [PoolScope(engine) for engine in engines]
    watching = asyncio.create_task(_watch(scopes, seen), name=THE_CHECK)
    try:
        for action, count in ((order, seen.orders), (pay, seen.payments)):
            if (await storm(action, count))["ok"] < count or seen.unanswered or seen.refused:
                return
        await _meet_a_colleague(customers, others, seen)
    finally:
        watching.cancel()
        for scope in scopes:
            scope.close()


@contextmanager
def _engines() -> Iterator[set[Engine]]:
    """The engines that are used in the block; one for each session is told from their number."""
    used: set[Engine] = set()

    def note(connection: Connection) -> None:
        used.add(connection.engine)

    event.listen(Engine, "engine_connect", note)
    try:
        yield used
    finally:
        event.remove(Engine, "engine_connect", note)


async def _watch(scopes: Sequence[PoolScope], seen: Service) -> None:
    """Note who holds and who waits, when somebody has stood in line for long."""
    while True:
        await asyncio.sleep(0.2)
        for scope in scopes:
            waiters = scope.waiters
            if waiters and time.perf_counter() - waiters[0].since > _SUSPICIOUS:
                seen.in_line = scope.verdict_now()


async def _meet_a_colleague(customers: Customers, others: asyncpg.Pool, seen: Service) -> None:
    """Some pay orders that a colleague has locked, as many as there are connections, and bystanders order meanwhile."""
    first = seen.orders + 1
    make = "INSERT INTO orders (household_id, status) VALUES ($1, 'new') RETURNING id"
    rows = own_households()[first : first + seen.payers]
    locked = [await others.fetchval(make, row) for row in rows]

    async def visit(number: int) -> None:
        if number >= seen.payers:
            await asyncio.sleep(_AFTER_THEM)
            household = own_households()[first + number]
            is_served = await customers.order(household, seen.patience_at_locks) is not None
            seen.blocked += not is_served
        else:
            is_stuck = await customers.pay_locked(locked[number])
            seen.stuck += is_stuck

    async with others.acquire() as colleague, colleague.transaction():
        await colleague.execute("SELECT FROM orders WHERE id = ANY ($1::int[]) FOR UPDATE", locked)
        await storm(visit, seen.payers + seen.bystanders)


def too_many(run: Recording, seen: Service) -> Iterator[Finding]:
    """Engines that may open more connections than the task allows."""
    pools = own_pools(run, seen)
    most = sum(pool.capacity or 0 for pool in pools)
    if most > SIZE:
        each = " + ".join(str(pool.capacity) for pool in pools)
        told = f"The pools of your service may open {each} connections; the task allows {SIZE}."
        yield Finding("size-is-not-the-limit", told)


def holds_and_waits(run: Recording, seen: Service) -> Iterator[Finding]:
    """Customers who hold a connection and stand in line for another, so that nobody is served."""
    stuck = [each for each in seen.in_line.holding if each.waits] if seen.in_line else []
    if seen.in_line and stuck and seen.unanswered:
        told = f"{seen.unanswered} of {seen.orders} customers at once had no answer after {seen.patience:g} s"
        yield Finding("holds-and-waits", f"{told}: {who_holds_and_waits(seen.in_line, stuck)}")


def waits_with_the_pool(run: Recording, seen: Service) -> Iterator[Finding]:
    """Those who wait for a lock keep all connections, as long as the colleague takes."""
    if seen.stuck:
        yield Finding(
            "a-lock-is-no-line",
            f"A colleague had locked {seen.payers} orders, and as many customers wanted to pay them. After"
            f" {seen.patience_at_locks:g} s {seen.stuck} of them still waited. Of {seen.bystanders} who came after"
            f" them and wanted something else, {seen.blocked} were not served.",
        )


def answers_too_early(run: Recording, seen: Service) -> Iterator[Finding]:
    """What the customer reads is not there yet, or never will be."""
    if seen.too_early and seen.missing:
        yield Finding(
            "forgets-to-commit",
            f"{seen.too_early} customers were answered with 200, and {seen.missing} of {seen.orders} orders were not"
            " in the database at the end.",
        )
    if seen.too_early:
        yield Finding(
            "answers-before-it-commits",
            f"{seen.too_early} times, at the moment at which the customer was answered with 200, nobody else could see"
            " in the database what was written. If that commit fails, nobody will.",
        )


def demands(run: Recording, seen: Service) -> Iterator[Finding]:
    """Each sentence of the task's text; what the rules say comes before it."""
    if seen.returned:
        told = f"shop(url) returned no FastAPI but {seen.returned}."
        yield Finding("not-what-was-asked", told)
        return
    if seen.unanswered:
        told = f"{seen.unanswered} customers had no answer after {seen.patience:g} s."
        yield Finding("never-ends", told)
    for status, count in seen.refused.items():
        told = f"{count} customers got the status {status}; the task wants all of them served."
        yield Finding("not-what-was-asked", told)
    if seen.wrong or seen.unpaid:
        told = f"{seen.wrong} of {seen.orders} orders were not as the task wants them: one for each customer, with one"
        yield Finding(
            "not-what-was-asked",
            f'{told} line at the shop\'s price. {seen.unpaid} of {seen.payments} that were paid were not "paid".',
        )
    if seen.left:
        yield Finding(
            "ends-without-a-goodbye",
            f"When your service had ended, the server still had {seen.left} of its connections.",
        )


def prove(run: Recording, seen: Service) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{seen.orders} customers served with {connections(run)}, each order in the database"
        " when its customer read the answer.\n"
        f"{seen.payers} customers wanted to pay orders that were locked: {seen.payers} were told, and"
        f" {seen.bystanders} of {seen.bystanders} others were served. At the end the server had {seen.left}"
        " connections of your service."
    )


def plot_requests(before: Recording, after: Recording) -> Picture:
    """Both runs, with all pools of each as one: as it is given, the service has a pool for each session."""
    return _with_one_pool(before).plot(_with_one_pool(after))


def _with_one_pool(run: Recording) -> Recording:
    """The run with the connections and those in line of all its pools added up."""
    every = [(sample, number) for number, pool in enumerate(run.pools) for sample in pool.samples]
    now, samples = {}, []
    for sample, number in sorted(every, key=lambda one: one[0].time):
        now[number] = sample
        out = sum(one.checked_out for one in now.values())
        waiting = sum(one.waiting for one in now.values())
        samples.append(sample._replace(checked_out=out, waiting=waiting))
    (capacity, *others) = [pool.capacity for pool in run.pools] or [None]
    every_pool = PoolCurve("all pools", None if others else capacity, samples)
    return replace(run, pools=[every_pool], curves=("connections", "requests"))


serve_a_crowd: Task[Service] = Task(
    "09",
    "serve_a_crowd",
    "shop",
    load=serve,
    trials=({"orders": 60, "payments": 20, "bystanders": 20},),
    rules=(
        engine_per_call,
        too_many,
        holds_and_waits,
        expired_objects,
        waits_with_the_pool,
        answers_too_early,
    ),
    demands=(demands,),
    proof=prove,
    load_seconds=_LOAD_SECONDS,
    curves=("requests",),
    plot=plot_requests,
    hints=(
        "For each line ask: how often does it run, with 60 customers? Who waits in it, and with what in their hands?"
        " When does it run: before the answer is sent, or after?",
        "One engine, made in shop, and an async_sessionmaker. Each endpoint opens one session, asks for the price in"
        " it, and its block ends before the return. FastAPI(lifespan=...) says what happens at the end.",
        'connect_args={"server_settings": {"lock_timeout": "500ms"}} limits the wait for a lock. The order\'s number'
        " is still to be read after the commit: expire_on_commit=False. At the end: await engine.dispose().",
    ),
)
