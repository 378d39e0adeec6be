"""A process that keeps something for as long as its parent lives: a database, a Prometheus, a PgBouncer.

The parent alone holds the other end of its standard input. However the parent goes (exit, restart, SIGKILL), that
pipe closes, and the keeper ends what it keeps.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

_END_SECONDS = 30.0

DETACHED: dict[str, Any] = {"start_new_session": True}
"""Arguments for subprocess: Jupyter kills the whole process group of a kernel, and the keeper outlives it."""
if sys.platform == "win32":
    DETACHED = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}


def free_port() -> int:
    """A port of 127.0.0.1 where nobody listens at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Keeper:
    """A Python program in a process of its own, which has to end when its standard input does.

    The program is given as its text, so that it is found on any import path. `cwd` and `stdout` are what `Popen` takes.
    """

    def __init__(
        self,
        program: str,
        *arguments: str,
        cwd: Path | None = None,
        stdout: int = subprocess.DEVNULL,
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            **DETACHED,
        )
        self._owner = os.getpid()
        _running.add(self)

    def tell(self, request: dict[str, Any]) -> None:
        """Hand the program what it is to do, as a line of JSON."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def listens(self, port: int, seconds: float) -> bool:
        """Whether what the program has started listens on a port of this machine within so many seconds."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return True
            time.sleep(0.02)
        return False

    def stop(self) -> None:
        """Tell it that it is over, and wait until it has cleaned up. In a forked child this does nothing."""
        if os.getpid() == self._owner:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(timeout=_END_SECONDS)
            self._let_go()

    def _let_go(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


_running: weakref.WeakSet[Keeper] = weakref.WeakSet()


def _let_go_of_all() -> None:
    for keeper in _running:
        keeper._let_go()


if hasattr(os, "register_at_fork"):
    # A program that is started does not inherit the pipe. A fork does, and a child that outlives
    # its parent would keep the keeper alive.
    os.register_at_fork(after_in_child=_let_go_of_all)
