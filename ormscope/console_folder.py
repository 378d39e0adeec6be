"""Where consoles are: a folder of the user's own, which nobody else may enter."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from tempfile import gettempdir

# PID, and a number where the same user has several of that id, in containers; `.sock` is a Unix socket, `.json` where
# there are none the file that tells port and token.
_NAME = re.compile(r"(\d+)(-\d+)?\.(sock|json)")


def folders() -> list[Path]:
    """Where a console of this user may be, whether there is such a folder or not; the first is where it is made.

    A service and a terminal of the same user need not agree: systemd gives XDG_RUNTIME_DIR to logins, not to services.
    """
    user = _user()
    found = []
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    # Under sudo it may be somebody else's.
    if os.path.isabs(runtime) and os.path.isdir(runtime) and os.stat(runtime).st_uid == user:
        found.append(Path(runtime, "ormscope"))
    found.append(Path(gettempdir(), "ormscope" if user is None else f"ormscope-{user}"))
    return found


def private_folder() -> Path:
    """The folder in which this process makes its console.

    Raises PermissionError where it is a link, or somebody else's, or open to others; OSError where it cannot be made.
    """
    folder = folders()[0]
    folder.mkdir(mode=0o700, exist_ok=True)
    check_private(folder)
    return folder


def check_private(folder: Path) -> None:
    """Raise PermissionError unless a path is a folder, no link, that only this user can enter."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise PermissionError(f"{folder} is not a folder")
    user = _user()
    if user is None:
        return  # Windows: the folder for temporary files is the user's own
    if found.st_uid != user:
        raise PermissionError(f"{folder} belongs to user {found.st_uid}, not to {user}")
    if found.st_mode & 0o077:
        raise PermissionError(f"{folder} is open to others (mode {found.st_mode & 0o777:o})")


def pid_of(path: Path) -> int | None:
    """The process whose console a path is, by its name; None where that is not the name of one."""
    found = _NAME.fullmatch(path.name)
    return None if found is None else int(found[1])


def check_own(path: Path) -> None:
    """Raise PermissionError unless a path is a socket or an ordinary file, no link, of this user (root: anybody's)."""
    found = path.lstat()
    if not (stat.S_ISSOCK(found.st_mode) or stat.S_ISREG(found.st_mode)):
        raise PermissionError(f"{path} is neither a socket nor a file")
    user = _user()
    if user not in (None, 0, found.st_uid):
        raise PermissionError(f"{path} belongs to user {found.st_uid}, not to {user}")


def _user() -> int | None:
    return os.geteuid() if hasattr(os, "geteuid") else None
