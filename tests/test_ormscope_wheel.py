"""ormscope as people get it: a wheel in an empty environment, with SQLAlchemy and a driver alone."""

from __future__ import annotations

import json
import signal
import subprocess
import zipfile
from pathlib import Path

import pytest
from environments import ROOT, SERIES, new_environment

from workshop.database import Server

IMPORTS = """
import json, sys
from ormscope import *
files = [(name, getattr(module, "__file__", None) or "") for name, module in sys.modules.items()]
print(json.dumps(sorted({name.partition(".")[0] for name, file in files if "site-packages" in file})))
"""

SERVICE = """
import asyncio, os, signal, sys
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
import ormscope
from ormscope import PoolScope, report_on_signal

async def price_of(engine):
    async with engine.connect() as connection:
        await connection.execute(text("select 1"))

async def order(engine, meet):
    async with engine.connect() as connection:
        await connection.execute(text("select 2"))
        await meet.wait()
        await price_of(engine)

async def main(url):
    engine = create_async_engine(url, pool_size=2, max_overflow=0, pool_timeout=None)
    scope, meet = PoolScope(engine, "shop"), asyncio.Barrier(2)
    tasks = [asyncio.create_task(order(engine, meet), name=f"order {n}") for n in range(2)]
    async with asyncio.timeout(60):
        await scope.deadlock()
    print(sqlalchemy.__version__, ormscope.__version__, ormscope.__file__)
    print(scope.report())
    if hasattr(signal, "SIGUSR1"):
        reader, writer = os.pipe()
        with open(writer, "w") as file, report_on_signal(file=file):
            os.kill(os.getpid(), signal.SIGUSR1)
            print("ON THE SIGNAL", os.read(reader, 65536).decode())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await engine.dispose()

asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture(scope="module", params=SERIES)
def python(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The Python of a new environment with the wheel, a series of SQLAlchemy, and asyncpg."""
    folder = tmp_path_factory.mktemp("environment")
    return str(new_environment(folder, str(wheel), "asyncpg", SERIES[request.param]))


def said(python: str, script: str, *arguments: str) -> str:
    """What a script says in that environment, which knows nothing of this one."""
    done = subprocess.run(
        [python, "-I", "-c", script, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    sources = {
        f"ormscope/{path.relative_to(ROOT / 'ormscope').as_posix()}"
        for path in (ROOT / "ormscope").rglob("*.py")
    }
    data = {
        f"ormscope/{name}"
        for name in ("py.typed", "alerts.yml", "dashboard.json", "lab/style.mplstyle")
    }
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == sources | data
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_it_imports_sqlalchemy_and_the_standard_library_alone(python: str) -> None:
    found = json.loads(said(python, IMPORTS))
    assert {"ormscope", "sqlalchemy"} <= set(found)
    assert set(found) <= {"ormscope", "sqlalchemy", "greenlet", "typing_extensions"}


@pytest.mark.parametrize(
    "module, package", [("metrics", "prometheus_client"), ("otel", "opentelemetry")]
)
def test_an_extra_that_is_missing_names_itself(python: str, module: str, package: str) -> None:
    script = f"""
try:
    import ormscope.{module}
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert said(python, script).strip() == package


def test_it_finds_a_deadlock(python: str, server: Server, request: pytest.FixtureRequest) -> None:
    report, _, on_signal = said(python, SERVICE, server.url).partition("ON THE SIGNAL")
    first, *_ = report.splitlines()
    series = request.node.callspec.params["python"]
    assert first.startswith(f"{series}.") and "site-packages" in first
    for text in [report, on_signal] if hasattr(signal, "SIGUSR1") else [report]:
        assert "POOL shop: 2 of 2 checked out, 2 waiting" in text
        assert "DEADLOCK in shop (hold-and-wait)" in text
        assert "last SQL: select 2" in text
        assert "waits for a connection of shop" in text
