"""`python3 lab.py room`: which seats have done which task, for the instructor, on a page that updates.

Seats are those who share it (`python3 lab.py join`): through the network, or a folder that all can write to. In a hub
the folder is that of the homes. Nothing but names and the marks of tasks is shared, and nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse

from workshop import progress
from workshop.mistake import Mistake

MARKS = ("done", "tried", "open")
PORT = 8970
_MOST_SEATS = 200
_LONGEST_NAME = 40
_MOST_BYTES = 10_000  # of what a seat sends
# Below a folder: what `join` writes, and what a kit has in a home, or one folder further down.
_PROGRESS = ("*/progress.json", "*/my_notebooks/progress.json", "*/*/my_notebooks/progress.json")
_OWN = ("127.0.0.1", "::1")
_PAGE = Path(__file__).with_name("room.html")


class Seats:
    """What each seat has shared: by its name, the marks of the tasks of each exercise, as `progress.state` has them."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._sent: dict[str, progress.State] = {}

    def share(self, name: str, marks: Any) -> None:
        """Take what a seat sends; raises ValueError where that is not marks of this kit's tasks."""
        if not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
            raise ValueError(f"a name has 1 to {_LONGEST_NAME} letters that can be printed")
        known = {number: set(names) for number, names in progress.state().items()}
        is_whole = isinstance(marks, dict) and all(
            isinstance(names, dict)
            and set(names) == known.get(number)
            and set(names.values()) <= set(MARKS)
            for number, names in marks.items()
        )
        if not is_whole or set(marks) != set(known):
            raise ValueError(
                "these are not the tasks of this kit; use the version that the room has"
            )
        if name not in self._sent and len(self._sent) >= _MOST_SEATS:
            raise ValueError(f"the room has {_MOST_SEATS} seats already")
        self._sent[name] = marks

    def state(self) -> dict[str, progress.State]:
        """All seats, by name, in its order."""
        found = dict(self._sent)
        if self._folder is not None:
            for pattern in _PROGRESS:
                for path in self._folder.glob(pattern):
                    found[path.relative_to(self._folder).parts[0]] = progress.state(path)
        return dict(sorted(found.items()))


def room(seats: Seats, key: str) -> FastAPI:
    """The service: whoever has the key may share; only whoever sits at this machine may look."""
    app = FastAPI(openapi_url=None)

    def look(request: Request) -> None:
        if request.client is None or request.client.host not in _OWN:
            raise HTTPException(404)

    @app.get("/", response_class=HTMLResponse)
    def page(request: Request) -> str:
        look(request)
        return _PAGE.read_text(encoding="utf-8")

    @app.get("/state")
    def state(request: Request) -> dict[str, progress.State]:
        look(request)
        return seats.state()

    @app.post("/{given}")
    async def share(given: str, request: Request) -> None:
        if not secrets.compare_digest(given.encode(), key.encode()):
            raise HTTPException(404, "this room has another address")
        content = b""
        async for part in request.stream():
            content += part
            if len(content) > _MOST_BYTES:
                raise HTTPException(413, "that is more than marks of tasks")
        try:
            sent = json.loads(content)
            seats.share(str(sent["name"]), sent["marks"])
        except (KeyError, TypeError) as error:
            raise HTTPException(422, "that is not a name and marks of tasks") from error
        except ValueError as error:
            raise HTTPException(422, str(error)) from error

    return app


def own_address() -> str:
    """This machine's address in its network; 127.0.0.1 where it is in none. Nothing is sent to find out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(("192.0.2.1", 9))  # an address that is nobody's (RFC 5737)
        except OSError:
            return "127.0.0.1"
        address: str = asking.getsockname()[0]
        return address


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the room until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="lab.py room", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, help="a folder that the seats share, or of their homes"
    )
    parser.add_argument("--network", action="store_true", help="let seats join over the network")
    parser.add_argument("--port", type=int, default=PORT)
    options = parser.parse_args(arguments)
    if options.folder is not None and not options.folder.is_dir():
        raise Mistake(f"there is no folder {options.folder}")
    if options.folder is None and not options.network:
        raise Mistake("say where the seats are: --network, --folder FOLDER, or both")
    key = secrets.token_hex(3)
    with socket.socket() as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("0.0.0.0" if options.network else "127.0.0.1", options.port))
        except OSError as error:
            raise Mistake(
                f"port {options.port} cannot be had ({error.strerror}); name another: --port 8971"
            ) from error
        listener.listen()  # before anybody reads the address
        port = listener.getsockname()[1]
        print(f"The room, for you alone: http://127.0.0.1:{port}/")
        if options.network:
            print(f"For the seats: python3 lab.py join http://{own_address()}:{port}/{key} NAME")
        if options.folder is not None:
            print(f"Or: python3 lab.py join {options.folder} NAME")
        print("Ctrl-C ends it.", flush=True)
        config = uvicorn.Config(room(Seats(options.folder), key), log_level="critical")
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    try:
        main()
    except Mistake as mistake:
        sys.exit(f"lab.py room: {mistake}")
    except KeyboardInterrupt:
        sys.exit(130)
