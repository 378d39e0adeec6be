"""`python3 lab.py rehearse`: a room of seats on this machine, which runs lessons all at once.

It starts the hub as `lab.py hub` does, on 127.0.0.1, with users, folders and ports of its own. It logs each seat in, as
a browser would; one runs the lessons alone, then all do, so many at once; then one looks for what it can read of
another. In the end the hub, the users and all that was theirs are gone, or it says what is left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import websockets

from workshop import copies, hub
from workshop.exercises import MY_NOTEBOOKS
from workshop.keeper import free_port
from workshop.mistake import Mistake

_PREFIX = "rehearsal"
_START_SECONDS = 300.0  # as the hub gives a seat
_CELL_SECONDS = 300.0  # more than the slowest cell takes in a crowd
_END_SECONDS = 60.0
_LOOK_SECONDS = 5.0
_BACKEND = re.compile(r"postgres: \S+ \S+ (\[local\]|127\.0\.0\.1\()")

# What a seat asks for that belongs to another, in its own kernel.
_INTRUDE = """
import json, os, socket
def readable(path):
    try:
        return bool(os.listdir(path)) if os.path.isdir(path) else bool(open(path, "rb").read(1))
    except OSError:
        return False
def answers(port):
    heard = b""
    for path in ("/", "/api/contents", "/metrics"):
        try:
            with socket.create_connection(("127.0.0.1", port), 2) as connection:
                connection.sendall(f"GET {path} HTTP/1.0\\r\\n\\r\\n".encode())
                connection.settimeout(2)
                heard = connection.recv(100)
        except OSError:
            continue
        if heard.startswith(b"HTTP/") and heard.split()[1] == b"200":
            return True
    return False
def lets_in(port):
    import psycopg
    try:
        psycopg.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres", connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True
print(json.dumps([
    *(path for path in paths if readable(path)),
    *(f"port {port}" for port in ports if answers(port) or lets_in(port)),
]))
"""

# A page for anybody, as of a service without a password.
_SERVE = """
import http.server, threading
anybody = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=anybody.serve_forever, daemon=True).start()
"""


class User(NamedTuple):
    """A user of the system's."""

    uid: int
    home: Path


def _users() -> dict[str, User]:
    """The users of a rehearsal, by name."""
    told = subprocess.run(["getent", "passwd"], capture_output=True, encoding="utf-8", check=True)
    lines = [line.split(":") for line in told.stdout.splitlines()]
    return {
        name: User(int(uid), Path(home))
        for name, _, uid, _, _, home, _ in lines
        if name.startswith(f"{_PREFIX}-")
    }


@dataclass
class Seat:
    """One seat: whose it is, what it ran, in seconds for each cell, by lesson and cell, and what failed."""

    name: str
    uid: int
    home: Path
    token: str = ""
    kernel: str = ""
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@dataclass
class Use:
    """The most that one seat, and all together, had of the machine: MiB of memory, and connections to databases."""

    seat: float = 0.0
    all_seats: float = 0.0
    connections: int = 0


class Room:
    """The seats of a hub at an address."""

    def __init__(self, address: str, users: Mapping[str, User]) -> None:
        self.seats = [Seat(name, *user) for name, user in users.items()]
        self._client = httpx.AsyncClient(base_url=address, timeout=_START_SECONDS)
        self._websocket = address.replace("http", "ws", 1)

    async def close(self) -> None:
        """Close what it has open."""
        await self._client.aclose()

    async def enter(self, seat: Seat, password: str) -> None:
        """Log a seat in by the form, as a browser does, and start its server."""
        async with httpx.AsyncClient(
            base_url=self._client.base_url, timeout=_START_SECONDS, follow_redirects=True
        ) as browser:
            await browser.get("/hub/login")
            form = {"username": seat.name, "password": password, "_xsrf": browser.cookies["_xsrf"]}
            await browser.post("/hub/login?next=/hub/home", data=form)
            made = await browser.post(
                f"/hub/api/users/{seat.name}/tokens",
                headers={"X-XSRFToken": _cookie(browser, "/hub/")},
                json={},
            )
            made.raise_for_status()
            seat.token = made.json()["token"]
        await self._ask(seat, "POST", f"/hub/api/users/{seat.name}/server")
        deadline = time.monotonic() + _START_SECONDS
        while True:
            user = await self._ask(seat, "GET", f"/hub/api/users/{seat.name}")
            if user["servers"].get("", {}).get("ready"):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{seat.name} has not started after {_START_SECONDS:g} s")
            await asyncio.sleep(0.5)

    async def run(self, seat: Seat, lessons: Sequence[Path]) -> None:
        """Run lessons in a seat, and keep the last kernel."""
        for lesson in lessons:
            path = f"{MY_NOTEBOOKS.name}/{lesson.name}"
            found = await self._ask(seat, "GET", f"/user/{seat.name}/api/contents/{path}")
            if seat.kernel:
                await self._ask(seat, "DELETE", f"/user/{seat.name}/api/kernels/{seat.kernel}")
            about = {
                "path": path,
                "name": lesson.name,
                "type": "notebook",
                "kernel": {"name": "python3"},
            }
            session = await self._ask(seat, "POST", f"/user/{seat.name}/api/sessions", about)
            seat.kernel = session["kernel"]["id"]
            async with self._kernel(seat) as kernel:
                for number, cell in enumerate(found["content"]["cells"]):
                    if cell["cell_type"] != "code":
                        continue
                    began = time.monotonic()
                    status, printed = await _execute(kernel, cell["source"])
                    seat.seconds[lesson.name[:2], number] = time.monotonic() - began
                    tags = cell["metadata"].get("tags", [])
                    if status != ("error" if "raises-exception" in tags else "ok"):
                        last = printed.strip().splitlines()[-1:]
                        seat.failures.append(f"{lesson.name[:2]}, cell {number}: {' '.join(last)}")

    async def intrude(self, seat: Seat, other: Seat, before: str = "") -> list[str]:
        """What one seat can read of another's: its folders and files, and what its ports answer to somebody else.

        The other runs `before` first.
        """
        async with self._kernel(other) as kernel:
            await _execute(kernel, before)
        inside = other.home.glob("*/my_notebooks/*")
        paths = [other.home, *inside, *_temporary_of(other)]
        mine = f"paths = {list(map(str, paths))}\nports = {sorted(_ports_of(other))}\n"
        async with self._kernel(seat) as kernel:
            _, printed = await _execute(kernel, mine + _INTRUDE)
        read: list[str] = json.loads(printed)
        return read

    @contextlib.asynccontextmanager
    async def _kernel(self, seat: Seat) -> AsyncIterator[websockets.ClientConnection]:
        address = f"{self._websocket}/user/{seat.name}/api/kernels/{seat.kernel}/channels"
        headers = {"Authorization": f"token {seat.token}"}
        async with websockets.connect(
            address, additional_headers=headers, max_size=None, open_timeout=_START_SECONDS
        ) as connection:
            yield connection

    async def _ask(self, seat: Seat, method: str, path: str, content: Any = None) -> Any:
        headers = {"Authorization": f"token {seat.token}"}
        answer = await self._client.request(method, path, headers=headers, json=content)
        answer.raise_for_status()
        return answer.json() if answer.content else None


def _cookie(browser: httpx.AsyncClient, path: str) -> str:
    """The token against forgery that belongs to a path; each path has one of its own."""
    found = [cookie.value for cookie in browser.cookies.jar if cookie.name == "_xsrf"]
    own = [cookie.value for cookie in browser.cookies.jar if cookie.path == path]
    return next(iter(own or found)) or ""


async def _execute(kernel: websockets.ClientConnection, source: str) -> tuple[str, str]:
    """Run a cell; return the status of the kernel's reply, and what was printed, with the error that was raised."""
    number = uuid.uuid4().hex
    header = {"msg_id": number, "msg_type": "execute_request", "version": "5.3"}
    header |= {"username": "", "session": number, "date": "2000-01-01T00:00:00Z"}
    content = {"code": source, "silent": False, "store_history": True, "user_expressions": {}}
    content |= {"allow_stdin": False, "stop_on_error": False}
    request = {"channel": "shell", "header": header, "content": content}
    await kernel.send(json.dumps(request | {"parent_header": {}, "metadata": {}, "buffers": []}))
    status, printed, is_idle = "", "", False
    async with asyncio.timeout(_CELL_SECONDS):
        while not (status and is_idle):
            message = json.loads(await kernel.recv())
            if message["parent_header"].get("msg_id") != number:
                continue
            kind, content = message["header"]["msg_type"], message["content"]
            if kind == "execute_reply":
                status = str(content["status"])
            elif kind == "status":
                is_idle = content["execution_state"] == "idle"
            elif kind == "stream":
                printed += content["text"]
            elif kind == "error":
                printed += f"\n{content['ename']}: {content['evalue']}"
    return status, printed


def _processes_of(uids: set[int]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.uids().real in uids and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _ports_of(seat: Seat) -> set[int]:
    """Where processes of a seat listen."""
    found = set()
    for process in _processes_of({seat.uid}):
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(connection.laddr.port)
    return found


def _temporary_of(seat: Seat) -> list[Path]:
    return [path for path in Path(tempfile.gettempdir()).iterdir() if _owner(path) == seat.uid]


def _owner(path: Path) -> int | None:
    try:
        return path.lstat().st_uid
    except FileNotFoundError:
        return None


def _memory(process: psutil.Process) -> float:
    """MiB that a process has, where it shares some of it, its part (PSS)."""
    try:
        rolled = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except OSError:  # ended
        return 0.0
    found = re.search(r"^Pss:\s+(\d+)", rolled, re.MULTILINE)
    return int(found.group(1)) / 1024 if found else 0.0


def _look(seats: Sequence[Seat]) -> dict[str, tuple[float, int]]:
    """What each seat has now: MiB, and connections to its databases."""
    names = {seat.uid: seat.name for seat in seats}
    found = dict.fromkeys(names.values(), (0.0, 0))
    for process in _processes_of(set(names)):
        with contextlib.suppress(psutil.NoSuchProcess):
            name = names[process.uids().real]
            memory, connections = found[name]
            is_backend = _BACKEND.match(" ".join(process.cmdline())) is not None
            found[name] = memory + _memory(process), connections + is_backend
    return found


async def _watch(seats: Sequence[Seat], use: Use) -> None:
    """Note what the seats use, until cancelled."""
    while True:
        now = await asyncio.to_thread(_look, seats)
        use.seat = max(use.seat, *(memory for memory, _ in now.values()))
        use.all_seats = max(use.all_seats, sum(memory for memory, _ in now.values()))
        use.connections = max(use.connections, *(number for _, number in now.values()))
        await asyncio.sleep(_LOOK_SECONDS)


@contextlib.asynccontextmanager
async def _watching(seats: Sequence[Seat]) -> AsyncIterator[Use]:
    use = Use()
    task = asyncio.create_task(_watch(seats, use))
    try:
        yield use
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def rehearse(
    room: Room, passwords: dict[str, str], lessons: Sequence[Path], at_once: int
) -> bool:
    """Let a room run lessons, and print what came of it; return whether all is well."""
    began = time.monotonic()
    entered = await asyncio.gather(
        *(room.enter(seat, passwords[seat.name]) for seat in room.seats), return_exceptions=True
    )
    for seat, error in zip(room.seats, entered, strict=True):
        if error is not None:
            seat.failures.append(f"log in and start: {error!r}")
    inside = [seat for seat in room.seats if not seat.failures]
    _row("logged in, each with a server", f"{len(inside)} of {len(room.seats)} seats", began)
    if not inside:
        print(room.seats[0].failures[0])
        return False
    first, *_ = inside
    idle = await asyncio.to_thread(_look, inside)
    _row("memory of a seat that has opened nothing", _median(idle))

    began = time.monotonic()
    async with _watching([first]) as alone:
        await room.run(first, lessons)
    seconds = dict(first.seconds)
    names = ", ".join(lesson.name[:2] for lesson in lessons)
    _row(f"one seat alone, lessons {names}", _failed([first]), began)
    _row("its memory, and its connections", f"{alone.seat:,.0f} MiB, {alone.connections}")

    limit, began = asyncio.Semaphore(at_once), time.monotonic()

    async def take_turn(seat: Seat) -> None:
        async with limit:
            try:
                await room.run(seat, lessons)
            except (httpx.HTTPError, websockets.WebSocketException, TimeoutError) as error:
                seat.failures.append(repr(error))

    async with _watching(inside) as use:
        await asyncio.gather(*map(take_turn, inside))
    done = [seat for seat in inside if not seat.failures]
    _row(f"all of them, {at_once} at once", f"{len(done)} of {len(inside)} seats done", began)
    _row("failures", _failed(inside))
    slowest = max((seat.seconds[cell], cell) for seat in done or [first] for cell in seat.seconds)
    took, (lesson, cell) = slowest
    _row("slowest cell", f"{took:.1f} s, lesson {lesson}, cell {cell}")
    _row("that cell in one seat alone", f"{seconds[lesson, cell]:.1f} s")
    idle = await asyncio.to_thread(_look, inside)
    _row("memory of a seat, its last lesson open", _median(idle))
    _row("the most of one seat", f"{use.seat:,.0f} MiB, {use.connections} connections")
    _row("the most of all seats", f"{use.all_seats:,.0f} MiB")
    for line in (f"{seat.name}: {failure}" for seat in inside for failure in seat.failures):
        print(line)

    if len(done) < 2:
        return len(done) == len(room.seats)
    first, second, *_ = done
    others = await room.intrude(first, second)
    _row("of another's folders, files and ports, a seat reads", ", ".join(others) or "nothing")
    # Who finds nothing may not have looked: these are there to be found.
    own = await room.intrude(first, first)
    _row("of its own, asked the same way", f"{len(own)} folders and files")
    served = await room.intrude(first, second, before=_SERVE)
    _row("of another's, who serves a page to anybody", ", ".join(served) or "nothing")
    return len(done) == len(room.seats) and not others and bool(own) and len(served) == 1


def _median(found: dict[str, tuple[float, int]]) -> str:
    return f"{statistics.median(memory for memory, _ in found.values()):,.0f} MiB"


def _failed(seats: Sequence[Seat]) -> str:
    failures = sum(len(seat.failures) for seat in seats)
    cells = sum(len(seat.seconds) for seat in seats)
    return f"{failures} of {cells} cells failed"


def _row(what: str, found: str, began: float | None = None) -> None:
    took = f"{time.monotonic() - began:7.0f} s" if began is not None else ""
    print(f"{what:<52} {found:<28}{took}".rstrip(), flush=True)


def _await_answer(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/hub/api/").is_success:
                return
        time.sleep(0.2)
    said = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise Mistake(f"the hub has not started: {' '.join(said)}")


def _take_away(state: Path, ports: Sequence[int]) -> list[str]:
    """Remove the users and what was theirs, and return what is left."""
    users = _users()
    uids = {user.uid for user in users.values()}
    deadline = time.monotonic() + _END_SECONDS
    while (left := _processes_of(uids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    found = [f"process {process.pid} {process.name()}" for process in left]
    for port in ports:
        with socket.socket() as asking:
            if asking.connect_ex(("127.0.0.1", port)) == 0:
                found.append(f"port {port}")
    places = [Path(tempfile.gettempdir()), Path("/dev/shm"), Path("/var/tmp")]
    theirs = [path for place in places for path in place.iterdir() if _owner(path) in uids]
    found += map(str, theirs)
    for name in users:
        subprocess.run(["userdel", "--remove", name], capture_output=True, check=False)
    shutil.rmtree(state)
    found += [f"user {name}" for name in _users()]
    found += [str(user.home) for user in users.values() if user.home.exists()]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse; return the exit status."""
    parser = argparse.ArgumentParser(prog="lab.py rehearse", description=__doc__)
    parser.add_argument("--seats", type=int, default=30)
    parser.add_argument("--at-once", type=int, default=10, help="how many run lessons at a time")
    parser.add_argument("--lessons", nargs="+", default=["00", "01", "02"], metavar="NN")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends all, as Ctrl-C
    known = {path.name[:2]: path for path in copies.copies() if path.parent == copies.LESSONS}
    unknown = [number for number in options.lessons if number not in known]
    if unknown or options.seats < 1 or options.at_once < 1:
        raise Mistake(f"there are lessons {', '.join(known)}, and at least one seat")
    environ = hub.prepare()
    if others := [*_users()]:
        raise Mistake(
            f"there are users of a rehearsal already: is one at work? If not: userdel {others[0]}, and so on"
        )
    state = Path(tempfile.mkdtemp(prefix="workshop-rehearsal-"))
    ports = [free_port() for _ in range(3)]
    address = f"http://127.0.0.1:{ports[0]}"
    environ |= {
        "HUB_STATE": str(state),
        "HUB_PREFIX": _PREFIX,
        "HUB_SEATS": str(options.seats),
        "CONFIGPROXY_AUTH_TOKEN": secrets.token_hex(16),
    }
    log = state / "log.txt"
    print(f"{_machine()}: {options.seats} seats", flush=True)
    is_well = False
    with open(log, "wb") as file:
        process = subprocess.Popen(
            hub.command(
                f"--JupyterHub.bind_url={address}",
                f"--JupyterHub.hub_bind_url=http://127.0.0.1:{ports[1]}",
                f"--ConfigurableHTTPProxy.api_url=http://127.0.0.1:{ports[2]}",
            ),
            cwd=hub.FOLDER,
            env=os.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the hub
        )
    try:
        _await_answer(address, process, log)
        lines = (state / "passwords.txt").read_text().splitlines()
        passwords = dict(line.split() for line in lines)
        is_well = asyncio.run(
            _in_room(address, passwords, [known[n] for n in options.lessons], options)
        )
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        left = _take_away(state, ports)
        _row("left afterwards", ", ".join(left) or "no process, port, folder or user")
    return 0 if is_well and not left else 1


async def _in_room(
    address: str, passwords: dict[str, str], lessons: Sequence[Path], options: argparse.Namespace
) -> bool:
    users = {name: user for name, user in _users().items() if not name.endswith("instructor")}
    room = Room(address, users)
    try:
        return await rehearse(room, passwords, lessons, options.at_once)
    finally:
        await room.close()


def _machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return f"{psutil.cpu_count()} cores, {memory:.0f} GiB"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Mistake as mistake:
        sys.exit(f"lab.py rehearse: {mistake}")
    except KeyboardInterrupt:
        sys.exit(130)
