"""The network of a lesson: it carries what comes, and when it is cut, nobody is told."""

from __future__ import annotations

import asyncio
import time

import pytest
from helpers import SELECT, run
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from workshop.database import Server
from workshop.network import IS_SILENT, Network, network_to

only_where_silent = pytest.mark.skipif(not IS_SILENT, reason="the kernel hears nothing of the cut")


async def asked(engine: AsyncEngine) -> float:
    """Ask something; how many seconds it took, or inf where two were not enough."""
    start = time.monotonic()
    try:
        async with asyncio.timeout(2), engine.connect() as connection:
            await connection.execute(SELECT)
    except TimeoutError:
        return float("inf")
    return time.monotonic() - start


def test_what_is_cut_stays_cut_and_what_is_new_goes_through(server: Server) -> None:
    async def main() -> list[float]:
        async with network_to(server.url) as network:
            url = make_url(network.url)
            assert (url.database, url.password) == (
                make_url(server.url).database,
                make_url(server.url).password,
            )
            assert url.port != make_url(server.url).port
            engine = create_async_engine(network.url, pool_size=1, max_overflow=0)
            seconds = [await asked(engine)]
            async with engine.connect() as cut:
                await cut.execute(SELECT)
                await network.cut()
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(1):
                        await cut.execute(SELECT)
            seconds.append(await asked(engine))
            network.mend()
            seconds.append(await asked(engine))
            await engine.dispose()
            return seconds

    before, while_cut, after = run(main())
    assert before < 2 and while_cut == float("inf") and after < 2


@only_where_silent
def test_the_kernel_is_silent_as_well(server: Server) -> None:
    """Nobody even accepts: an attempt to connect is not refused, it waits."""

    async def main() -> None:
        async with network_to(server.url) as network:
            await network.cut()
            url = make_url(network.url)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await asyncio.open_connection(url.host, url.port)

    run(main())


def test_nothing_is_left_of_it(server: Server) -> None:
    """At the end of the block, also of what was cut: the server has its connections back."""

    async def main() -> Network:
        async with network_to(server.url) as network:
            engine = create_async_engine(network.url)
            await asked(engine)
            await network.cut()
            await engine.dispose(close=False)
        return network

    network = run(main())
    assert not network._pumps
    with pytest.raises(OSError):
        str(network.url)  # the listener is closed, and has no port any more
