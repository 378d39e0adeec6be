"""Processes for `observe`, forked from one that has imported SQLAlchemy already, where that can be done.

The import takes most of the time of a short run. So the first run of a process starts a server, which imports and
then forks itself for each run; it ends with the process that started it. Only on Linux: macOS's own libraries do
not bear a fork without an exec, and Windows has none.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import subprocess
import sys
import threading
from typing import Any, BinaryIO, Protocol, cast

CAN_FORK = sys.platform == "linux"
_FORK, _WAIT = b"fork", b"wait"
_LONGEST_MESSAGE = 2**16
_PATH = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
_BOOTSTRAP = (
    f"import sys; sys.path.insert(0, {_PATH!r}); from ormscope.lab import child; child.{{}}()"
)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"}


class Process(Protocol):
    """A process to which a workload can be sent. `stdin` is to be written, `stdout` and `stderr` are to be read."""

    pid: int
    stdin: BinaryIO
    stdout: BinaryIO
    stderr: BinaryIO

    def kill(self) -> None:
        """End it at once, and with it all that it has started, but for what has left its group."""

    def wait(self) -> int:
        """Wait for its end."""


class Forked:
    """A Process that the server forked."""

    def __init__(self, server: ForkServer) -> None:
        ours, theirs = [], []
        for ours_is_read in (False, True, True):
            read, write = os.pipe()
            ours.append(read if ours_is_read else write)
            theirs.append(write if ours_is_read else read)
        self._server = server
        try:
            self.pid = server.fork(theirs)
        except OSError:
            for descriptor in ours:
                os.close(descriptor)
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self.stdin: BinaryIO = os.fdopen(ours[0], "wb")
        self.stdout: BinaryIO = os.fdopen(ours[1], "rb")
        self.stderr: BinaryIO = os.fdopen(ours[2], "rb")

    def kill(self) -> None:
        """End it and its group. Its number is its own until `wait`, for nobody else may learn of its end before."""
        if sys.platform == "win32":
            raise NotImplementedError  # nobody forks there
        os.killpg(self.pid, 9)

    def wait(self) -> int:
        """Wait for its end; return what `os.waitpid` says of it."""
        return self._server.wait(self.pid)


class ForkServer:
    """The process that forks; it ends when this one does, or closes it."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP.format("serve"), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_environment(),
                start_new_session=True,  # Ctrl-C in the terminal is not for it
            )

    @property
    def usable(self) -> bool:
        """Whether it runs, and was not inherited from the parent by a fork of this process."""
        return self._owner == os.getpid() and self._process.poll() is None

    def fork(self, streams: list[int]) -> int:
        """A new process with these file descriptors as its standard streams; its number.

        Raises OSError where the server has ended.
        """
        if sys.platform == "win32":
            raise NotImplementedError  # nobody forks there
        message = " ".join([_FORK.decode(), *_preloaded]).encode()
        with self._lock:
            socket.send_fds(self._channel, [message], streams)
            return self._answer()

    def wait(self, pid: int) -> int:
        """Wait for the end of a process that was forked here; 0 where the server has ended meanwhile."""
        with self._lock:
            try:
                self._channel.send(_WAIT + str(pid).encode())
                return self._answer()
            except OSError:
                return 0

    def _answer(self) -> int:
        answer = self._channel.recv(_LONGEST_MESSAGE)
        if not answer:
            raise ConnectionResetError("the fork server has ended")
        return int(answer)


class _Spawned(subprocess.Popen[bytes]):
    def kill(self) -> None:
        """End it and its group; on Windows it alone, for there an interrupt is all that a group can be sent."""
        if sys.platform == "win32":
            super().kill()
        else:
            # macOS forbids it where only the remains of a process that has ended are left.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, 9)


def spawned() -> Process:
    """A Process that is started in the ordinary way."""
    # A group of its own: an interrupt is for the parent to judge, which wants to hear the last words.
    detached: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
        detached = {"creationflags": flags}
    process = _Spawned(
        [sys.executable, "-c", _BOOTSTRAP.format("main")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(),
        **detached,
    )
    return cast(Process, process)  # the streams are there, since they are pipes


_preloaded: dict[str, None] = {}


def preload(module: str) -> None:
    """Let the server import a module before it forks the next run, so that no run has to.

    Only what neither starts a thread nor makes an engine when it is imported: a fork has no threads but one, and
    watches the engines that are made in it.
    """
    _preloaded[module] = None


_server: ForkServer | None = None
_server_lock = threading.Lock()


def forked() -> Process:
    """A Process that is forked from this process's server, which the first call starts."""
    global _server
    with _server_lock:
        if _server is None or not _server.usable:
            _server = ForkServer()
    return Forked(_server)


def serve_forks() -> None:
    """Fork this process whenever it is asked for, and return in each of the new ones; end with who asks."""
    if sys.platform == "win32":
        raise NotImplementedError  # nobody forks there
    channel = socket.socket(fileno=int(sys.argv[-1]))
    while True:
        message, streams, _, _ = socket.recv_fds(channel, _LONGEST_MESSAGE, 3)
        if not message:
            os._exit(0)
        if not message.startswith(_FORK):
            _, status = os.waitpid(int(message.removeprefix(_WAIT)), 0)
            channel.send(str(status).encode())
            continue
        for module in message.decode().split()[1:]:
            with contextlib.suppress(Exception):  # the run imports it again, and says what is wrong
                importlib.import_module(module)
        pid = os.fork()
        if pid == 0:
            channel.close()
            os.setpgid(0, 0)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            return
        os.setpgid(pid, pid)  # whoever comes first: it may be killed before it has begun
        for stream in streams:
            os.close(stream)
        channel.send(str(pid).encode())
