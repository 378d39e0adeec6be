"""The console: its socket against foreign files, garbage and crowds, and its view on real services."""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from console_picture import PICTURE, ROOT, lines_of, service, shows
from helpers import PATIENCE, SELECT, cancelled, price_of, run, until
from leftovers import await_that
from sqlalchemy.ext.asyncio import create_async_engine
from terminals import needs_tmux, terminal

from ormscope import Console, LoopScope, PoolScope, console, console_folder, serve_console
from ormscope.__main__ import main as command
from ormscope.console_client import Connection, ConsoleError, NoAnswerError, address_of, offers
from ormscope.console_view import ConsoleApp
from workshop.database import Server

needs_unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no Unix sockets")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for consoles that is only this test's; its name is short, as a socket's must be."""
    with tempfile.TemporaryDirectory() as made:
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        for name in ("TMPDIR", "TEMP"):  # the services'; pytest and the database keep their own
            monkeypatch.setenv(name, made)
        monkeypatch.setattr(console_folder, "gettempdir", lambda: made)
        yield Path(made, f"ormscope-{os.geteuid()}" if hasattr(os, "geteuid") else "ormscope")


@pytest.fixture(params=["unix", "port"])
def offered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Console]:
    """A console of this process: on a Unix socket, and as where there are none."""
    if request.param == "port":
        monkeypatch.setattr(console, "_has_unix_sockets", False)
    made = serve_console()
    yield made
    made.close()


def address(offered: Console) -> Path:
    assert offered.address is not None, offered.failure
    return offered.address


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ormscope-console"]


def raw(offered: Console, *sent: bytes, with_token: bool = True) -> bytes:
    """What comes back on a new connection until it is closed, or a line is complete."""
    connection, prefix = console.connect(address(offered), 10)
    received = b""
    with connection:
        try:
            for number, part in enumerate(sent):
                connection.sendall(prefix.encode() * (with_token and number == 0) + part)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was refused before all of it was sent
        try:
            while not received.endswith(b"\n") and (more := connection.recv(65536)):
                received += more
        except ConnectionResetError:
            pass  # so does a port that is closed before all was read
    return received


# The socket


def test_the_address_is_this_users_alone(offered: Console, folder: Path) -> None:
    path = address(offered)
    assert path.parent == folder
    assert path.stem == str(os.getpid())
    if os.name == "posix":
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        assert stat.S_IMODE(folder.lstat().st_mode) == 0o700
    (found,) = offers()
    assert (found.pid, found.address, found.lack) == (os.getpid(), path, "")
    assert address_of(str(os.getpid())) == address_of(str(path)) == path


@needs_unix
def test_the_logins_own_folder_is_preferred(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Unless it is somebody else's, as under sudo; who looks for a console looks at both."""
    login = folder.with_name("login")
    login.mkdir()
    early = serve_console()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(login))
    late = serve_console()
    assert (address(early).parent, address(late).parent) == (folder, login / "ormscope")
    assert {offer.address for offer in offers()} == {early.address, late.address}
    late.close()
    early.close()
    if os.geteuid() == 0:
        os.chown(login, 65534, 65534)
        assert console_folder.folders() == [folder]


@pytest.mark.skipif(os.name != "posix", reason="the user's own folder has no modes")
@pytest.mark.parametrize("trap", ["link", "file", "open", "foreign"])
def test_a_planted_folder_is_refused(
    trap: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if trap == "link":
        folder.symlink_to(tmp_path)
    elif trap == "file":
        folder.write_text("")
    else:
        folder.mkdir(mode=0o700)
    if trap == "open":
        folder.chmod(0o777)
    if trap == "foreign":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(folder, 65534, 65534)
    offered = serve_console()
    assert offered.address is None and offered.failure is not None
    assert str(folder) in offered.failure
    assert len(caplog.records) == 1
    assert list(tmp_path.iterdir()) == [] and threads() == []
    with pytest.raises(ConsoleError, match=folder.name):
        offers()
    offered.close()


@pytest.mark.parametrize("trap", ["link", "file"])
@needs_unix
def test_a_planted_socket_is_refused_and_left_alone(trap: str, folder: Path) -> None:
    folder.mkdir(mode=0o700)
    planted = folder / f"{os.getpid()}.sock"
    if trap == "link":
        planted.symlink_to("elsewhere")
    else:
        planted.write_text("mine")
    offered = serve_console()
    assert offered.address is None and "PermissionError" in str(offered.failure)
    assert os.path.lexists(planted)


def test_what_a_killed_process_left_is_removed(folder: Path, server: Server) -> None:
    with service("busy", server.url) as (process, left):
        process.kill()
        process.wait()
    assert left.exists() and offers() == []
    taken = left.rename(left.with_name(f"{os.getpid()}{left.suffix}"))
    offered = serve_console()
    assert offered.address == taken, "the dead one's place"
    offered.close()
    assert list(folder.iterdir()) == []


def test_old_leftovers_of_others_are_removed(folder: Path, server: Server) -> None:
    with service("busy", server.url) as (process, left):
        process.kill()
        process.wait()
    os.utime(left, (0, 0), follow_symlinks=False)
    (folder / "notes.txt").write_text("not a console's")
    serve_console().close()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_two_consoles_of_one_process(offered: Console) -> None:
    second = serve_console()
    assert address(second) != address(offered)
    with pytest.raises(ConsoleError, match="say which"):
        address_of(str(os.getpid()))
    second.close()
    assert address_of(str(os.getpid())) == address(offered)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\n",
        b"\xff\xfe\x00\n",
        b"state\nstate\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"report\n",
        b"report 7f\n",
        b"x" * 513,
        b"x" * 4_000_000,
        b"[" * 400 + b"\n",
    ],
    ids=str,
)
def test_garbage_draws_one_error_and_no_more(offered: Console, garbage: bytes) -> None:
    answer = raw(offered, garbage)
    assert not answer or set(json.loads(answer)) == {"error"}
    assert b"pid" in raw(offered, b"st", b"ate\n"), "the next one is served"


def test_a_port_asks_for_its_token(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(console, "_has_unix_sockets", False)
    offered = serve_console()
    request.addfinalizer(offered.close)
    for attempt in (b"state\n", b"wrong state\n", b"\xff state\n"):
        assert json.loads(raw(offered, attempt, with_token=False)) == {
            "error": "the token is wrong"
        }
    address(offered).write_text("[1]")
    with pytest.raises(ConsoleError, match="does not name a port"):
        Connection(address(offered)).ask("state")


def test_a_crowd_is_told_to_wait(offered: Console) -> None:
    crowd = [Connection(address(offered)) for _ in range(8)]
    for client in crowd:
        assert client.ask("state")["pid"] == os.getpid()
    assert b"8 consoles are connected" in raw(offered, b"state\n") or not raw(offered, b"state\n")
    crowd[0].close()
    assert await_that(lambda: b"pid" in raw(offered, b"state\n"), 10)
    for client in crowd[1:]:
        assert client.ask("state")["pid"] == os.getpid(), "the crowd's own are still served"
        client.close()


def test_whoever_does_not_read_holds_up_nobody(offered: Console) -> None:
    """Nor does the answer for him grow: he is not read from before he has read it."""
    lazy, prefix = console.connect(address(offered), 10)
    lazy.sendall(f"{prefix}state\n".encode())
    for _ in range(20):
        assert b"pid" in raw(offered, b"state\n")
    lazy.close()


def test_closed_without_trace(offered: Console, folder: Path) -> None:
    asking = Connection(address(offered))
    asking.ask("state")
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    offered.close()
    offered.close()
    assert offered.address is None and list(folder.iterdir()) == []
    assert threads() == []
    with pytest.raises(ConsoleError):
        asking.ask("state")
    if descriptors:  # listener, two to wake, the selector, both ends of the connection
        assert await_that(lambda: len(os.listdir("/proc/self/fd")) == descriptors - 6, 10)


def test_an_ending_process_removes_it(folder: Path) -> None:
    script = "import ormscope; print(ormscope.serve_console().address)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert str(folder) in done.stdout and done.stderr == ""
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_does_not_inherit_it(folder: Path) -> None:
    """It has no descriptor of it, does not remove it at its end, and may have a console of its own."""
    script = """
import os, sys, ormscope
from ormscope.console_client import Connection, offers
offered = ormscope.serve_console()
asking = Connection(offered.address)
asking.ask("state")
before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
child = os.fork()
if not child:
    after = os.listdir("/proc/self/fd") if before else []
    assert len(after) == max(0, len(before) - 5), (before, after)  # `asking` stays
    assert offered.address is None
    own = ormscope.serve_console()
    assert Connection(own.address).ask("state")["pid"] == os.getpid()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert [offer.pid for offer in offers()] == [os.getpid()]
assert asking.ask("state")["pid"] == os.getpid()
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_fails_in_it_is_logged_once(
    offered: Console, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(console, "state_of", broken)
    for _ in range(3):
        assert json.loads(raw(offered, b"state\n")) == {"error": "ZeroDivisionError: a bug"}
    assert [record.name for record in caplog.records] == ["ormscope"]
    monkeypatch.setattr(Console, "_attend", broken)
    connection, _ = console.connect(address(offered), 10)
    with connection:
        connection.sendall(b"state\n")
        assert await_that(lambda: offered.failure, 10)
    assert await_that(lambda: not threads(), 10)
    assert offered.address is None and len(caplog.records) == 2


# What it tells


def test_three_thousand_waiters_are_cut_and_counted(server: Server, offered: Console) -> None:
    async def main() -> None:
        engine = create_async_engine(server.url, pool_size=1, max_overflow=0, pool_timeout=None)
        scope = PoolScope(engine, "a pool" * 100)
        async with engine.connect() as connection:
            await connection.execute(SELECT)
            await connection.exec_driver_sql("select '\x1b[2J'" + " " * 9 + "as it" + "_" * 1000)
            waiting = [asyncio.create_task(price_of(engine)) for _ in range(3000)]
            await until(lambda: len(scope.waiters) == 3000)
            asking = Connection(address(offered))
            state = await asyncio.to_thread(asking.ask, "state")
            assert len(json.dumps(state)) < 100_000
            # Scopes of other tests may still be there.
            (pool,) = [pool for pool in state["pools"] if pool["name"].startswith("a pool")]
            detail = state["detail"]
            assert (pool["checked_out"], pool["capacity"], pool["waiting"]) == (1, 1, 3000)
            assert len(pool["name"]) < 250
            assert len(detail["waiting"]) == 100
            assert sum(group["count"] for group in detail["grouped"]) == 2900
            assert detail["more_waiting"] == detail["more_holding"] == 0
            (holder,) = detail["holding"]
            assert holder["sql"].startswith("select '\N{REPLACEMENT CHARACTER}[2J' as it")
            assert len(holder["sql"]) < 250
            await asyncio.to_thread(asking.ask, f"report {pool['key']}")
            asking.close()
            await cancelled(*waiting)
        scope.close()
        await engine.dispose()

    run(main())


def test_a_blocked_loop_is_seen_through_it(server: Server, offered: Console) -> None:
    """Asked while the loop's own thread sleeps: the console's thread answers."""
    seen: list[dict[str, Any]] = []

    def causes(state: dict[str, Any]) -> dict[str, str]:
        return {pool["name"]: pool["cause"] for pool in state["pools"]}

    def look() -> None:
        asking = Connection(address(offered))
        while not seen or causes(seen[-1])["mine"] != "loop blocked":
            seen.append(asking.ask("state"))
        asking.close()

    def block() -> None:
        time.sleep(1)

    async def main() -> None:
        loop = LoopScope()
        engine = create_async_engine(server.url)
        scope = PoolScope(engine, "mine", loop=loop)
        looking = threading.Thread(target=look)
        looking.start()
        while looking.is_alive():
            block()  # until that has been seen
            await asyncio.sleep(0)
        scope.close()
        loop.close()
        await engine.dispose()

    run(main())
    assert seen[-1]["loop"]["lag"] >= 0.5
    assert "block" in str(seen[-1]["detail"])


def test_only_what_watches_is_shown(url: str) -> None:
    async def main() -> None:
        engine, other = create_async_engine(url), create_async_engine(url)
        scope, unseen = PoolScope(engine, "shown"), PoolScope(other, "not asked for")
        offered = serve_console(scope)
        asking = Connection(address(offered))

        def names() -> list[str]:
            return [pool["name"] for pool in asking.ask("state")["pools"]]

        assert await asyncio.to_thread(names) == ["shown"]
        scope.close()
        key = f"report {id(scope):x}"
        assert await asyncio.to_thread(lambda: await_that(lambda: names() == [], 10))
        with pytest.raises(ConsoleError, match="no such pool"):
            await asyncio.to_thread(asking.ask, key)
        offered.close()
        asking.close()
        unseen.close()
        await engine.dispose()
        await other.dispose()

    run(main())


# The command


def test_the_command_lists_and_explains(
    offered: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["console"]) == 0
    assert re.search(
        rf"^ *{os.getpid()}  .*\({re.escape(str(address(offered)))}\)$", capsys.readouterr().out
    )
    assert command(["console", "1"]) == 1
    assert "process 1 offers no console" in capsys.readouterr().err
    assert command(["console", "nowhere.sock"]) == 1
    assert "there is no nowhere.sock" in capsys.readouterr().err
    assert command(["console", str(os.getpid())]) == 1
    assert "needs a terminal" in capsys.readouterr().err
    offered.close()
    assert command(["console"]) == 0
    assert "No process of this user" in capsys.readouterr().out


def test_without_textual_one_line_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['textual'] = sys.modules['rich'] = None; import ormscope.__main__;"
        "sys.exit(ormscope.__main__.main(['console', '1']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == (
        'ormscope console: the live view needs Textual: pip install "ormscope[console]"\n'
    )


# The view, on services in processes of their own


def test_the_view_of_a_starved_service_and_its_end(server: Server) -> None:
    async def main() -> None:
        with service("starved", server.url) as (process, at):
            app = ConsoleApp(Connection(at))
            async with app.run_test(size=(150, 40)) as pilot:
                fix = "Fix: hand the session that check_out holds on to price_of"
                text = await shows(app, "deadlock", "GET /price/11", "on time", fix)
                assert str(process.pid) in text
                assert "4 / 4" in text and "1 / 2" in text
                assert "select 'an order [bold]' as made" in text
                assert "a connection of orders, in price_of, line" in text
                await pilot.press("r")
                text = await shows(app, "DEADLOCK in orders", "formula")
                await pilot.press("escape")
                await pilot.press("n")
                text = await shows(app, "count(*) from", "nobody")
                assert "GET /price/11" not in text
                await pilot.press("p")
                await shows(app, "GET /price/11")
                process.send_signal(signal.SIGSTOP)
                await shows(app, "does not answer", "GET /price/11")
                process.send_signal(signal.SIGCONT)
                text = await shows(app, "deadlock")
                while "does not answer" in text:
                    text = await shows(app, "deadlock")
                process.kill()
                text = await shows(app, "has gone", "What follows was")
                assert "deadlock" in text and "GET /price/11" in text, "the last state stays"
                await pilot.press("q")

    run(main())


def test_the_view_of_a_busy_service(server: Server) -> None:
    async def main() -> None:
        with service("busy", server.url) as (_, at):
            app = ConsoleApp(Connection(at))
            async with app.run_test(size=(150, 40)) as pilot:
                text = await shows(app, "saturated", "the database", "pg_sleep", "on time")
                assert "slow: async with orders.connect()" in text
                await pilot.press("r")
                await shows(app, "SATURATED orders (busy, but moving)")

    run(main())


def test_an_answer_that_comes_once_the_view_is_closed_is_shown_nowhere(server: Server) -> None:
    async def main() -> None:
        with service("busy", server.url) as (process, at):
            app = ConsoleApp(Connection(at))
            async with app.run_test():
                await shows(app, "saturated")
            await app._refresh()
            process.kill()
            process.wait(PATIENCE)
            await app._refresh()

    run(main())


def test_the_view_of_a_blocked_service(server: Server) -> None:
    async def main() -> None:
        with service("blocked", server.url) as (_, at):
            app = ConsoleApp(Connection(at))
            async with app.run_test(size=(150, 40)) as pilot:
                text = await shows(app, "loop blocked", " s late")
                assert "asyncio.to_thread" in text
                await pilot.press("r")
                await shows(app, "LOOP BLOCKED", "time.sleep(3600)")

    run(main())


def test_no_answer_is_told_from_no_console(server: Server) -> None:
    with service("busy", server.url) as (process, at):
        asking = Connection(at)
        asking.ask("state")
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(NoAnswerError):
            asking.ask("state")
        (found,) = offers()
        assert (found.pid, found.lack) == (process.pid, "it does not answer")
        process.kill()
        process.wait()
        with pytest.raises(ConsoleError) as told:
            asking.ask("state")
        assert not isinstance(told.value, NoAnswerError)


@needs_tmux
def test_the_view_in_a_real_terminal(server: Server, tmp_path: Path) -> None:
    with service("starved", server.url) as (process, _):
        command = f"'{sys.executable}' -m ormscope console {process.pid}; echo status: $?; cat"
        with terminal(command, tmp_path / "tmux", ROOT) as view:
            view.shows("deadlock", "GET /price/11")
            view.types("r")
            view.shows("DEADLOCK in orders")
            view.types("q")
            assert await_that(lambda: "DEADLOCK" not in view.screen(), 30), view.screen()
            view.types("q")
            view.shows("status: 0")


def test_the_picture_tells_what_the_view_shows() -> None:
    """It is drawn by tests/console_picture.py; nothing in it is loaded from elsewhere, or of somebody's machine."""
    svg = PICTURE.read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"]+", svg) == ["http://www.w3.org/2000/svg"]
    assert "url(" not in svg.replace("url(#", "")
    text = "\n".join(lines_of(svg))
    assert all(expected in text for expected in ("process 4711: shop.py", "deadlock", "Who holds"))
    assert not re.search(r"/(tmp|home|root|work|Users)\b", html.unescape(svg))
