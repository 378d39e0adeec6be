"""Answers to the tasks of exercise 11, right and wrong, as people give them."""

from __future__ import annotations

import asyncio
import contextlib
from decimal import Decimal

from psycopg_pool import AsyncConnectionPool
from tortoise.transactions import atomic, in_transaction

from answers import Answers
from workshop.tortoise_shop import Order, OrderLine, Product

# The order


async def in_the_context(database, household_id, sku):
    async with in_transaction():
        order = await Order.create(household_id=household_id)
        product = await Product.get(sku=sku)
        await OrderLine.create(order_id=order.id, sku=sku, unit_price=product.unit_price)


async def with_its_connection(database, household_id, sku):
    async with in_transaction() as connection:
        order = await Order.create(household_id=household_id, using_db=connection)
        product = await Product.get(sku=sku).using_db(connection)
        line = OrderLine(order_id=order.id, sku=sku, unit_price=product.unit_price)
        await line.save(using_db=connection)


async def price_first(database, household_id, sku):
    product = await Product.get(sku=sku).using_db(database)
    async with in_transaction():
        order = await Order.create(household_id=household_id)
        await OrderLine.create(order_id=order.id, sku=sku, unit_price=product.unit_price)


@atomic()
async def write_down(household_id, sku):
    order = await Order.create(household_id=household_id)
    async with in_transaction():
        (product,) = await asyncio.gather(Product.get(sku=sku))
    await OrderLine.create(order_id=order.id, sku=sku, unit_price=product.unit_price)


async def nested_and_gathered(database, household_id, sku):
    await write_down(household_id, sku)


async def on_the_pool(database, household_id, sku):
    async with in_transaction():
        product = await Product.get(sku=sku).using_db(database)
        order = await Order.create(household_id=household_id)
        await OrderLine.create(order_id=order.id, sku=sku, unit_price=product.unit_price)
        await Product.get(sku=sku).using_db(database)


async def gathered_on_the_pool(database, household_id, sku):
    async with in_transaction():
        order = await Order.create(household_id=household_id)
        (product,) = await asyncio.gather(Product.get(sku=sku).using_db(database))
        await OrderLine.create(order_id=order.id, sku=sku, unit_price=product.unit_price)


door = asyncio.Lock()


async def through_a_door(database, household_id, sku):
    async with door:
        await in_the_context(database, household_id, sku)


async def without_a_transaction(database, household_id, sku):
    order = await Order.create(household_id=household_id)
    product = await Product.get(sku=sku)
    await OrderLine.create(order_id=order.id, sku=sku, unit_price=product.unit_price)


async def the_line_may_wait(database, household_id, sku):
    product = await Product.get(sku=sku)
    await Order.create(household_id=household_id)
    del product


async def a_price_from_memory(database, household_id, sku):
    async with in_transaction():
        await Product.get(sku=sku)
        order = await Order.create(household_id=household_id)
        await OrderLine.create(order_id=order.id, sku=sku, unit_price=Decimal("3.99"))


async def gives_up(database, household_id, sku):
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.001):
            await asyncio.sleep(0.01)
            await in_the_context(database, household_id, sku)
    await Product.get(sku=sku)


async def to_be_sure(database, household_id, sku):
    await in_the_context(database, household_id, sku)
    await in_the_context(database, household_id, sku)


in_the_background = set()


async def later(database, household_id, sku):
    await Product.get(sku=sku)
    work = asyncio.sleep(0.3, in_the_context)
    task = asyncio.create_task(work)
    in_the_background.add(task)


# Customers who leave


async def reserve_at_once(household_id):
    async with in_transaction():
        order = await Order.create(household_id=household_id)
        order.status = "reserved"
        await order.save()


async def shielded(household_id):
    task = asyncio.create_task(reserve_at_once(household_id))
    in_the_background.add(task)
    task.add_done_callback(in_the_background.discard)
    await asyncio.shield(task)


async def shielded_in_one_line(household_id):
    await asyncio.shield(reserve_at_once(household_id))


async def leaves_when_it_is_done(household_id):
    task = asyncio.create_task(reserve_at_once(household_id))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


async def with_one_statement(household_id):
    """A statement without a transaction of its own: whoever is cancelled in it gives back the lock."""
    await Order.create(household_id=household_id, status="reserved")


async def with_a_finally(household_id):
    transaction = in_transaction()
    try:
        async with transaction:
            order = await Order.create(household_id=household_id)
            order.status = "reserved"
            await order.save()
    finally:
        await asyncio.sleep(0)


async def shielded_within(household_id):
    async with in_transaction():
        order = await asyncio.shield(Order.create(household_id=household_id))
        order.status = "reserved"
        await asyncio.shield(order.save())


async def within_a_timeout(household_id):
    async with asyncio.timeout(0.5):
        await reserve_at_once(household_id)


async def who_leaves_is_kept(household_id):
    task = asyncio.create_task(reserve_at_once(household_id))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task


async def two_statements(household_id):
    order = await Order.create(household_id=household_id)
    order.status = "reserved"
    await order.save()


async def nobody_waits(household_id):
    task = asyncio.create_task(reserve_at_once(household_id))
    in_the_background.add(task)


async def twice_shielded(household_id):
    await shielded(household_id)
    await shielded(household_id)


# The line

LINE = {"min_size": 5, "max_size": 5, "timeout": 1, "max_waiting": 10}


async def opened(conninfo, **options):
    pool = AsyncConnectionPool(conninfo, open=False, **options)
    await pool.open(wait=True)
    return pool


async def with_a_look(conninfo):
    return await opened(conninfo, check=AsyncConnectionPool.check_connection, **LINE)


async def with_a_name(conninfo):
    pool = AsyncConnectionPool(
        conninfo,
        check=AsyncConnectionPool.check_connection,
        open=False,
        name="shop",
        kwargs={"autocommit": True},
        **LINE,
    )
    await pool.open()
    return pool


async def as_it_comes(conninfo):
    return await opened(
        conninfo,
        check=AsyncConnectionPool.check_connection,
        **{name: value for name, value in LINE.items() if "size" not in name},
    )


async def a_few_more(conninfo):
    options = LINE | {"min_size": 8, "max_size": 8}
    return await opened(conninfo, check=AsyncConnectionPool.check_connection, **options)


async def all_may_wait(conninfo):
    options = LINE | {"max_waiting": 0}
    return await opened(conninfo, check=AsyncConnectionPool.check_connection, **options)


async def half_a_minute(conninfo):
    options = LINE | {"timeout": 30}
    return await opened(conninfo, check=AsyncConnectionPool.check_connection, **options)


async def all_three(conninfo):
    return await opened(conninfo, **LINE)


async def a_young_pool(conninfo):
    return await opened(conninfo, max_lifetime=60, max_idle=10, **LINE)


async def a_shorter_line(conninfo):
    options = LINE | {"max_waiting": 3}
    return await opened(conninfo, check=AsyncConnectionPool.check_connection, **options)


async def hardly_any_patience(conninfo):
    options = LINE | {"timeout": 0.2}
    return await opened(conninfo, check=AsyncConnectionPool.check_connection, **options)


async def nothing_comes_back(conninfo):
    pool = await opened(conninfo, **LINE)
    await pool.close()


ANSWERS = {
    "stay_in_the_context": Answers(
        right=[in_the_context, with_its_connection, price_first, nested_and_gathered],
        wrong=[
            (on_the_pool, "asks-past-its-transaction"),
            (gathered_on_the_pool, "asks-past-its-transaction"),
            (through_a_door, "one-at-a-time"),
            (without_a_transaction, "half-an-order"),
            (the_line_may_wait, "half-an-order"),
            (a_price_from_memory, "guesses-the-price"),
            (gives_up, "success-without-work"),
            (to_be_sure, "twice"),
            (later, "fire-and-forget"),
        ],
    ),
    "leave_at_any_moment": Answers(
        right=[shielded, shielded_in_one_line, leaves_when_it_is_done, with_one_statement],
        wrong=[
            (with_a_finally, "async-with-gives-it-back"),
            (shielded_within, "async-with-gives-it-back"),
            (within_a_timeout, "async-with-gives-it-back"),
            (who_leaves_is_kept, "a-cancellation-is-an-error"),
            (two_statements, "half-an-order"),
            (nobody_waits, "fire-and-forget"),
            (twice_shielded, "twice"),
        ],
    ),
    "draw_a_line": Answers(
        right=[all_three, with_a_look, with_a_name, a_young_pool],
        wrong=[
            (as_it_comes, "four-is-the-default"),
            (a_few_more, "not-what-was-asked"),
            (all_may_wait, "a-line-has-an-end"),
            (half_a_minute, "a-pool-is-impatient"),
            (a_shorter_line, "not-what-was-asked"),
            (hardly_any_patience, "not-what-was-asked"),
            (nothing_comes_back, "not-what-was-asked"),
        ],
    ),
}
