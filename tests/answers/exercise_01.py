"""Answers to the tasks of exercise 01, right and wrong, as people give them."""

from __future__ import annotations

import asyncio
import contextlib

import asyncpg
from sqlalchemy import select
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

from answers import Answers
from workshop.database import database_url
from workshop.shop import Order, OrderLine, Product


async def price_of(Session, sku):
    async with Session() as session:
        return await session.scalar(select(Product.unit_price).where(Product.sku == sku))


async def price_with(session, sku):
    return await session.scalar(select(Product.unit_price).where(Product.sku == sku))


async def nested_order(Session, number, sku):
    """The order as it was given, under another name: part of many a wrong answer."""
    async with Session() as session:
        order = Order(household_id=number)
        session.add(order)
        await session.flush()
        price = await price_of(Session, sku)
        session.add(OrderLine(order=order, sku=sku, unit_price=price))
        await session.commit()


async def reuse(Session, number, sku):
    async with Session() as session:
        order = Order(household_id=number)
        session.add(order)
        await session.flush()
        session.add(OrderLine(order=order, sku=sku, unit_price=await price_with(session, sku)))
        await session.commit()


async def look_first(Session, number, sku):
    price = await price_of(Session, sku)
    async with Session.begin() as session:
        session.add(
            Order(household_id=number, lines=[OrderLine(sku=sku, quantity=1, unit_price=price)])
        )


async def finish_first(Session, number, sku):
    async with Session(expire_on_commit=False) as session:
        order = Order(household_id=number)
        session.add(order)
        await session.commit()
        price = await price_of(Session, sku)
        session.add(OrderLine(order_id=order.id, sku=sku, unit_price=price))
        await session.commit()


async def without_a_flush(Session, number, sku):
    async with Session() as session:
        order = Order(household_id=number)
        session.add(order)
        price = await price_of(Session, sku)
        session.add(OrderLine(order=order, sku=sku, unit_price=price))
        await session.commit()


WITH_ITS_PRICE = select(Product.sku, Product.unit_price)


async def by_a_statement_of_another_cell(Session, number, sku):
    async with Session.begin() as session:
        row = (await session.execute(WITH_ITS_PRICE.where(Product.sku == sku))).one()
        session.add(
            Order(household_id=number, lines=[OrderLine(sku=sku, unit_price=row.unit_price)])
        )


async def price_in_the_meantime(Session, number, sku):
    """The task may have to wait for the order's connection, and the order waits for nobody."""
    task = asyncio.create_task(price_of(Session, sku))
    async with Session() as session:
        await session.scalar(select(Product.title).where(Product.sku == sku))
        await asyncio.sleep(0)
    price = await task
    async with Session.begin() as session:
        session.add(Order(household_id=number, lines=[OrderLine(sku=sku, unit_price=price)]))


at_their_queue = {}


async def work_off(Session, queue):
    while True:
        number, sku, done = await queue.get()
        try:
            await reuse(Session, number, sku)
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)


async def by_workers(Session, number, sku):
    """Long-lived workers, which have nothing to do in the end; each call awaits its own order."""
    if not at_their_queue:
        queue = at_their_queue["queue"] = asyncio.Queue()
        at_their_queue["workers"] = [
            asyncio.create_task(work_off(Session, queue))
            for _ in range(Session.kw["bind"].pool.size())
        ]
    done = asyncio.get_running_loop().create_future()
    at_their_queue["queue"].put_nowait((number, sku, done))
    await done


prices = {}


async def prices_from_a_pool_of_their_own(Session, number, sku):
    if not prices:
        prices["Session"] = async_sessionmaker(create_async_engine(database_url(), pool_size=2))
    async with Session() as session:
        order = Order(household_id=number)
        session.add(order)
        await session.flush()
        price = await price_of(prices["Session"], sku)
        session.add(OrderLine(order=order, sku=sku, unit_price=price))
        await session.commit()


async def with_a_generous_door(Session, number, sku):
    """A door that lets everybody in changes nothing, and is no mistake either."""
    async with asyncio.Semaphore(1_000):
        await reuse(Session, number, sku)


async def flush_later(Session, number, sku):
    async with Session() as session:
        product = await session.get(Product, sku)
        order = Order(household_id=number)
        session.add(order)
        price = await price_of(Session, product.sku)
        session.add(OrderLine(order=order, sku=sku, unit_price=price))
        await session.commit()


async def price_in_a_task(Session, number, sku):
    async with Session() as session:
        order = Order(household_id=number)
        session.add(order)
        await session.flush()
        price = await asyncio.create_task(price_of(Session, sku))
        session.add(OrderLine(order=order, sku=sku, unit_price=price))
        await session.commit()


large = {}


async def a_larger_pool(Session, number, sku):
    if not large:
        engine = create_async_engine(database_url(), pool_size=100, max_overflow=0)
        large["Session"] = async_sessionmaker(engine)
    await nested_order(large["Session"], number, sku)


async def an_engine_for_each_order(Session, number, sku):
    engine = create_async_engine(database_url(), poolclass=NullPool)
    await nested_order(async_sessionmaker(engine), number, sku)


async def more_overflow(Session, number, sku):
    Session.kw["bind"].pool._max_overflow = 100
    await nested_order(Session, number, sku)


async def another_pool(Session, number, sku):
    engine = Session.kw["bind"]
    if not isinstance(engine.sync_engine.pool, NullPool):
        engine.sync_engine.pool = NullPool(engine.sync_engine.pool._creator)
    await nested_order(Session, number, sku)


async def come_later(Session, number, sku):
    await asyncio.sleep(number % 60 * 0.01)
    await nested_order(Session, number, sku)


lock = asyncio.Lock()


async def one_order_at_a_time(Session, number, sku):
    async with lock:
        await nested_order(Session, number, sku)


async def one_session_at_a_time(Session, number, sku):
    async with lock:
        await reuse(Session, number, sku)


door = asyncio.Semaphore(9)


async def nine_permits(Session, number, sku):
    async with door:
        await nested_order(Session, number, sku)


async def ignore_the_timeout(Session, number, sku):
    with contextlib.suppress(PoolTimeoutError):
        await nested_order(Session, number, sku)


async def answer_200_anyway(Session, number, sku):
    try:
        await nested_order(Session, number, sku)
    except Exception:
        return {"status": 200}
    return {"status": 200}


async def try_again(Session, number, sku):
    while True:
        try:
            return await nested_order(Session, number, sku)
        except PoolTimeoutError:
            pass


async def return_at_once(Session, number, sku):
    return None


async def close_first(Session, number, sku):
    async with Session(expire_on_commit=False) as session:
        order = Order(household_id=number)
        session.add(order)
        await session.commit()
        await price_of(Session, sku)


at_work = set()


async def line_in_the_background(Session, number, sku):
    async with Session(expire_on_commit=False) as session:
        order = Order(household_id=number)
        session.add(order)
        await session.commit()

    async def add_line():
        price = await price_of(Session, sku)
        async with Session.begin() as session:
            session.add(OrderLine(order_id=order.id, sku=sku, unit_price=price))

    at_work.add(asyncio.create_task(add_line()))


async def place_it_twice(Session, number, sku):
    await reuse(Session, number, sku)
    await reuse(Session, number, sku)


async def the_price_of_bananas(Session, number, sku):
    async with Session.begin() as session:
        session.add(Order(household_id=number, lines=[OrderLine(sku=sku, unit_price=1)]))


kept = []


async def never_close(Session, number, sku):
    session = Session()
    kept.append(session)
    price = await price_with(session, sku)
    session.add(Order(household_id=number, lines=[OrderLine(sku=sku, unit_price=price)]))
    await session.commit()
    if number % 20 == 0:
        await price_with(session, sku)


async def order_and_price_apart(Session, number, sku):
    """Two transactions for one order, and a gather between them."""

    async def order():
        async with Session(expire_on_commit=False) as session:
            placed = Order(household_id=number)
            session.add(placed)
            await session.commit()
            return placed.id

    order_id, price = await asyncio.gather(order(), price_of(Session, sku))
    async with Session.begin() as session:
        session.add(OrderLine(order_id=order_id, sku=sku, unit_price=price))


async def give_up_and_try_again(Session, number, sku):
    """No deadlock lasts long enough to be proved."""
    while True:
        try:
            async with Session() as session:
                order = Order(household_id=number)
                session.add(order)
                await session.flush()
                async with asyncio.timeout(0.01):
                    price = await price_of(Session, sku)
                session.add(OrderLine(order=order, sku=sku, unit_price=price))
                return await session.commit()
        except TimeoutError:
            pass


async def price_through_a_queue(Session, number, sku):
    queue = asyncio.Queue()

    async def fetch():
        await queue.put(await price_of(Session, sku))

    async with Session() as session:
        order = Order(household_id=number)
        session.add(order)
        await session.flush()
        task = asyncio.create_task(fetch())
        session.add(OrderLine(order=order, sku=sku, unit_price=await queue.get()))
        await session.commit()
        await task


async def one_price_at_a_time(Session, number, sku):
    async with Session() as session:
        order = Order(household_id=number)
        session.add(order)
        await session.flush()
        async with lock:
            price = await price_of(Session, sku)
        session.add(OrderLine(order=order, sku=sku, unit_price=price))
        await session.commit()


narrow = asyncio.Semaphore(3)


async def three_at_a_time(Session, number, sku):
    async with narrow:
        await reuse(Session, number, sku)


async def past_every_pool(Session, number, sku):
    url = Session.kw["bind"].url.set(drivername="postgresql")
    async with Session() as session:
        order = Order(household_id=number)
        session.add(order)
        await session.flush()
        connection = await asyncpg.connect(url.render_as_string(hide_password=False))
        price = await connection.fetchval("SELECT unit_price FROM products WHERE sku = $1", sku)
        await connection.close()
        session.add(OrderLine(order=order, sku=sku, unit_price=price))
        await session.commit()


async def price_beside_it(Session, number, sku):
    async with Session() as session:
        order = Order(household_id=number)
        session.add(order)
        _, price = await asyncio.gather(session.flush(), price_with(session, sku))
        session.add(OrderLine(order=order, sku=sku, unit_price=price))
        await session.commit()


async def flush_and_leave(Session, number, sku):
    price = await price_of(Session, sku)
    async with Session() as session:
        session.add(Order(household_id=number, lines=[OrderLine(sku=sku, unit_price=price)]))
        await session.flush()


async def commit_not_awaited(Session, number, sku):
    price = await price_of(Session, sku)
    async with Session() as session:
        session.add(Order(household_id=number, lines=[OrderLine(sku=sku, unit_price=price)]))
        session.commit()


async def price_not_awaited(Session, number, sku):
    price = price_of(Session, sku)
    async with Session.begin() as session:
        session.add(Order(household_id=number, lines=[OrderLine(sku=sku, unit_price=price)]))


# The shelf


def behind(sku):
    return select(Product.sku).where(Product.sku > sku).order_by(Product.sku).limit(5)


async def gather_outside(Session, sku):
    async with Session() as session:
        skus = (await session.scalars(behind(sku))).all()
    prices = await asyncio.gather(*(price_of(Session, number) for number in skus))
    return dict(zip(skus, prices, strict=True))


async def one_statement(Session, sku):
    both = select(Product.sku, Product.unit_price).where(Product.sku.in_(behind(sku)))
    async with Session() as session:
        return {row.sku: row.unit_price for row in await session.execute(both)}


async def one_after_another(Session, sku):
    async with Session() as session:
        skus = (await session.scalars(behind(sku))).all()
        return {number: await price_with(session, number) for number in skus}


async def task_group_inside(Session, sku):
    async with Session() as session:
        skus = (await session.scalars(behind(sku))).all()
        async with asyncio.TaskGroup() as group:
            prices = {number: group.create_task(price_of(Session, number)) for number in skus}
    return {number: price.result() for number, price in prices.items()}


async def one_by_one_inside(Session, sku):
    async with Session() as session:
        skus = (await session.scalars(behind(sku))).all()
        return {number: await price_of(Session, number) for number in skus}


async def gather_on_one_session(Session, sku):
    async with Session() as session:
        skus = (await session.scalars(behind(sku))).all()
        prices = await asyncio.gather(*(price_with(session, number) for number in skus))
    return dict(zip(skus, prices, strict=True))


async def a_few_at_a_time(Session, sku):
    door = asyncio.Semaphore(3)

    async def price(number):
        async with door:
            return await price_of(Session, number)

    async with Session() as session:
        skus = (await session.scalars(behind(sku))).all()
        prices = await asyncio.gather(*map(price, skus))
    return dict(zip(skus, prices, strict=True))


async def in_loops_of_their_own(Session, sku):
    async with Session() as session:
        skus = (await session.scalars(behind(sku))).all()
    prices = (asyncio.to_thread(asyncio.run, price_of(Session, number)) for number in skus)
    return dict(zip(skus, await asyncio.gather(*prices), strict=True))


async def pairs(Session, sku):
    both = select(Product.sku, Product.unit_price).where(Product.sku.in_(behind(sku)))
    async with Session() as session:
        return [(row.sku, row.unit_price) for row in await session.execute(both)]


async def floats(Session, sku):
    prices = await one_statement(Session, sku)
    return {number: price and float(price) for number, price in prices.items()}


async def the_same_of_another_order(Session, sku):
    """Which five, nobody has said."""
    both = select(Product.sku, Product.unit_price).where(Product.sku > sku).limit(5)
    async with Session() as session:
        return dict((await session.execute(both)).all())


async def only_those_with_a_price(Session, sku):
    prices = await one_statement(Session, sku)
    return {number: price for number, price in prices.items() if price is not None}


async def each_in_its_turn(Session, sku):
    """Children share the session, one after another."""
    turn = asyncio.Lock()
    async with Session() as session:

        async def price(number):
            async with turn:
                return await price_with(session, number)

        skus = (await session.scalars(behind(sku))).all()
        prices = await asyncio.gather(*map(price, skus))
    return dict(zip(skus, prices, strict=True))


async def nothing(Session, sku):
    await one_statement(Session, sku)


async def only_three(Session, sku):
    async with Session() as session:
        skus = (await session.scalars(behind(sku).limit(3))).all()
        return {number: await price_with(session, number) for number in skus}


ANSWERS = {
    "reuse_the_session": Answers(
        right=[
            reuse,
            look_first,
            without_a_flush,
            price_in_the_meantime,
            by_workers,
            by_a_statement_of_another_cell,
            with_a_generous_door,
            prices_from_a_pool_of_their_own,
        ],
        wrong=[
            (flush_later, "holds-and-waits"),
            (price_in_a_task, "children-count-too"),
            (a_larger_pool, "bigger-pool"),
            (an_engine_for_each_order, "engine-per-call"),
            (more_overflow, "changes-the-pool"),
            (another_pool, "changes-the-pool"),
            (come_later, "sleeps"),
            (one_order_at_a_time, "one-at-a-time"),
            (one_session_at_a_time, "one-at-a-time"),
            (nine_permits, "door-for-one-size"),
            (ignore_the_timeout, "swallows-the-timeout"),
            (answer_200_anyway, "swallows-the-timeout"),
            (try_again, "retries"),
            (return_at_once, "success-without-work"),
            (close_first, "half-an-order"),
            (finish_first, "half-an-order"),
            (order_and_price_apart, "half-an-order"),
            (give_up_and_try_again, "holds-and-waits"),
            (price_through_a_queue, "holds-while-it-waits"),
            (one_price_at_a_time, "door-for-one-size"),
            (three_at_a_time, "needless-door"),
            (past_every_pool, "engine-per-call"),
            (line_in_the_background, "fire-and-forget"),
            (place_it_twice, "twice"),
            (the_price_of_bananas, "guesses-the-price"),
            (never_close, "leaves-it-checked-out"),
            (price_beside_it, "one-session-many-tasks"),
            (flush_and_leave, "forgets-to-commit"),
            (commit_not_awaited, "never-awaited"),
            (price_not_awaited, "never-awaited"),
        ],
    ),
    "enrich_in_parallel": Answers(
        right=[gather_outside, one_statement, one_after_another, each_in_its_turn],
        wrong=[
            (task_group_inside, "children-count-too"),
            (one_by_one_inside, "holds-and-waits"),
            (gather_on_one_session, "one-session-many-tasks"),
            (a_few_at_a_time, "children-count-too"),
            (only_three, "not-what-was-asked"),
            (in_loops_of_their_own, "another-loop"),
            (pairs, "not-what-was-asked"),
            (floats, "not-what-was-asked"),
            (nothing, "not-what-was-asked"),
            (the_same_of_another_order, "not-what-was-asked"),
            (only_those_with_a_price, "not-what-was-asked"),
        ],
    ),
}
