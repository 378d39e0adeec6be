"""observe: a workload in a process of its own, watched, ended in time, and never left behind."""

from __future__ import annotations

import asyncio
import functools
import io
import linecache
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from IPython.core.formatters import DisplayFormatter
from leftovers import await_that, has_ended
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from ormscope.lab import Recording, observe, storm
from ormscope.lab.observe import InstrumentError, WorkloadError
from ormscope.lab.picture import stored_picture
from ormscope.lab.sending import UnsendableError
from workshop.database import Server
from workshop.shop import Product

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
    failed = next(failed for failed in recording.requests if failed.outcome != "ok")
    assert "QueuePool limit of size 2 overflow 0 reached" in failed.error


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


# Mistakes: each is told in one line that says what to do


def refused(workload: Any, *arguments: Any, **options: Any) -> str:
    """The one line that a notebook shows for what cannot be run."""
    with pytest.raises(UnsendableError) as caught:
        observe(workload, *arguments, live=False, **options)
    (line,) = caught.value._render_traceback_()  # type: ignore[attr-defined]
    assert line == str(caught.value)
    return str(line)


async def rush(count: int = 1) -> int:
    return count


async def stream() -> AsyncIterator[int]:
    yield 1


def in_a_cell(source: str, **known: Any) -> dict[str, Any]:
    """What a cell of a notebook defines, among names that other cells have given."""
    namespace: dict[str, Any] = {"__name__": "__main__", **known}
    exec(textwrap.dedent(source), namespace)
    return namespace


USES_GLOBALS = """
def inner():
    return [(lambda: {name})() for _ in range(1)]

async def workload():
    return inner()
"""


@pytest.mark.filterwarnings("error")
def test_a_call_instead_of_the_function_is_refused() -> None:
    line = refused(rush())
    assert line.startswith("pass the function, not its result: observe(rush), not observe(rush())")
    assert refused(stream()).startswith("pass the function, not its result: observe(stream)")


def test_what_is_no_workload_is_refused() -> None:
    assert refused(7) == "observe wants a function to run, not int; pass it without ()."
    assert refused(stream).startswith("stream has a `yield`, so calling it runs nothing")


@pytest.mark.parametrize("name", ["engine", "rows", "guard"])
def test_what_cannot_be_sent_is_named(name: str, server: Server) -> None:
    """Through the functions, nested ones too, that lead to it; what else they use can be sent."""
    known = {"engine": create_async_engine(server.url), "rows": stream(), "guard": threading.Lock()}
    kind = type(known[name]).__name__
    workload = in_a_cell(USES_GLOBALS.format(name=name), **known)["workload"]
    assert f"workload cannot be sent to its own process, for the global {name} ({kind}) cannot" in (
        refused(workload)
    )
    assert "hand it plain values" in refused(workload)


@pytest.mark.parametrize("statement", [select(Product.title), insert(Product)])
def test_a_statement_of_the_orm_is_sent(statement: Any) -> None:
    """Also one that only a nested function uses."""
    source = USES_GLOBALS.format(name="str(statement)")
    workload = in_a_cell(source, statement=statement)["workload"]
    assert observe(workload, live=False).result == [str(statement)]


def test_what_cannot_be_sent_is_named_wherever_it_is() -> None:
    guard = threading.Lock()

    async def waits() -> None:
        guard.acquire()

    assert "for the variable guard (lock) cannot" in refused(waits)
    assert "for argument 2 (lock) cannot" in refused(rush, 1, guard)
    assert "for argument count (lock) cannot" in refused(rush, count=guard)
    assert "rush cannot be sent to its own process, for an argument of rush (lock) cannot" in (
        refused(partial(rush, guard))
    )


def test_an_executor_and_a_cache_arrive_as_new_ones() -> None:
    """What is in them stays behind: no thread, no value that somebody has asked for."""
    executor = ThreadPoolExecutor(3)
    numbers: list[int] = []

    @functools.lru_cache(maxsize=5)
    def noted(number: int) -> int:
        numbers.append(number)
        return number

    async def uses_both() -> tuple[int, int | None, list[int]]:
        loop = asyncio.get_running_loop()
        return (
            await loop.run_in_executor(executor, noted, 1) + noted(1),
            noted.cache_info().maxsize,
            numbers,
        )

    noted(1)
    numbers.clear()
    assert observe(uses_both, live=False).result == (2, 5, [1])


async def returns_a_lock() -> Any:
    return threading.Lock()


def test_a_result_that_cannot_be_sent_back() -> None:
    line = refused(returns_a_lock)
    assert line.startswith("returns_a_lock returned what cannot be sent back, lock (")
    assert line.endswith("return plain values.")


def test_arguments_may_be_bound() -> None:
    recording = observe(partial(rush, 7), live=False)
    assert (recording.title, recording.result) == ("rush", 7)


def asks_for_a_name() -> str:
    return input("Your name? ")


def stops_to_look() -> None:
    breakpoint()


@pytest.mark.parametrize("workload", [asks_for_a_name, stops_to_look])
def test_there_is_no_keyboard(workload: Callable[[], object]) -> None:
    """It is said at once, not after the fuse; and the parent's own pipe is not read."""
    with pytest.raises(EOFError, match="there is no keyboard in the process of a run") as caught:
        observe(workload, live=False)
    shown = "\n".join(caught.value._render_traceback_())  # type: ignore[attr-defined]
    assert f"in {workload.__name__}" in shown


async def requests_that_stop_to_look() -> None:
    async def request(number: int) -> None:
        breakpoint()

    await storm(request, 3)


def test_there_is_no_keyboard_in_a_storm_either(capsys: pytest.CaptureFixture[str]) -> None:
    observe(requests_that_stop_to_look)
    printed = capsys.readouterr().out
    assert printed.startswith("3 of 3 requests failed: EOFError: there is no keyboard in the")
    assert len(printed.splitlines()) == 1


ADVICE = "If a cell defines it, run that cell first, and then this one again; else mend the name."


def test_an_unknown_name_speaks_of_the_cell_to_run() -> None:
    workload = in_a_cell("async def workload():\n    return await price_of()")["workload"]
    with pytest.raises(NameError, match="'price_of' is not defined") as caught:
        observe(workload, live=False)
    assert caught.value._render_traceback_()[-1] == ADVICE  # type: ignore[attr-defined]


def test_an_unknown_name_in_a_storm_speaks_of_the_cell_to_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = """
    async def place_order(number):
        await price_of()

    async def workload():
        await storm(place_order, 3)
    """
    observe(in_a_cell(source, storm=storm)["workload"])
    assert capsys.readouterr().out == (
        f"3 of 3 requests failed: NameError: name 'price_of' is not defined. {ADVICE}\n"
    )


def shown(value: Any) -> str:
    """What a notebook shows where a value is a cell's last line."""
    data, _ = DisplayFormatter().format(value)
    assert set(data) == {"text/plain"}
    return str(data["text/plain"])


def test_a_recording_and_its_verdict_are_shown_as_their_reports(server: Server) -> None:
    starved = observe(
        nested_orders, server.url, 50, pool_size=5, max_overflow=0, fuse=1, live=False
    )
    assert shown(starved.verdict()) == str(starved.verdict())
    assert shown(starved.verdict()).startswith("DEADLOCK in pool")
    assert shown(starved) == f"nested_orders\n{starved.summary()}\n{starved.verdict()}"
    assert shown([starved.verdict()]).startswith("[DEADLOCK in pool")
    assert repr(starved) == "<Recording 'nested_orders': 0 of 50 requests completed>"
    assert len(repr(starved.pools)) < 1000
    assert shown(observe(rush, live=False)) == "rush"


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


SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


def starts_a_process(**options: Any) -> int:
    """It has the ends of the run's pipes, as one of a ProcessPoolExecutor has."""
    return subprocess.Popen(SLEEPER, **options).pid


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and not has_ended(psutil.Process(pid))


def test_what_a_run_has_started_ends_with_it() -> None:
    recording = observe(starts_a_process, live=False)
    assert recording.ended == "returned"
    assert await_that(lambda: not runs(recording.result), 5)


def test_a_process_that_has_left_the_group_is_not_waited_for() -> None:
    before = time.monotonic()
    recording = observe(starts_a_process, live=False, start_new_session=True)
    lasted = time.monotonic() - before
    assert runs(recording.result)
    os.kill(recording.result, signal.SIGKILL)
    assert recording.ended == "returned" and lasted < 20


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
    assert repr(picture) == "<Picture: broken | fixed>"
    assert stored_picture(picture._repr_html_()) == (picture.alternative, picture.png())
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
