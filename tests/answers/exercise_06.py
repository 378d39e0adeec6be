"""Answers to the tasks of exercise 06, right and wrong, as people give them."""

from __future__ import annotations

import asyncio
import contextlib

import asyncpg
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from answers import Answers
from workshop.payment import Declined
from workshop.shop import Order

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
        engine = create_async_engine(Session.kw["bind"].url, pool_size=40, max_overflow=0)
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


async def put_back_what_is_declined(Session, number, provider):
    household = await take(Session, number)
    if household is None:
        return
    try:
        await provider(number, household)
    except Declined:
        await set_status(Session, number, "new")
        raise
    await set_status(Session, number, "paid")


async def rows_that_were_changed(Session, number, provider):
    async with Session.begin() as session:
        mine = update(Order).where(Order.id == number, Order.status == "new")
        claimed = await session.execute(mine.values(status="paying"))
        if claimed.rowcount != 1:
            return
        household = await session.scalar(select(Order.household_id).where(Order.id == number))
    await finish(Session, number, household, provider)


async def skip_what_is_locked(Session, number, provider):
    async with Session.begin() as session:
        order = await session.get(Order, number, with_for_update={"skip_locked": True})
        if order is None or order.status != "new":
            return
        order.status, household = "paying", order.household_id
    await finish(Session, number, household, provider)


async def raw_connections_of_the_pool(Session, number, provider):
    async def run(query, *arguments):
        async with Session.kw["bind"].connect() as connection:
            raw = (await connection.get_raw_connection()).driver_connection
            return await raw.fetchval(query, *arguments)

    claim = "UPDATE orders SET status = 'paying' WHERE id = $1 AND status = 'new' RETURNING household_id"
    household = await run(claim, number)
    if household is None:
        return
    try:
        await provider(number, household)
    except Declined:
        await run("UPDATE orders SET status = 'new' WHERE id = $1", number)
        raise
    await run("UPDATE orders SET status = 'paid' WHERE id = $1", number)


async def behind_a_shield(Session, number, provider):
    """A customer who gives up does not end the payment."""
    household = await take(Session, number)
    if household is not None:
        await asyncio.shield(asyncio.create_task(finish(Session, number, household, provider)))


async def finish(Session, number, household, provider):
    try:
        await provider(number, household)
    except Exception:
        await set_status(Session, number, "new")
        raise
    await set_status(Session, number, "paid")


kept_tasks = set()


async def in_the_background(Session, number, provider):
    household = await take(Session, number)
    if household is not None:
        kept_tasks.add(asyncio.create_task(finish(Session, number, household, provider)))


async def ask_twice(Session, number, provider):
    household = await take(Session, number)
    if household is None:
        return
    try:
        await provider(number, household)
    except Declined:
        await finish(Session, number, household, provider)
    else:
        await set_status(Session, number, "paid")


async def paid_in_any_case(Session, number, provider):
    """A slip of indentation: whoever got no claim writes "paid" as well."""
    household = await take(Session, number)
    if household is not None:
        try:
            await provider(number, household)
        except Exception:
            await set_status(Session, number, "new")
            raise
    await set_status(Session, number, "paid")


async def paying_whatever_it_was(Session, number, provider):
    async with Session() as session:
        order = await session.get(Order, number, with_for_update=True)
        is_new, household = order.status == "new", order.household_id
        order.status = "paying"
        await session.commit()
    if is_new:
        await finish(Session, number, household, provider)


async def in_other_words(Session, number, provider):
    async with Session.begin() as session:
        household = await session.scalar(taken(number).values(status="in progress"))
    if household is not None:
        await finish(Session, number, household, provider)


async def out_of_the_table(Session, number, provider):
    mine = delete(Order).where(Order.id == number, Order.status == "new")
    async with Session.begin() as session:
        household = await session.scalar(mine.returning(Order.household_id))
    if household is None:
        return
    status = "new"
    try:
        await provider(number, household)
        status = "paid"
    finally:
        async with Session.begin() as session:
            session.add(Order(id=number, household_id=household, status=status))


async def never_paid(Session, number, provider):
    household = await take(Session, number)
    if household is not None:
        try:
            await provider(number, household)
        except Exception:
            await set_status(Session, number, "new")
            raise


async def declined_is_declined(Session, number, provider):
    household = await take(Session, number)
    if household is None:
        return
    try:
        await provider(number, household)
    except Declined:
        await set_status(Session, number, "declined")
        raise
    await set_status(Session, number, "paid")


async def a_better_error(Session, number, provider):
    try:
        await claim_with_one_statement(Session, number, provider)
    except Declined as error:
        raise RuntimeError("payment failed") from error


async def not_longer_than_that(Session, number, provider):
    household = await take(Session, number)
    if household is None:
        return
    try:
        async with asyncio.timeout(0.1):
            await provider(number, household)
    except (Declined, TimeoutError):
        await set_status(Session, number, "new")
        raise
    await set_status(Session, number, "paid")


async def paying_is_for_everybody(Session, number, provider):
    async with Session.begin() as session:
        await session.execute(taken(number))
    async with Session() as session:
        order = await session.get(Order, number)
    if order.status == "paying":
        await finish(Session, number, order.household_id, provider)


async def paid_whatever_the_network_does(Session, number, provider):
    household = await take(Session, number)
    if household is None:
        return
    try:
        await provider(number, household)
    except Declined:
        await set_status(Session, number, "new")
        raise
    except TimeoutError:
        await set_status(Session, number, "paid")
        raise
    await set_status(Session, number, "paid")


async def a_lost_answer_is_no_error(Session, number, provider):
    with contextlib.suppress(TimeoutError):
        await put_back_what_is_declined(Session, number, provider)


async def giving_up_is_no_error(Session, number, provider):
    with contextlib.suppress(asyncio.CancelledError):
        await put_back_what_is_declined(Session, number, provider)


def plain_dsn(Session):
    url = Session.kw["bind"].url.set(drivername="postgresql")
    return url.render_as_string(hide_password=False)


async def past_the_pool(Session, number, provider):
    connection = await asyncpg.connect(plain_dsn(Session))
    try:
        claim = "UPDATE orders SET status = 'paying' WHERE id = $1 AND status = 'new' RETURNING household_id"
        household = await connection.fetchval(claim, number)
        if household is None:
            return
        status = "new"
        try:
            await provider(number, household)
            status = "paid"
        finally:
            change = "UPDATE orders SET status = $2 WHERE id = $1"
            await connection.execute(change, number, status)
    finally:
        await connection.close()


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


def looks(Session):
    async def look(number):
        async with Session() as session:
            return await session.scalar(status_of(number))

    return look


def in_parts(Session, changed):
    """An event may be sent piece by piece."""
    look = looks(Session)

    async def follow(number: int):
        if await look(number) is None:
            raise HTTPException(404)

        async def events():
            while True:
                status = await look(number)
                yield "event: status\ndata: "
                yield f"{status}\n"
                yield "\n"
                await changed(number)

        return stream(events())

    return app_of(follow)


def only_what_is_new(Session, changed):
    """And it begins to wait before it looks."""
    look = looks(Session)

    async def follow(number: int):
        if await look(number) is None:
            raise HTTPException(404)

        async def events():
            shown, news = None, asyncio.ensure_future(changed(number))
            try:
                while True:
                    if (status := await look(number)) != shown:
                        shown = status
                        yield f"data: {status}\n\n"
                    await news
                    news = asyncio.ensure_future(changed(number))
            finally:
                news.cancel()

        return stream(events())

    return app_of(follow)


def fed_by_a_task(Session, changed):
    look = looks(Session)

    async def follow(number: int):
        if await look(number) is None:
            raise HTTPException(404)

        async def events():
            statuses = asyncio.Queue()

            async def feed():
                while True:
                    await statuses.put(await look(number))
                    await changed(number)

            feeding = asyncio.create_task(feed())
            try:
                while True:
                    yield f"data: {await statuses.get()}\n\n"
            finally:
                feeding.cancel()

        return stream(events())

    return app_of(follow)


def commit_after_the_first_event(Session, changed):
    as_always = Depends(session_of(Session))

    async def follow(number: int, session: AsyncSession = as_always):
        first = await session.scalar(status_of(number))
        if first is None:
            raise HTTPException(404)

        async def events():
            yield f"data: {first}\n\n"
            while True:
                await session.commit()
                await changed(number)
                status = await session.scalar(status_of(number))
                await session.commit()
                yield f"data: {status}\n\n"

        return stream(events())

    return app_of(follow)


def connection_for_each_page(Session, changed):
    look = looks(Session)

    async def follow(number: int):
        if await look(number) is None:
            raise HTTPException(404)

        async def events():
            connection = await asyncpg.connect(plain_dsn(Session))
            try:
                while True:
                    found = "SELECT status FROM orders WHERE id = $1"
                    yield f"data: {await connection.fetchval(found, number)}\n\n"
                    await changed(number)
            finally:
                await connection.close()

        return stream(events())

    return app_of(follow)


def known_statuses(Session, changed):
    look, known = looks(Session), {}

    async def follow(number: int):
        if number not in known:
            known[number] = await look(number)
        if known[number] is None:
            raise HTTPException(404)

        async def events():
            while True:
                yield f"data: {known[number]}\n\n"
                await changed(number)
                known[number] = await look(number)

        return stream(events())

    return app_of(follow)


def without_await(Session, changed):
    look = looks(Session)

    async def follow(number: int):
        if await look(number) is None:
            raise HTTPException(404)

        async def events():
            while True:
                yield f"data: {await look(number)}\n\n"
                await asyncio.sleep(0)

        return stream(events())

    return app_of(follow)


def five_times_a_second(Session, changed):
    look = looks(Session)

    async def follow(number: int):
        if await look(number) is None:
            raise HTTPException(404)

        async def events():
            shown = None
            while True:
                if (status := await look(number)) != shown:
                    shown = status
                    yield f"data: {status}\n\n"
                await asyncio.sleep(0.2)

        return stream(events())

    return app_of(follow)


def no_news_for_a_moment(Session, changed):
    look = looks(Session)

    async def follow(number: int):
        if await look(number) is None:
            raise HTTPException(404)

        async def events():
            while True:
                yield f"data: {await look(number)}\n\n"
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed(number), 0.2)

        return stream(events())

    return app_of(follow)


def news_first(Session, changed):
    look = looks(Session)

    async def follow(number: int):
        if await look(number) is None:
            raise HTTPException(404)

        async def events():
            while True:
                await changed(number)
                yield f"data: {await look(number)}\n\n"

        return stream(events())

    return app_of(follow)


def never_not_found(Session, changed):
    look = looks(Session)

    async def follow(number: int):
        async def events():
            while True:
                yield f"data: {await look(number)}\n\n"
                await changed(number)

        return stream(events())

    return app_of(follow)


def task_that_nobody_ends(Session, changed):
    look = looks(Session)

    async def follow(number: int):
        if await look(number) is None:
            raise HTTPException(404)
        statuses = asyncio.Queue()

        async def feed():
            while True:
                await statuses.put(await look(number))
                await changed(number)

        asyncio.create_task(feed())  # noqa: RUF006  # that is what is wrong

        async def events():
            while True:
                yield f"data: {await statuses.get()}\n\n"

        return stream(events())

    return app_of(follow)


def empty_app(Session, changed):
    return FastAPI()


def pool_without_limit(Session, changed):
    Session.kw["bind"].pool._max_overflow = -1
    return yield_within_the_block(Session, changed)


ANSWERS = {
    "pay_without_a_connection": Answers(
        right=[
            claim_with_one_statement,
            lock_claim_and_load_again,
            one_session_that_commits,
            put_back_what_is_declined,
            rows_that_were_changed,
            skip_what_is_locked,
            raw_connections_of_the_pool,
            behind_a_shield,
        ],
        wrong=[
            (in_the_background, "fire-and-forget"),
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
            (ask_twice, "asks-again"),
            (paid_in_any_case, "more-than-asked"),
            (paying_whatever_it_was, "more-than-asked"),
            (in_other_words, "not-what-was-asked"),
            (out_of_the_table, "not-what-was-asked"),
            (never_paid, "not-what-was-asked"),
            (declined_is_declined, "not-what-was-asked"),
            (a_better_error, "raises-another-error"),
            (not_longer_than_that, "no-answer-is-no-refusal"),
            (paying_is_for_everybody, "claim-that-races"),
            (paid_whatever_the_network_does, "paid-before-the-money"),
            (a_lost_answer_is_no_error, "swallows-the-timeout"),
            (giving_up_is_no_error, "swallows-the-timeout"),
            (past_the_pool, "another-pool"),
        ],
    ),
    "follow_an_order": Answers(
        right=[
            session_for_each_look,
            commit_after_each_look,
            dependency_for_the_look_only,
            connection_for_each_look,
            in_parts,
            only_what_is_new,
            fed_by_a_task,
        ],
        wrong=[
            (dependency_and_short_sessions, "as-long-as-the-response"),
            (function_scope_and_its_session, "closed-session-opens-again"),
            (yield_within_the_block, "holds-while-they-read"),
            (read_before_the_stream, "reads-once"),
            (not_found_within_the_stream, "status-comes-first"),
            (commit_after_the_first_event, "holds-while-they-read"),
            (connection_for_each_page, "another-pool"),
            (known_statuses, "remembers-for-others"),
            (without_await, "asks-all-the-time"),
            (five_times_a_second, "asks-all-the-time"),
            (no_news_for_a_moment, "asks-all-the-time"),
            (news_first, "not-what-was-asked"),
            (never_not_found, "not-what-was-asked"),
            (task_that_nobody_ends, "fire-and-forget"),
            (empty_app, "not-what-was-asked"),
            (pool_without_limit, "changes-the-pool"),
        ],
    ),
}
