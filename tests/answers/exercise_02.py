"""Answers to the tasks of exercise 02, right and wrong, as people give them."""

from __future__ import annotations

import asyncio

from answers import Answers
from workshop.shop import AuditEntry, Order

# The permits


def by_the_formula(pool_size, max_overflow, depth):
    return (pool_size + max_overflow - 1) // (depth - 1)


def by_counting(pool_size, max_overflow, depth):
    inside = 1
    while (inside + 1) * (depth - 1) + 1 <= pool_size + max_overflow:
        inside += 1
    return inside


def all_connections(pool_size, max_overflow, depth):
    return pool_size + max_overflow


def one_less(pool_size, max_overflow, depth):
    return pool_size + max_overflow - 1


def shared_out(pool_size, max_overflow, depth):
    return (pool_size + max_overflow) // depth


def no_limit(pool_size, max_overflow, depth):
    return 0


# The audit log


async def log_with(Session, number):
    async with Session() as log:
        log.add(AuditEntry(action="order", detail=str(number)))
        await log.commit()


async def order_with(session, number, charge):
    session.add(Order(household_id=number))
    await session.flush()
    if await charge(number):
        await session.commit()
    else:
        await session.rollback()


async def pool_of_its_own(Orders, Audit, number, charge):
    async with Orders() as session:
        session.add(Order(household_id=number))
        await session.flush()
        await log_with(Audit, number)
        if await charge(number):
            await session.commit()


async def log_first(Orders, Audit, number, charge):
    await log_with(Orders, number)
    async with Orders() as session:
        await order_with(session, number, charge)


async def log_last(Orders, Audit, number, charge):
    try:
        async with Orders() as session:
            await order_with(session, number, charge)
    finally:
        await log_with(Orders, number)


async def same_session_after_the_end(Orders, Audit, number, charge):
    async with Orders() as session:
        await order_with(session, number, charge)
        session.add(AuditEntry(action="order", detail=str(number)))
        await session.commit()


async def still_the_same_pool(Orders, Audit, number, charge):
    async with Orders() as session:
        session.add(Order(household_id=number))
        await session.flush()
        if await charge(number):
            await log_with(Orders, number)
            await session.commit()
        else:
            await log_with(Orders, number)


async def in_the_same_transaction(Orders, Audit, number, charge):
    async with Orders() as session:
        session.add(AuditEntry(action="order", detail=str(number)))
        await order_with(session, number, charge)


async def commit_to_be_safe(Orders, Audit, number, charge):
    async with Orders() as session:
        session.add(Order(household_id=number))
        session.add(AuditEntry(action="order", detail=str(number)))
        await session.commit()
        if not await charge(number):
            await session.rollback()


background = set()


async def in_the_background(Orders, Audit, number, charge):
    task = asyncio.create_task(log_with(Audit, number))
    background.add(task)
    async with Orders() as session:
        await order_with(session, number, charge)


async def log_only(Orders, Audit, number, charge):
    await log_with(Audit, number)


async def log_twice(Orders, Audit, number, charge):
    await log_with(Audit, number)
    await log_last(Orders, Audit, number, charge)


async def child_that_logs(Orders, Audit, number, charge):
    async with Orders() as session:
        session.add(Order(household_id=number))
        await session.flush()
        await asyncio.gather(log_with(Orders, number))
        if await charge(number):
            await session.commit()


ANSWERS = {
    "choose_the_permits": Answers(
        right=[by_the_formula, by_counting],
        wrong=[
            (all_connections, "as-many-permits-as-connections"),
            (one_less, "permits-ignore-the-depth"),
            (shared_out, "too-careful"),
            (no_limit, "nobody-gets-in"),
        ],
    ),
    "keep_the_audit": Answers(
        right=[pool_of_its_own, log_first, log_last, same_session_after_the_end],
        wrong=[
            (still_the_same_pool, "holds-and-waits"),
            (child_that_logs, "children-count-too"),
            (in_the_same_transaction, "audit-rolls-back-too"),
            (commit_to_be_safe, "commits-what-should-roll-back"),
            (in_the_background, "fire-and-forget"),
            (log_only, "success-without-work"),
            (log_twice, "twice"),
        ],
    ),
}
