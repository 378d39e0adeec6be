"""A PgBouncer of a lesson: transaction mode, on a free port of 127.0.0.1, before a database of ours.

PgBouncer is a program of its own and need not be there; where it is, it goes with whoever asked for it, however that
one ends.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Self

from sqlalchemy.engine import make_url

from workshop import postgres
from workshop.keeper import Keeper, free_port
from workshop.mistake import Mistake

_START_SECONDS = 10.0
# The first that knows prepared statements, and so the setting.
_KNOWS_PREPARED_STATEMENTS = (1, 21)


def program() -> str | None:
    """Where PgBouncer is on this machine; None where it is not. (Debian has it where only root looks.)"""
    return shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")


class PgBouncer:
    """A PgBouncer that shares `connections` of the database at `url` among all its clients, until `close()`.

    It keeps no prepared statements for them, which is all that versions before 1.21 can do; later ones do unless
    told otherwise. `url` is its own address. Raises Mistake where the program is missing, or does not start.
    """

    def __init__(self, url: str, connections: int) -> None:
        found = program()
        if found is None:
            raise Mistake("There is no program named pgbouncer here.")
        self.version = _version(found)
        database, port = make_url(url), free_port()
        setting = {
            "listen_addr": "127.0.0.1",
            "listen_port": port,
            "unix_socket_dir": "",
            "auth_type": "any",  # whoever reaches it on this machine may use it, as long as it lives
            "pool_mode": "transaction",
            "default_pool_size": connections,
        }
        if tuple(map(int, self.version.split(".")[:2])) >= _KNOWS_PREPARED_STATEMENTS:
            setting["max_prepared_statements"] = 0
        lines = [
            "[databases]",
            f"{database.database} = host={database.host} port={database.port}"
            f" user={database.username} password={database.password}",
            "[pgbouncer]",
            *(f"{name} = {value}" for name, value in setting.items()),
        ]
        self.url = database.set(port=port).render_as_string(hide_password=False)
        account = postgres.unprivileged_account()  # it refuses to run as root, too
        self._keeper = Keeper(_KEEPER, cwd=postgres.place_for(account))
        try:
            who = None if account is None else (account.uid, account.gid)
            request = {"program": found, "ini": "\n".join(lines), "account": who}
            self._keeper.tell(request)
            if not self._keeper.listens(port, _START_SECONDS):
                raise Mistake("PgBouncer did not start. Run `pgbouncer --version` to see why.")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it, and wait until it and its folder are gone."""
        self._keeper.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _version(found: str) -> str:
    """For example 1.18.0."""
    said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30)
    match = re.search(r"(?i)pgbouncer(?: version)? (\d+\.\d+\.\d+)", said.stdout + said.stderr)
    if match is None:
        raise Mistake(f"{found} does not say which PgBouncer it is.")
    return match[1]


# Keeps one PgBouncer as long as its standard input is open, which ends with the parent in any case. The file has the
# database's password, so it is written for its reader alone. (A thread reads the input, so that a PgBouncer that does
# not start ends its keeper.)
_KEEPER = """
import json, os, subprocess, sys, tempfile, threading
from pathlib import Path
request = json.loads(sys.stdin.readline())
options = {}
with tempfile.TemporaryDirectory(prefix="workshop-pgbouncer-", dir=".") as folder:
    ini = Path(folder, "pgbouncer.ini")
    ini.touch(mode=0o600)
    ini.write_text(request["ini"], encoding="utf-8")
    if request["account"]:
        uid, gid = request["account"]
        os.chown(ini, uid, gid)
        os.chown(folder, -1, gid)
        os.chmod(folder, 0o750)
        options = {"user": uid, "group": gid, "extra_groups": []}
    bouncer = subprocess.Popen(
        [request["program"], "pgbouncer.ini"], cwd=folder, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options,
    )
    def end():
        while os.read(0, 4096):
            pass
        bouncer.terminate()
    threading.Thread(target=end, daemon=True).start()
    bouncer.wait()
"""
