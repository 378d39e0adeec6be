"""Memory and objects over time, and the memory limit, in a real child process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import psutil
import pytest
from leftovers import await_that, runs_of
from sqlalchemy import select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from ormscope.lab import MemoryScope, observe
from workshop.database import Server
from workshop.shop import Sale

MEBIBYTE = 2**20
PATIENCE = 20.0  # seconds; only a broken instrument takes so long


async def take_slowly(mebibytes: int) -> int:
    kept = []
    for _ in range(mebibytes):
        kept.append(b"x" * MEBIBYTE)
        await asyncio.sleep(0.002)
    await asyncio.sleep(0.1)  # a few samples more
    return len(kept)


async def load(url: str, rows: int) -> int:
    async with async_sessionmaker(create_async_engine(url))() as session:
        sales = (await session.scalars(select(Sale).limit(rows))).all()
        await asyncio.sleep(0.3)  # long enough to be seen
    return len(sales)


def test_memory_of_another_process_is_seen_from_outside() -> None:
    script = f"x = b'x' * {100 * MEBIBYTE}; print('taken', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        scope = MemoryScope(process.pid)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"taken"
        assert await_that(
            lambda: bool(scope.samples) and 100 < scope.samples[-1].mebibytes < 150, PATIENCE
        )
        process.kill()
        process.wait()
        time.sleep(0.5)
        seen = len(scope.samples)
        time.sleep(0.1)
        assert len(scope.samples) == seen, "samples of a process that is gone"
        scope.close()


def test_memory_curve_begins_where_the_run_begins() -> None:
    recording = observe(take_slowly, 60, live=False)
    assert recording.result == 60
    assert recording.memory[0].time == 0
    assert recording.memory == sorted(recording.memory)
    assert 58 < recording.extra_memory < 70


def test_a_run_that_passes_its_memory_limit_is_killed_and_its_recording_kept(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recording = observe(take_slowly, 4_000, memory_limit=50, fuse=60)
    assert recording.ended == "memory limit"
    assert recording.seconds == recording.memory[-1].time
    assert 50 < recording.extra_memory < 100
    assert recording.result is None
    assert recording.ending == capsys.readouterr().out.strip()
    assert "The memory limit of 50 MiB ended this run" in recording.summary()
    assert runs_of(psutil.Process()) == []


def test_a_run_below_its_memory_limit_is_left_alone() -> None:
    assert observe(take_slowly, 20, memory_limit=50, live=False).ended == "returned"


def test_objects_alive_in_identity_maps_are_counted(server: Server) -> None:
    recording = observe(load, server.url, 5_000, live=False, curves=("memory", "objects"))
    assert recording.result == 5_000
    assert recording.most_objects == 5_000
    assert recording.objects[-1].alive == 0
    picture = recording.plot()
    assert "Up to 5,000 objects were alive" in picture.alternative
    assert "Memory rose by up to" in picture.alternative
    assert picture.png().startswith(b"\x89PNG")
