"""Answers to the tasks of exercise 05, right and wrong, as people give them."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

from sqlalchemy import Float, cast, create_engine, func, select, text
from sqlalchemy.engine import make_url
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


SHARED_EXECUTOR = ThreadPoolExecutor(8)


async def in_an_executor_of_the_notebook(old, shop, sku):
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(SHARED_EXECUTOR, report_of, old, sku)


@functools.cache
def executor_made_once():
    return ThreadPoolExecutor(8)


async def with_a_future_of_the_executor(old, shop, sku):
    return await asyncio.wrap_future(executor_made_once().submit(report_of, old, sku))


async def on_the_raw_connection_of_the_pool(old, shop, sku):
    async with shop.connect() as connection:
        raw = (await connection.get_raw_connection()).driver_connection
        return await raw.fetchrow(REPORT.replace(":sku", "$1"), sku)


async def in_another_process(old, shop, sku):
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor() as executor:
        return await loop.run_in_executor(executor, report_of, old, sku)


async def is_it_there_yet(old, shop, sku):
    made = asyncio.ensure_future(in_a_thread(old, shop, sku))
    while not made.done():
        await asyncio.sleep(0)
    return made.result()


async def on_another_loop(old, shop, sku):
    return await asyncio.to_thread(asyncio.run, with_the_driver_that_awaits(old, shop, sku))


async def past_the_engines(old, shop, sku):
    asyncpg = __import__("asyncpg")
    url = make_url(database_url()).set(drivername="postgresql")
    connection = await asyncpg.connect(url.render_as_string(hide_password=False))
    row = await connection.fetchrow(REPORT.replace(":sku", "$1"), sku)
    await connection.close()
    return row


async def one_engine_more(old, shop, sku):
    if not shared:
        shared["engine"] = create_async_engine(database_url(), pool_size=10)
    return await with_the_driver_that_awaits(old, shared["engine"], sku)


async def with_a_new_pool_afterwards(old, shop, sku):
    row = await with_the_driver_that_awaits(old, shop, sku)
    await shop.dispose()
    return row


async def coroutine_of_a_thread(old, shop, sku):
    return asyncio.to_thread(report_of, old, sku)


async def as_a_dictionary(old, shop, sku):
    row = await with_the_driver_that_awaits(old, shop, sku)
    return {"lines": row.lines, "revenue": row.revenue}


async def revenue_first(old, shop, sku):
    lines, revenue = await with_the_driver_that_awaits(old, shop, sku)
    return revenue, lines


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


async def columns_at_once(Session, first, last):
    columns = lines_of(first, last).with_only_columns(Sale.store_id, Sale.sales_value)
    sums = Counter()
    async with Session() as session:
        for store, value in (await session.execute(columns)).all():
            sums[store] += value
    return sums


async def five_ranges_at_a_time(Session, first, last):
    sums, door = {}, asyncio.Semaphore(5)

    async def part(start):
        async with door, Session() as session:
            add(sums, (await session.scalars(lines_of(start, min(start + 999, last)))).all())

    async with asyncio.TaskGroup() as group:
        for start in range(first, last + 1, 1_000):
            group.create_task(part(start))
    return sums


async def by_the_driver_and_the_database(Session, first, last):
    sums = (
        "SELECT store_id, sum(sales_value) FROM sales WHERE id BETWEEN $1 AND $2 GROUP BY store_id"
    )
    async with Session() as session:
        raw = (await (await session.connection()).get_raw_connection()).driver_connection
        return dict(await raw.fetch(sums, first, last))


async def three_ranges(Session, first, last):
    sums, step = {}, (last - first) // 3 + 1
    async with Session() as session:
        for start in range(first, last + 1, step):
            end = min(start + step - 1, last)
            add(sums, (await session.scalars(lines_of(start, end))).all())
    return sums


async def sorted_columns(Session, first, last):
    columns = lines_of(first, last).with_only_columns(Sale.store_id, Sale.sales_value)
    sums = Counter()
    async with Session() as session:
        for store, value in sorted((await session.execute(columns)).all()):
            sums[store] += value
    return sums


async def scalars_with_yield_per(Session, first, last):
    sums = {}
    async with Session() as session:
        for sale in await session.scalars(in_batches_of(1_000, first, last)):
            add(sums, [sale])
    return sums


async def batches_in_a_list(Session, first, last):
    sums, sales = {}, []
    async with Session() as session:
        stream = await session.stream_scalars(in_batches_of(1_000, first, last))
        async for batch in stream.partitions():
            sales += batch
    add(sums, sales)
    return sums


async def all_of_the_stream(Session, first, last):
    sums = {}
    async with Session() as session:
        stream = await session.stream_scalars(in_batches_of(1_000, first, last))
        add(sums, await stream.all())
    return sums


async def batches_of_five_thousand(Session, first, last):
    sums = {}
    async with Session() as session:
        stream = await session.stream_scalars(in_batches_of(5_000, first, last))
        async for batch in stream.partitions():
            add(sums, batch)
    return sums


async def a_statement_for_each_line(Session, first, last):
    sums = {}
    async with Session() as session:
        for number in range(first, last + 1):
            if sale := await session.get(Sale, number):
                add(sums, [sale])
    return sums


async def pages_in_no_order(Session, first, last):
    sums, page, offset = {}, lines_of(first, last).limit(1_000), 0
    async with Session() as session:
        while sales := (await session.scalars(page.offset(offset))).all():
            add(sums, sales)
            offset += 1_000
    return sums


async def on_from_the_last_in_no_order(Session, first, last):
    sums = {}
    async with Session() as session:
        while sales := (await session.scalars(lines_of(first, last).limit(1_000))).all():
            add(sums, sales)
            first = sales[-1].id + 1
    return sums


async def without_the_ends(Session, first, last):
    return await by_the_database(Session, first + 1, last - 1)


async def printed(Session, first, last):
    print(await by_the_database(Session, first, last))


async def commit_after_each_batch(Session, first, last):
    sums = {}
    async with Session() as session:
        stream = await session.stream_scalars(in_batches_of(1_000, first, last))
        async for batch in stream.partitions():
            add(sums, batch)
            await session.commit()
    return sums


async def forget_after_each_batch(Session, first, last):
    sums = {}
    async with Session() as session:
        stream = await session.stream_scalars(in_batches_of(1_000, first, last))
        async for batch in stream.partitions():
            add(sums, batch)
            session.expunge_all()
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
            in_an_executor_of_the_notebook,
            with_a_future_of_the_executor,
            on_the_raw_connection_of_the_pool,
        ],
        wrong=[
            (in_another_process, "process-takes-no-engine"),
            (is_it_there_yet, "asks-again-and-again"),
            (on_another_loop, "another-loop"),
            (past_the_engines, "past-the-pools"),
            (one_engine_more, "another-pool"),
            (with_a_new_pool_afterwards, "not-what-was-asked"),
            (coroutine_of_a_thread, "never-awaited"),
            (as_a_dictionary, "not-what-was-asked"),
            (revenue_first, "not-what-was-asked"),
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
            objects_in_batches,
            columns_streamed,
            five_ranges_at_a_time,
            pages_by_key,
        ],
        wrong=[
            (by_the_database, "added-by-the-database"),
            (by_the_driver_and_the_database, "added-by-the-database"),
            (columns_at_once, "the-driver-awaits-so-all-is-well"),
            (with_pauses_in_the_sum, "the-driver-awaits-so-all-is-well"),
            (streamed_without_batches, "stream-without-yield-per"),
            (in_one_batch, "one-huge-batch"),
            (line_by_line, "batch-of-one"),
            (with_a_session_in_a_thread, "sync-face-of-an-async-engine"),
            (three_ranges, "the-driver-awaits-so-all-is-well"),
            (sorted_columns, "the-driver-awaits-so-all-is-well"),
            (scalars_with_yield_per, "yield-per-without-a-stream"),
            (batches_in_a_list, "collects-the-batches"),
            (all_of_the_stream, "collects-the-batches"),
            (batches_of_five_thousand, "one-huge-batch"),
            (a_statement_for_each_line, "batch-of-one"),
            (pages_in_no_order, "no-order-by"),
            (on_from_the_last_in_no_order, "no-order-by"),
            (without_the_ends, "not-what-was-asked"),
            (printed, "not-what-was-asked"),
            (commit_after_each_batch, "stream-without-its-transaction"),
            (forget_after_each_batch, "expunge-all-in-a-stream"),
            (the_first_thousand, "not-what-was-asked"),
            (sums_of_floats, "floats-lose-cents"),
        ],
    ),
}
