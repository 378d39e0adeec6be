"""The PgBouncer of a lesson: private, in transaction mode, and gone with whoever asked for it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from environments import ROOT
from helpers import run
from leftovers import GONE_WITHIN, await_that
from sqlalchemy import text

from workshop import db, pgbouncer, postgres
from workshop.database import Server
from workshop.mistake import Mistake
from workshop.pgbouncer import PgBouncer

needs_pgbouncer = pytest.mark.skipif(
    pgbouncer.program() is None and os.environ.get("CI") != "true",
    reason="PgBouncer is not installed",
)


@pytest.fixture
def bouncer(server: Server) -> Iterator[PgBouncer]:
    with PgBouncer(server.url, connections=2) as started:
        yield started


def bouncers_of(process: psutil.Process) -> list[psutil.Process]:
    return [
        child for child in process.children(recursive=True) if child.name().startswith("pgbouncer")
    ]


@needs_pgbouncer
def test_many_clients_share_few_connections(bouncer: PgBouncer) -> None:
    """Ten transactions at once, on two connections; and the file that people take home knows how."""

    async def processes_met() -> set[int]:
        settings = db.Settings(database_url=bouncer.url, behind_pgbouncer=True)
        engine, met = db.make_engine(settings), set()
        for _ in range(5):
            connections = [await engine.connect() for _ in range(10)]
            for connection in connections:
                met.add(await connection.scalar(text("SELECT pg_backend_pid()")))
                await connection.commit()
                assert await connection.scalar(text("SHOW application_name")) == "shop"
                await connection.close()
        await engine.dispose()
        return met

    assert 1 <= len(run(processes_met())) <= 2


@needs_pgbouncer
def test_it_refuses_the_limits_of_the_file_unless_that_is_told(bouncer: PgBouncer) -> None:
    async def connect() -> None:
        engine = db.make_engine(db.Settings(database_url=bouncer.url))
        try:
            async with engine.connect():
                pass
        finally:
            await engine.dispose()

    with pytest.raises(Exception, match="unsupported startup parameter"):
        run(connect())


@needs_pgbouncer
def test_it_ends_with_who_asked_for_it(server: Server) -> None:
    """Killed: within 3 s neither the program nor its file, with the password in it, is left."""
    # Where the user that it runs as can reach it, as for the server.
    place = postgres.place_for(postgres.unprivileged_account())
    with tempfile.TemporaryDirectory(dir=place) as folder:
        Path(folder).chmod(0o755)
        program = (
            "import sys; from workshop.pgbouncer import PgBouncer\n"
            f"started = PgBouncer({server.url!r}, 1)\nprint('started', flush=True)\nsys.stdin.read()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "TMPDIR": folder, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.readline()
        (running,) = bouncers_of(psutil.Process(process.pid))
        (file,) = Path(folder).rglob("pgbouncer.ini")
        assert file.stat().st_mode & 0o077 == 0
        process.kill()
        process.communicate()
        assert await_that(
            lambda: not running.is_running() and not any(Path(folder).iterdir()), GONE_WITHIN
        )


def test_without_the_program(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pgbouncer, "program", lambda: None)
    with pytest.raises(Mistake, match="no program named pgbouncer"):
        PgBouncer(server.url, 1)


@pytest.mark.skipif(os.name == "nt", reason="a script stands for the program")
def test_a_program_that_does_not_start(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "pgbouncer"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo PgBouncer 1.24.1\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setattr(pgbouncer, "program", lambda: str(script))
    start = time.monotonic()
    with pytest.raises(Mistake, match="did not start"):
        PgBouncer(server.url, 1)
    assert time.monotonic() - start < 10
