"""Answers to the tasks of exercise 06, right and wrong, as people give them."""

from __future__ import annotations

import asyncio

from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from answers import Answers
from workshop.database import database_url
from workshop.shop import ExportJob, Order, Sale

# The payment


def taken(number):
    mine = update(Order).where(Order.id == number, Order.status == "new").values(status="paying")
    return mine.returning(Order.household_id)


async def take(Session, number):
    async with Session.begin() as session:
        return await session.scalar(taken(number))


async def set_status(Session, number, status):
    async with Session.begin() as session:
        await session.execute(update(Order).where(Order.id == number).values(status=status))


async def claim_with_one_statement(Session, number, provider):
    household = await take(Session, number)
    if household is None:
        return
    try:
        await provider(number, household)
    except BaseException:
        await set_status(Session, number, "new")
        raise
    await set_status(Session, number, "paid")


async def lock_claim_and_load_again(Session, number, provider):
    async with Session.begin() as session:
        order = await session.get(Order, number, with_for_update=True)
        if order.status != "new":
            return
        order.status, household = "paying", order.household_id
    status = "new"
    try:
        await provider(number, household)
        status = "paid"
    finally:
        async with Session.begin() as session:
            order = await session.get(Order, number)
            order.status = status


async def one_session_that_commits(Session, number, provider):
    async with Session(expire_on_commit=False) as session:
        order = await session.get(Order, number, with_for_update=True)
        if order.status != "new":
            return
        order.status = "paying"
        await session.commit()
        try:
            await provider(order.id, order.household_id)
        except Exception:
            order.status = "new"
            await session.commit()
            raise
        order.status = "paid"
        await session.commit()


async def flush_the_claim(Session, number, provider):
    async with Session() as session:
        order = await session.get(Order, number, with_for_update=True)
        if order.status == "new":
            order.status = "paying"
            await session.flush()
            await provider(order.id, order.household_id)
            order.status = "paid"
            await session.commit()


async def close_it_first(Session, number, provider):
    async with Session() as session:
        order = await session.get(Order, number)
    if order.status == "new":
        await provider(order.id, order.household_id)
        order.status = "paid"
        async with Session() as session:
            await session.commit()


async def change_what_is_detached(Session, number, provider):
    if await take(Session, number) is None:
        return
    async with Session() as session:
        order = await session.get(Order, number)
    try:
        await provider(order.id, order.household_id)
    except Exception:
        await set_status(Session, number, "new")
        raise
    order.status = "paid"
    async with Session() as session:
        await session.commit()


async def flush_the_end(Session, number, provider):
    household = await take(Session, number)
    if household is None:
        return
    try:
        await provider(number, household)
    except Exception:
        await set_status(Session, number, "new")
        raise
    async with Session() as session:
        order = await session.get(Order, number)
        order.status = "paid"
        await session.flush()


async def read_then_claim(Session, number, provider):
    async with Session() as session:
        order = await session.get(Order, number)
        if order.status != "new":
            return
        household = order.household_id
        order.status = "paying"
        await session.commit()
    try:
        await provider(number, household)
    except Exception:
        await set_status(Session, number, "new")
        raise
    await set_status(Session, number, "paid")


async def expired_order(Session, number, provider):
    async with Session() as session:
        order = await session.get(Order, number, with_for_update=True)
        if order.status != "new":
            return
        order.status = "paying"
        await session.commit()
        await provider(order.id, order.household_id)
        order.status = "paid"
        await session.commit()


async def ask_first(Session, number, provider):
    async with Session() as session:
        household = await session.scalar(select(Order.household_id).where(Order.id == number))
    await provider(number, household)
    await set_status(Session, number, "paid")


async def paid_at_once(Session, number, provider):
    async with Session.begin() as session:
        paid = taken(number).values(status="paid")
        household = await session.scalar(paid)
    if household is None:
        return
    try:
        await provider(number, household)
    except Exception:
        await set_status(Session, number, "new")
        raise


async def forget_the_declined(Session, number, provider):
    household = await take(Session, number)
    if household is not None:
        await provider(number, household)
        await set_status(Session, number, "paid")


async def log_the_declined(Session, number, provider):
    household = await take(Session, number)
    if household is None:
        return
    try:
        await provider(number, household)
    except Exception as error:
        print("declined", error)
        await set_status(Session, number, "new")
    else:
        await set_status(Session, number, "paid")


lock = asyncio.Lock()


async def one_payment_at_a_time(Session, number, provider):
    async with lock:
        await claim_with_one_statement(Session, number, provider)


async def given(Session, number, provider):
    async with Session() as session:
        order = await session.get(Order, number, with_for_update=True)
        if order.status == "new":
            await provider(order.id, order.household_id)
            order.status = "paid"
            await session.commit()


large = {}


async def from_a_larger_pool(Session, number, provider):
    if not large:
        engine = create_async_engine(database_url(), pool_size=40, max_overflow=0)
        large["Session"] = async_sessionmaker(engine)
    await given(large["Session"], number, provider)


async def claim_beside_an_open_session(Session, number, provider):
    async with Session() as session:
        order = await session.get(Order, number)
        if order.status != "new":
            return
        household = await take(Session, number)
        if household is not None:
            await provider(number, household)
            await set_status(Session, number, "paid")


async def do_nothing(Session, number, provider):
    pass


# The page


def status_of(number):
    return select(Order.status).where(Order.id == number)


def app_of(follow):
    app = FastAPI()
    app.get("/orders/{number}")(follow)
    return app


def stream(events):
    return StreamingResponse(events, media_type="text/event-stream")


def session_of(Session):
    async def get_session():
        async with Session() as session:
            yield session

    return get_session


def session_for_each_look(Session, changed):
    async def look(number):
        async with Session() as session:
            return await session.scalar(status_of(number))

    async def follow(number: int):
        if await look(number) is None:
            raise HTTPException(404)

        async def events():
            while True:
                status = await look(number)
                yield f"data: {status}\n\n"
                await changed(number)

        return stream(events())

    return app_of(follow)


def commit_after_each_look(Session, changed):
    as_always = Depends(session_of(Session))

    async def follow(number: int, session: AsyncSession = as_always):
        if await session.scalar(status_of(number)) is None:
            raise HTTPException(404)
        await session.commit()

        async def events():
            while True:
                status = await session.scalar(status_of(number))
                await session.commit()
                yield f"data: {status}\n\n"
                await changed(number)

        return stream(events())

    return app_of(follow)


def dependency_for_the_look_only(Session, changed):
    """`scope="function"` ends it before the response; the stream has sessions of its own."""
    scoped = Depends(session_of(Session), scope="function")

    async def follow(number: int, session: AsyncSession = scoped):
        if await session.get(Order, number) is None:
            raise HTTPException(404)

        async def events():
            while True:
                async with Session() as own:
                    order = await own.get(Order, number)
                yield f"data: {order.status}\n\n"
                await changed(number)

        return stream(events())

    return app_of(follow)


def connection_for_each_look(Session, changed):
    engine = Session.kw["bind"]

    async def look(number):
        async with engine.connect() as connection:
            return await connection.scalar(status_of(number))

    async def follow(number: int):
        if (status := await look(number)) is None:
            raise HTTPException(404)

        async def events(status):
            yield f"data: {status}\n\n"
            while True:
                await changed(number)
                yield f"data: {await look(number)}\n\n"

        return stream(events(status))

    return app_of(follow)


def dependency_and_short_sessions(Session, changed):
    as_always = Depends(session_of(Session))

    async def follow(number: int, session: AsyncSession = as_always):
        if await session.scalar(status_of(number)) is None:
            raise HTTPException(404)

        async def events():
            while True:
                async with Session() as own:
                    status = await own.scalar(status_of(number))
                yield f"data: {status}\n\n"
                await changed(number)

        return stream(events())

    return app_of(follow)


def function_scope_and_its_session(Session, changed):
    scoped = Depends(session_of(Session), scope="function")

    async def follow(number: int, session: AsyncSession = scoped):
        if await session.scalar(status_of(number)) is None:
            raise HTTPException(404)

        async def events():
            while True:
                yield f"data: {await session.scalar(status_of(number))}\n\n"
                await changed(number)

        return stream(events())

    return app_of(follow)


def yield_within_the_block(Session, changed):
    async def follow(number: int):
        async with Session() as session:
            if await session.scalar(status_of(number)) is None:
                raise HTTPException(404)

        async def events():
            while True:
                async with Session() as session:
                    yield f"data: {await session.scalar(status_of(number))}\n\n"
                await changed(number)

        return stream(events())

    return app_of(follow)


def read_before_the_stream(Session, changed):
    async def follow(number: int):
        async with Session() as session:
            status = await session.scalar(status_of(number))
        if status is None:
            raise HTTPException(404)

        async def events():
            while True:
                yield f"data: {status}\n\n"
                await changed(number)

        return stream(events())

    return app_of(follow)


def not_found_within_the_stream(Session, changed):
    async def follow(number: int):
        async def events():
            while True:
                async with Session() as session:
                    status = await session.scalar(status_of(number))
                if status is None:
                    raise HTTPException(404)
                yield f"data: {status}\n\n"
                await changed(number)

        return stream(events())

    return app_of(follow)


def empty_app(Session, changed):
    return FastAPI()


def pool_without_limit(Session, changed):
    Session.kw["bind"].pool._max_overflow = -1
    return yield_within_the_block(Session, changed)


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
    "pay_without_a_connection": Answers(
        right=[claim_with_one_statement, lock_claim_and_load_again, one_session_that_commits],
        wrong=[
            (flush_the_claim, "holds-while-it-waits"),
            (close_it_first, "claims-nothing"),
            (change_what_is_detached, "changes-a-detached-object"),
            (flush_the_end, "forgets-to-commit"),
            (read_then_claim, "claim-that-races"),
            (expired_order, "expired-objects"),
            (ask_first, "asks-before-it-looks"),
            (paid_at_once, "paid-before-the-money"),
            (forget_the_declined, "claim-that-stays"),
            (log_the_declined, "swallows-the-timeout"),
            (one_payment_at_a_time, "one-at-a-time"),
            (from_a_larger_pool, "bigger-pool"),
            (claim_beside_an_open_session, "holds-and-waits"),
            (do_nothing, "success-without-work"),
        ],
    ),
    "follow_an_order": Answers(
        right=[
            session_for_each_look,
            commit_after_each_look,
            dependency_for_the_look_only,
            connection_for_each_look,
        ],
        wrong=[
            (dependency_and_short_sessions, "as-long-as-the-response"),
            (function_scope_and_its_session, "closed-session-opens-again"),
            (yield_within_the_block, "holds-while-they-read"),
            (read_before_the_stream, "reads-once"),
            (not_found_within_the_stream, "status-comes-first"),
            (empty_app, "success-without-work"),
            (pool_without_limit, "changes-the-pool"),
        ],
    ),
    "ask_in_parallel": Answers(
        right=[one_statement, one_after_another, three_at_once, gather_in_pairs],
        wrong=[
            (task_group_on_one_session, "one-session-many-tasks"),
            (gather_three, "gather-leaves-the-others"),
            (task_group_of_all, "takes-the-whole-pool"),
            (children_beside_their_parent, "children-count-too"),
            (exceptions_returned, "errors-among-results"),
            (only_five, "success-without-work"),
            (one_report_at_a_time, "one-at-a-time"),
        ],
    ),
    "let_others_in": Answers(
        right=[let_a_step_pass, session_for_each_job, claim_first],
        wrong=[
            (begin_on_the_long_session, "overtakes-the-queue"),
            (one_commit_at_the_end, "one-transaction-for-all"),
            (flush_each, "forgets-to-commit"),
            (pause_a_little, "waits-by-the-clock"),
            (without_a_lock, "claim-that-races"),
            (all_kinds, "more-than-asked"),
            (five_each, "part-of-the-rows"),
            (one_worker_at_a_time, "one-at-a-time"),
        ],
    ),
}
