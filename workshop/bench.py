"""`python3 lab.py bench`: what the instruments cost, as ratios of runs on the same machine in the same minutes.

Tests assert no speeds; this prints them, for whoever changes the instruments.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME
from nbclient import NotebookClient
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from ormscope import Recording, observe, storm
from ormscope.storm import log
from workshop.database import start_server
from workshop.shop import Product

BANANAS = 1082185
REQUESTS = 6_000
PAIRS = 9
DEADLOCKS = 20

Sessions = async_sessionmaker[AsyncSession]


async def _look_up(sessions: Sessions, number: int) -> None:
    async with sessions() as session:
        await session.scalar(select(Product.unit_price).where(Product.sku == BANANAS))


async def _look_up_nested(sessions: Sessions, number: int) -> None:
    async with sessions() as session:
        await session.scalar(select(Product.unit_price).where(Product.sku == BANANAS))
        await _look_up(sessions, number)


async def busy(url: str) -> None:
    """A storm of small requests on a pool of 20, for a few seconds."""
    sessions = async_sessionmaker(create_async_engine(url, pool_size=20, max_overflow=0))
    await storm(partial(_look_up, sessions), REQUESTS)


async def starve(url: str) -> None:
    """A storm that deadlocks, on a pool whose 20 connections are open already."""
    engine = create_async_engine(url, pool_size=20, max_overflow=0, pool_timeout=0.5)
    sessions = async_sessionmaker(engine)
    await storm(partial(_look_up, sessions), 200)
    await storm(partial(_look_up_nested, sessions), 200)


def _bare(url: str) -> float:
    """The storm's throughput in a fresh process without any instrument, in requests per second."""
    script = f"import workshop.bench as bench; bench.print_bare({url!r})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def print_bare(url: str) -> None:
    """Run the storm in this process and print its throughput; what `_bare` starts."""
    asyncio.run(busy(url))
    print(Recording("bare", requests=list(log.ended)).throughput)


def _observed(url: str) -> float:
    """The storm's throughput when a notebook cell observes it and draws it live, in requests per second."""
    cell = nbformat.v4.new_code_cell(
        f"from ormscope import observe\nfrom workshop.bench import busy\nprint(observe(busy, {url!r}).throughput)"
    )
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, kernel_name=NATIVE_KERNEL_NAME, timeout=300).execute()
    texts = [one.text for one in notebook.cells[0].outputs if one.output_type == "stream"]
    return float(texts[-1])


def _detection(url: str) -> float:
    """Seconds from the moment that the last free connection was taken to the verdict."""
    recording = observe(starve, url, live=False)
    verdict, samples = recording.deadlocks[0], recording.pools[0].samples
    full = [
        after.time
        for before, after in itertools.pairwise(samples)
        if before.checked_out < verdict.checked_out == after.checked_out
        and after.time <= verdict.at
    ]
    return verdict.at - full[-1]


def _server_start() -> float:
    started = time.perf_counter()
    start_server().stop()
    return time.perf_counter() - started


def main() -> int:
    """Measure, and print one line a figure; return the exit status."""
    with tempfile.TemporaryDirectory() as cold:
        warm = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = str(Path(cold))
        first = _server_start()
        second = statistics.median(_server_start() for _ in range(PAIRS))
        if warm is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = warm
    print(
        f"server: first start and stop {first:.2f} s, second {second:.2f} s ({second / first:.2f} of the first)"
    )
    server = start_server()
    try:
        pairs = [(_bare(server.url), _observed(server.url)) for _ in range(PAIRS)]
        ratio = statistics.median(observed / bare for bare, observed in pairs)
        print(
            f"storm: {ratio:.2f} of the bare throughput when observed with live drawing"
            f" (median of {PAIRS} pairs, wanted: at least 0.90; bare {pairs[-1][0]:.0f} requests per second)"
        )
        delays = [_detection(server.url) for _ in range(DEADLOCKS)]
        print(
            f"deadlock: {statistics.median(delays) * 1000:.0f} ms from the last free connection to the verdict"
            f" (median of {DEADLOCKS}, longest {max(delays) * 1000:.0f} ms, wanted: a median of at most 50)"
        )
    finally:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
