"""Answers to the tasks of exercise 02, right and wrong, as people give them."""

from __future__ import annotations

import asyncio
import contextlib
import math

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from answers import Answers
from workshop.database import database_url
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


def rounded_up(pool_size, max_overflow, depth):
    return math.ceil((pool_size + max_overflow - 1) / (depth - 1))


def rounded(pool_size, max_overflow, depth):
    return round((pool_size + max_overflow - 1) / (depth - 1))


def one_less_of_the_share(pool_size, max_overflow, depth):
    return (pool_size + max_overflow) // (depth - 1) - 1


def without_overflow(pool_size, max_overflow, depth):
    return (pool_size - 1) // (depth - 1)


def a_number_with_a_point(pool_size, max_overflow, depth):
    return (pool_size + max_overflow - 1) / (depth - 1)


def nothing(pool_size, max_overflow, depth):
    print((pool_size + max_overflow - 1) // (depth - 1))


def as_many_as_hold_all_but_one(pool_size, max_overflow, depth):
    left, inside = pool_size + max_overflow, 0
    while left > depth - 1:
        left -= depth - 1
        inside += 1
    return inside


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


async def commit_and_delete(Orders, Audit, number, charge):
    """Others see an order whose card is declined a moment later."""
    await log_with(Audit, number)
    async with Orders() as session:
        order = Order(household_id=number)
        session.add(order)
        await session.commit()
        if not await charge(number):
            await session.delete(order)
            await session.commit()


async def charge_again(Orders, Audit, number, charge):
    await log_with(Audit, number)
    if await charge(number):
        async with Orders() as session:
            await order_with(session, number, charge)


async def the_wrong_way_round(Orders, Audit, number, charge):
    await log_with(Audit, number)
    async with Orders() as session:
        session.add(Order(household_id=number))
        if not await charge(number):
            await session.commit()


async def log_what_is_accepted(Orders, Audit, number, charge):
    async with Orders() as session:
        session.add(Order(household_id=number))
        if await charge(number):
            await session.commit()
            await log_with(Audit, number)


async def log_what_is_declined(Orders, Audit, number, charge):
    async with Orders() as session:
        session.add(Order(household_id=number))
        accepted = await charge(number)
        if accepted:
            await session.commit()
    if not accepted:
        await log_with(Audit, number)


async def log_without_commit(Orders, Audit, number, charge):
    async with Audit() as log:
        log.add(AuditEntry(action="order", detail=str(number)))
    async with Orders() as session:
        await order_with(session, number, charge)


async def flush_the_log(Orders, Audit, number, charge):
    async with Audit() as log:
        log.add(AuditEntry(action="order", detail=str(number)))
        await log.flush()
    async with Orders() as session:
        await order_with(session, number, charge)


async def log_in_words(Orders, Audit, number, charge):
    await log_with(Audit, f"household {number}")
    async with Orders() as session:
        await order_with(session, number, charge)


async def log_not_awaited(Orders, Audit, number, charge):
    log_with(Audit, number)
    async with Orders() as session:
        await order_with(session, number, charge)


engines = {}


async def a_third_pool(Orders, Audit, number, charge):
    if not engines:
        engines["Log"] = async_sessionmaker(create_async_engine(database_url(), pool_size=2))
    async with Orders() as session:
        session.add(Order(household_id=number))
        await session.flush()
        await log_with(engines["Log"], number)
        if await charge(number):
            await session.commit()


async def blocks_that_commit(Orders, Audit, number, charge):
    """The second commits where it ends, in a task of SQLAlchemy's own."""
    async with Orders.begin() as session:
        session.add(Order(household_id=number))
        await session.flush()
        async with Orders.begin() as log:
            log.add(AuditEntry(action="order", detail=str(number)))
        if not await charge(number):
            await session.rollback()


async def give_up_on_the_log(Orders, Audit, number, charge):
    async with Orders() as session:
        session.add(Order(household_id=number))
        await session.flush()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await log_with(Orders, number)
        if await charge(number):
            await session.commit()


doors = {}


async def door_for_this_pool(Orders, Audit, number, charge):
    """As task 1 has it; on a pool with a single connection nobody gets in."""
    pool = Orders.kw["bind"].pool
    async with doors.setdefault(id(pool), asyncio.Semaphore(pool.size() - 1)):
        await still_the_same_pool(Orders, Audit, number, charge)


async def only_the_order_in_a_savepoint(Orders, Audit, number, charge):
    async with Orders.begin() as session:
        session.add(AuditEntry(action="order", detail=str(number)))
        async with session.begin_nested() as savepoint:
            session.add(Order(household_id=number))
            await session.flush()
            if not await charge(number):
                await savepoint.rollback()


async def charge_first(Orders, Audit, number, charge):
    accepted = await charge(number)
    async with Orders.begin() as session:
        session.add(AuditEntry(action="order", detail=str(number)))
        if accepted:
            session.add(Order(household_id=number))


async def log_meanwhile(Orders, Audit, number, charge):
    async with Orders() as session:
        session.add(Order(household_id=number))
        await session.flush()
        async with asyncio.TaskGroup() as group:
            group.create_task(log_with(Audit, number))
            accepted = group.create_task(charge(number))
        if accepted.result():
            await session.commit()


async def log_once_the_order_is_done(Orders, Audit, number, charge):
    """The task asks for a connection while its parent has one, and the parent does not wait for it then."""
    async with Orders() as session:
        session.add(Order(household_id=number))
        await session.flush()
        task = asyncio.create_task(log_with(Orders, number))
        if await charge(number):
            await session.commit()
    await task


async def in_the_background_of_the_order(Orders, Audit, number, charge):
    async with Orders() as session:
        session.add(Order(household_id=number))
        await session.flush()
        background.add(asyncio.create_task(log_with(Orders, number)))
        if await charge(number):
            await session.commit()


ANSWERS = {
    "choose_the_permits": Answers(
        right=[by_the_formula, by_counting, as_many_as_hold_all_but_one],
        wrong=[
            (all_connections, "as-many-permits-as-connections"),
            (one_less, "permits-ignore-the-depth"),
            (shared_out, "sets-all-apart"),
            (rounded_up, "too-many-permits"),
            (rounded, "too-many-permits"),
            (one_less_of_the_share, "too-careful"),
            (without_overflow, "forgets-the-overflow"),
            (a_number_with_a_point, "not-what-was-asked"),
            (nothing, "not-what-was-asked"),
            (no_limit, "nobody-gets-in"),
        ],
    ),
    "keep_the_audit": Answers(
        right=[
            pool_of_its_own,
            log_first,
            log_last,
            same_session_after_the_end,
            only_the_order_in_a_savepoint,
            charge_first,
            log_meanwhile,
            log_once_the_order_is_done,
        ],
        wrong=[
            (still_the_same_pool, "holds-and-waits"),
            (child_that_logs, "children-count-too"),
            (in_the_same_transaction, "audit-rolls-back-too"),
            (commit_to_be_safe, "commits-what-should-roll-back"),
            (in_the_background, "fire-and-forget"),
            (in_the_background_of_the_order, "fire-and-forget"),
            (log_only, "success-without-work"),
            (log_twice, "twice"),
            (commit_and_delete, "commits-what-should-roll-back"),
            (charge_again, "twice"),
            (the_wrong_way_round, "ignores-the-answer"),
            (log_what_is_accepted, "logs-one-outcome"),
            (log_what_is_declined, "logs-one-outcome"),
            (log_without_commit, "forgets-to-commit"),
            (flush_the_log, "forgets-to-commit"),
            (log_in_words, "another-detail"),
            (log_not_awaited, "never-awaited"),
            (a_third_pool, "another-pool"),
            (blocks_that_commit, "holds-and-waits"),
            (give_up_on_the_log, "holds-and-waits"),
            (door_for_this_pool, "door-for-one-size"),
        ],
    ),
}
