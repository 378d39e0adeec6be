"""Answers to the tasks of exercise 08, right and wrong, as people give them."""

from __future__ import annotations

import asyncpg
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

from answers import Answers
from workshop import db

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


def too_small(url):
    return engine_with(url, pool_size=2)


def too_strict(url):
    return engine_with(url, server=SERVER | {"statement_timeout": "300ms", "lock_timeout": "200ms"})


def sessions(url):
    return async_sessionmaker(engine_with(url))


def nothing(url):
    engine_with(url)


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
            (too_small, "not-what-was-asked"),
            (too_strict, "not-what-was-asked"),
            (sessions, "not-what-was-asked"),
            (nothing, "not-what-was-asked"),
        ],
    ),
}
