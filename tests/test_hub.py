"""A room of seats on one machine: a real JupyterHub, in which seats run lessons and cannot read each other's."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from workshop import copies, hub, rehearse
from workshop.exercises import MY_NOTEBOOKS

ROOT = Path(__file__).parents[1]
NOBODY = 65534
SYSTEMS_PYTHON = "/usr/bin/python3"
MINUTES = 6

is_root_of_linux = sys.platform == "linux" and os.geteuid() == 0
needs_root = pytest.mark.skipif(
    not is_root_of_linux and os.environ.get("CI") != "true",
    reason="the seats are users of Linux, which only root can make",
)


@pytest.fixture(scope="module")
def kit() -> Iterator[Path]:
    """A clone of the kit that seats can read, set up with a Python that they can run."""
    top = Path("/opt") / f"workshop-test-hub-{os.getpid()}"
    top.mkdir(mode=0o755)
    folder = top / 'it\'s a "kit"'
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    yield folder
    shutil.rmtree(top)


@needs_root
@pytest.mark.timeout(MINUTES * 60)
def test_a_room_is_rehearsed(kit: Path) -> None:
    """Two seats log in, run a lesson at once, and read nothing of each other's; afterwards nothing is left."""
    done = subprocess.run(
        [SYSTEMS_PYTHON, "lab.py", "rehearse", "--seats", "2", "--at-once", "2", "--lessons", "00"],
        cwd=kit,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = {
        line[:52].strip(): line[52:].strip() for line in done.stdout.splitlines() if len(line) > 52
    }
    assert said["logged in, each with a server"].startswith("2 of 2 seats"), done.stdout
    assert said["all of them, 2 at once"].startswith("2 of 2 seats done")
    assert re.fullmatch(r"0 of \d\d cells failed", said["failures"])
    assert said["of another's folders, files and ports, a seat reads"] == "nothing"
    assert int(said["of its own, asked the same way"].split()[0]) > 10
    assert re.fullmatch(r"port \d+", said["of another's, who serves a page to anybody"])
    assert said["left afterwards"] == "no process, port, folder or user"
    assert not rehearse._users()


@needs_root
def test_without_root_it_says_so(kit: Path) -> None:
    """In one line, and so does one whose folder or Python its seats could not use."""
    ask = [SYSTEMS_PYTHON, "-m", "workshop.hub"]
    asked: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "check": False}
    done = subprocess.run(ask, cwd=kit, user=NOBODY, extra_groups=[], **asked)
    (line,) = done.stderr.splitlines()
    assert line.endswith("sudo python3 lab.py hub")
    kit.parent.chmod(0o700)
    try:
        done = subprocess.run(ask, cwd=kit, **asked)
    finally:
        kit.parent.chmod(0o755)
    (line,) = done.stderr.splitlines()
    assert "a seat could not read" in line and "/opt" in line


def configured(state: Path, monkeypatch: pytest.MonkeyPatch, **environ: str) -> dict[str, Any]:
    """What the hub's configuration has set and defined."""
    pytest.importorskip("jupyterhub", reason="JupyterHub is installed on Linux only")
    from traitlets.config import Config

    for name, value in {"HUB_STATE": str(state), "HUB_NODE": "node", **environ}.items():
        monkeypatch.setenv(name, value)
    settings = Config()
    found: dict[str, Any] = {"get_config": lambda: settings, "__file__": str(hub.FOLDER / "x.py")}
    source = (hub.FOLDER / "jupyterhub_config.py").read_text("utf-8")
    exec(compile(source, "jupyterhub_config.py", "exec"), found)
    return found


def test_a_seat_opens_with_its_own_card_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passwords are of one seat, stay when the hub starts again, and only root can read them."""
    found = configured(tmp_path / "state", monkeypatch, HUB_SEATS="3")
    cards = found["Cards"]()

    def enter(name: str, password: str) -> str | None:
        data = {"username": name, "password": password}
        entered: str | None = asyncio.run(cards.authenticate(None, data))
        return entered

    own = found["PASSWORDS"]
    assert set(own) == {"seat-01", "seat-02", "seat-03", "seat-instructor"}
    assert len(set(own.values())) == len(own)
    assert [enter(name, own[name]) for name in own] == [*own]
    assert enter("seat-01", own["seat-02"]) is None
    assert enter("seat-04", own["seat-01"]) is None
    assert enter("seat-01", "") is None
    assert enter("seat-01", "schlüssel") is None
    assert (tmp_path / "state" / "passwords.txt").stat().st_mode & 0o077 == 0
    again = configured(tmp_path / "state", monkeypatch, HUB_SEATS="4")["PASSWORDS"]
    assert own.items() < again.items()
    assert len(again) == len(own) + 1


def seat_script() -> Any:
    spec = importlib.util.spec_from_file_location("seat", hub.FOLDER / "seat.py")
    assert spec is not None and spec.loader is not None
    seat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seat)
    return seat


@pytest.mark.skipif(os.name == "nt", reason="seats are users of Linux")
def test_in_a_seat_lab_py_uses_the_environment_of_the_kit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its progress is that of the copy, and nothing is installed a second time."""
    seat = seat_script()
    monkeypatch.setattr(seat, "COPY", tmp_path / "copy")
    seat.copy_kit()
    (tmp_path / "copy" / MY_NOTEBOOKS.name).mkdir()
    marks = '{"01": {"reuse_the_session": "right"}}'
    (tmp_path / "copy" / MY_NOTEBOOKS.name / "progress.json").write_text(marks)
    done = subprocess.run(
        [sys.executable, "lab.py", "progress"],
        cwd=tmp_path / "copy",
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout.splitlines()[-1].startswith("1 of ")
    assert "Setting up" not in done.stdout
    assert (tmp_path / "copy" / ".venv").is_symlink()


def test_what_kubernetes_starts_is_in_the_image() -> None:
    """The command of a seat is in the folder that the image copies the kit to; it opens the first lesson."""
    seat = yaml.safe_load((hub.FOLDER / "values.yaml").read_text("utf-8"))["singleuser"]
    image = (hub.FOLDER / "Dockerfile").read_text("utf-8")
    (folder,) = re.findall(r"^COPY \. (\S+)$", image, re.MULTILINE)
    python, script = seat["cmd"]
    assert python == f"{folder}/.venv/bin/python"
    assert (ROOT / Path(script).relative_to(folder)).is_file()
    first = min(copies.copies().values())
    assert seat["defaultUrl"] == f"/lab/tree/{MY_NOTEBOOKS.name}/{first.name}"
