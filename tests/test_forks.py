"""The processes of `observe`: forked where that can be done, spawned elsewhere, and the same to who uses them."""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from leftovers import has_ended, runs_of
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from ormscope.lab import Recording, forks, observe
from workshop.database import Server

needs_forks = pytest.mark.skipif(not forks.CAN_FORK, reason="only Linux forks")


@pytest.fixture(params=["forked", "spawned"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "forked" and not forks.CAN_FORK:
        pytest.skip("only Linux forks")
    # The module; the package's name for it is the function.
    module = sys.modules["ormscope.lab.observe"]
    monkeypatch.setattr(module, "CAN_FORK", request.param == "forked")
    return str(request.param)


def surroundings() -> dict[str, Any]:
    print("printed")
    print("complained", file=sys.stderr)
    return {
        "folder": os.getcwd(),
        "variable": os.environ.get("A_VARIABLE_OF_THIS_TEST"),
        "path": list(sys.path),
        "leader": os.getpid() == os.getpgid(0) if os.name == "posix" else None,
        "streams": [stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)],
    }


def throw_dice() -> float:
    return random.random()


async def query(url: str) -> int:
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        return int(await connection.scalar(text("select 40 + 2")) or 0)


def test_a_run_finds_its_surroundings_as_they_are_now(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observe(surroundings, live=False)  # the server is there, with the surroundings of before
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("A_VARIABLE_OF_THIS_TEST", "now")
    monkeypatch.syspath_prepend(str(tmp_path))
    recording = observe(surroundings, live=False)
    assert recording.result == {
        "folder": os.getcwd(),
        "variable": "now",
        "path": sys.path,
        "leader": True if os.name == "posix" else None,
        "streams": [False, False, False],
    }
    assert sorted(recording.printed.split()) == ["complained", "printed"]


def test_a_run_sees_the_pool_and_the_memory(way: str, server: Server) -> None:
    recording = observe(query, server.url, live=False)
    assert (recording.ended, recording.result) == ("returned", 42)
    assert recording.pools[0].most_checked_out == 1
    assert recording.memory[0].time == 0 and recording.memory[0].mebibytes > 20
    assert runs_of(psutil.Process()) == []


def test_a_run_that_dies(way: str) -> None:
    recording = observe(os._exit, 3, live=False)
    assert recording.ended == "died"
    assert runs_of(psutil.Process()) == []


def test_runs_side_by_side(way: str) -> None:
    """Each gets its own answer, and none keeps another's streams open."""
    found: list[Recording] = []
    threads = [
        threading.Thread(target=lambda: found.append(observe(throw_dice, live=False)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {fork.ended for fork in found} == {"returned"}
    assert len({fork.result for fork in found}) == 8, "forks begin with the same random numbers"


def imported_by(module: str) -> int:
    return int(importlib.import_module(module).BY)


@needs_forks
def test_what_is_preloaded_is_imported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the server, for all runs; but what cannot be imported is told by the run that wants it."""
    monkeypatch.setattr(forks, "_preloaded", {})
    monkeypatch.setattr(forks, "_server", None)  # one that knows this path
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "slow_to_import.py").write_text("import os\nBY = os.getpid()\n")
    (tmp_path / "broken.py").write_text("raise OSError('no such sound card')\n")
    apart = [observe(imported_by, "slow_to_import", live=False) for _ in range(2)]
    assert len({run.result for run in apart}) == 2
    for module in ("broken", "slow_to_import"):
        forks.preload(module)
    once = [observe(imported_by, "slow_to_import", live=False) for _ in range(2)]
    (server,) = [child for child in psutil.Process().children() if child.pid == once[0].result]
    assert {run.result for run in once} == {server.pid}
    with pytest.raises(OSError, match="no such sound card"):
        observe(imported_by, "broken", live=False)
    assert forks._server is not None
    forks._server._channel.close()
    forks._server._process.wait()


def fork_servers() -> list[psutil.Process]:
    """Those of this process; other tests may have left keepers of a database, whose programs speak of servers too."""
    children = psutil.Process().children()
    return [child for child in children if "child.serve()" in " ".join(child.cmdline())]


@needs_forks
def test_a_server_that_was_killed_is_replaced() -> None:
    observe(surroundings, live=False)
    (before,) = fork_servers()
    before.kill()
    before.wait()
    assert observe(surroundings, live=False).ended == "returned"
    (after,) = fork_servers()
    assert after.pid != before.pid


@needs_forks
def test_a_fork_of_the_user_gets_a_server_of_its_own() -> None:
    """Else two processes would read each other's answers."""
    observe(surroundings, live=False)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            recording = observe(os.getppid, live=False)
            os.write(write, recording.ended.encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        assert answer.read() == "returned"
    os.waitpid(child, 0)
    assert observe(surroundings, live=False).ended == "returned"


@needs_forks
def test_the_server_ends_with_its_process() -> None:
    code = "from ormscope.lab import observe; observe(print, live=False); print('ran', flush=True); input()"

    user = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert user.stdout is not None and user.stdout.readline() == "ran\n"
    (server,) = psutil.Process(user.pid).children()
    user.kill()
    user.communicate()
    psutil.wait_procs([server], timeout=3)
    assert has_ended(server)
