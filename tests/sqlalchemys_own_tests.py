"""SQLAlchemy's own tests of pools and of asyncio, without and with a PoolScope on every engine.

A script, and its own plugin in pytest; exit status 0 where every test has the same outcome twice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

if TYPE_CHECKING:  # SQLAlchemy's conftest.py wants to be there before SQLAlchemy
    from sqlalchemy import Engine
    from sqlalchemy.engine import Dialect

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from workshop.database import start_server  # noqa: E402
from workshop.mistake import Mistake  # noqa: E402

TESTS = ["test/engine/test_pool.py", "test/ext/asyncio"]
DATABASES = ["aiosqlite_file", "postgresql"]
DOWNLOAD_WITHIN, RUN_WITHIN, TEST_WITHIN = 300, 900, 60  # seconds
# what the plugin reports of a run
results: dict[str, Any] = {"outcomes": {}, "reasons": {}, "watched": 0}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pool-scopes", action="store_true")
    parser.addoption("--results", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    """Attach the scopes when a user could at the earliest: at the end of create_engine.

    Not in Engine.__init__, for create_engine reads off its signature what it may be called with.
    """
    if config.getoption("--pool-scopes"):
        from sqlalchemy.engine import Dialect

        Dialect.engine_created = classmethod(attach)  # type: ignore[assignment, method-assign]


def attach(dialect: type[Dialect], engine: Engine) -> None:
    from ormscope import PoolScope

    # Never closed: a scope lives as long as its engine, as in most programs.
    vars(engine)["pool_scope"] = PoolScope(engine)
    results["watched"] += 1


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart() -> None:
    from sqlalchemy.dialects.postgresql import provision

    # They are for other tests, and PostgreSQL from a wheel does not have them.
    provision._extensions.clear()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        results["outcomes"][report.nodeid] = report.outcome
    if crash := getattr(report.longrepr, "reprcrash", None):
        results["reasons"][report.nodeid] = crash.message.split("\n")[0][:200]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if results["outcomes"]:
        session.config.getoption("--results").write_text(json.dumps(results))


def call(what: str, seconds: float, command: list[str], **options: Any) -> None:
    """Run a Python program; one that fails or takes longer is a Mistake."""
    try:
        program = [sys.executable, *command]
        options |= {"capture_output": True, "text": True, "errors": "replace"}
        subprocess.run(program, check=True, timeout=seconds, **options)
    except subprocess.TimeoutExpired:
        raise Mistake(f"{what}: not done within {seconds} s.") from None
    except subprocess.CalledProcessError as error:
        lines = (error.stdout + error.stderr).strip().split("\n")
        telling = [line for line in lines if "Error: " in line or "ERROR: " in line]
        raise Mistake(f"{what}: {(telling or lines)[-1]}") from None


def download(folder: Path) -> Path:
    """The source distribution of the SQLAlchemy that is installed here."""
    wanted = f"sqlalchemy=={version('sqlalchemy')}"
    pip = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # Not :all: as source, for pip builds the metadata, and would compile Cython for that.
    command = [*pip, "--no-binary", "sqlalchemy", "--dest", str(folder), wanted]
    call(f"No sources of {wanted} (is there a network?)", DOWNLOAD_WITHIN, command)
    return next(folder.glob("*.tar.gz"))


@contextmanager
def options_for(database: str) -> Iterator[list[str]]:
    """What names the database, a new and empty one, to SQLAlchemy's tests."""
    if database != "postgresql":
        yield ["--db", database]
        return
    server = start_server()
    try:
        with psycopg.connect(server.url.replace("+asyncpg", "")) as connection:
            # The server has no template for another database: the shop has to make room.
            connection.execute("DROP SCHEMA public CASCADE")
            for schema in (b"public", b"test_schema", b"test_schema_2"):
                connection.execute(b"CREATE SCHEMA " + schema)
        yield ["--dburi", server.url]
    finally:
        server.stop()


def run(archive: Path, database: str, scopes: list[str]) -> dict[str, Any]:
    """The results of one run of the tests, in a folder of its own."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # nbval and others are the project's
        "PYTEST_ADDOPTS": "",
    }
    with TemporaryDirectory(dir=archive.parent) as folder, options_for(database) as options:
        with tarfile.open(archive) as sources:
            sources.extractall(folder, filter="data")
        (unpacked,) = Path(folder).iterdir()
        written = unpacked / "results.json"
        # -s: SQLAlchemy's conftest.py then takes the installed SQLAlchemy, not the sources.
        command = ["-s", "-m", "pytest", "-c", "pyproject.toml", "--rootdir", "."]
        for plugin in ("no:cacheprovider", "pytest_timeout", Path(__file__).stem):
            command += ["-p", plugin]
        command += [f"--timeout={TEST_WITHIN}", f"--results={written}", *options, *scopes, *TESTS]
        try:
            call("SQLAlchemy's tests", RUN_WITHIN, command, cwd=unpacked, env=environment)
        except Mistake:
            if not written.exists():  # then it was not just that tests failed
                raise
        found: dict[str, Any] = json.loads(written.read_text())
    if scopes and not found["watched"]:
        raise Mistake("No engine got a PoolScope: SQLAlchemy called no Dialect.engine_created.")
    return found


def compare(archive: Path, database: str) -> bool:
    """Whether every test has the same outcome without and with scopes; prints what came out."""
    runs = []
    for scopes in ([], ["--pool-scopes"]):
        found = run(archive, database, scopes)
        runs.append(found)
        counts = Counter(found["outcomes"].values())
        numbers = ", ".join(
            f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")
        )
        print(f"{database}, {found['watched']} engines with a PoolScope: {numbers}", flush=True)
    same = True
    for name in sorted({*runs[0]["outcomes"], *runs[1]["outcomes"]}):
        before, after = (found["outcomes"].get(name, "not run") for found in runs)
        if before != after:
            reason = (runs[0]["reasons"] | runs[1]["reasons"]).get(name, "")
            print(f"  {name}: {before} without, {after} with: {reason}", flush=True)
            same = False
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", nargs="+", choices=DATABASES, default=DATABASES)
    arguments = parser.parse_args()
    try:
        with TemporaryDirectory(prefix="sqlalchemys-own-tests-") as folder:
            archive = download(Path(folder))
            same = [compare(archive, database) for database in arguments.database]
        return 0 if all(same) else 1
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
