"""The MariaDB of a lesson: private, and gone with whoever asked for it; or the server that MYSQL_URL names; or none."""

from __future__ import annotations

import asyncio
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pymysql
import pytest
from environments import ROOT
from helpers import PATIENCE, run
from leftovers import GONE_WITHIN, await_that
from nbformat import NotebookNode
from nbval_gate import WITHOUT_MYSQL, _expect_what_runs_here
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from ormscope import PoolScope
from workshop import mariadb, postgres
from workshop.doctor import check_mysql, rehearse
from workshop.mariadb import MariaDB, mysql_url
from workshop.mistake import Mistake
from workshop.stacks import mysql_arguments

needs_mariadb = pytest.mark.skipif(
    mariadb.programs() is None and os.environ.get("CI") != "true",
    reason="MariaDB is not installed",
)


@pytest.fixture(scope="module")
def started() -> Iterator[MariaDB]:
    with MariaDB() as server:
        yield server


def connect(url: str, **other: object) -> pymysql.Connection:
    arguments = mysql_arguments(url)
    return pymysql.connect(database=arguments.pop("db"), **{**arguments, **other})


@needs_mariadb
def test_it_answers_and_knows_nobody_else(started: MariaDB) -> None:
    """Its user may do anything in it; a wrong password, or root without one, comes in from nowhere."""
    with connect(started.url) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE one (id INTEGER PRIMARY KEY)")
        assert cursor.execute("INSERT INTO one VALUES (1)") == 1
    for other in ({"password": "wrong"}, {"user": "root", "password": ""}):
        with pytest.raises(pymysql.err.OperationalError, match="Access denied"):
            connect(started.url, **other)


@needs_mariadb
def test_it_listens_on_this_machine_only(started: MariaDB) -> None:
    port = mysql_arguments(started.url)["port"]
    servers = [process for process in psutil.process_iter() if process.name() == "mariadbd"]
    listening = [
        socket.laddr.ip
        for process in servers
        for socket in process.net_connections()
        if socket.status == psutil.CONN_LISTEN and socket.laddr.port == port
    ]
    assert listening == ["127.0.0.1"]


@needs_mariadb
@pytest.mark.parametrize("ending", ["killed", "closed"])
def test_it_ends_with_who_asked_for_it(ending: str) -> None:
    """Neither the program nor its folder, with the password in it, is left."""
    place = postgres.place_for(postgres.unprivileged_account())
    with tempfile.TemporaryDirectory(dir=place) as folder:
        Path(folder).chmod(0o755)
        program = (
            "import sys; from workshop.mariadb import mysql_url\n"
            "print(mysql_url(), flush=True)\nsys.stdin.read()"
        )
        environment = {name: value for name, value in os.environ.items() if name != "MYSQL_URL"}
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**environment, "TMPDIR": folder, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"mysql://")
        (running,) = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if child.name() == "mariadbd"
        ]
        (file,) = Path(folder).rglob("first.sql")
        assert file.stat().st_mode & 0o077 == 0
        if ending == "killed":
            process.kill()
        process.communicate()
        # It says goodbye to its tables, which takes a moment on a busy machine.
        assert await_that(
            lambda: not running.is_running() and not any(Path(folder).iterdir()), GONE_WITHIN
        )


@needs_mariadb
@pytest.mark.parametrize("driver", ["aiomysql", "asyncmy"])
def test_a_pool_scope_sees_a_pool_of_mysql(started: MariaDB, driver: str) -> None:
    """As it does on PostgreSQL: who has one connection and waits for another is in a deadlock, and proved to be."""

    async def main() -> None:
        address = make_url(started.url).set(drivername=f"mysql+{driver}")
        engine = create_async_engine(address, pool_size=1, max_overflow=0)
        scope = PoolScope(engine)
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            assert scope.verdict().cause == "healthy"

        async def nested() -> None:
            async with engine.connect(), engine.connect():
                pass

        task = asyncio.create_task(nested())
        async with asyncio.timeout(PATIENCE):
            await scope.deadlock()
        assert scope.verdict().cause == "deadlock"
        task.cancel()
        await asyncio.wait([task])
        await engine.dispose()

    run(main())


@needs_mariadb
@pytest.mark.parametrize("here", [True, False])
def test_the_doctor_says_whether_there_is_one(
    started: MariaDB, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mariadb, "programs", lambda: None)
    monkeypatch.setattr(mariadb, "_private", None)
    monkeypatch.setenv("MYSQL_URL", started.url if here else "")
    told = check_mysql()
    assert told.endswith("for lesson 11" if here else "install mariadb-server")


@needs_mariadb
def test_the_doctor_says_who_does_not_let_us_in(
    started: MariaDB, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = make_url(started.url).set(password="wrong")
    monkeypatch.setenv("MYSQL_URL", address.render_as_string(hide_password=False))
    assert not rehearse(["mysql"])
    assert "does not let us in (1045)" in capsys.readouterr().out


def test_without_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lesson goes on without it; whoever wants one all the same is told."""
    monkeypatch.delenv("MYSQL_URL", raising=False)
    monkeypatch.setattr(mariadb, "programs", lambda: None)
    monkeypatch.setattr(mariadb, "_private", None)
    assert mysql_url() is None
    with pytest.raises(Mistake, match="no programs named mariadbd"):
        MariaDB()


def test_the_server_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYSQL_URL", "mysql+pymysql://me:secret@db.example/shop")
    assert mysql_url() == "mysql://me:secret@db.example/shop"


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("postgresql://me:secret@db/shop", "begins with postgresql://"),
        ("mysql://me:secret@/shop", "names no host"),
        ("mysql://me:secret@db", "names no database"),
        ("nonsense secret", "is not an address"),
    ],
)
def test_what_cannot_be_a_server(named: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYSQL_URL", named)
    with pytest.raises(Mistake, match=told) as raised:
        mysql_url()
    assert "secret" not in str(raised.value)


def test_without_a_server_the_cells_of_the_lesson_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each prints one line, and the gate expects exactly that; it changes no other cell, and none in CI."""
    lesson = nbformat.read(ROOT / "notebooks" / "11_other_stacks.ipynb", as_version=4)
    cells = [cell for cell in lesson.cells if "MySQL here:" in cell.source]
    assert len(cells) >= 4
    known = {"MYSQL": None, "QUESTIONS": (), "ON_MYSQL": (), "answers": None}
    for cell in cells:
        exec(cell.source, {**known, "on_mysql": lambda *arguments: None})
        assert capsys.readouterr().out == WITHOUT_MYSQL
    monkeypatch.delenv("MYSQL_URL", raising=False)
    monkeypatch.setattr(mariadb, "programs", lambda: None)
    stored = copy.deepcopy(lesson.cells)
    for ci in ("true", "false"):
        monkeypatch.setenv("CI", ci)
        for cell in lesson.cells:
            if cell.cell_type == "code":
                _expect_what_runs_here(cell)
        changed = [
            cell.id
            for cell, before in zip(lesson.cells, stored, strict=True)
            if texts(cell) != texts(before)
        ]
        assert changed == ([] if ci == "true" else [cell.id for cell in cells])
    assert {texts(cell) for cell in cells} == {WITHOUT_MYSQL}


def texts(cell: NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


@pytest.mark.skipif(os.name == "nt", reason="a script stands for the programs")
def test_programs_that_do_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "mariadbd"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(mariadb, "programs", lambda: (str(script), str(script)))
    with pytest.raises(Mistake, match="did not start"):
        MariaDB()
