"""The doctor rehearses: will everything that the lessons do work on this machine?

`python3 lab.py doctor` prints one line a check, each failure with its cure. `--server` only asks whether the
database starts and answers.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import importlib.metadata
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from workshop.mistake import Mistake

# Everything else is imported by the check that needs it: a missing package is what the doctor is there to find.

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
FREE_DISK = 500_000_000  # bytes: a few servers of the shop, and the executed copies
FREE_MEMORY = 1_000_000_000  # bytes: JupyterLab, a kernel, the observed process, the server


def check_python() -> str:
    """Python itself: a version that the kit is made for."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        raise Mistake(
            f"Python {platform.python_version()} found; 3.11 to 3.14 wanted: install one of these."
        )
    return f"Python {platform.python_version()}"


def check_lock() -> str:
    """Every package that requirements.lock pins for this machine is installed in that version."""
    from packaging.markers import Marker

    wrong = []
    pinned = 0
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        if "==" not in line or line.startswith((" ", "#")):
            continue
        requirement, _, marker = line.rstrip(" \\").partition(";")
        if marker and not Marker(marker).evaluate():
            continue
        name, _, version = requirement.strip().partition("==")
        pinned += 1
        try:
            found = importlib.metadata.version(name.partition("[")[0])
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != version:
            wrong.append(f"{name} {found}, not {version}")
    if wrong:
        raise Mistake(
            f"{len(wrong)} of {pinned} packages differ from requirements.lock ({wrong[0]}): "
            "fine if you chose them yourself, else run `uv pip sync requirements.lock`."
        )
    return f"{pinned} packages as locked"


def check_server() -> str:
    """The database starts, answers, and holds the shop."""
    from sqlalchemy import func, select
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    from workshop.database import database_url, describe
    from workshop.shop import Product

    async def ask() -> int:
        engine = create_async_engine(database_url(), poolclass=NullPool)
        async with engine.connect() as connection:
            return await connection.scalar(select(func.count()).select_from(Product)) or 0

    # In a notebook this thread has a running loop already.
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        products = executor.submit(asyncio.run, ask()).result()
    return f"{describe()}, with {products:,} products"


def check_mysql() -> str:
    """A MySQL server for lesson 11, which needs none: where there is none, its cells say so."""
    from workshop import mariadb
    from workshop.stacks import mysql_arguments

    url = mariadb.mysql_url()
    if url is None:
        return (
            "no MariaDB here, and MYSQL_URL names no server: lesson 11 goes on without its part on MySQL, which can be"
            " read in the stored lesson; to run it, install mariadb-server"
        )
    import pymysql

    arguments = mysql_arguments(url)
    try:
        connection = pymysql.connect(database=arguments.pop("db"), **arguments)
    except pymysql.err.OperationalError as error:
        raise Mistake(
            f"MYSQL_URL names a server that does not let us in ({error.args[0]}). Unset it, or see whether it runs."
        ) from None
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT VERSION()")
        (version,) = cursor.fetchone() or ("?",)
    return f"{version}, for lesson 11"


async def _starve(url: str) -> None:
    from sqlalchemy import select
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

    from ormscope.lab import storm

    engine = create_async_engine(url, pool_size=2, max_overflow=0)
    session_maker = async_sessionmaker(engine)
    both_hold = asyncio.Barrier(2)

    async def hold_and_wait(number: int) -> None:
        async with session_maker() as outer, session_maker() as inner:
            await outer.execute(select(1))
            await both_hold.wait()
            await inner.execute(select(1))

    await storm(hold_and_wait, 2)


def check_starvation() -> str:
    """A pool is starved for two seconds, and the instruments call it a deadlock."""
    from ormscope.lab import observe
    from workshop.database import database_url

    recording = observe(_starve, database_url(), fuse=2, live=False, title="rehearsal")
    if recording.ended != "fuse" or recording.verdict().cause != "deadlock":
        raise Mistake(
            f"A starvation was staged and not seen: the run {recording.ended}, verdict "
            f"{recording.verdict().cause}: please report this with your platform ({platform.platform()})."
        )
    return "a starved pool is named within two seconds"


def check_memory_reading() -> str:
    """memory-profiler can read the resident memory of a process."""
    from memory_profiler import memory_usage

    (mebibytes,) = memory_usage(-1, interval=0.01, timeout=0.01, max_iterations=1)
    if not mebibytes > 1:
        raise Mistake(f"memory-profiler reads {mebibytes} MiB for this process: reinstall psutil.")
    return f"resident memory reads {mebibytes:.0f} MiB"


def check_picture() -> str:
    """A picture is drawn, fonts included."""
    from ormscope.lab.recording import Recording
    from ormscope.lab.run_picture import draw

    png = draw(Recording(title="rehearsal")).png()
    if not png.startswith(b"\x89PNG"):
        raise Mistake("matplotlib drew no PNG: reinstall matplotlib.")
    return "a picture is drawn"


def check_disk() -> str:
    """Free disk where temporary files go."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < FREE_DISK:
        raise Mistake(
            f"{free / 1e6:.0f} MB of disk free in {folder}; {FREE_DISK / 1e6:.0f} MB wanted: make room."
        )
    return f"{free / 1e9:.1f} GB of disk free"


def check_memory() -> str:
    """Free memory."""
    import psutil

    free = psutil.virtual_memory().available
    if free < FREE_MEMORY:
        raise Mistake(
            f"{free / 1e9:.1f} GB of memory free; {FREE_MEMORY / 1e9:.0f} GB wanted: close something."
        )
    return f"{free / 1e9:.1f} GB of memory free"


CHECKS: dict[str, Callable[[], str]] = {
    "python": check_python,
    "packages": check_lock,
    "database": check_server,
    "mysql": check_mysql,
    "starvation": check_starvation,
    "memory reading": check_memory_reading,
    "picture": check_picture,
    "disk": check_disk,
    "memory": check_memory,
}


def rehearse(names: list[str] | None = None, *, details: bool = True) -> bool:
    """Make the checks, all or those named, and print a line for each; return whether all went well.

    Without `details` a check that went well prints no figures of this machine.
    """
    well = True
    for name in names or list(CHECKS):
        try:
            found = CHECKS[name]()
        except Mistake as mistake:
            well = False
            print(f"FAIL  {name:<15} {mistake}", flush=True)
        except (
            Exception
        ) as error:  # what nobody foresaw is a finding too, and the other checks go on
            well = False
            print(
                f"FAIL  {name:<15} {type(error).__name__}: {error}: please report this.", flush=True
            )
        else:
            print(f"ok    {name:<15} {found if details else ''}".rstrip(), flush=True)
    return well


def main() -> int:
    """Carry out one command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="lab.py doctor")
    parser.add_argument(
        "--server", action="store_true", help="only ask whether the database starts and answers"
    )
    arguments = parser.parse_args()
    try:
        if arguments.server:
            check_server()
            return 0
        return 0 if rehearse() else 1
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
