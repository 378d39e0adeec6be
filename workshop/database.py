"""The database of the lessons: one for each process, started when it is first asked for.

    url = database_url()

gives a private PostgreSQL with the shop in it, which goes when this process goes, or whatever
the environment variable DATABASE_URL names. Everything here is synchronous: it is called from
notebook cells, where an event loop is already running.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop.keeper import Keeper
from workshop.mistake import Mistake

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

ROOT = Path(__file__).resolve().parent.parent
# Tells child processes of this one which databases it has (see _inherited).
INHERITANCE = "SQLALCHEMY_UNDER_LOAD_DATABASES"
WANTED = (
    "Wanted: postgresql+asyncpg://user:password@host:port/database, or no DATABASE_URL at all "
    "for a server of your own."
)


@dataclass(frozen=True)
class Database:
    """A database with the shop in it.

    `url` is for create_async_engine, `name` is such as "PostgreSQL 16.14", and `private` says
    whether it is ours and goes with us.
    """

    url: str
    name: str
    private: bool

    @property
    def description(self) -> str:
        """One line on which database this is and whose; without the password."""
        if self.private:
            return f"{self.name}, private to this process and gone with it"
        host, port = _server_of(self.url)
        return f"{self.name} at {host}:{port}/{_parsed(self.url).database}, as DATABASE_URL says"


@dataclass(frozen=True)
class Restart:
    """When a server was gone and when it answered again, in seconds of `time.monotonic()`."""

    down: float
    up: float


class Server:
    """A private database, and the watchdog process that keeps it while this process lives."""

    def __init__(self, database: Database, watchdog: Keeper) -> None:
        self.database = database
        self._watchdog = watchdog
        atexit.register(self.stop)

    @property
    def url(self) -> str:
        """The address for create_async_engine."""
        return self.database.url

    def restart(self, pause: float = 0.0) -> Restart:
        """Stop the server and start it again at the same address, with the same data, `pause` seconds later.

        As an administrator does it: connections are ended, whatever they are at. Returns when it answers
        again. Raises RuntimeError where it does not come back, BrokenPipeError where it was gone already.
        """
        return Restart(**_request(self._watchdog, {"restart": pause}))

    def stop(self) -> None:
        """End the database, and wait until its server and its folder are gone."""
        atexit.unregister(self.stop)
        self._watchdog.stop()


_databases: dict[int, Database] = {}
_starting = threading.Lock()


def database_url(scale: int = 1) -> str:
    """The address of this process's one database, for create_async_engine.

    The first call starts it (a second; a few seconds the very first time on a machine); later
    calls give the same address, also in child processes that this one starts. `scale` repeats
    each sales line so many times, 6 for about 1.4 million; each scale has a database of its own.
    Raises Mistake if DATABASE_URL cannot be used, the machine lacks something, or the server
    has died meanwhile.
    """
    return _database(scale).url


def database_name(scale: int = 1) -> str:
    """What the database is, with its version, for example "PostgreSQL 16.14"."""
    return _database(scale).name


def describe(scale: int = 1) -> str:
    """One line on which database this is and whose; without the password."""
    return _database(scale).description


def start_server(scale: int = 1) -> Server:
    """Start one more private database with the shop in it, whatever DATABASE_URL says.

    It lives until `stop()`, or until this process ends in any way. Raises Mistake if the machine
    lacks disk space, permissions or PostgreSQL itself.
    """
    watchdog, answer = _ask({"scale": scale})
    return Server(Database(**answer, private=True), watchdog)


def check_url(url: str) -> None:
    """Raise Mistake unless `url` names a database for asyncpg; does not connect."""
    from sqlalchemy.exc import ArgumentError

    try:
        parts = _parsed(url)
    except (ArgumentError, ValueError):
        # The text is not shown, for nobody knows where in it the password is.
        raise Mistake(f"DATABASE_URL is not an address of a database. {WANTED}") from None
    if parts.drivername != "postgresql+asyncpg":
        raise Mistake(f"DATABASE_URL begins with {parts.drivername}://. {WANTED}")
    if not parts.host or not parts.database:
        missing = "database" if parts.host else "host"
        raise Mistake(f"DATABASE_URL names no {missing}. {WANTED}")
    if "@" in parts.host + parts.database:  # then messages would show a part of the password
        raise Mistake("DATABASE_URL has more than one @. In a password, write it as %40.")


def _database(scale: int) -> Database:
    with _starting:
        if scale not in _databases:
            _databases[scale] = _inherited(scale) or _first(scale)
            _bequeath()
        elif _databases[scale].private and not _answers(_databases[scale].url):
            raise Mistake(
                "The database server of this process has stopped. Restart the kernel "
                "(menu Kernel, Restart Kernel) and run the cells again from the top."
            )
        return _databases[scale]


def _first(scale: int) -> Database:
    """What DATABASE_URL names, loaded; else a private database."""
    url = os.environ.get("DATABASE_URL")
    if url:
        check_url(url)
        watchdog, answer = _ask({"scale": scale, "url": url})
        watchdog.stop()
        database = Database(**answer, private=False)
        print(f"The database: {database.description}.", file=sys.stderr)
        return database
    return start_server(scale).database


def _kernel() -> str | None:
    """What Jupyter tells a kernel about its parent; differs from kernel to kernel."""
    return os.environ.get("JPY_PARENT_PID")


def _bequeath() -> None:
    """Tell processes that are started from here on which databases there are."""
    os.environ[INHERITANCE] = json.dumps(
        {"kernel": _kernel(), "databases": {s: asdict(d) for s, d in _databases.items()}}
    )


def _inherited(scale: int) -> Database | None:
    """The database that this process's parent has. A kernel never takes one: it gets its own."""
    heritage = json.loads(os.environ.get(INHERITANCE, "{}"))
    databases = heritage.get("databases", {})
    if heritage.get("kernel") != _kernel() or str(scale) not in databases:
        return None
    database = Database(**databases[str(scale)])
    return database if _answers(database.url) else None


def _parsed(url: str) -> URL:
    # By SQLAlchemy's own parser, for another one finds another password in the same text. It is
    # imported here, for the start of a private database has no time to lose.
    from sqlalchemy.engine import make_url

    return make_url(url)


def _server_of(url: str) -> tuple[str, int]:
    parts = _parsed(url)
    assert parts.host is not None
    return parts.host, parts.port or 5432


def _answers(url: str) -> bool:
    """Whether the server is still there."""
    try:
        socket.create_connection(_server_of(url), timeout=2).close()
    except OSError:
        return False
    return True


def _ask(request: dict[str, Any]) -> tuple[Keeper, dict[str, Any]]:
    """Start a watchdog and wait for its answer."""
    # Its import path is told outright, for how this process finds the package may not be inherited.
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); "
        "from workshop.watchdog import main; main()"
    )
    watchdog = Keeper(program, str(ROOT), stdout=subprocess.PIPE)
    try:
        return watchdog, _request(watchdog, request)
    except BaseException:
        # Also an interrupt: nothing may be left of a start that nobody waits for any more.
        watchdog.stop()
        raise


def _request(watchdog: Keeper, request: dict[str, Any]) -> dict[str, Any]:
    """Send a watchdog a line and wait for its answer."""
    stdin, stdout = watchdog.process.stdin, watchdog.process.stdout
    assert stdin is not None and stdout is not None
    stdin.write(json.dumps(request).encode("ascii") + b"\n")
    stdin.flush()
    line = stdout.readline()
    answer: dict[str, Any] = (
        json.loads(line) if line else {"failure": "the watchdog ended without an answer"}
    )
    if "mistake" in answer:
        raise Mistake(answer["mistake"])
    if "failure" in answer:
        raise RuntimeError(answer["failure"])
    return answer
