"""What is left of kernels that have ended: their processes and files, told by their temporary folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

GONE_WITHIN = 15.0  # seconds to the end of all that a kernel started: one when idle, more than 3 on an overloaded disk


def processes_of(temporary: Path) -> list[psutil.Process]:
    """The processes that were started with this temporary folder as TMPDIR, orphans included."""
    found = []
    for process in psutil.process_iter():
        try:
            # PostgreSQL's children overwrite their environment, but they live in its data folder.
            if process.environ().get("TMPDIR") == str(temporary) or process.cwd().startswith(
                str(temporary)
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # ended meanwhile, or somebody else's
    return found


def runs_of(process: psutil.Process) -> list[psutil.Process]:
    """The runs of `observe` that a process has going: forks of its fork server, or children where it has none."""
    found = []
    for child in process.children():
        line = " ".join(child.cmdline())
        if "child.serve()" in line:
            found += child.children()
        elif "child.main()" in line:
            found.append(child)
    return found


def has_ended(process: psutil.Process) -> bool:
    """Whether it runs no more; an orphan stays as a zombie until the first process takes notice."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def await_that(condition: Callable[[], object], seconds: float) -> bool:
    """Whether the condition comes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _waits_for_consoles(path: Path) -> bool:
    """Whether it is the folder of this user's consoles, which stays for the next one, with nothing in it."""
    return path.name.startswith("ormscope") and path.is_dir() and not any(path.iterdir())


def assert_nothing_is_left(temporary: Path, known: Iterable[psutil.Process] = ()) -> None:
    """No process and no file of a kernel that has ended just now, within the promised time.

    `known` are processes that must be gone, too, though they may not show where they come from.
    """

    def left() -> list[object]:
        living = [process for process in known if not has_ended(process)]
        files = [path for path in temporary.iterdir() if not _waits_for_consoles(path)]
        return [*living, *processes_of(temporary), *files]

    await_that(lambda: not left(), GONE_WITHIN)
    # pytest explains only the assertions of test files.
    assert not left(), f"after {GONE_WITHIN} s there is still {left()}"
