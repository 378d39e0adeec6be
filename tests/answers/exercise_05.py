"""Answers to the tasks of exercise 05, right and wrong, as people give them."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from sqlalchemy import Float, cast, create_engine, func, select, text
from sqlalchemy.ext.asyncio import create_async_engine

from answers import Answers
from workshop.database import database_url
from workshop.shop import Sale

# The reports

REPORT = """
    SELECT count(*) AS lines, sum(sales_value) AS revenue
    FROM sales, pg_sleep(0.1) WHERE sku = :sku
"""


def report_of(engine, sku):
    with engine.connect() as connection:
        return connection.execute(text(REPORT), {"sku": sku}).one()


async def with_the_driver_that_awaits(old, shop, sku):
    async with shop.connect() as connection:
        return (await connection.execute(text(REPORT), {"sku": sku})).one()


async def in_a_thread(old, shop, sku):
    return await asyncio.to_thread(report_of, old, sku)


async def through_run_sync(old, shop, sku):
    def made_with(connection):
        return connection.execute(text(REPORT), {"sku": sku}).one()

    async with shop.connect() as connection:
        return await connection.run_sync(made_with)


# What a process has once, whoever comes first; each check runs in a process of its own.
shared = {}


async def in_an_executor_of_its_own(old, shop, sku):
    if not shared:
        shared["executor"] = ThreadPoolExecutor(4)
    loop = asyncio.get_running_loop()
    row = await loop.run_in_executor(shared["executor"], partial(report_of, old, sku))
    return row.lines, row.revenue


async def in_a_task_of_its_own(old, shop, sku):
    async def made():
        await asyncio.sleep(0)
        return report_of(old, sku)

    return await asyncio.create_task(made())


async def with_more_connections(old, shop, sku):
    if not shared:
        url = database_url().replace("asyncpg", "psycopg")
        shared["engine"] = create_engine(url, pool_size=50, max_overflow=0)
    return report_of(shared["engine"], sku)


async def one_by_one_on_the_loop(old, shop, sku):
    async with shared.setdefault("lock", asyncio.Lock()):
        await asyncio.sleep(0)
        return report_of(old, sku)


async def run_sync_with_the_old_engine(old, shop, sku):
    async with shop.connect() as connection:
        return await connection.run_sync(lambda _: report_of(old, sku))


async def with_the_sync_engine_of_the_shop(old, shop, sku):
    return await asyncio.to_thread(report_of, shop.sync_engine, sku)


async def only_the_query_in_a_thread(old, shop, sku):
    with old.connect() as connection:
        result = await asyncio.to_thread(connection.execute, text(REPORT), {"sku": sku})
        return result.one()


async def called_instead_of_passed(old, shop, sku):
    return await asyncio.to_thread(report_of(old, sku))


async def result_of_a_thread(old, shop, sku):
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(report_of, old, sku).result()


async def a_thread_for_each_report(old, shop, sku):
    loop = asyncio.get_running_loop()
    made = loop.create_future()

    def make():
        row = report_of(old, sku)
        loop.call_soon_threadsafe(made.set_result, row)

    threading.Thread(target=make).start()
    return await made


async def one_thread_for_all_reports(old, shop, sku):
    if not shared:
        shared["executor"] = ThreadPoolExecutor(1)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(shared["executor"], report_of, old, sku)


async def no_longer_than_a_moment(old, shop, sku):
    try:
        return await asyncio.wait_for(asyncio.to_thread(report_of, old, sku), 0.05)
    except TimeoutError:
        return None


async def an_engine_for_each_report(old, shop, sku):
    engine = create_async_engine(database_url())
    row = await with_the_driver_that_awaits(old, engine, sku)
    await engine.dispose()
    return row


async def from_a_larger_pool(old, shop, sku):
    shop.pool._max_overflow = 100
    return await with_the_driver_that_awaits(old, shop, sku)


async def what_was_said_before(old, shop, sku):
    if sku not in shared:
        shared[sku] = await with_the_driver_that_awaits(old, shop, sku)
    return shared[sku]


async def one_connection_for_all_reports(old, shop, sku):
    if not shared:
        shared["connection"] = asyncio.ensure_future(shop.connect().start())
    connection = await shared["connection"]
    return (await connection.execute(text(REPORT), {"sku": sku})).one()


async def never_close_the_connection(old, shop, sku):
    if not shared:
        shared["connection"] = await shop.connect()
    return await with_the_driver_that_awaits(old, shop, sku)


# The sums


def lines_of(first, last):
    return select(Sale).where(Sale.id.between(first, last))


def in_batches_of(number, first, last):
    return lines_of(first, last).execution_options(yield_per=number)


def add(sums, sales):
    for sale in sales:
        sums[sale.store_id] = sums.get(sale.store_id, 0) + sale.sales_value


async def by_the_database(Session, first, last):
    sums = select(Sale.store_id, func.sum(Sale.sales_value)).group_by(Sale.store_id)
    async with Session() as session:
        rows = await session.execute(sums.where(Sale.id.between(first, last)))
        return dict(row._tuple() for row in rows)


async def objects_in_batches(Session, first, last):
    sums = {}
    async with Session() as session:
        sales = await session.stream_scalars(in_batches_of(1_000, first, last))
        async for batch in sales.partitions():
            add(sums, batch)
    return sums


async def columns_streamed(Session, first, last):
    sums = Counter()
    columns = in_batches_of(500, first, last).with_only_columns(Sale.store_id, Sale.sales_value)
    async with Session() as session:
        async for store, value in await session.stream(columns):
            sums[store] += value
    return sums


async def pages_by_key(Session, first, last):
    sums, page, done = {}, lines_of(first, last).order_by(Sale.id).limit(1_000), 0
    async with Session() as session:
        while sales := (await session.scalars(page.where(Sale.id > done))).all():
            add(sums, sales)
            done = sales[-1].id
    return sums


async def with_pauses_in_the_sum(Session, first, last):
    sums = {}
    async with Session() as session:
        sales = (await session.scalars(lines_of(first, last))).all()
        for start in range(0, len(sales), 500):
            add(sums, sales[start : start + 500])
            await asyncio.sleep(0)
    return sums


async def streamed_without_batches(Session, first, last):
    sums = {}
    async with Session() as session:
        async for sale in await session.stream_scalars(lines_of(first, last)):
            add(sums, [sale])
    return sums


async def in_one_batch(Session, first, last):
    sums = {}
    async with Session() as session:
        sales = await session.stream_scalars(in_batches_of(100_000, first, last))
        async for batch in sales.partitions():
            add(sums, batch)
    return sums


async def line_by_line(Session, first, last):
    sums = {}
    async with Session() as session:
        async for sale in await session.stream_scalars(in_batches_of(1, first, last)):
            add(sums, [sale])
    return sums


async def with_a_session_in_a_thread(Session, first, last):
    sums = {}
    async with Session() as session:
        load = session.sync_session.scalars
        await asyncio.to_thread(lambda: add(sums, load(lines_of(first, last))))
    return sums


async def the_first_thousand(Session, first, last):
    sums = {}
    async with Session() as session:
        add(sums, await session.scalars(lines_of(first, last).limit(1_000)))
    return sums


async def sums_of_floats(Session, first, last):
    sums = select(Sale.store_id, func.sum(cast(Sale.sales_value, Float))).group_by(Sale.store_id)
    async with Session() as session:
        rows = await session.execute(sums.where(Sale.id.between(first, last)))
        return dict(row._tuple() for row in rows)


ANSWERS = {
    "free_the_loop": Answers(
        right=[
            with_the_driver_that_awaits,
            in_a_thread,
            through_run_sync,
            in_an_executor_of_its_own,
        ],
        wrong=[
            (in_a_task_of_its_own, "async-def-is-enough"),
            (with_more_connections, "more-connections-for-one-thread"),
            (one_by_one_on_the_loop, "blocks-one-at-a-time"),
            (run_sync_with_the_old_engine, "run-sync-is-no-thread"),
            (with_the_sync_engine_of_the_shop, "sync-face-of-an-async-engine"),
            (only_the_query_in_a_thread, "pool-wait-without-await"),
            (called_instead_of_passed, "calls-instead-of-passing"),
            (result_of_a_thread, "waits-for-the-thread"),
            (a_thread_for_each_report, "thread-for-each-call"),
            (one_thread_for_all_reports, "one-at-a-time-in-the-background"),
            (no_longer_than_a_moment, "limit-ends-the-thread"),
            (an_engine_for_each_report, "engine-per-call"),
            (from_a_larger_pool, "changes-the-pool"),
            (what_was_said_before, "success-without-work"),
            (one_connection_for_all_reports, "one-session-many-tasks"),
            (never_close_the_connection, "leaves-it-checked-out"),
        ],
    ),
    "sum_without_a_stall": Answers(
        right=[
            by_the_database,
            objects_in_batches,
            columns_streamed,
            pages_by_key,
        ],
        wrong=[
            (with_pauses_in_the_sum, "the-driver-awaits-so-all-is-well"),
            (streamed_without_batches, "stream-without-yield-per"),
            (in_one_batch, "one-huge-batch"),
            (line_by_line, "batch-of-one"),
            (with_a_session_in_a_thread, "sync-face-of-an-async-engine"),
            (the_first_thousand, "part-of-the-rows"),
            (sums_of_floats, "floats-lose-cents"),
        ],
    ),
}
