"""The other end of `serve_console()`: which processes offer a console, and asking one of them."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

from ormscope.console import connect
from ormscope.console_folder import check_own, check_private, folders, pid_of

_SECONDS = 3.0
_LONGEST_ANSWER = 4 << 20  # bytes


class ConsoleError(Exception):
    """A console that there is not, or that refuses."""


class NoAnswerError(ConsoleError):
    """A console that is there and says nothing: its process is stopped, or lets no thread run."""


class Offer(NamedTuple):
    """A process that offers a console: where, and what it calls itself. `lack` says why it cannot be asked."""

    pid: int
    address: Path
    program: str
    lack: str = ""


def offers() -> list[Offer]:
    """The processes of this user that offer a console, by their ids; what killed ones have left is not among them.

    Raises ConsoleError where their folder is not this user's alone.
    """
    found = []
    for path in _addresses(None):
        pid = pid_of(path)
        assert pid is not None
        connection = Connection(path)
        try:
            found.append(Offer(pid, path, str(connection.ask("state")["program"])))
        except NoAnswerError as error:
            found.append(Offer(pid, path, "", str(error)))
        except ConsoleError:
            continue  # nobody serves it any more
        finally:
            connection.close()
    return sorted(found)


def address_of(target: str) -> Path:
    """The console that is meant by a process's id or a path. Raises ConsoleError where there is none."""
    if not target.isascii() or not target.isdigit():
        path = Path(target)
        if not path.exists():
            raise ConsoleError(f"there is no {target}")
        return path
    found = _addresses(int(target))
    if not found:
        raise ConsoleError(
            f"process {target} offers no console to this user; it must call ormscope.serve_console()"
        )
    if len(found) > 1:
        several = " or ".join(map(str, found))
        raise ConsoleError(f"several processes have the id {target}; say which: {several}")
    return found[0]


def _addresses(pid: int | None) -> list[Path]:
    """The consoles of this user that are there, or those of one process; root may look at another user's process."""
    own = folders()
    known = list(own)
    if pid is not None and hasattr(os, "geteuid") and os.geteuid() == 0:
        try:
            user = os.stat(f"/proc/{pid}").st_uid
        except OSError:
            user = 0  # it has gone, or this is not Linux
        if user:
            known += [
                Path(f"/run/user/{user}/ormscope"),
                own[-1].with_name(f"ormscope-{user}"),
            ]
    found = []
    for folder in known:
        try:
            if folder in own:
                check_private(folder)
            found += [path for path in sorted(folder.iterdir()) if pid_of(path) is not None]
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConsoleError(str(error)) from error
    return [path for path in found if pid is None or pid_of(path) == pid]


class Connection:
    """Asks one console, from one thread; connects when it is first asked, and anew after each failure."""

    def __init__(self, address: Path) -> None:
        self.address = address
        self._connection: socket.socket | None = None
        self._prefix = ""

    def ask(self, request: str) -> dict[str, Any]:
        """The answer to a request; takes 3 s at most for each part of it.

        Raises NoAnswerError where there is none in that time, ConsoleError where nobody serves the console any more,
        or it refuses.
        """
        try:
            if self._connection is None:
                check_own(self.address)
                self._connection, self._prefix = connect(self.address, _SECONDS)
            self._connection.sendall(f"{self._prefix}{request}\n".encode())
            answer = json.loads(self._line(self._connection))
            if not isinstance(answer, dict):
                raise ValueError("it does not talk as a console does")
        except (TimeoutError, BlockingIOError) as error:
            self.close()
            raise NoAnswerError("it does not answer") from error
        except (OSError, ValueError, RecursionError) as error:
            self.close()
            raise ConsoleError(str(error) or type(error).__name__) from error
        if "error" in answer:
            raise ConsoleError(str(answer["error"]))
        cleaned: dict[str, Any] = clean(answer)
        return cleaned

    def _line(self, connection: socket.socket) -> bytes:
        received = bytearray()
        while not received.endswith(b"\n"):
            more = connection.recv(1 << 16)
            if not more:
                raise ConnectionResetError("it has closed the connection")
            received += more
            if len(received) > _LONGEST_ANSWER:
                raise ValueError("its answer is too long")
        return bytes(received)

    def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def clean(answer: Any) -> Any:
    """An answer without what a terminal would obey: an SQL statement can have escape sequences in it."""
    if isinstance(answer, str):
        return "".join(
            character
            if character.isprintable() or character == "\n"
            else "\N{REPLACEMENT CHARACTER}"
            for character in answer
        )
    if isinstance(answer, list):
        return [clean(part) for part in answer]
    if isinstance(answer, dict):
        return {clean(key): clean(value) for key, value in answer.items()}
    return answer
