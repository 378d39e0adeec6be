"""Answers to the tasks of exercise 09, right and wrong, as people give them."""

from __future__ import annotations

from contextlib import asynccontextmanager

import asyncpg
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import event, insert, select, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

from answers import Answers
from workshop import db
from workshop.shop import Order, OrderLine, Product

# The engine

SERVER = {"application_name": "shop", "statement_timeout": "1s", "lock_timeout": "500ms"}
POOL = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 0.5, "pool_pre_ping": True}


def engine_with(url, server=SERVER, driver=(), without=(), **pool):
    """The settings that the task wants, and what an answer has otherwise."""
    settings = {name: value for name, value in (POOL | pool).items() if name not in without}
    server = {name: value for name, value in server.items() if name not in without}
    return create_async_engine(
        url, connect_args={"server_settings": server, **dict(driver)}, **settings
    )


def said_when_it_connects(url):
    return engine_with(url)


def the_file_to_take_home(url):
    return db.make_engine(
        db.Settings(
            database_url=url,
            pool_size=5,
            pool_timeout=0.5,
            lock_timeout="500ms",
            statement_timeout="1s",
        )
    )


def set_outside_of_a_transaction(url):
    engine = create_async_engine(url, **POOL)

    @event.listens_for(engine.sync_engine, "connect")
    def limit(connection, record):
        for name, value in SERVER.items():
            connection.run_async(lambda raw: raw.execute(f"SET {name} = '{value}'"))  # noqa: B023

    return engine


def set_and_committed(url):
    engine = create_async_engine(url, **POOL)

    @event.listens_for(engine.sync_engine, "connect")
    def limit(connection, record):
        cursor = connection.cursor()
        for name, value in SERVER.items():
            cursor.execute(f"SET {name} = '{value}'")
        cursor.close()
        connection.commit()

    return engine


def connections_of_its_own_making(url):
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: asyncpg.connect(dsn, server_settings=SERVER),
        **POOL,
    )


def and_the_client_as_the_last_resort(url):
    return engine_with(url, driver={"command_timeout": 3, "timeout": 3}, pool_recycle=1800)


def numbers_in_milliseconds(url):
    limits = {"statement_timeout": "1000", "lock_timeout": "500"}
    return engine_with(url, server=SERVER | limits, pool_use_lifo=True)


def size_alone(url):
    return engine_with(url, without=["max_overflow"])


def no_pool(url):
    return create_async_engine(url, poolclass=NullPool, connect_args={"server_settings": SERVER})


def half_a_minute_in_line(url):
    return engine_with(url, without=["pool_timeout"])


def no_limit_for_statements(url):
    return engine_with(url, without=["statement_timeout", "lock_timeout"])


def only_for_locks(url):
    return engine_with(url, without=["statement_timeout"])


def the_client_is_enough(url):
    return engine_with(url, without=["statement_timeout"], driver={"command_timeout": 1})


def upside_down(url):
    return engine_with(url, driver={"command_timeout": 0.7})


def statements_only(url):
    return engine_with(url, without=["lock_timeout"])


def one_of_what(url):
    return engine_with(url, server=SERVER | {"statement_timeout": "1"})


def half_of_what(url):
    return engine_with(url, server=SERVER | {"lock_timeout": "5"})


def set_and_forgotten(url):
    engine = create_async_engine(url, **POOL)

    @event.listens_for(engine.sync_engine, "connect")
    def limit(connection, record):
        cursor = connection.cursor()
        for name, value in SERVER.items():
            cursor.execute(f"SET {name} = '{value}'")
        cursor.close()

    return engine


def no_ping(url):
    return engine_with(url, without=["pool_pre_ping"])


def young_connections(url):
    return engine_with(url, without=["pool_pre_ping"], pool_recycle=60)


def nameless(url):
    return engine_with(url, without=["application_name"])


def another_name(url):
    return engine_with(url, server=SERVER | {"application_name": "service"})


def too_impatient(url):
    return engine_with(url, pool_timeout=0.05)


def too_patient(url):
    return engine_with(url, pool_timeout=1)


def too_small(url):
    return engine_with(url, pool_size=2)


def too_strict(url):
    return engine_with(url, server=SERVER | {"statement_timeout": "300ms", "lock_timeout": "200ms"})


def sessions(url):
    return async_sessionmaker(engine_with(url))


def nothing(url):
    engine_with(url)


# The service


def price_of(sku):
    return select(Product.unit_price).where(Product.sku == sku)


def limited(url, **pool):
    settings = {"pool_size": 5, "max_overflow": 0} | pool
    return create_async_engine(
        url, connect_args={"server_settings": {"lock_timeout": "500ms"}}, **settings
    )


def disposing(engine):
    @asynccontextmanager
    async def lifespan(app):
        yield
        await engine.dispose()

    return lifespan


def app_of(place_order, pay, lifespan=None):
    app = FastAPI(lifespan=lifespan)
    app.post("/orders")(place_order)
    app.post("/orders/{number}/pay")(pay)
    return app


def endpoints(Session):
    """One session in each, and its transaction ends there."""

    async def place_order(household: int, sku: int) -> int:
        async with Session.begin() as session:
            price = await session.scalar(price_of(sku))
            lines = [OrderLine(sku=sku, unit_price=price)]
            session.add(order := Order(household_id=household, lines=lines))
        return order.id

    async def pay(number: int):
        async with Session.begin() as session:
            order = await session.get(Order, number, with_for_update=True)
            order.status = "paid"

    return place_order, pay


def all_five_mended(url):
    engine = limited(url)
    Session = async_sessionmaker(engine, expire_on_commit=False)
    return app_of(*endpoints(Session), disposing(engine))


def on_top_of_the_file(url):
    settings = db.Settings(database_url=url, pool_size=5, lock_timeout="500ms")

    @asynccontextmanager
    async def lifespan(app):
        engine = db.make_engine(settings)
        app.state.session_factory = async_sessionmaker(engine, expire_on_commit=False)
        yield
        await engine.dispose()

    app = FastAPI(lifespan=lifespan)
    app.add_exception_handler(DBAPIError, db.service_unavailable)

    @app.post("/orders")
    async def place_order(household: int, sku: int, Session: db.SessionFactory) -> int:
        return await endpoints(Session)[0](household, sku)

    @app.post("/orders/{number}/pay")
    async def pay(number: int, Session: db.SessionFactory):
        await endpoints(Session)[1](number)

    return app


def without_waiting_for_locks(url):
    """NOWAIT, and Core."""
    engine = create_async_engine(url, pool_size=3, max_overflow=2)

    async def place_order(household: int, sku: int) -> int:
        async with engine.begin() as connection:
            price = await connection.scalar(price_of(sku))
            order = insert(Order).values(household_id=household, status="new")
            number = await connection.scalar(order.returning(Order.id))
            line = {"order_id": number, "sku": sku, "quantity": 1, "unit_price": price}
            await connection.execute(insert(OrderLine), line)
        return number

    async def pay(number: int):
        found = select(Order.status).where(Order.id == number)
        try:
            async with engine.begin() as connection:
                await connection.execute(found.with_for_update(nowait=True))
                await connection.execute(
                    update(Order).where(Order.id == number).values(status="paid")
                )
        except DBAPIError:
            raise HTTPException(409, "somebody else has it") from None

    return app_of(place_order, pay, disposing(engine))


def a_dependency_of_the_function(url):
    """Its commit comes before the answer; and the limit is that of the transaction."""
    engine = create_async_engine(url, pool_size=5, max_overflow=0)
    Session = async_sessionmaker(engine)

    async def get_session():
        async with Session.begin() as session:
            await session.execute(text("SET LOCAL lock_timeout = '300ms'"))
            yield session

    of_the_function = Depends(get_session, scope="function")

    async def place_order(household: int, sku: int, session: AsyncSession = of_the_function) -> int:
        price = await session.scalar(price_of(sku))
        order = Order(household_id=household, lines=[OrderLine(sku=sku, unit_price=price)])
        session.add(order)
        await session.flush()
        return order.id

    async def pay(number: int, session: AsyncSession = of_the_function):
        order = await session.get(Order, number, with_for_update=True)
        order.status = "paid"

    return app_of(place_order, pay, disposing(engine))


def an_engine_for_each_session(url):
    def Session():
        return AsyncSession(limited(url), expire_on_commit=False)

    async def place_order(household: int, sku: int) -> int:
        async with Session() as session:
            price = await session.scalar(price_of(sku))
            lines = [OrderLine(sku=sku, unit_price=price)]
            session.add(order := Order(household_id=household, lines=lines))
            await session.commit()
        return order.id

    async def pay(number: int):
        async with Session() as session:
            order = await session.get(Order, number, with_for_update=True)
            order.status = "paid"
            await session.commit()

    return app_of(place_order, pay)


def no_pool_at_all(url):
    settings = {"server_settings": {"lock_timeout": "500ms"}}
    engine = create_async_engine(url, poolclass=NullPool, connect_args=settings)
    return app_of(*endpoints(async_sessionmaker(engine, expire_on_commit=False)))


def with_overflow(url):
    engine = limited(url, max_overflow=10)
    Session = async_sessionmaker(engine, expire_on_commit=False)
    return app_of(*endpoints(Session), disposing(engine))


def a_pool_for_prices(url):
    engine, prices = limited(url), limited(url)
    Session = async_sessionmaker(engine, expire_on_commit=False)

    async def place_order(household: int, sku: int) -> int:
        async with prices.connect() as connection:
            price = await connection.scalar(price_of(sku))
        async with Session.begin() as session:
            lines = [OrderLine(sku=sku, unit_price=price)]
            session.add(order := Order(household_id=household, lines=lines))
        return order.id

    return app_of(place_order, endpoints(Session)[1], disposing(engine))


def prices_from_a_dependency(url):
    engine = limited(url)
    Session = async_sessionmaker(engine, expire_on_commit=False)

    async def get_price(sku: int):
        async with Session() as session:
            yield await session.scalar(price_of(sku))

    async def place_order(household: int, sku: int, price: object = Depends(get_price)) -> int:
        async with Session.begin() as session:
            lines = [OrderLine(sku=sku, unit_price=price)]
            session.add(order := Order(household_id=household, lines=lines))
        return order.id

    return app_of(place_order, endpoints(Session)[1], disposing(engine))


def commits_after_the_yield(url):
    engine = limited(url)
    Session = async_sessionmaker(engine, expire_on_commit=False)

    async def get_session():
        async with Session() as session:
            yield session
            await session.commit()

    of_this_request = Depends(get_session)

    async def place_order(household: int, sku: int, session: AsyncSession = of_this_request) -> int:
        price = await session.scalar(price_of(sku))
        order = Order(household_id=household, lines=[OrderLine(sku=sku, unit_price=price)])
        session.add(order)
        await session.flush()
        return order.id

    async def pay(number: int, session: AsyncSession = of_this_request):
        order = await session.get(Order, number, with_for_update=True)
        order.status = "paid"

    return app_of(place_order, pay, disposing(engine))


def only_flushed(url):
    engine = limited(url)
    Session = async_sessionmaker(engine, expire_on_commit=False)

    async def place_order(household: int, sku: int) -> int:
        async with Session() as session:
            price = await session.scalar(price_of(sku))
            lines = [OrderLine(sku=sku, unit_price=price)]
            session.add(order := Order(household_id=household, lines=lines))
            await session.flush()
        return order.id

    async def pay(number: int):
        async with Session.begin() as session:
            await session.execute(update(Order).where(Order.id == number).values(status="paid"))

    return app_of(place_order, pay, disposing(engine))


def locks_without_a_limit(url):
    engine = create_async_engine(url, pool_size=5, max_overflow=0)
    Session = async_sessionmaker(engine, expire_on_commit=False)
    return app_of(*endpoints(Session), disposing(engine))


def never_disposed(url):
    return app_of(*endpoints(async_sessionmaker(limited(url), expire_on_commit=False)))


def expired(url):
    engine = limited(url)
    return app_of(*endpoints(async_sessionmaker(engine)), disposing(engine))


def twice_to_be_sure(url):
    engine = limited(url)
    Session = async_sessionmaker(engine, expire_on_commit=False)
    once, pay = endpoints(Session)

    async def place_order(household: int, sku: int) -> int:
        await once(household, sku)
        return await once(household, sku)

    return app_of(place_order, pay, disposing(engine))


def the_engine_instead(url):
    return limited(url)


ANSWERS = {
    "give_it_limits": Answers(
        right=[
            said_when_it_connects,
            the_file_to_take_home,
            set_outside_of_a_transaction,
            set_and_committed,
            connections_of_its_own_making,
            and_the_client_as_the_last_resort,
            numbers_in_milliseconds,
        ],
        wrong=[
            (size_alone, "size-is-not-the-limit"),
            (no_pool, "size-is-not-the-limit"),
            (half_a_minute_in_line, "everybody-is-patient"),
            (no_limit_for_statements, "somebody-presses-ctrl-c"),
            (only_for_locks, "somebody-presses-ctrl-c"),
            (the_client_is_enough, "whoever-leaves-ends-it"),
            (upside_down, "whoever-leaves-ends-it"),
            (statements_only, "a-lock-is-no-line"),
            (one_of_what, "a-number-is-in-seconds"),
            (half_of_what, "a-number-is-in-seconds"),
            (set_and_forgotten, "once-set-is-set"),
            (no_ping, "the-pool-would-know"),
            (young_connections, "the-pool-would-know"),
            (nameless, "everybody-is-nobody"),
            (another_name, "not-what-was-asked"),
            (too_impatient, "not-what-was-asked"),
            (too_patient, "not-what-was-asked"),
            (too_small, "not-what-was-asked"),
            (too_strict, "not-what-was-asked"),
            (sessions, "not-what-was-asked"),
            (nothing, "not-what-was-asked"),
        ],
    ),
    "serve_a_crowd": Answers(
        right=[
            all_five_mended,
            on_top_of_the_file,
            without_waiting_for_locks,
            a_dependency_of_the_function,
        ],
        wrong=[
            (an_engine_for_each_session, "engine-per-call"),
            (no_pool_at_all, "engine-per-call"),
            (with_overflow, "size-is-not-the-limit"),
            (a_pool_for_prices, "size-is-not-the-limit"),
            (prices_from_a_dependency, "holds-and-waits"),
            (commits_after_the_yield, "answers-before-it-commits"),
            (only_flushed, "forgets-to-commit"),
            (locks_without_a_limit, "a-lock-is-no-line"),
            (never_disposed, "ends-without-a-goodbye"),
            (expired, "expired-objects"),
            (twice_to_be_sure, "not-what-was-asked"),
            (the_engine_instead, "not-what-was-asked"),
        ],
    ),
}
