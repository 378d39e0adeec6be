"""report_on_signal in real processes: idle, deadlocked, and blocked; under asyncio, uvloop and uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import PATIENCE
from sqlalchemy.ext.asyncio import create_async_engine

from ormscope import PoolScope, report_on_signal
from workshop.database import Server

if not hasattr(signal, "SIGUSR1"):
    pytest.skip("there is no SIGUSR1 on this system", allow_module_level=True)

HERE = Path(__file__).parent


def wait_for(condition: Callable[[], object], what: str = "") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.02)


class Service:
    """A running process, and what it has written to its standard error so far."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])},
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(self.process.stderr)

    def reads(self, line: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{line}\n", "".join(self.said)

    def report(self, expected: str) -> str:
        """What it writes on the signal. The state that it is to be in may be a moment away, so it is asked again."""
        written = ""

        def asked() -> bool:
            nonlocal written
            before = len(self.said)
            self.process.send_signal(signal.SIGUSR1)
            wait_for(lambda: self.said[before:] and self.said[-1] == "\n", "a report")
            written = "".join(self.said[before:])
            return expected in written

        wait_for(asked, expected)
        return written

    def ends(self, signum: int) -> int:
        self.process.send_signal(signum)
        code = self.process.wait(PATIENCE)
        self._reader.join()
        return code

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *about: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


SERVERS = ["asyncio", "a running loop", "another thread", "uvloop", "uvicorn"]


@pytest.fixture(params=SERVERS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    return str(request.param)


@contextlib.contextmanager
def service(server: Server, state: str, kind: str) -> Iterator[Service]:
    with Service(str(HERE / "signalled_service.py"), server.url, state, kind) as running:
        running.reads("ready")
        yield running


def test_an_idle_service(server: Server, kind: str) -> None:
    with service(server, "idle", kind) as running:
        report = running.report("POOL shop: 0 of 2 checked out, 0 waiting")
        assert f"process {running.process.pid}, " in report
        running.report("HEALTHY shop")
        assert running.ends(signal.SIGTERM) in (0, -signal.SIGTERM), "uvicorn says how it was ended"
        running_down = running.process.stdout
        assert running_down is not None and running_down.read() == "shut down\n"
        assert "Traceback" not in "".join(running.said)


def test_a_deadlocked_service(server: Server, kind: str) -> None:
    with service(server, "deadlocked", kind) as running:
        report = running.report("DEADLOCK in shop")
        assert "POOL shop: 2 of 2 checked out, 2 waiting" in report
        assert "order 0" in report and "last SQL: select 1" in report
        running.ends(signal.SIGTERM)
        assert running.process.stdout is not None
        assert running.process.stdout.read() == "shut down\n", "its own handler was left alone"


@pytest.mark.parametrize("state", ["sleep", "c"])
def test_a_blocked_service(server: Server, kind: str, state: str) -> None:
    with service(server, state, kind) as running:
        line = {"sleep": "time.sleep(3600)", "c": "library.pthread_mutex_lock(mutex)"}[state]
        report = running.report("LOOP BLOCKED, and shop with it")
        assert "main thread at signalled_service.py:" in report and line in report
        assert running.process.poll() is None


# What it does to the signal


def of(text: io.StringIO) -> int:
    """How many reports were written."""
    return text.getvalue().count("ORMSCOPE, process ")


def test_one_report_for_each_signal_until_it_is_closed() -> None:
    text = io.StringIO()
    with report_on_signal(file=text):
        for number in range(1, 4):
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(lambda number=number: of(text) == number)
    assert faulthandler.unregister(signal.SIGUSR1) is False, "it was given back"
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert "No PoolScope watches a pool" in text.getvalue() or "POOL" in text.getvalue()


def test_the_reports_of_all_scopes() -> None:
    first, second = (create_async_engine("sqlite+aiosqlite://") for _ in range(2))
    scopes = [PoolScope(second, "b"), PoolScope(first, "a")]
    text = io.StringIO()
    with report_on_signal(file=text):
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: text.getvalue().endswith("\n\n"))
    written = text.getvalue()
    assert 0 < written.index("POOL a:") < written.index("POOL b:")
    for scope in scopes:
        scope.close()


def test_no_descriptor_and_no_thread_is_left() -> None:
    def those() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "ormscope signal"]

    for _ in range(20):
        report_on_signal(file=io.StringIO()).close()
    wait_for(lambda: not those())
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    for _ in range(20):
        report_on_signal(file=io.StringIO()).close()
    wait_for(lambda: not those())
    again = os.pipe()
    for descriptor in again:
        os.close(descriptor)
    assert again == (reader, writer)


def test_the_last_call_counts() -> None:
    first, second = io.StringIO(), io.StringIO()
    earlier = report_on_signal(file=first)
    with report_on_signal(file=second):
        earlier.close()
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: of(second) == 1)
        assert of(first) == 0


@contextlib.contextmanager
def handler_of_the_program(calls: list[int]) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, lambda number, _: calls.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_was_there_is_called_as_before() -> None:
    calls: list[int] = []
    text = io.StringIO()
    with handler_of_the_program(calls):
        with report_on_signal(file=text):
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(lambda: of(text) == len(calls) == 1)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: len(calls) == 2)
        assert of(text) == 1


def test_a_handler_that_came_later_has_the_signal_for_itself_and_keeps_it() -> None:
    calls: list[int] = []
    text = io.StringIO()
    watching = report_on_signal(file=text)
    with handler_of_the_program(calls):
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: len(calls) == 1)
        watching.close()
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: len(calls) == 2)
        assert of(text) == 0
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


@pytest.mark.parametrize("closes", [True, False])
def test_it_can_be_called_again_after_a_handler_came(closes: bool) -> None:
    calls: list[int] = []
    text = io.StringIO()
    watching = report_on_signal(file=text)
    with handler_of_the_program(calls):
        if closes:  # only the main thread may set a handler
            closing = threading.Thread(target=watching.close)
            closing.start()
            closing.join()
        refused: list[str] = []

        def elsewhere() -> None:
            try:
                report_on_signal(file=text)
            except RuntimeError as error:
                refused.append(str(error))

        asking = threading.Thread(target=elsewhere)
        asking.start()
        asking.join()
        (message,) = refused
        assert "in the main thread" in message and "\n" not in message
        with report_on_signal(file=text):
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(lambda: of(text) == len(calls) == 1)
    assert faulthandler.unregister(signal.SIGUSR1) is False


def test_an_event_loops_handler_for_the_same_signal() -> None:
    text = io.StringIO()

    async def main() -> None:
        seen = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, seen.set)
        with report_on_signal(file=text):
            os.kill(os.getpid(), signal.SIGUSR1)
            async with asyncio.timeout(PATIENCE):
                await seen.wait()
                await asyncio.to_thread(wait_for, lambda: of(text) == 1)
        loop.remove_signal_handler(signal.SIGUSR1)

    asyncio.run(main())


def test_another_signal() -> None:
    text = io.StringIO()
    with report_on_signal(signal.SIGUSR2, text):
        os.kill(os.getpid(), signal.SIGUSR2)
        wait_for(lambda: of(text) == 1)


def test_a_file_that_cannot_be_written_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    text = io.StringIO()
    text.close()
    with caplog.at_level(logging.ERROR, "ormscope"), report_on_signal(file=text):
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: caplog.records)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: len(caplog.records) == 2, "it goes on")
    assert "could not be written" in caplog.text


def test_a_system_without_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGUSR1")
    with pytest.raises(RuntimeError, match=r"^there is no SIGUSR1 on this system; serve .*$"):
        report_on_signal()


def test_a_system_whose_python_cannot_catch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(faulthandler, "register")
    with pytest.raises(RuntimeError, match=r"^there is no SIGUSR1 on this system; serve .*$"):
        report_on_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    "signum, error",
    [(signal.SIGSEGV, RuntimeError), (signal.SIGKILL, OSError), (1000, ValueError)],
)
def test_a_signal_that_cannot_be_had(signum: int, error: type[Exception]) -> None:
    before = {*threading.enumerate()}
    with pytest.raises(error):
        report_on_signal(signum)
    assert {*threading.enumerate()} <= before  # that of a test before this may just end


FORKING = """
import os, signal, time
from ormscope import report_on_signal
report_on_signal()
child = os.fork()
if not child:
    print(os.getpid(), flush=True)
    time.sleep(3600)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_process_writes_its_own() -> None:
    with Service("-W", "ignore", "-c", FORKING) as running:
        assert running.process.stdout is not None
        child = int(running.process.stdout.readline())
        try:
            os.kill(child, signal.SIGUSR1)
            wait_for(lambda: f"ORMSCOPE, process {child}, " in "".join(running.said))
            running.report(f"ORMSCOPE, process {running.process.pid}, ")
            assert "".join(running.said).count(f"process {child}, ") == 1
        finally:
            os.kill(child, signal.SIGKILL)
        assert running.process.wait(PATIENCE) == 0


CLOSING = """
import time
from ormscope import report_on_signal
report_on_signal().close()
print("ready", flush=True)
time.sleep(3600)
"""


def test_after_close_the_signal_does_what_it_did() -> None:
    with Service("-c", CLOSING) as running:
        running.reads("ready")
        assert running.ends(signal.SIGUSR1) == -signal.SIGUSR1
