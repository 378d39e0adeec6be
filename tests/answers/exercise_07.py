"""Answers to the tasks of exercise 07, right and wrong, as people give them."""

from __future__ import annotations

import asyncio
import contextlib

import asyncpg
from sqlalchemy import func, select, update

from answers import Answers
from answers.exercise_06 import plain_dsn
from workshop.shop import ExportJob, Sale

# The report


def sold(sku):
    return select(func.sum(Sale.quantity)).where(Sale.sku == sku)


def sold_by_sku(skus):
    both = select(Sale.sku, func.sum(Sale.quantity)).where(Sale.sku.in_(skus))
    return both.group_by(Sale.sku)


async def one_statement(Session, skus):
    async with Session() as session:
        return dict((await session.execute(sold_by_sku(skus))).all())


async def one_after_another(Session, skus):
    async with Session() as session:
        return {sku: await session.scalar(sold(sku)) for sku in skus}


async def three_at_once(Session, skus):
    door = asyncio.Semaphore(3)

    async def sold_of(sku):
        async with door, Session() as session:
            return await session.scalar(sold(sku))

    async with asyncio.TaskGroup() as group:
        tasks = {sku: group.create_task(sold_of(sku)) for sku in skus}
    return {sku: task.result() for sku, task in tasks.items()}


async def gather_in_pairs(Session, skus):
    """Errors wait until all of a pair have ended, and are raised then."""

    async def sold_of(sku):
        async with Session() as session:
            return await session.scalar(sold(sku))

    found = {}
    for start in range(0, len(skus), 2):
        pair = skus[start : start + 2]
        counts = await asyncio.gather(*map(sold_of, pair), return_exceptions=True)
        for sku, count in zip(pair, counts, strict=True):
            if isinstance(count, BaseException):
                raise count
            found[sku] = count
    return found


async def task_group_on_one_session(Session, skus):
    async with Session() as session, asyncio.TaskGroup() as group:
        tasks = {sku: group.create_task(session.scalar(sold(sku))) for sku in skus}
    return {sku: task.result() for sku, task in tasks.items()}


async def gather_three(Session, skus):
    door = asyncio.Semaphore(3)

    async def sold_of(sku):
        async with door, Session() as session:
            return await session.scalar(sold(sku))

    counts = await asyncio.gather(*map(sold_of, skus))
    return dict(zip(skus, counts, strict=True))


async def task_group_of_all(Session, skus):
    async def sold_of(sku):
        async with Session() as session:
            return await session.scalar(sold(sku))

    async with asyncio.TaskGroup() as group:
        tasks = {sku: group.create_task(sold_of(sku)) for sku in skus}
    return {sku: task.result() for sku, task in tasks.items()}


async def children_beside_their_parent(Session, skus):
    async def sold_of(sku):
        async with Session() as session:
            return await session.scalar(sold(sku))

    async with Session() as session:
        await session.scalar(select(1))
        async with asyncio.TaskGroup() as group:
            tasks = {sku: group.create_task(sold_of(sku)) for sku in skus}
    return {sku: task.result() for sku, task in tasks.items()}


async def exceptions_returned(Session, skus):
    door = asyncio.Semaphore(3)

    async def sold_of(sku):
        async with door, Session() as session:
            return await session.scalar(sold(sku))

    counts = await asyncio.gather(*map(sold_of, skus), return_exceptions=True)
    return dict(zip(skus, counts, strict=True))


async def workers_with_a_queue(Session, skus):
    queue, found = asyncio.Queue(), {}
    for sku in skus:
        queue.put_nowait(sku)

    async def work():
        async with Session() as session:
            while not queue.empty():
                sku = queue.get_nowait()
                found[sku] = await session.scalar(sold(sku))
                await session.commit()

    tasks = [asyncio.create_task(work()) for _ in range(3)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return found


async def one_session_behind_a_lock(Session, skus):
    """Used by many tasks, and never by two at the same time."""
    lock = asyncio.Lock()
    async with Session() as session:

        async def sold_of(sku):
            async with lock:
                return await session.scalar(sold(sku))

        async with asyncio.TaskGroup() as group:
            tasks = {sku: group.create_task(sold_of(sku)) for sku in skus}
    return {sku: task.result() for sku, task in tasks.items()}


async def sold_alone(Session, sku):
    async with Session() as session:
        return await session.scalar(sold(sku))


async def gather_by_threes(Session, skus):
    found = {}
    for start in range(0, len(skus), 3):
        some = skus[start : start + 3]
        counts = await asyncio.gather(*(sold_alone(Session, sku) for sku in some))
        found |= zip(some, counts, strict=True)
    return found


async def cancel_and_do_not_wait(Session, skus):
    door = asyncio.Semaphore(3)

    async def sold_of(sku):
        async with door:
            return await sold_alone(Session, sku)

    tasks = [asyncio.create_task(sold_of(sku)) for sku in skus]
    try:
        return dict(zip(skus, await asyncio.gather(*tasks), strict=True))
    except Exception:
        for task in tasks:
            task.cancel()
        raise


async def look_for_the_large(Session, skus):
    if any(sku >= 2**31 for sku in skus):
        raise ValueError("no such number")
    return await one_after_another(Session, skus)


async def leave_out_the_large(Session, skus):
    return await one_after_another(Session, [sku for sku in skus if sku < 2**31])


async def nothing_sold(Session, skus):
    found = {}
    for sku in skus:
        try:
            found[sku] = await sold_alone(Session, sku)
        except Exception:
            found[sku] = 0
    return found


async def close_when_all_is_well(Session, skus):
    session = Session()
    found = {sku: await session.scalar(sold(sku)) for sku in skus}
    await session.close()
    return found


async def report_past_the_pool(Session, skus):
    connection = await asyncpg.connect(plain_dsn(Session))
    try:
        query = "SELECT sum(quantity) FROM sales WHERE sku = $1"
        return {sku: await connection.fetchval(query, sku) for sku in skus}
    finally:
        await connection.close()


async def in_the_order_of_their_end(Session, skus):
    async with asyncio.TaskGroup() as group:
        door, counts = asyncio.Semaphore(3), []

        async def count(sku):
            async with door:
                counts.append(await sold_alone(Session, sku))

        for sku in reversed(skus):
            group.create_task(count(sku))
    return dict(zip(skus, counts, strict=True))


async def tasks_instead_of_numbers(Session, skus):
    async with asyncio.TaskGroup() as group:
        task = group.create_task(one_after_another(Session, skus))
    return dict.fromkeys(skus, task)


async def only_five(Session, skus):
    return await one_after_another(Session, skus[:5])


all_reports = asyncio.Lock()


async def one_report_at_a_time(Session, skus):
    async with all_reports:
        return await one_after_another(Session, skus)


# The workers


def next_of(kind):
    queued = select(ExportJob).where(ExportJob.kind == kind, ExportJob.status == "queued")
    return queued.order_by(ExportJob.id).limit(1).with_for_update(skip_locked=True)


async def let_a_step_pass(Session, kind, export):
    async with Session() as session:
        while job := await session.scalar(next_of(kind)):
            export(job.id)
            job.status = "done"
            await session.commit()
            await asyncio.sleep(0)


async def session_for_each_job(Session, kind, export):
    while True:
        async with Session() as session:
            job = await session.scalar(next_of(kind))
            if job is None:
                return
            export(job.id)
            job.status = "done"
            await session.commit()


async def claim_first(Session, kind, export):
    number = select(ExportJob.id).where(ExportJob.kind == kind, ExportJob.status == "queued")
    number = number.order_by(ExportJob.id).limit(1).with_for_update(skip_locked=True)
    claim = update(ExportJob).where(ExportJob.id == number.scalar_subquery())
    while True:
        async with Session.begin() as session:
            mine = await session.scalar(claim.values(status="running").returning(ExportJob.id))
        if mine is None:
            return
        export(mine)
        async with Session.begin() as session:
            done = update(ExportJob).where(ExportJob.id == mine)
            await session.execute(done.values(status="done"))


async def begin_on_the_long_session(Session, kind, export):
    async with Session() as session:
        while True:
            async with session.begin():
                job = await session.scalar(next_of(kind))
                if job is None:
                    return
                export(job.id)
                job.status = "done"


async def raw_connections_for_jobs(Session, kind, export):
    found = (
        "SELECT id FROM export_jobs WHERE kind = $1 AND status = 'queued'"
        " ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED"
    )
    while True:
        async with Session.kw["bind"].connect() as connection:
            raw = (await connection.get_raw_connection()).driver_connection
            async with raw.transaction():
                number = await raw.fetchval(found, kind)
                if number is None:
                    return
                export(number)
                await raw.execute("UPDATE export_jobs SET status = 'done' WHERE id = $1", number)


async def jobs_of_a_generator(Session, kind, export):
    async def jobs():
        while True:
            async with Session.begin() as session:
                job = await session.scalar(next_of(kind))
                if job is None:
                    return
                yield job

    async with contextlib.aclosing(jobs()) as some:
        async for job in some:
            export(job.id)
            job.status = "done"


async def done_first(Session, kind, export):
    while True:
        async with Session.begin() as session:
            job = await session.scalar(next_of(kind))
            if job is None:
                return
            number, job.status = job.id, "done"
        export(number)


async def wait_for_the_row(Session, kind, export):
    queued = next_of(kind).with_for_update()
    while True:
        async with Session.begin() as session:
            job = await session.scalar(queued)
            if job is None:
                return
            export(job.id)
            job.status = "done"


busy = set()


async def the_first_does_all(Session, kind, export):
    if kind not in busy:
        busy.add(kind)
        await session_for_each_job(Session, kind, export)


doors = {}


async def one_worker_less(Session, kind, export):
    size = Session.kw["bind"].pool.size()
    async with doors.setdefault(size, asyncio.Semaphore(size - 1)), Session() as session:
        while job := await session.scalar(next_of(kind)):
            export(job.id)
            job.status = "done"
            await session.commit()


async def finished_instead_of_done(Session, kind, export):
    while True:
        async with Session.begin() as session:
            job = await session.scalar(next_of(kind))
            if job is None:
                return
            export(job.id)
            job.status = "finished"


async def ten_in_one_commit(Session, kind, export):
    while True:
        async with Session.begin() as session:
            jobs = (await session.scalars(next_of(kind).limit(10))).all()
            if not jobs:
                return
            for job in jobs:
                export(job.id)
                job.status = "done"


async def one_commit_at_the_end(Session, kind, export):
    async with Session() as session:
        while job := await session.scalar(next_of(kind)):
            export(job.id)
            job.status = "done"
        await session.commit()


async def flush_each(Session, kind, export):
    async with Session() as session:
        while job := await session.scalar(next_of(kind)):
            export(job.id)
            job.status = "done"
            await session.flush()


async def pause_a_little(Session, kind, export):
    async with Session() as session:
        while job := await session.scalar(next_of(kind)):
            export(job.id)
            job.status = "done"
            await session.commit()
            await asyncio.sleep(0.005)


async def without_a_lock(Session, kind, export):
    queued = select(ExportJob).where(ExportJob.kind == kind, ExportJob.status == "queued")
    while True:
        async with Session.begin() as session:
            job = await session.scalar(queued.order_by(ExportJob.id).limit(1))
            if job is None:
                return
            export(job.id)
            job.status = "done"


async def all_kinds(Session, kind, export):
    queued = select(ExportJob).where(ExportJob.kind.startswith(kind), ExportJob.status == "queued")
    while True:
        async with Session.begin() as session:
            job = await session.scalar(queued.limit(1).with_for_update(skip_locked=True))
            if job is None:
                return
            export(job.id)
            job.status = "done"


async def five_each(Session, kind, export):
    for _ in range(5):
        async with Session.begin() as session:
            job = await session.scalar(next_of(kind))
            if job is not None:
                export(job.id)
                job.status = "done"


workers = asyncio.Lock()


async def one_worker_at_a_time(Session, kind, export):
    async with Session() as session:
        while True:
            async with workers:
                job = await session.scalar(next_of(kind))
                if job is None:
                    return
                export(job.id)
                job.status = "done"
                await session.commit()


ANSWERS = {
    "ask_in_parallel": Answers(
        right=[
            one_statement,
            one_after_another,
            three_at_once,
            gather_in_pairs,
            workers_with_a_queue,
            one_session_behind_a_lock,
        ],
        wrong=[
            (task_group_on_one_session, "one-session-many-tasks"),
            (gather_three, "gather-leaves-the-others"),
            (task_group_of_all, "takes-the-whole-pool"),
            (children_beside_their_parent, "children-count-too"),
            (exceptions_returned, "errors-among-results"),
            (gather_by_threes, "gather-leaves-the-others"),
            (cancel_and_do_not_wait, "gather-leaves-the-others"),
            (look_for_the_large, "looks-for-it-itself"),
            (leave_out_the_large, "looks-for-it-itself"),
            (nothing_sold, "swallows-the-timeout"),
            (close_when_all_is_well, "leaves-it-checked-out"),
            (report_past_the_pool, "another-pool"),
            (in_the_order_of_their_end, "not-what-was-asked"),
            (tasks_instead_of_numbers, "not-what-was-asked"),
            (only_five, "not-what-was-asked"),
            (one_report_at_a_time, "one-at-a-time"),
        ],
    ),
    "let_others_in": Answers(
        right=[
            let_a_step_pass,
            session_for_each_job,
            claim_first,
            raw_connections_for_jobs,
            jobs_of_a_generator,
        ],
        wrong=[
            (begin_on_the_long_session, "overtakes-the-queue"),
            (one_commit_at_the_end, "one-transaction-for-all"),
            (flush_each, "forgets-to-commit"),
            (pause_a_little, "waits-by-the-clock"),
            (without_a_lock, "claim-that-races"),
            (all_kinds, "more-than-asked"),
            (five_each, "part-of-the-rows"),
            (one_worker_at_a_time, "one-at-a-time"),
            (done_first, "done-before-it-is-done"),
            (wait_for_the_row, "stands-in-the-lock-queue"),
            (the_first_does_all, "leaves-it-to-the-others"),
            (one_worker_less, "leaves-it-to-the-others"),
            (finished_instead_of_done, "not-what-was-asked"),
            (ten_in_one_commit, "one-transaction-for-all"),
        ],
    ),
}
