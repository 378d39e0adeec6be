"""`python3 lab.py matrix`: how it finds Pythons, what it says, and one real run."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from workshop import matrix
from workshop.matrix import BROKEN_OFF, NEEDED, ROOT, TESTS, UNMADE, Outcome
from workshop.mistake import Mistake

HERE = "{}.{}".format(*sys.version_info)


def entry(version: str, path: str, **other: str) -> dict[str, Any]:
    major, minor, patch = version.split(".")
    parts = {"major": int(major), "minor": int(minor), "patch": int(patch)}
    about = {"implementation": "cpython", "variant": "default"} | other
    return {"version": version, "version_parts": parts, "path": path, **about}


def found(monkeypatch: pytest.MonkeyPatch, *entries: dict[str, Any]) -> dict[str, str]:
    """The Pythons that are found where uv lists these."""
    listed = subprocess.CompletedProcess([], 0, json.dumps(entries), "")
    monkeypatch.setattr(matrix, "uv", lambda *_: listed)
    return matrix.find_pythons()


def test_one_python_for_each_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    pythons = found(
        monkeypatch,
        entry("3.15.0", "/usr/bin/python3.15"),
        entry("3.14.2", "/t/python3.14", variant="freethreaded"),
        entry("3.14.1", "/usr/bin/python3.14"),
        entry("3.14.0", "/opt/python3.14"),
        entry("3.12.9", "/usr/bin/python3.12"),
        entry("3.11.9", "/usr/bin/pypy", implementation="pypy"),
        entry("3.10.1", "/usr/bin/python3.10"),
    )
    assert pythons == {"3.12": sys.executable, "3.14": "/usr/bin/python3.14"}


def test_this_python_is_found() -> None:
    assert matrix.find_pythons()[HERE] == sys.executable


def test_uv_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 2, "", "error: no such\n  cause: option\n")
    monkeypatch.setattr(matrix, "uv", lambda *_: failed)
    with pytest.raises(Mistake, match=r"^uv does not list the Pythons: error: no such cause"):
        matrix.find_pythons()


def test_the_packages_are_as_locked() -> None:
    lines = matrix.locked(NEEDED | {"uvloop"})
    assert {line.partition("==")[0] for line in lines} == NEEDED | {"uvloop"}
    (uvloop,) = (line for line in lines if line.startswith("uvloop"))
    assert re.fullmatch(r"uvloop==[\d.]+ ; sys_platform != 'win32'", uvloop)
    with pytest.raises(Mistake, match="lacks no-such-package"):
        matrix.locked({"no-such-package"})


def test_the_tests_are_there() -> None:
    assert [name for name in TESTS if not (ROOT / name).exists()] == []


def test_the_table() -> None:
    rows = {
        ("python3.11", "2.0"): {
            "asyncio": Outcome("3.11.7", "2.0.58", "asyncio", 12, 1, 3, 61.4, lines=["t::x: no"]),
            "uvloop": Outcome("python3.11", "2.0", "uvloop", trouble=UNMADE, lines=["no wheel"]),
        },
        ("3.13", "2.1"): {
            "asyncio": Outcome("3.13", "2.1", "asyncio", trouble=UNMADE, lines=["no network"]),
            "uvloop": Outcome("3.13.0", "2.1.9", "uvloop 0.23.0", trouble=BROKEN_OFF),
        },
    }
    assert matrix.table(rows, ["asyncio", "uvloop"]).splitlines() == [
        "Python  SQLAlchemy  asyncio                               uvloop 0.23.0",
        "3.11.7  2.0.58      12 passed, 1 failed, 3 skipped, 61 s  cannot be made",
        "3.13.0  2.1.9       cannot be made                        broke off",
        "",
        "Python 3.11.7, SQLAlchemy 2.0.58, asyncio: t::x: no",
        "Python 3.11.7, SQLAlchemy 2.0.58, uvloop: no wheel",
        "Python 3.13.0, SQLAlchemy 2.1.9, asyncio: no network",
    ]


def test_the_table_of_a_run_that_was_stopped() -> None:
    rows = {("3.11", "2.0"): {"asyncio": Outcome("3.11.7", "2.0.58", "asyncio", 12)}}
    assert matrix.table(rows, ["asyncio", "uvloop"]).splitlines() == [
        "Python  SQLAlchemy  asyncio                              uvloop",
        "3.11.7  2.0.58      12 passed, 0 failed, 0 skipped, 0 s  not run",
    ]
    assert matrix.table({}, ["asyncio"]) == "Python  SQLAlchemy  asyncio"


def test_a_python_that_is_not_there(tmp_path: Path) -> None:
    outcome = matrix.run(str(tmp_path / "python"), "2.0", "asyncio", TESTS, tmp_path)
    assert str(outcome) == "cannot be made"
    (line,) = outcome.lines
    assert "python" in line and "\n" not in line


def test_the_loop_is_the_one_asked_for(request: pytest.FixtureRequest) -> None:
    async def name() -> str:
        return type(asyncio.get_running_loop()).__module__.partition(".")[0]

    assert asyncio.run(name()) == request.config.getoption("--loop")


def test_a_real_run() -> None:
    loops = ["asyncio"] if os.name == "nt" else ["asyncio", "uvloop"]
    tiny = f"tests/{Path(__file__).name}::{test_the_loop_is_the_one_asked_for.__name__}"
    command = ["-m", "workshop.matrix", "--python", HERE, "--sqlalchemy", "2.0", "--tests", tiny]
    done = subprocess.run(
        [sys.executable, *command, "--loop", *loops], cwd=ROOT, capture_output=True, text=True
    )
    if re.search("error sending request|network was disabled", done.stdout):
        assert os.environ.get("CI") != "true"
        pytest.skip("the package index is out of reach")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    row = r"1 passed, 0 failed, 0 skipped, \d+ s"
    assert re.search(rf"\n{HERE}\.\S+ +2\.0\.\d+ +{' +'.join([row] * len(loops))}$", done.stdout)
