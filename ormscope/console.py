"""serve_console: a socket on which `ormscope console` looks at this process, served by a thread of its own.

A request is one line, the answer another: `state`, or `state KEY` for the details of that pool, or `report KEY`. The
answer is a JSON object; one with the key "error" tells what could not be done. On a port, where there are no Unix
sockets, the token and a space stand before the request.
"""

from __future__ import annotations

import atexit
import hmac
import itertools
import json
import logging
import os
import secrets
import selectors
import socket
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ormscope import proof
from ormscope.console_folder import check_own, pid_of, private_folder
from ormscope.console_state import key_of, report_of, state_of
from ormscope.loop import LoopScope
from ormscope.pool import PoolScope

logger = logging.getLogger("ormscope")

_MOST_CLIENTS = 8
_LONGEST_REQUEST = 512  # bytes
_IDLE_SECONDS = 60.0
# So long an answer serves whoever asks the same: eight consoles cost what one does.
_STATE_SECONDS = 0.2
_REPORT_SECONDS = 1.0
_MOST_ANSWERS_KEPT = 16
_PAUSE_SECONDS = 0.01  # after each round of answers, so that no client can keep the thread busy
_CLOSED_WITHIN_SECONDS = 5.0
_CONNECT_SECONDS = 1.0
_MOST_CONSOLES = 10  # of processes with one id, in containers that share the folder
_FRESH_SECONDS = 60.0  # a socket so young may be about to be listened at
_LONGEST_SOCKET_PATH = 100  # bytes; macOS allows 103

_has_unix_sockets = sys.platform != "win32" and hasattr(socket, "AF_UNIX")
_open: weakref.WeakSet[Console] = weakref.WeakSet()


def serve_console(*scopes: PoolScope, loop: LoopScope | None = None) -> Console:
    """Open a socket for `ormscope console PID`, until the process ends or `close()`.

    Without `scopes` the console shows each PoolScope of this process, those that are made later included; without a
    `loop`, the lag of the loops that the scopes were given. Only this user can connect. A process that is forked
    off does not inherit it, but may call this anew.

    Raises nothing: what fails is logged (`logging.getLogger("ormscope")`), and `Console.failure` says it.
    """
    return Console(*scopes, loop=loop)


class _Client:
    """A connection to a console: what it has asked so far, and what it has still to be told."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received = b""
        self.pending = memoryview(b"")
        self.ends = False  # once it has been told
        self.active_at = time.monotonic()


class Console:
    """The socket that `serve_console()` has opened.

    `address` is the Unix socket, or the file with port and token, None where there is none (any more); `failure` says
    why it could not be opened, or had to be closed.
    """

    def __init__(self, *scopes: PoolScope, loop: LoopScope | None = None) -> None:
        self.address: Path | None = None
        self.failure: str | None = None
        self._scopes, self._loop = scopes, loop
        self._seen: weakref.WeakSet[PoolScope] = weakref.WeakSet(scopes)
        self._token: bytes | None = None
        self._sockets: list[socket.socket] = []
        self._selector: selectors.BaseSelector | None = None
        self._clients: set[_Client] = set()
        self._answers: dict[str, tuple[float, bytes]] = {}
        self._complained = False
        self._closing = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="ormscope-console", daemon=True)
        try:
            self._listener = self._listen()
            self._sockets.append(self._listener)
            self._wake, self._woken = socket.socketpair()
            self._sockets += [self._wake, self._woken]
            self._selector = selectors.DefaultSelector()
            for listened in (self._listener, self._woken):
                listened.setblocking(False)
                self._selector.register(listened, selectors.EVENT_READ)
            self._thread.start()
        except Exception as error:
            self._fail(error)
            self._release()
            return
        _open.add(self)
        atexit.register(self.close)

    def close(self) -> None:
        """Close the socket and remove it. Raises nothing."""
        if self._process != os.getpid() or self._closing:
            return
        self._closing = True
        atexit.unregister(self.close)
        _open.discard(self)
        if not self._thread.is_alive():
            return  # it has removed all itself
        self._remove()
        try:
            self._wake.send(b"x")
        except OSError as error:  # the thread has just ended by itself
            logger.debug("the console's thread could not be woken: %s", error)
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSED_WITHIN_SECONDS)

    # Opening and closing.

    def _listen(self) -> socket.socket:
        folder = private_folder()
        _remove_stale(folder)
        if _has_unix_sockets and len(os.fsencode(folder)) < _LONGEST_SOCKET_PATH - 15:
            if sys.platform == "win32":
                raise NotImplementedError
            path = _free_path(folder, ".sock")
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                listener.bind(str(path))
                self.address = path
                os.chmod(path, 0o600)  # before anybody can connect
                listener.listen(_MOST_CLIENTS)
            except BaseException:
                listener.close()
                raise
            return listener
        path = _free_path(folder, ".json")
        listener = socket.create_server(("127.0.0.1", 0), backlog=_MOST_CLIENTS)
        try:
            token = secrets.token_urlsafe(32)
            self._token = token.encode()
            about = json.dumps({"port": listener.getsockname()[1], "token": token})
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self.address = path
            with os.fdopen(opened, "w") as file:
                file.write(about)
        except BaseException:
            listener.close()
            raise
        return listener

    def _fail(self, error: BaseException) -> None:
        self.failure = f"{type(error).__qualname__}: {error}"
        logger.error("the console of this process is closed; all else goes on", exc_info=error)

    def _remove(self) -> None:
        address, self.address = self.address, None
        if address is not None:
            try:
                address.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("the console's socket could not be removed: %s", error)

    def _release(self) -> None:
        self._remove()
        self._let_go()

    def _let_go(self) -> None:
        """Close all descriptors, and nothing else: in a forked child the socket's file is the parent's."""
        for client in list(self._clients):
            client.connection.close()
        for opened in self._sockets:
            opened.close()
        if self._selector is not None:
            self._selector.close()
        self._clients.clear()
        self._sockets.clear()
        self._answers.clear()

    def _forked(self) -> None:
        self._closing, self.address = True, None
        self._let_go()

    # The thread.

    def _serve(self) -> None:
        try:
            while not self._closing:
                self._serve_round()
        except Exception as error:
            self._fail(error)
        finally:
            self._release()

    def _serve_round(self) -> None:
        assert self._selector is not None
        answered = False
        for key, _ in self._selector.select(_IDLE_SECONDS / 4 if self._clients else None):
            if key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.data, _Client):
                try:
                    self._attend(key.data)
                except OSError as error:  # it has hung up, as each does in the end
                    logger.debug("a console's client has gone: %s", error)
                    self._drop(key.data)
                answered = True
        now = time.monotonic()
        for client in [idle for idle in self._clients if now - idle.active_at > _IDLE_SECONDS]:
            self._drop(client)
        if answered:
            time.sleep(_PAUSE_SECONDS)

    def _accept(self) -> None:
        assert self._selector is not None
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return  # whoever wanted to connect has given up
        except OSError as error:  # too many open files, say
            self._complain(error)
            time.sleep(10 * _PAUSE_SECONDS)
            return
        connection.setblocking(False)
        client = _Client(connection)
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, client)
        if len(self._clients) > _MOST_CLIENTS:
            self._answer(
                client, _refusal(f"{_MOST_CLIENTS} consoles are connected, no more can be")
            )
            client.ends = True

    def _attend(self, client: _Client) -> None:
        """Read what a client asks, or go on with the answer."""
        client.active_at = time.monotonic()
        if not client.pending:
            more = client.connection.recv(_LONGEST_REQUEST + 1)
            client.received += more
            if not more:
                self._drop(client)
                return
            line, newline, rest = client.received.partition(b"\n")
            if len(line) > _LONGEST_REQUEST or rest:
                client.ends = True
                self._answer(client, _refusal("one short line at a time"))
                return
            if not newline:
                return
            client.received = b""
            self._answer(client, self._answer_to(client, line))
        self._send(client)

    def _answer(self, client: _Client, answer: bytes) -> None:
        assert self._selector is not None
        client.pending = memoryview(answer)
        self._selector.modify(client.connection, selectors.EVENT_WRITE, client)

    def _send(self, client: _Client) -> None:
        assert self._selector is not None
        try:
            sent = client.connection.send(client.pending)
        except BlockingIOError:
            return
        client.pending = client.pending[sent:]
        if client.pending:
            return
        if client.ends:
            self._drop(client)
        else:
            self._selector.modify(client.connection, selectors.EVENT_READ, client)

    def _drop(self, client: _Client) -> None:
        assert self._selector is not None
        if client in self._clients:
            self._clients.discard(client)
            self._selector.unregister(client.connection)
            client.connection.close()
        if not self._clients:
            self._answers.clear()

    def _complain(self, error: BaseException) -> None:
        if not self._complained:
            self._complained = True
            logger.error("the console could not answer; more of this is not logged", exc_info=error)

    # The answers.

    def _answer_to(self, client: _Client, line: bytes) -> bytes:
        if self._token is not None:
            token, _, line = line.partition(b" ")
            if not hmac.compare_digest(token, self._token):
                client.ends = True
                return _refusal("the token is wrong")
        what, _, key = line.decode("ascii", "replace").strip().partition(" ")
        if what not in ("state", "report"):
            return _refusal("the requests are: state, state KEY, report KEY")
        try:
            shown = self._shown()
            scope = next((scope for scope in shown if key_of(scope) == key), None)
            if what == "state":
                name = "" if scope is None else key
                return self._kept(name, _STATE_SECONDS, lambda: self._state(shown, key))
            if scope is None:
                return _refusal("there is no such pool any more")
            asked = scope
            return self._kept(
                f"report {key}", _REPORT_SECONDS, lambda: {"report": report_of(asked)}
            )
        except Exception as error:
            self._complain(error)
            return _refusal(f"{type(error).__qualname__}: {error}"[:_LONGEST_REQUEST])

    def _kept(self, request: str, seconds: float, make: Callable[[], dict[str, Any]]) -> bytes:
        """The answer to a request, made anew where the last one is older."""
        made_at, answer = self._answers.get(request, (0.0, b""))
        if not answer or time.monotonic() - made_at > seconds:
            answer = json.dumps(make()).encode() + b"\n"
            if len(self._answers) >= _MOST_ANSWERS_KEPT:
                self._answers.clear()
            self._answers[request] = time.monotonic(), answer
        return answer

    def _shown(self) -> list[PoolScope]:
        """The scopes that watch, or have failed; not those that were closed."""
        watching = proof.scopes()
        if not self._scopes:
            self._seen.update(watching)
        shown = [scope for scope in list(self._seen) if scope in watching or scope.failure]
        return sorted(shown, key=lambda scope: (scope.name, id(scope)))

    def _state(self, shown: list[PoolScope], key: str) -> dict[str, Any]:
        loops = [self._loop] if self._loop is not None else [scope.loop for scope in shown]
        return state_of(shown, [loop for loop in loops if loop is not None], key)


def _refusal(why: str) -> bytes:
    return json.dumps({"error": why}).encode() + b"\n"


def _paths(folder: Path, suffix: str) -> Iterator[Path]:
    yield folder / f"{os.getpid()}{suffix}"
    for number in itertools.count(2):
        yield folder / f"{os.getpid()}-{number}{suffix}"


def _free_path(folder: Path, suffix: str) -> Path:
    """Where this process's console can be; what a dead process of the same id has left there is removed.

    Raises PermissionError where something else is there that no console has left.
    """
    for path in itertools.islice(_paths(folder, suffix), _MOST_CONSOLES):
        try:
            found = path.lstat()
        except FileNotFoundError:
            return path
        is_ours = stat.S_ISSOCK(found.st_mode) if suffix == ".sock" else stat.S_ISREG(found.st_mode)
        if not is_ours or (hasattr(os, "geteuid") and found.st_uid != os.geteuid()):
            raise PermissionError(f"{path} is not what a console of this user has left")
        if not _is_served(path):
            path.unlink(missing_ok=True)
            return path
    raise FileExistsError(f"{_MOST_CONSOLES} consoles of process {os.getpid()} are in {folder}")


def _remove_stale(folder: Path) -> None:
    """Remove what processes have left that were killed."""
    for path in folder.iterdir():
        try:
            is_old = time.time() - path.lstat().st_mtime > _FRESH_SECONDS
            if pid_of(path) is not None and is_old and not _is_served(path):
                check_own(path)
                path.unlink()
        except OSError as error:  # another process does the same just now, say
            logger.debug("what is left of another console could not be removed: %s", error)


def _is_served(path: Path) -> bool:
    """Whether anybody listens at a console's address."""
    try:
        connect(path, _CONNECT_SECONDS)[0].close()
    except (ConnectionRefusedError, FileNotFoundError, ValueError):
        return False
    except OSError as error:  # its process is stopped, or all its places are taken
        logger.debug("a console does not answer: %s", error)
    return True


def connect(address: Path, seconds: float) -> tuple[socket.socket, str]:
    """A connection to a console, and what stands before each request on it; every wait on it is limited to `seconds`.

    Raises OSError where nobody serves it, ValueError where the file with port and token is not one.
    """
    if sys.platform != "win32" and address.suffix != ".json":
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(seconds)
            connection.connect(str(address))
        except BaseException:
            connection.close()
            raise
        return connection, ""
    about = json.loads(address.read_text())
    port, token = (about.get("port"), about.get("token")) if isinstance(about, dict) else (0, "")
    if not isinstance(port, int) or not 0 < port < 65536 or not isinstance(token, str):
        raise ValueError(f"{address} does not name a port and a token")
    return socket.create_connection(("127.0.0.1", port), timeout=seconds), f"{token} "


def _let_go_after_fork() -> None:
    for console in list(_open):
        console._forked()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_after_fork)
