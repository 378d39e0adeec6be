"""What lesson 11 stands on: the clock that runs fast, the cancellation that comes on demand, and the pools."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import pytest
from environments import ROOT
from helpers import PATIENCE, run

from workshop import mariadb, stacks
from workshop.database import Server
from workshop.stacks import STACKS, Stack
from workshop.stacks.picture import Seen, side_by_side
from workshop.strikes import strike
from workshop.time_lapse import time_lapse


def test_half_a_minute_is_over_in_a_moment() -> None:
    """By the loop's clock it is half a minute, by the wall's none; and afterwards the clock is the old one."""

    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        with time_lapse():
            began = loop.time()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(30):
                    await asyncio.Event().wait()
            seconds = loop.time() - began
        began = loop.time()
        await asyncio.sleep(0.05)
        return seconds, loop.time() - began

    wall = time.monotonic()
    seconds, afterwards = run(main())
    assert 30 <= seconds < 35
    assert time.monotonic() - wall < 25
    assert 0.04 < afterwards < 5


async def three_awaits(done: list[int]) -> None:
    for number in range(3):
        await asyncio.sleep(0)
        done.append(number)


async def swallows() -> None:
    try:
        await asyncio.sleep(5)
    except asyncio.CancelledError:
        await asyncio.sleep(0)


async def falls_over() -> None:
    try:
        await asyncio.sleep(5)
    finally:
        raise LookupError


@pytest.mark.parametrize(("number", "end", "reached"), [(1, "cancelled", 0), (3, "cancelled", 2)])
def test_a_strike_comes_when_it_is_told_to(number: int, end: str, reached: int) -> None:
    done: list[int] = []
    assert run(strike(three_awaits(done), number)) == end
    assert len(done) == reached


def test_how_a_strike_can_end() -> None:
    assert run(strike(three_awaits([]), 4)) == "ended"
    assert run(strike(swallows(), 1)) == "went on"
    assert run(strike(falls_over(), 1)) == "failed"
    assert run(strike(asyncio.sleep(5), 2, patience=0.1)) == "stuck"


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.name)
def test_each_stack_opens_asks_and_reads(stack: Stack, server: Server) -> None:
    """Two transactions at once, or one after the other, on a pool that is open; and the first of many rows."""
    if stack.server == "MySQL" and mariadb.programs() is None and os.environ.get("CI") != "true":
        pytest.skip("MariaDB is not installed")
    address = {
        "PostgreSQL": lambda: server.url,
        "SQLite": stacks.sqlite_shop,
        "MySQL": stacks.mysql_shop,
    }[stack.server]()
    assert address is not None

    async def main() -> None:
        async with stack.opened(address, 2) as pool:

            async def turn() -> None:
                async with pool.transaction() as connection:
                    await pool.ask(connection)

            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(turn())
            assert all(number == int(number) for number in pool.statistics().values())
            products = pool.products()
            assert await anext(products)
            await products.aclose()

    run(main())


PROGRAM = """
import asyncio
from workshop import stacks

async def main():
    async with stacks.tortoise(stacks.sqlite_shop(), 1):
        from workshop.tortoise_shop import Product
        assert await Product.all().count()

asyncio.run(main())
"""


def test_a_process_ends_that_has_used_tortoise_on_a_file() -> None:
    """Its connection has a thread that would keep the process, were it not closed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, timeout=PATIENCE)


def test_the_picture_tells_in_words_what_it_shows() -> None:
    storms = {
        "one, patient": Seen([(0.0, 0, 0), (1.0, 2, 6), (40.0, 2, 6)], 0),
        "another": Seen([(0.0, 0, 5), (1.0, 2, 3), (2.0, 0, 0)], 5),
    }
    picture = side_by_side(storms, 6)
    assert picture.alternative.splitlines() == [
        "one, patient: at most 6 wait at once; 6 still wait after 40 s, and 2 have a connection; 0 of 6 are served.",
        "another: at most 5 wait at once; nobody waits any more after 1 s; 5 of 6 are served.",
    ]
    assert picture.png().startswith(b"\x89PNG")
