"""The instructor's room: what seats share arrives, nothing else does, and nobody but the instructor sees it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from leftovers import await_that
from playwright.sync_api import Browser, expect

from workshop import join, progress, room
from workshop.mistake import Mistake

ROOT = Path(__file__).parents[1]
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def own_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A learner's progress, in a folder of the test."""
    path = tmp_path / "mine" / "progress.json"
    path.parent.mkdir()
    monkeypatch.setattr(progress, "PROGRESS", path)
    return path


class Room:
    """`python3 lab.py room` in a process of its own."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "workshop.room", "--port", "0", *options]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.said = ""
        while "Ctrl-C" not in self.said:
            line = self.process.stdout.readline()
            assert line, self.said
            self.said += line
        self.own = self._found(r"for you alone: (http://127\.0\.0\.1:\d+)/")
        self.joined = self._found(r"join (http://\S+)") if "--network" in options else ""

    def _found(self, pattern: str) -> str:
        match = re.search(pattern, self.said)
        assert match, self.said
        return match[1]

    @property
    def local(self) -> str:
        """The seats' address, on this machine."""
        return self.own + "/" + self.joined.rpartition("/")[2]

    def seats(self) -> dict[str, progress.State]:
        answer: dict[str, progress.State] = httpx.get(self.own + "/state").json()
        return answer

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE)


@pytest.fixture
def on_network() -> Iterator[Room]:
    opened = Room("--network")
    yield opened
    opened.end()


def solve(path: Path, **kinds: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"01": kinds}))


def test_a_seat_joins_over_the_network(on_network: Room, own_progress: Path) -> None:
    solve(own_progress, reuse_the_session="right", enrich_in_parallel="wrong")
    join.share(on_network.local, "Ada / 7")
    (name,) = seats = on_network.seats()
    assert name == "Ada / 7"
    assert seats[name]["01"] == {"reuse_the_session": "done", "enrich_in_parallel": "tried"}
    assert {
        mark for number in seats[name] if number != "01" for mark in seats[name][number].values()
    } == {"open"}


@pytest.mark.parametrize(
    "address, name, reason",
    [
        ("000000", "Ada", "this room has another address"),
        ("", "A" * 41, "a name has 1 to 40 letters"),
        ("", "\x1b[31m", "letters that can be printed"),
    ],
)
def test_what_is_no_seat_is_refused(on_network: Room, address: str, name: str, reason: str) -> None:
    where = f"{on_network.own}/{address}" if address else on_network.local
    with pytest.raises(Mistake, match=reason):
        join.share(where, name)
    assert on_network.seats() == {}


@pytest.mark.parametrize(
    "content",
    [
        *("{}", "[]", "not JSON", "1" * 10_001),
        '{"name": "Eve", "marks": {}}',
        '{"name": "Eve", "marks": {"01": {"reuse_the_session": "<script>"}}}',
        '{"name": "Eve", "marks": [1]}',
    ],
)
def test_nothing_but_marks_gets_in(on_network: Room, content: str) -> None:
    answer = httpx.post(on_network.local, content=content)
    assert answer.status_code in (413, 422)
    assert on_network.seats() == {}


def test_the_number_of_seats_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_MOST_SEATS", 2)
    seats = room.Seats()
    for name in ("one", "two", "one"):
        seats.share(name, progress.state())
    with pytest.raises(ValueError, match="2 seats already"):
        seats.share("three", progress.state())


def test_only_the_instructors_machine_may_look(on_network: Room) -> None:
    address = room.own_address()
    if address == "127.0.0.1":
        pytest.skip("this machine is in no network")
    elsewhere = on_network.own.replace("127.0.0.1", address)
    for path in ("/", "/state"):
        assert httpx.get(on_network.own + path).status_code == 200
        assert httpx.get(elsewhere + path).status_code == 404


def test_a_room_of_a_folder_is_for_this_machine(tmp_path: Path, own_progress: Path) -> None:
    """Also a hub's homes are such a folder; what is no progress of ours is nothing."""
    shared = tmp_path / "shared"
    solve(shared / "grace" / "my_notebooks" / "progress.json", reuse_the_session="right")
    solve(shared / "linus" / "kit" / "my_notebooks" / "progress.json", reuse_the_session="raised")
    (shared / "eve").mkdir()
    (shared / "eve" / "progress.json").write_text('{"01": {"reuse_the_session": ["right"]}}')
    solve(own_progress, reuse_the_session="right")
    opened = Room("--folder", str(shared))
    try:
        join.share(str(shared), "Ada")
        marks = {name: marks["01"]["reuse_the_session"] for name, marks in opened.seats().items()}
        assert marks == {"Ada": "done", "eve": "open", "grace": "done", "linus": "tried"}
        assert "--network" not in opened.said and opened.joined == ""
    finally:
        status = opened.end()
    assert status in (0, 130)


def test_a_learner_sees_that_it_is_shared(on_network: Room) -> None:
    """And that it is not: the room goes, and Ctrl-C ends it."""
    command = [sys.executable, "-u", "-m", "workshop.join", on_network.local, "Ada"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as joined:
        assert joined.stdout is not None
        assert joined.stdout.readline() == "You share your marks as 'Ada'. Ctrl-C ends it.\n"
        assert await_that(lambda: list(on_network.seats()) == ["Ada"], PATIENCE)
        joined.send_signal(signal.SIGINT)
        assert joined.stdout.readline().startswith("You share nothing any more")
        assert joined.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    "module, arguments, told",
    [
        ("room", [], "say where the seats are: --network, --folder FOLDER, or both"),
        ("room", ["--folder", "nowhere"], "there is no folder nowhere"),
        ("join", ["nowhere", "Ada"], "there is no folder nowhere"),
        ("join", [".", "../Ada"], "cannot be the name of a folder"),
    ],
)
def test_a_mistake_is_one_line(module: str, arguments: list[str], told: str) -> None:
    command = [sys.executable, "-m", f"workshop.{module}", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 1 and told in line


def test_a_port_in_use_is_told(on_network: Room) -> None:
    port = on_network.own.rpartition(":")[2]
    with pytest.raises(Mistake, match=f"port {port} cannot be had"):
        room.main(["--network", "--port", port])


def test_the_page_updates(on_network: Room, own_progress: Path, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(on_network.own)
    expect(page.get_by_role("status")).to_have_text("Nobody has joined yet.")
    solve(own_progress, reuse_the_session="right")
    join.share(on_network.local, "<b>Ada</b>")
    tasks = sum(len(names) for names in progress.state().values())
    expect(page.get_by_role("status")).to_have_text(
        f"1 seats, 1 of {tasks} tasks done", timeout=PATIENCE * 1000
    )
    expect(page.get_by_role("rowheader", name="<b>Ada</b>")).to_be_visible()
    expect(page.get_by_title("<b>Ada</b>, reuse_the_session: done")).to_have_text("✓")
    on_network.end()
    expect(page.get_by_text("does not hear of the room any more")).to_be_visible(
        timeout=PATIENCE * 1000
    )
    page.close()
