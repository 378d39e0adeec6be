"""The MySQL server of a lesson: the one that MYSQL_URL names, or a private MariaDB, or none.

MariaDB is a program of its own and need not be there. Where it is, a private one starts on a free port of 127.0.0.1,
and goes with whoever asked for it, however that one ends.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import sys
import threading
from typing import Self

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from workshop import postgres
from workshop.keeper import Keeper, free_port
from workshop.mistake import Mistake

_START_SECONDS = 60.0  # it makes its tables first; a second where nobody else is busy
_FOLDERS = (
    "/usr/sbin",
    "/usr/local/sbin",
    "/opt/homebrew/opt/mariadb/bin",
    "/usr/local/opt/mariadb/bin",
)
_WANTED = "Wanted: mysql://user:password@host:port/database, of an empty database."


def programs() -> tuple[str, str] | None:
    """Where mariadbd and mariadb-install-db are on this machine; None where they are not, and on Windows."""
    if sys.platform == "win32":
        return None
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_FOLDERS])
    server = shutil.which("mariadbd", path=path)
    install = shutil.which("mariadb-install-db", path=path)
    return (server, install) if server and install else None


def mysql_url() -> str | None:
    """The address of this process's one MySQL server, `mysql://…`; None where there is none.

    The first call starts a private one (a second), unless MYSQL_URL names another. Raises Mistake where MYSQL_URL is
    no such address, or MariaDB does not start.
    """
    named = os.environ.get("MYSQL_URL")
    if named:
        return _checked(named)
    global _private
    with _starting:
        if _private is None and programs() is not None:
            _private = MariaDB()
            atexit.register(_private.close)
    return None if _private is None else _private.url


_private: MariaDB | None = None
_starting = threading.Lock()


def _checked(named: str) -> str:
    try:
        url = make_url(named)
    except (ArgumentError, ValueError):
        # The text is not shown, for nobody knows where in it the password is.
        raise Mistake(f"MYSQL_URL is not an address of a database. {_WANTED}") from None
    if url.get_backend_name() not in ("mysql", "mariadb"):
        raise Mistake(f"MYSQL_URL begins with {url.drivername}://. {_WANTED}")
    if not url.host or not url.database:
        missing = "database" if url.host else "host"
        raise Mistake(f"MYSQL_URL names no {missing}. {_WANTED}")
    return url.set(drivername="mysql").render_as_string(hide_password=False)


class MariaDB:
    """A MariaDB with an empty database, until `close()`; `url` is its address.

    Its one user has a random password and may do anything in it. Raises Mistake where the programs are missing, or do
    not start.
    """

    def __init__(self) -> None:
        found = programs()
        if found is None:
            raise Mistake("There are no programs named mariadbd and mariadb-install-db here.")
        password, port = secrets.token_urlsafe(16), free_port()
        address = URL.create("mysql", "workshop", password, "127.0.0.1", port, "shop")
        self.url = address.render_as_string(hide_password=False)
        account = postgres.unprivileged_account()  # it refuses to run as root, too
        self._keeper = Keeper(_KEEPER, cwd=postgres.place_for(account))
        try:
            who = None if account is None else (account.uid, account.gid)
            request = {"programs": found, "port": port, "password": password, "account": who}
            self._keeper.tell(request)
            # It listens when its tables are made and the user is known.
            if not self._keeper.listens(port, _START_SECONDS):
                raise Mistake("MariaDB did not start. Run `mariadbd --version` to see why.")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it, and wait until it and its folder are gone."""
        atexit.unregister(self.close)
        self._keeper.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# Keeps one MariaDB as long as its standard input is open, which ends with the parent in any case; a thread reads it, so
# that a MariaDB that does not start ends its keeper. The password is in a file for its reader alone. Root has none, and
# comes in by the socket only, which is in the folder. The script that makes the tables is awaited: killed, it would
# leave the program that it has started. The data are thrown away at the end, so nothing has to survive a power cut.
_KEEPER = """
import json, os, shutil, subprocess, sys, tempfile, threading
from pathlib import Path
request = json.loads(sys.stdin.readline())
server, install = request["programs"]
ended = threading.Event()
def await_the_end():
    while os.read(0, 4096):
        pass
    ended.set()
def start(*command):
    return subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "TZ": "UTC", "TMPDIR": folder}, **options,
    )
with tempfile.TemporaryDirectory(prefix="workshop-mariadb-", dir=".") as name:
    folder, options = os.path.abspath(name), {}
    first = Path(folder, "first.sql")
    first.touch(mode=0o600)
    first.write_text(
        "CREATE DATABASE shop CHARACTER SET utf8mb4;\\n"
        "CREATE USER workshop@'127.0.0.1' IDENTIFIED BY '%(password)s';\\n"
        "GRANT ALL ON *.* TO workshop@'127.0.0.1';\\n" % request
    )
    if request["account"]:
        uid, gid = request["account"]
        for path in (folder, first):
            os.chown(path, uid, gid)
        options = {"user": uid, "group": gid, "extra_groups": []}
    threading.Thread(target=await_the_end, daemon=True).start()
    failed = start(
        install, "--no-defaults", "--datadir=" + folder + "/data", "--skip-test-db",
        "--auth-root-authentication-method=socket", "--innodb-log-file-size=16M",
    ).wait()
    if not failed and not ended.is_set():
        running = start(
            server, "--no-defaults", "--datadir=" + folder + "/data", "--tmpdir=" + folder,
            "--bind-address=127.0.0.1", "--port=%(port)d" % request, "--socket=s", "--pid-file=pid",
            "--init-file=" + str(first), "--skip-name-resolve",
            "--max-connections=151", "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0",
            "--innodb-log-file-size=16M", "--innodb-buffer-pool-size=64M", "--performance-schema=off",
        )
        while running.poll() is None and not ended.wait(0.1):
            pass
        running.kill()  # asked to leave just after its start, it may never do so; nobody wants its data
        running.wait()
"""
