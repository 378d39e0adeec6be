"""`python3 lab.py bench`: what the instruments cost, as ratios of runs on the same machine in the same minutes.

Tests assert no speeds; this prints them, for whoever changes the instruments.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gc
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME
from nbclient import NotebookClient
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from ormscope import PoolScope
from ormscope.lab import MemoryScope, Recording, observe, storm
from ormscope.lab.storm import log
from workshop.database import start_server
from workshop.kernels import SETTINGS
from workshop.shop import Product, Sale

BANANAS = 1082185
REQUESTS = 6_000
PAIRS = 9
DEADLOCKS = 20
BATCH = 1_000
CHECKOUTS = 5_000  # in one storm
ROUNDS = 3  # of what lasts long enough to be measured well at once

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
        f"from ormscope.lab import observe\nfrom workshop.bench import busy\nprint(observe(busy, {url!r}).throughput)"
    )
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, kernel_name=NATIVE_KERNEL_NAME, timeout=300, config=SETTINGS).execute()
    texts = [output.text for output in notebook.cells[0].outputs if output.output_type == "stream"]
    return float(texts[-1])


def _detection(url: str) -> tuple[float, float]:
    """Seconds to the verdict: since the last holder stood in line, so that there was a deadlock, and since the last
    free connection was taken, which all holders need to ask for a second.
    """
    recording = observe(starve, url, live=False)
    verdict, samples = recording.deadlocks[0], recording.pools[0].samples
    changes = [pair for pair in itertools.pairwise(samples) if pair[1].time <= verdict.at]
    joined = [after.time for before, after in changes if before.waiting < after.waiting]
    full = [
        after.time
        for before, after in changes
        if before.checked_out < verdict.checked_out == after.checked_out
    ]
    return verdict.at - joined[-1], verdict.at - full[-1]


async def _check_out(engine: AsyncEngine, tasks: int) -> tuple[float, float]:
    """A saturated storm of the smallest statement: checkouts per second, and CPU microseconds for each."""

    async def work() -> None:
        for _ in range(times):
            async with engine.connect() as connection:
                await connection.execute(text("select 1"))

    times = max(2, CHECKOUTS // tasks)
    gc.collect()
    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work() for _ in range(tasks)))
    count = tasks * times
    return count / (time.perf_counter() - started), (time.process_time() - cpu) / count * 1e6


async def _attached(url: str, tasks: int) -> tuple[float, float, float]:
    """Throughput with a PoolScope as a share of that without; CPU microseconds that it adds, and without it."""
    bare, watched = (
        create_async_engine(url, pool_size=20, max_overflow=0, pool_timeout=60) for _ in range(2)
    )
    scope = PoolScope(watched)
    await _check_out(bare, 40)
    await _check_out(watched, 40)
    shares, added, without = [], [], []
    for number in range(PAIRS):
        # In turns, or what the machine does meanwhile would fall on one of them.
        order = (bare, watched) if number % 2 else (watched, bare)
        found = {engine: await _check_out(engine, tasks) for engine in order}
        shares.append(found[watched][0] / found[bare][0])
        added.append(found[watched][1] - found[bare][1])
        without.append(found[bare][1])
    scope.close()
    await bare.dispose()
    await watched.dispose()
    return statistics.median(shares), statistics.median(added), statistics.median(without)


def _server_start() -> float:
    started = time.perf_counter()
    start_server().stop()
    return time.perf_counter() - started


async def export_everything(url: str) -> int:
    """Load all sales lines as objects, and return how many there are."""
    async with AsyncSession(create_async_engine(url)) as session:
        return len((await session.scalars(select(Sale).order_by(Sale.id))).all())


async def export_columns(url: str) -> float:
    """Stream five columns of all sales lines into a CSV file; return rows per second, without the connecting."""
    columns = (Sale.id, Sale.basket_id, Sale.sku, Sale.quantity, Sale.sales_value)
    statement = select(*columns).order_by(Sale.id).execution_options(yield_per=BATCH)
    async with create_async_engine(url).connect() as connection:
        with tempfile.TemporaryFile("w", newline="") as file:
            write, started, rows = csv.writer(file).writerows, time.perf_counter(), 0
            async for batch in (await connection.stream(statement)).partitions():
                write(batch)
                rows += len(batch)
            return rows / (time.perf_counter() - started)


async def export_raw(url: str, by_row: bool) -> float:
    """The same with asyncpg's own cursor: iterated, prefetching as many rows, or fetched in batches of as many."""
    query = "SELECT id, basket_id, sku, quantity, sales_value FROM sales ORDER BY id"
    async with create_async_engine(url).connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        with tempfile.TemporaryFile("w", newline="") as file:
            writer, started, rows = csv.writer(file), time.perf_counter(), 0
            async with driver.transaction():
                if by_row:
                    async for row in driver.cursor(query, prefetch=BATCH):
                        writer.writerow(row)
                        rows += 1
                else:
                    cursor = await driver.cursor(query)
                    while batch := await cursor.fetch(BATCH):
                        writer.writerows(batch)
                        rows += len(batch)
            return rows / (time.perf_counter() - started)


def print_export(url: str) -> None:
    """Run the streamed export in this process and print its speed; what `_export` starts."""
    print(asyncio.run(export_columns(url)))


def _export(url: str, sampled: bool) -> float:
    """The streamed export's rows per second in a fresh process, which MemoryScope watches or not."""
    script = f"import workshop.bench as bench; bench.print_export({url!r})"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        scope = MemoryScope(process.pid) if sampled else None
        assert process.stdout is not None
        speed = float(process.stdout.read())
        if scope is not None:
            scope.close()
    return speed


def _exports(url: str, large_url: str) -> None:
    """Measure and print what the exports of lesson 04 need, and what watching them costs."""

    def speed(export: Callable[..., object], *arguments: bool) -> float:
        return float(observe(export, large_url, *arguments, live=False, fuse=120).result)

    runs = [
        (speed(export_columns), speed(export_raw, True), speed(export_raw, False))
        for _ in range(PAIRS)
    ]
    by_row = statistics.median(streamed / raw for streamed, raw, _ in runs)
    in_batches = statistics.median(streamed / raw for streamed, _, raw in runs)
    print(
        f"export: {by_row:.2f} of the rows per second of asyncpg's own cursor when columns are streamed (median of"
        f" {PAIRS} pairs, wanted: at least 0.90; {in_batches:.2f} of those of its fetch(); {runs[-1][0]:.0f} rows"
        f" per second)"
    )
    peaks = {
        name: statistics.median(
            observe(export, address, live=False, fuse=120).extra_memory for _ in range(times)
        )
        for name, export, address, times in (
            ("streamed", export_columns, url, PAIRS),
            ("large", export_columns, large_url, ROUNDS),
            ("all", export_everything, url, ROUNDS),
        )
    }
    print(
        f"export: {peaks['large'] / peaks['streamed']:.2f} of the peak memory when the streamed rows are six times"
        f" as many (wanted: at most 1.30; the peak is {peaks['streamed']:.1f} MiB)"
    )
    print(
        f"export: {peaks['all'] / peaks['streamed']:.0f} times the streamed peak when .all() loads the objects"
        f" (wanted: at least 20; the peak is {peaks['all']:.0f} MiB)"
    )
    ratio = statistics.median(
        _export(large_url, sampled=True) / _export(large_url, sampled=False) for _ in range(PAIRS)
    )
    print(
        f"memory: {ratio:.2f} of the rows per second when MemoryScope samples the export"
        f" (median of {PAIRS} pairs, wanted: at least 0.97)"
    )


def main() -> int:
    """Measure, and print one line a figure; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python3 lab.py bench",
        description="Measure what the instruments cost, one line a figure. Takes some ten minutes; for true figures,"
        " let nothing else run meanwhile.",
    )
    parser.parse_args()
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
        for tasks in (40, 200, 2_000):
            share, added, without = asyncio.run(_attached(server.url, tasks))
            print(
                f"PoolScope: {share:.2f} of the bare throughput with {tasks} tasks on 20 connections (median of {PAIRS}"
                f" pairs, wanted: at least 0.97; {added:.0f} µs of CPU on {without:.0f} for a checkout)"
            )
        pairs = [(_bare(server.url), _observed(server.url)) for _ in range(PAIRS)]
        ratio = statistics.median(observed / bare for bare, observed in pairs)
        print(
            f"storm: {ratio:.2f} of the bare throughput when observed with live drawing"
            f" (median of {PAIRS} pairs, wanted: at least 0.90; bare {pairs[-1][0]:.0f} requests per second)"
        )
        delays, since_full = zip(*(_detection(server.url) for _ in range(DEADLOCKS)), strict=True)
        print(
            f"deadlock: {statistics.median(delays) * 1000:.0f} ms from the last holder who stands in line to the"
            f" verdict (median of {DEADLOCKS}, longest {max(delays) * 1000:.0f} ms, wanted: a median of at most 50);"
            f" {statistics.median(since_full) * 1000:.0f} ms from the last free connection, with the workload's own"
            " queries"
        )
        large = start_server(scale=6)
        try:
            _exports(server.url, large.url)
        finally:
            large.stop()
    finally:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
