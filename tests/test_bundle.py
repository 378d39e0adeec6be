"""A bundle sets the kit up where there is no network, and says what it lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workshop import bundle
from workshop.mistake import Mistake

HERE = "linux-x86-64"
PYTHON = "{}.{}".format(*sys.version_info)
BASE_PYTHON = Path(sys.base_prefix, "bin", "python3")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kit as somebody unpacks it, made for this system and Python alone."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("the wheels for this system are not those that the test makes")
    into = tmp_path_factory.mktemp("a room")
    try:
        bundle.main([HERE, "--python", PYTHON, "--into", str(into)])
    except Mistake as mistake:
        if "could not be had" in str(mistake) and os.environ.get("CI") != "true":
            pytest.skip("the package index is out of reach")
        raise
    (archive,) = into.glob("*.tar.gz")
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=into, check=True)
    shutil.unpack_archive(archive, into)
    return into / bundle.APPLICATION


def without_network() -> list[str]:
    """What takes the network away from a command; nothing where that is not allowed, as in many containers."""
    command = ["unshare", "--net"]
    allowed = shutil.which("unshare") and not subprocess.call(
        [*command, "true"], stderr=subprocess.DEVNULL
    )
    return command if allowed else []


def start(kit: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run its start script without a network, as somebody with nothing cached; who asks one all the same fails."""
    nowhere = "http://127.0.0.1:9"  # the port that discards
    return subprocess.run(
        [*without_network(), str(kit / "start.sh"), *arguments],
        cwd=home,
        env={
            "PATH": f"{BASE_PYTHON.parent}:/usr/bin:/bin",
            "HOME": str(home),
            **{f"{kind}_PROXY": nowhere for kind in ("ALL", "HTTP", "HTTPS")},
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_it_sets_up_without_a_network(unpacked: Path, tmp_path: Path) -> None:
    started = start(unpacked, tmp_path, "progress")
    assert started.returncode == 0, started.stderr
    assert started.stdout.startswith("Setting up .venv, from the folder wheels.\n")
    assert "tasks done" in started.stdout
    tracked = bundle._tracked_files()
    assert all(
        (unpacked / file).read_bytes() == (bundle.ROOT / file).read_bytes() for file in tracked
    )


def test_a_package_that_is_not_in_it_is_told(unpacked: Path, tmp_path: Path) -> None:
    (wheel,) = (unpacked / "wheels").glob("sqlalchemy-*")
    wheel.unlink()
    shutil.rmtree(unpacked / ".venv", ignore_errors=True)
    started = start(unpacked, tmp_path, "progress")
    assert started.returncode == 1 and not (unpacked / ".venv").exists()
    (told,) = started.stderr.splitlines()
    assert f"the folder wheels has no package for this system and Python {PYTHON}" in told
    assert "sqlalchemy" in told


@pytest.mark.parametrize("arguments", [["beos"], ["windows", "--python", "3.10"]])
def test_what_there_is_no_bundle_for_is_told(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bundle.main(arguments)
    assert arguments[-1] in capsys.readouterr().err.splitlines()[-1]


def test_a_kit_without_git_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    with pytest.raises(Mistake, match="git checkout"):
        bundle.bundle(HERE, [PYTHON], tmp_path)
