"""Answers to the tasks of exercise 04, right and wrong, as people give them."""

from __future__ import annotations

import asyncio
import csv
import gc
from operator import attrgetter
from zlib import crc32

import asyncpg
from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from answers import Answers
from workshop.database import database_url
from workshop.shop import ExportJob, Order, Sale

as_line = attrgetter(*Sale.__table__.columns.keys())


# The export


def sales_of(first, last):
    return select(Sale).where(Sale.id.between(first, last)).order_by(Sale.id)


def columns_of(first, last):
    return select(*Sale.__table__.columns).where(Sale.id.between(first, last)).order_by(Sale.id)


async def objects_in_batches(Session, file, first, last):
    async with Session() as session:
        sales = await session.stream_scalars(
            sales_of(first, last).execution_options(yield_per=1_000)
        )
        async for batch in sales.partitions():
            csv.writer(file).writerows(map(as_line, batch))


async def columns_streamed(Session, file, first, last):
    async with Session() as session:
        rows = await session.stream(columns_of(first, last).execution_options(yield_per=1_000))
        async for batch in rows.partitions():
            csv.writer(file, lineterminator="\n").writerows(batch)


async def pages_by_key(Session, file, first, last):
    while True:
        async with Session() as session:
            rows = (await session.execute(columns_of(first, last).limit(2_000))).all()
        if not rows:
            return
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
        first = rows[-1].id + 1


async def copied(Session, file, first, last):
    query = f"SELECT * FROM sales WHERE id BETWEEN {first} AND {last} ORDER BY id"
    async with Session() as session:
        connection = await (await session.connection()).get_raw_connection()
        await connection.driver_connection.copy_from_query(query, output=file.buffer, format="csv")


async def rows_by_a_cursor(Session, file, first, last):
    query = "SELECT * FROM sales WHERE id BETWEEN $1 AND $2 ORDER BY id"
    async with Session() as session:
        raw = (await (await session.connection()).get_raw_connection()).driver_connection
        async with raw.transaction():
            async for row in raw.cursor(query, first, last, prefetch=1_000):
                csv.writer(file).writerow(row.values())


async def ranges_of_numbers(Session, file, first, last):
    async with Session() as session:
        for start in range(first, last + 1, 900):
            sales = await session.scalars(sales_of(start, min(start + 899, last)))
            csv.writer(file).writerows(map(as_line, sales))


async def scalars_in_batches(Session, file, first, last):
    async with Session() as session:
        sales = await session.scalars(sales_of(first, last).execution_options(yield_per=1_000))
        for batch in sales.partitions():
            csv.writer(file).writerows(map(as_line, batch))


async def streamed_in_one_piece(Session, file, first, last):
    async with Session() as session:
        async for sale in await session.stream_scalars(sales_of(first, last)):
            csv.writer(file).writerow(as_line(sale))


async def in_no_order(Session, file, first, last):
    rows = columns_of(first, last).order_by(None).execution_options(yield_per=1_000)
    async with Session() as session:
        async for batch in (await session.stream(rows)).partitions():
            csv.writer(file).writerows(batch)


async def in_the_order_of_time(Session, file, first, last):
    rows = columns_of(first, last).order_by(None).order_by(Sale.sold_at)
    async with Session() as session:
        async for batch in (await session.stream(rows)).partitions(1_000):
            csv.writer(file).writerows(batch)


async def pages_in_no_order(Session, file, first, last):
    offset, rows = 0, columns_of(first, last).order_by(None).limit(2_000)
    async with Session() as session:
        while page := (await session.execute(rows.offset(offset))).all():
            csv.writer(file).writerows(page)
            offset += 2_000


async def behind_the_first(Session, file, first, last):
    rows, done = columns_of(first, last).limit(2_000), first
    async with Session() as session:
        while page := (await session.execute(rows.where(Sale.id > done))).all():
            csv.writer(file).writerows(page)
            done = page[-1].id


async def to_the_end_of_the_page(Session, file, first, last):
    async with Session() as session:
        for start in range(first, last + 1, 1_000):
            rows = await session.execute(columns_of(start, start + 999))
            csv.writer(file).writerows(rows)


async def full_pages_only(Session, file, first, last):
    async with Session() as session:
        while (
            len(rows := (await session.execute(columns_of(first, last).limit(1_000))).all())
            == 1_000
        ):
            csv.writer(file).writerows(rows)
            first = rows[-1].id + 1


async def closed_at_the_end(Session, file, first, last):
    with file:
        await columns_streamed(Session, file, first, last)


async def never_close_the_reader(Session, file, first, last):
    rows = await Session().stream(columns_of(first, last).execution_options(yield_per=1_000))
    async for batch in rows.partitions():
        csv.writer(file).writerows(batch)


async def all_of_them(Session, file, first, last):
    async with Session() as session:
        for sale in (await session.scalars(sales_of(first, last))).all():
            file.write(",".join(map(str, as_line(sale))) + "\n")


async def collect_in_a_loop(Session, file, first, last):
    async with Session() as session:
        sales = await session.stream_scalars(
            sales_of(first, last).execution_options(yield_per=1_000)
        )
        async for batch in sales.partitions():
            csv.writer(file).writerows(map(as_line, batch))
            gc.collect()


async def the_fix_of_the_article(Session, file, first, last):
    async with Session() as session:
        sales = await session.stream_scalars(
            sales_of(first, last).execution_options(yield_per=1_000)
        )
        async for batch in sales.partitions():
            csv.writer(file).writerows(map(as_line, batch))
            session.expunge_all()


async def all_columns(Session, file, first, last):
    async with Session() as session:
        rows = (await session.execute(columns_of(first, last))).all()
    csv.writer(file).writerows(rows)


async def first_thousand(Session, file, first, last):
    async with Session() as session:
        rows = await session.execute(columns_of(first, last).limit(1_000))
        csv.writer(file).writerows(rows)


async def five_columns(Session, file, first, last):
    five = select(Sale.id, Sale.basket_id, Sale.sku, Sale.quantity, Sale.sales_value)
    wanted = five.where(Sale.id.between(first, last)).order_by(Sale.id)
    async with Session() as session:
        rows = await session.stream(wanted.execution_options(yield_per=1_000))
        async for batch in rows.partitions():
            csv.writer(file).writerows(batch)


async def commit_after_each_batch(Session, file, first, last):
    async with Session() as session:
        sales = await session.stream_scalars(
            sales_of(first, last).execution_options(yield_per=1_000)
        )
        async for batch in sales.partitions():
            csv.writer(file).writerows(map(as_line, batch))
            await session.commit()


# The jobs


def lines_of(number):
    return crc32(str(number).encode()) % 10_000


def queued_of(kind):
    ours = select(ExportJob).where(ExportJob.kind == kind, ExportJob.status == "queued")
    return ours.order_by(ExportJob.id)


def change(jobs):
    for job in jobs:
        job.status = "done"
        job.rows_done = lines_of(job.id)


async def commit_each_page(Session, kind):
    async with Session() as session:
        while jobs := (await session.scalars(queued_of(kind).limit(500))).all():
            change(jobs)
            await session.commit()


async def autoflush_each_page(Session, kind):
    async with Session.begin() as session:
        while jobs := (await session.scalars(queued_of(kind).limit(500))).all():
            change(jobs)


async def flush_then_expunge(Session, kind):
    async with Session() as session:
        while jobs := (await session.scalars(queued_of(kind).limit(300))).all():
            change(jobs)
            await session.flush()
            for job in jobs:
                session.expunge(job)
        await session.commit()


async def numbers_and_values(Session, kind):
    async with Session.begin() as session:
        numbers = (await session.scalars(queued_of(kind).with_only_columns(ExportJob.id))).all()
        values = [
            {"id": number, "status": "done", "rows_done": lines_of(number)} for number in numbers
        ]
        await session.execute(update(ExportJob), values)


async def changed_apart_and_added(Session, kind):
    while True:
        async with Session() as session:
            jobs = (await session.scalars(queued_of(kind).limit(200))).all()
        if not jobs:
            return
        change(jobs)
        async with Session.begin() as session:
            session.add_all(jobs)


async def changed_when_the_session_is_closed(Session, kind):
    last = 0
    while True:
        async with Session() as session:
            page = queued_of(kind).where(ExportJob.id > last).limit(400)
            jobs = (await session.scalars(page)).all()
        if not jobs:
            return
        change(jobs)
        async with Session() as session:
            await session.commit()
        last = jobs[-1].id


async def scalars_of_the_jobs_in_batches(Session, kind):
    async with Session() as session:
        for job in await session.scalars(queued_of(kind).execution_options(yield_per=400)):
            change([job])
        await session.commit()


async def commit_each_job_of_a_stream(Session, kind):
    async with Session() as session:
        jobs = await session.stream_scalars(queued_of(kind).execution_options(yield_per=400))
        async for job in jobs:
            change([job])
            await session.commit()


async def finished_instead_of_done(Session, kind):
    async with Session() as session:
        while jobs := (await session.scalars(queued_of(kind).limit(400))).all():
            change(jobs)
            for job in jobs:
                job.status = "finished"
            await session.commit()


async def numbered_instead_of_looked_up(Session, kind):
    async with Session() as session:
        while jobs := (await session.scalars(queued_of(kind).limit(400))).all():
            for number, job in enumerate(jobs):
                job.status, job.rows_done = "done", number
            await session.commit()


async def commit_at_the_end(Session, kind):
    async with Session() as session:
        jobs = (await session.scalars(queued_of(kind))).all()
        change(jobs)
        await session.commit()


async def collect_for_each_page(Session, kind):
    async with Session() as session:
        while jobs := (await session.scalars(queued_of(kind).limit(100))).all():
            change(jobs)
            await session.commit()
            gc.collect()


async def flush_and_keep_the_list(Session, kind):
    async with Session() as session:
        jobs = (await session.scalars(queued_of(kind))).all()
        for number in range(0, len(jobs), 500):
            change(jobs[number : number + 500])
            await session.flush()
        await session.commit()


async def expunge_all_per_page(Session, kind):
    last = 0
    async with Session() as session:
        while True:
            page = queued_of(kind).where(ExportJob.id > last).limit(500)
            if not (jobs := (await session.scalars(page)).all()):
                break
            change(jobs)
            last = jobs[-1].id
            session.expunge_all()
        await session.commit()


async def expunge_all_in_a_stream(Session, kind):
    async with Session() as session:
        jobs = await session.stream_scalars(queued_of(kind).execution_options(yield_per=500))
        async for batch in jobs.partitions():
            change(batch)
            await session.flush()
            session.expunge_all()
        await session.commit()


async def expire_all_per_page(Session, kind):
    last = 0
    async with Session() as session:
        while True:
            page = queued_of(kind).where(ExportJob.id > last).limit(500)
            if not (jobs := (await session.scalars(page)).all()):
                break
            last = jobs[-1].id
            change(jobs)
            session.expire_all()
        await session.commit()


async def flush_without_commit(Session, kind):
    async with Session() as session:
        while jobs := (await session.scalars(queued_of(kind).limit(500))).all():
            change(jobs)
            await session.flush()


async def change_nothing(Session, kind):
    pass


async def every_job_of_the_kind(Session, kind):
    ours, last = select(ExportJob).where(ExportJob.kind == kind).order_by(ExportJob.id), 0
    async with Session() as session:
        while jobs := (await session.scalars(ours.where(ExportJob.id > last).limit(500))).all():
            change(jobs)
            last = jobs[-1].id
            await session.commit()


async def offset_over_what_goes_away(Session, kind):
    offset = 0
    async with Session() as session:
        while jobs := (await session.scalars(queued_of(kind).limit(500).offset(offset))).all():
            change(jobs)
            await session.commit()
            offset += 500


async def one_statement_for_all(Session, kind):
    ours = update(ExportJob).where(ExportJob.kind == kind, ExportJob.status == "queued")
    async with Session.begin() as session:
        await session.execute(ours.values(status="done"))


async def commit_in_the_stream(Session, kind):
    async with Session() as session:
        jobs = await session.stream_scalars(queued_of(kind).execution_options(yield_per=400))
        async for batch in jobs.partitions():
            change(batch)
            await session.commit()


kept = []


async def never_close_the_session(Session, kind):
    await commit_each_page(Session, kind)
    session = Session()
    kept.append(session)
    await session.scalar(select(func.count()).select_from(ExportJob))


# The deliveries


def orders_of(first, last):
    return select(Order).where(Order.household_id.between(first, last)).order_by(Order.id)


async def page_behind(Session, orders, last):
    async with Session() as session:
        return (await session.scalars(orders.where(Order.id > last).limit(500))).all()


async def session_for_each_batch(Session, first, last, deliver):
    done = 0
    while batch := await page_behind(Session, orders_of(first, last), done):
        await deliver(batch)
        done = batch[-1].id


async def one_session_that_commits(Session, first, last, deliver):
    done, numbers = 0, orders_of(first, last).with_only_columns(Order.id)
    async with Session() as session:
        while True:
            batch = (await session.scalars(numbers.where(Order.id > done).limit(400))).all()
            await session.commit()
            if not batch:
                return
            await deliver(batch)
            done = batch[-1]


async def numbers_first(Session, first, last, deliver):
    """All numbers at the beginning, and each batch read when its turn comes."""
    async with Session() as session:
        numbers = (await session.scalars(orders_of(first, last).with_only_columns(Order.id))).all()
    for start in range(0, len(numbers), 500):
        async with Session() as session:
            page = select(Order).where(Order.id.in_(numbers[start : start + 500]))
            batch = (await session.scalars(page)).all()
        await deliver(batch)


async def one_page_ahead(Session, first, last, deliver):
    orders = orders_of(first, last)
    batch = await page_behind(Session, orders, 0)
    while batch:
        following = await page_behind(Session, orders, batch[-1].id)
        await deliver(batch)
        batch = following


how_far = {"done": 0}


async def from_where_it_was(Session, first, last, deliver):
    """A night that goes on where the last one ended."""
    while batch := await page_behind(Session, orders_of(first, last), how_far["done"]):
        await deliver(batch)
        how_far["done"] = batch[-1].id


async def note_in_the_database(Session, first, last, deliver):
    orders = orders_of(first, last).where(Order.status != "delivered")
    while batch := await page_behind(Session, orders, 0):
        await deliver(batch)
        async with Session.begin() as session:
            delivered = update(Order).where(Order.id.in_([order.id for order in batch]))
            await session.execute(delivered.values(status="delivered"))


async def scalars_in_batches_of_orders(Session, first, last, deliver):
    async with Session() as session:
        wanted = orders_of(first, last).execution_options(yield_per=500)
        found = await session.scalars(wanted)
    for batch in found.partitions():
        await deliver(batch)


async def deliver_once_more(Session, first, last, deliver):
    done = 0
    while batch := await page_behind(Session, orders_of(first, last), done):
        try:
            await deliver(batch)
        except ConnectionError:
            await deliver(batch)
        done = batch[-1].id


async def all_batches_at_once(Session, first, last, deliver):
    done, deliveries = 0, []
    while batch := await page_behind(Session, orders_of(first, last), done):
        deliveries.append(deliver(batch))
        done = batch[-1].id
    await asyncio.gather(*deliveries)


async def orders_in_no_order(Session, first, last, deliver):
    done, orders = 0, orders_of(first, last).order_by(None)
    while batch := await page_behind(Session, orders, done):
        await deliver(batch)
        done = batch[-1].id


async def without_the_last_household(Session, first, last, deliver):
    await session_for_each_batch(Session, first, last - 1, deliver)


async def only_what_is_new(Session, first, last, deliver):
    done, orders = 0, orders_of(first, last).where(Order.status == "new")
    while batch := await page_behind(Session, orders, done):
        await deliver(batch)
        done = batch[-1].id


async def one_order_at_a_time(Session, first, last, deliver):
    done = 0
    while batch := await page_behind(Session, orders_of(first, last), done):
        for order in batch:
            await deliver([order])
        done = batch[-1].id


async def delete_what_was_delivered(Session, first, last, deliver):
    while batch := await page_behind(Session, orders_of(first, last), 0):
        await deliver(batch)
        async with Session.begin() as session:
            ours = delete(Order).where(Order.id.in_([order.id for order in batch]))
            await session.execute(ours)


async def behind_the_next(Session, first, last, deliver):
    done = 0
    while batch := await page_behind(Session, orders_of(first, last), done):
        await deliver(batch)
        done = batch[-1].id + 1


async def by_the_driver_alone(Session, first, last, deliver):
    url = Session.kw["bind"].url.set(drivername="postgresql")
    connection = await asyncpg.connect(url.render_as_string(hide_password=False))
    query = "SELECT id FROM orders WHERE household_id BETWEEN $1 AND $2 AND id > $3 ORDER BY id LIMIT 500"
    done = 0
    while batch := [row["id"] for row in await connection.fetch(query, first, last, done)]:
        await deliver(batch)
        done = batch[-1]
    await connection.close()


async def collect_for_each_batch(Session, first, last, deliver):
    done = 0
    while batch := await page_behind(Session, orders_of(first, last), done):
        await deliver(batch)
        done = batch[-1].id
        del batch
        gc.collect()


async def with_yield_per(Session, first, last, deliver):
    async with Session() as session:
        wanted = orders_of(first, last).execution_options(yield_per=250)
        async for batch in (await session.stream_scalars(wanted)).partitions():
            await deliver([order.id for order in batch])


async def everything_first(Session, first, last, deliver):
    async with Session() as session:
        orders = (await session.scalars(orders_of(first, last))).all()
    for start in range(0, len(orders), 500):
        await deliver(orders[start : start + 500])


async def everything_at_once(Session, first, last, deliver):
    async with Session() as session:
        orders = (await session.scalars(orders_of(first, last))).all()
    await deliver(orders)


async def commit_within_the_stream(Session, first, last, deliver):
    async with Session() as session:
        numbers = orders_of(first, last).with_only_columns(Order.id)
        stream = await session.stream_scalars(numbers.execution_options(yield_per=500))
        async for batch in stream.partitions():
            await session.commit()
            await deliver(batch)


async def ask_once_more_within_the_stream(Session, first, last, deliver):
    """The connection has another transaction by then, and so the driver raises something else."""
    async with Session() as session:
        numbers = orders_of(first, last).with_only_columns(Order.id)
        stream = await session.stream_scalars(numbers.execution_options(yield_per=500))
        async for batch in stream.partitions():
            await session.commit()
            await deliver(batch)
            await session.get(Order, batch[-1])


async def offset_pages(Session, first, last, deliver):
    offset = 0
    while True:
        async with Session() as session:
            page = orders_of(first, last).limit(500).offset(offset)
            batch = (await session.scalars(page)).all()
        if not batch:
            return
        await deliver(batch)
        offset += 500


async def key_that_is_shared(Session, first, last, deliver):
    """Not to lose those of the same household they are read again."""
    household, done = 0, False
    while not done:
        async with Session() as session:
            page = select(Order).where(
                Order.household_id.between(first, last), Order.household_id >= household
            )
            batch = (await session.scalars(page.order_by(Order.household_id).limit(500))).all()
        await deliver(batch)
        done = len(batch) < 500
        household = batch[-1].household_id


async def only_the_first(Session, first, last, deliver):
    await deliver(await page_behind(Session, orders_of(first, last), 0))


async def of_all_households(Session, first, last, deliver):
    done, orders = 0, select(Order).where(Order.household_id >= first).order_by(Order.id)
    while batch := await page_behind(Session, orders, done):
        await deliver(batch)
        done = batch[-1].id


async def expired_by_the_commit(Session, first, last, deliver):
    done = 0
    async with Session() as session:
        while True:
            page = orders_of(first, last).where(Order.id > done).limit(500)
            if not (batch := (await session.scalars(page)).all()):
                return
            done = batch[-1].id
            await session.commit()
            await deliver(batch)


async def log_and_go_on(Session, first, last, deliver):
    done = 0
    while batch := await page_behind(Session, orders_of(first, last), done):
        try:
            await deliver(batch)
        except Exception as error:
            print("could not deliver", error)
        done = batch[-1].id


async def from_an_engine_of_its_own(Session, first, last, deliver):
    engine = create_async_engine(database_url(), pool_size=1, max_overflow=0)
    await with_yield_per(async_sessionmaker(engine), first, last, deliver)
    await engine.dispose()


async def from_a_larger_pool(Session, first, last, deliver):
    Session.kw["bind"].pool._max_overflow = 10
    await with_yield_per(Session, first, last, deliver)


async def never_close_the_last(Session, first, last, deliver):
    await session_for_each_batch(Session, first, last, deliver)
    session = AsyncSession(Session.kw["bind"])
    kept.append(session)
    await session.scalar(select(func.count()).select_from(Order))


ANSWERS = {
    "export_under_64_mib": Answers(
        right=[
            objects_in_batches,
            columns_streamed,
            pages_by_key,
            copied,
            rows_by_a_cursor,
            ranges_of_numbers,
        ],
        wrong=[
            (all_of_them, "loads-everything"),
            (collect_in_a_loop, "collects-garbage"),
            (the_fix_of_the_article, "expunge-all-in-a-stream"),
            (all_columns, "keeps-everything-in-another-shape"),
            (first_thousand, "part-of-the-rows"),
            (five_columns, "another-file"),
            (commit_after_each_batch, "stream-without-its-transaction"),
            (scalars_in_batches, "yield-per-without-a-stream"),
            (streamed_in_one_piece, "stream-without-yield-per"),
            (in_no_order, "no-order-by"),
            (in_the_order_of_time, "no-order-by"),
            (pages_in_no_order, "no-order-by"),
            (behind_the_first, "leaves-out-an-end"),
            (to_the_end_of_the_page, "another-file"),
            (full_pages_only, "part-of-the-rows"),
            (closed_at_the_end, "closes-what-it-was-lent"),
            (never_close_the_reader, "leaves-it-checked-out"),
        ],
    ),
    "mark_the_jobs_done": Answers(
        right=[
            commit_each_page,
            autoflush_each_page,
            flush_then_expunge,
            numbers_and_values,
            changed_apart_and_added,
        ],
        wrong=[
            (commit_at_the_end, "one-flush-at-the-end"),
            (collect_for_each_page, "collects-garbage"),
            (flush_and_keep_the_list, "loads-everything"),
            (expunge_all_per_page, "expunge-loses-changes"),
            (expunge_all_in_a_stream, "expunge-all-in-a-stream"),
            (expire_all_per_page, "expire-loses-changes"),
            (flush_without_commit, "forgets-to-commit"),
            (change_nothing, "part-of-the-rows"),
            (every_job_of_the_kind, "more-than-asked"),
            (offset_over_what_goes_away, "pages-shift"),
            (one_statement_for_all, "one-value-for-all"),
            (commit_in_the_stream, "stream-without-its-transaction"),
            (never_close_the_session, "leaves-it-checked-out"),
            (changed_when_the_session_is_closed, "changes-what-is-detached"),
            (scalars_of_the_jobs_in_batches, "yield-per-without-a-stream"),
            (commit_each_job_of_a_stream, "stream-without-its-transaction"),
            (finished_instead_of_done, "not-what-was-asked"),
            (numbered_instead_of_looked_up, "not-what-was-asked"),
        ],
    ),
    "hold_no_connection": Answers(
        right=[
            session_for_each_batch,
            one_session_that_commits,
            numbers_first,
            one_page_ahead,
            from_where_it_was,
            note_in_the_database,
        ],
        wrong=[
            (with_yield_per, "holds-while-it-waits"),
            (everything_first, "read-too-early"),
            (everything_at_once, "larger-batches"),
            (commit_within_the_stream, "stream-without-its-transaction"),
            (ask_once_more_within_the_stream, "stream-without-its-transaction"),
            (offset_pages, "pages-shift"),
            (key_that_is_shared, "delivers-twice"),
            (only_the_first, "part-of-the-rows"),
            (of_all_households, "more-than-asked"),
            (expired_by_the_commit, "expired-objects"),
            (log_and_go_on, "swallows-the-refusal"),
            (from_an_engine_of_its_own, "another-pool"),
            (from_a_larger_pool, "changes-the-pool"),
            (never_close_the_last, "leaves-it-checked-out"),
            (scalars_in_batches_of_orders, "yield-per-without-a-stream"),
            (deliver_once_more, "delivers-twice"),
            (all_batches_at_once, "batches-at-once"),
            (orders_in_no_order, "no-order-by"),
            (without_the_last_household, "leaves-out-an-end"),
            (only_what_is_new, "part-of-the-rows"),
            (one_order_at_a_time, "small-batches"),
            (by_the_driver_alone, "another-pool"),
            (delete_what_was_delivered, "more-than-asked"),
            (behind_the_next, "pages-shift"),
            (collect_for_each_batch, "collects-garbage"),
        ],
    ),
}
