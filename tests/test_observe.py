"""observe: a workload in a process of its own, watched, ended in time, and never left behind."""

from __future__ import annotations

import asyncio
import io
import linecache
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from leftovers import await_that, has_ended
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from ormscope.lab import Recording, observe, storm
from ormscope.lab.observe import InstrumentError, WorkloadError
from ormscope.lab.picture import _thinned
from workshop.database import Server

ROOT = Path(__file__).resolve().parent.parent


async def nested_orders(url: str, count: int, **pool: Any) -> Any:
    """`count` orders, each asking for a second connection while it holds the first."""
    engine = create_async_engine(url, **pool)
    Session = async_sessionmaker(engine)

    async def price_of() -> None:
        async with Session() as session:
            await session.execute(text("select 1"))

    async def place_order(number: int) -> None:
        async with Session() as session:
            await session.execute(text("select 1"))
            await price_of()

    outcomes = await storm(place_order, count)
    await engine.dispose()
    return outcomes


def test_a_starved_run_is_ended_by_the_fuse_and_kept(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = observe(nested_orders, server.url, 50, pool_size=5, max_overflow=0, fuse=1.5)
    assert recording.ended == "fuse"
    assert "The fuse ended this run after 1.5 s" in capsys.readouterr().out
    assert recording.verdict().cause == "deadlock"
    assert (recording.verdict().checked_out, len(recording.verdict().waiting)) == (5, 50)
    assert (recording.completed, recording.announced) == (0, 50)
    pool = recording.pools[0]
    assert (pool.capacity, pool.most_checked_out, pool.most_waiting) == (5, 5, 50)
    assert pool.filled_at is not None and pool.filled_at <= recording.deadlocks[0].at
    assert pool.last is not None and pool.last.cause == "deadlock"
    assert 1.4 < recording.seconds < 5


def test_a_healthy_run_returns_its_result(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = observe(nested_orders, server.url, 5, pool_size=6, max_overflow=0)
    assert recording.ended == "returned"
    assert recording.result == {"ok": 5}
    assert recording.outcomes == {"ok": 5}
    assert recording.verdict().cause == "healthy"
    assert recording.throughput > 0
    assert 0 < recording.slowest < recording.seconds
    assert capsys.readouterr().out == ""


def test_timeouts_are_told_apart_by_class(server: Server) -> None:
    recording = observe(
        nested_orders, server.url, 20, pool_size=2, max_overflow=0, pool_timeout=0.5, live=False
    )
    failed = recording.outcomes["sqlalchemy.exc.TimeoutError"]
    assert failed >= 18
    assert recording.timeouts == failed
    assert failed + recording.completed == 20
    one = next(one for one in recording.requests if one.outcome != "ok")
    assert "QueuePool limit of size 2 overflow 0 reached" in one.error


async def prints_and_fails(kind: str) -> None:
    print("before the failure")
    async with asyncio.TaskGroup() as group:
        group.create_task(fails(kind))


async def fails(kind: str) -> None:
    if kind == "simple":
        raise LookupError("no such order")

    class Local(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("not to be pickled")

    raise Local("stays at home")


def test_the_learner_sees_his_own_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        observe(prints_and_fails, "simple")
    assert isinstance(caught.value.exceptions[0], LookupError)
    shown = "\n".join(caught.value._render_traceback_())  # type: ignore[attr-defined]
    assert 'raise LookupError("no such order")' in shown
    assert "in prints_and_fails" in shown and "in fails" in shown
    assert "ormscope" not in shown and "taskgroups.py" not in shown
    assert "before the failure" in capsys.readouterr().out


def test_an_exception_that_cannot_travel_is_told_as_text() -> None:
    with pytest.raises(WorkloadError, match="unhandled errors in a TaskGroup"):
        observe(prints_and_fails, "local")


def test_an_open_engine_is_refused_in_one_clear_line(server: Server) -> None:
    engine = create_async_engine(server.url)

    async def uses_a_global_engine() -> None:
        async with engine.connect():
            pass

    with pytest.raises(ValueError, match="create the engine, the sessions"):
        observe(uses_a_global_engine)


async def blocks_the_loop() -> None:
    time.sleep(60)  # noqa: ASYNC251 - what it does wrong is what is tested


def test_a_blocked_loop_is_ended_too_and_its_lag_was_seen() -> None:
    recording = observe(blocks_the_loop, fuse=1, live=False)
    assert recording.ended == "fuse"
    assert max(lag for _, lag in recording.loop_lag) > 0.5


async def dies() -> None:
    os._exit(3)


def test_a_process_that_dies_is_said_to_have_died() -> None:
    recording = observe(dies, live=False)
    assert recording.ended == "died"
    with pytest.raises(ValueError, match="no verdict"):
        recording.verdict()


def synchronous() -> int:
    return os.getpid()


def test_an_ordinary_function_runs_in_another_process() -> None:
    assert observe(synchronous, live=False).result != os.getpid()


def test_places_in_a_cell_are_named_by_function_line_and_text(server: Server) -> None:
    """A cell's function, compiled as ipykernel does it, under the name of a file that never existed."""
    source = textwrap.dedent(
        """
        from sqlalchemy.ext.asyncio import create_async_engine
        from ormscope.lab import storm
        async def order(engine):
            async with engine.connect():
                async with engine.connect() as second:
                    pass
        async def main(url):
            engine = create_async_engine(url, pool_size=1, max_overflow=0)
            await storm(lambda number: order(engine), 1)
        """
    )
    filename = os.path.join(os.sep, "nowhere", "ipykernel_1", "2.py")
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    cell: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, filename, "exec"), cell)
    report = str(observe(cell["main"], server.url, fuse=1, live=False).verdict())
    assert "order, line 5: async with engine.connect():" in report
    assert "order, line 6: async with engine.connect() as second:" in report
    assert "ipykernel" not in report and "nowhere" not in report


SCRIPT = """
import sys
sys.path.insert(0, "tests")
from ormscope.lab import observe
from tests.test_observe import nested_orders
print("ready", flush=True)
recording = observe(nested_orders, sys.argv[1], 20, pool_size=2, max_overflow=0, fuse=60)
print(recording.ended, recording.verdict().cause, recording.pools[0].most_waiting, flush=True)
"""


def starved_script(
    server: Server,
) -> tuple[subprocess.Popen[str], list[psutil.Process], Callable[[], set[int]]]:
    """A script whose observed run is starved, the processes that it started, and who asks for its backends."""
    before = backends(server)
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, server.url],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    wait_until(lambda: len(backends(server) - before) >= 2)
    children = psutil.Process(script.pid).children(recursive=True)
    return script, children, lambda: backends(server) - before


def backends(server: Server) -> set[int]:
    """The process ids of the server's client connections, this one left out."""

    async def ask() -> set[int]:
        engine = create_async_engine(server.url)
        async with engine.connect() as connection:
            found = await connection.scalars(
                text(
                    "select pid from pg_stat_activity"
                    " where backend_type = 'client backend' and pid <> pg_backend_pid()"
                )
            )
            pids = set(found)
        await engine.dispose()
        return pids

    return asyncio.run(ask())


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> float:
    """Wait for a condition; return how long that took, in seconds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it never came true"
        time.sleep(0.02)
    return time.monotonic() - started


def test_an_interrupt_ends_the_run_at_once_and_keeps_it(server: Server) -> None:
    script, children, its_backends = starved_script(server)
    assert children
    os.kill(script.pid, signal.SIGINT)
    sent = time.monotonic()
    out, _ = script.communicate(timeout=20)
    assert time.monotonic() - sent < 3
    assert "interrupted deadlock 20" in out
    assert script.returncode == 0
    assert await_that(lambda: all(map(has_ended, children)), 3)
    wait_until(lambda: not its_backends(), 3)


def test_nothing_is_left_when_the_parent_is_killed(server: Server) -> None:
    script, children, its_backends = starved_script(server)
    assert children
    script.kill()
    script.communicate(timeout=20)
    assert await_that(lambda: all(map(has_ended, children)), 3)
    wait_until(lambda: not its_backends(), 3)


def test_pictures_carry_what_the_data_say(server: Server) -> None:
    starved = observe(
        nested_orders, server.url, 20, pool_size=3, max_overflow=0, fuse=1, live=False
    )
    fine = observe(nested_orders, server.url, 2, pool_size=3, max_overflow=0, live=False)
    picture = starved.plot(fine, titles=["broken", "fixed"])
    assert picture.png().startswith(b"\x89PNG")
    assert (
        "broken. pool: up to 3 of 3 checked out, 3 at the end; up to 20 waiting"
        in picture.alternative
    )
    assert "fixed. pool:" in picture.alternative and "2 of 2 completed" in picture.alternative
    data, metadata = picture._repr_mimebundle_()
    assert data["text/plain"] == "<Picture: broken | fixed>"
    assert metadata["image/png"]["alt"] == picture.alternative
    graph = starved.plot_waits()
    assert "3 tasks each hold one connection" in graph.alternative
    assert "17 tasks that hold nothing" in graph.alternative
    with pytest.raises(ValueError, match="no deadlock was seen"):
        fine.plot_waits()


def test_an_empty_recording_can_be_drawn() -> None:
    assert Recording("nothing").plot().png().startswith(b"\x89PNG")


def test_live_drawing_happens_only_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    observe(synchronous)
    assert out.getvalue() == ""


def test_a_long_curve_is_thinned_without_losing_its_peaks() -> None:
    times = [number / 1000 for number in range(20_000)]
    values = [5] * len(times)
    values[7_777], values[12_345] = 19, 0
    kept_times, kept = _thinned(times, values)
    assert len(kept) < 4_000
    assert (kept_times[0], kept_times[-1]) == (times[0], times[-1])
    assert kept_times == sorted(kept_times)
    assert {7.777: 19, 12.345: 0}.items() <= dict(zip(kept_times, kept, strict=True)).items()
    assert _thinned(times[:100], values[:100]) == (times[:100], values[:100])


async def breaks_its_instruments(url: str) -> str:
    from ormscope import PoolScope

    def fail(*about: Any, **more: Any) -> None:
        raise ZeroDivisionError("the instrument's own")

    PoolScope.trouble = fail  # type: ignore[method-assign]
    engine = create_async_engine(url)
    async with engine.connect():
        await asyncio.sleep(0.3)
    return "the workload ended well"


def test_instruments_that_fail_are_not_silent(server: Server) -> None:
    with pytest.raises(InstrumentError, match="ZeroDivisionError: the instrument's own"):
        observe(breaks_its_instruments, server.url, live=False)
