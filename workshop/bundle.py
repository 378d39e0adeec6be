"""`python3 lab.py bundle`: the kit with all its packages in one archive for each system, for a room without network.

uv says what of requirements.lock a system needs, and pip fetches those wheels, held against the lock's hashes. Where
lab.py finds the folder `wheels` beside it, it installs from there and asks no network. Python itself is not in it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workshop.matrix import PYTHONS
from workshop.mistake import Mistake
from workshop.postgres import APPLICATION

ROOT = Path(__file__).resolve().parent.parent
MACOS = (
    "11.0"  # the oldest that every package still has a wheel for; glibc 2.28 is Debian's of 2019
)
_UNIX = f"""\
#!/bin/sh
# Start the kit with a Python that it works with; its packages are in the folder wheels.
cd "$(dirname "$0")" || exit 1
for python in python3 {" ".join(f"python{version}" for version in PYTHONS)}; do
    if "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] not in {tuple(PYTHONS)})" 2>/dev/null; then
        exec "$python" lab.py "$@"
    fi
done
echo "no Python {PYTHONS[0]} to {PYTHONS[-1]} found; install one, and start again" >&2
exit 1
"""
_WINDOWS = """\
@rem Start the kit; its packages are in the folder wheels.
@cd /d "%~dp0"
@py lab.py %*
@if errorlevel 1 pause
"""


@dataclass(frozen=True)
class Platform:
    """A system as uv names it and as wheels do, how its archive is made, and what starts the kit there."""

    uv: str
    tags: tuple[str, ...]
    archive: str = "gztar"
    start: str = "start.sh"


def _manylinux(machine: str) -> tuple[str, ...]:
    return (
        *(f"manylinux_2_{minor}_{machine}" for minor in range(28, 16, -1)),
        f"manylinux2014_{machine}",
    )


def _macos(machine: str) -> tuple[str, ...]:
    return (f"macosx_{MACOS.replace('.', '_')}_{machine}",)  # pip takes those for older ones, too


PLATFORMS = {
    "linux-x86-64": Platform("x86_64-manylinux_2_28", _manylinux("x86_64")),
    "linux-arm64": Platform("aarch64-manylinux_2_28", _manylinux("aarch64")),
    "macos-arm64": Platform("aarch64-apple-darwin", _macos("arm64"), start="start.command"),
    "macos-x86-64": Platform("x86_64-apple-darwin", _macos("x86_64"), start="start.command"),
    "windows": Platform("x86_64-pc-windows-msvc", ("win_amd64",), "zip", "start.bat"),
}


def bundle(name: str, pythons: Sequence[str], into: Path) -> Path:
    """Write the archive for a system with the wheels for these Pythons, and return its path.

    Raises Mistake where the kit is no git checkout, or where a package is out of reach.
    """
    platform = PLATFORMS[name]
    with tempfile.TemporaryDirectory() as temporary:
        kit = Path(temporary, APPLICATION)
        for file in _tracked_files():
            target = kit / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, target)
        is_windows = platform.start.endswith(".bat")
        (kit / platform.start).write_text(
            _WINDOWS if is_windows else _UNIX, newline="\r\n" if is_windows else "\n"
        )
        (kit / platform.start).chmod(0o755)
        for python in pythons:
            _fetch(platform, python, kit / "wheels")
        into.mkdir(parents=True, exist_ok=True)
        base = into.resolve() / f"{APPLICATION}-{name}"
        return Path(shutil.make_archive(str(base), platform.archive, temporary, APPLICATION))


def _tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, encoding="utf-8"
    )
    if listed.returncode:
        raise Mistake(f"a bundle is made from a git checkout; git says: {listed.stderr.strip()}")
    return [file for file in listed.stdout.split("\0") if file and (ROOT / file).is_file()]


def _fetch(platform: Platform, python: str, wheels: Path) -> None:
    """Put the wheels for one Python into the folder."""
    # Some markers ask for the patch release: the first one of a Python and its last may need different packages.
    for patch in ("0", "99"):
        requirements = wheels.parent.with_name("requirements.txt")
        _run(
            *("uv", "pip", "compile", "--no-deps", "--generate-hashes", "--no-annotate", "--quiet"),
            *("--python-platform", platform.uv, "--python-version", f"{python}.{patch}"),
            *("--output-file", str(requirements), str(ROOT / "requirements.lock")),
        )
        _run(
            *("uv", "tool", "run", "--python", sys.executable, "pip", "download", "--quiet"),
            *("--no-deps", "--require-hashes", "--only-binary=:all:", "--dest", str(wheels)),
            *("--implementation", "cp", "--python-version", f"{python}.{patch}"),
            *(f"--abi={abi}" for abi in (f"cp{python.replace('.', '')}", "abi3", "none")),
            *(f"--platform={tag}" for tag in platform.tags),
            *("--requirement", str(requirements)),
        )
        requirements.unlink()


def _run(*command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command],
        env=os.environ | {"MACOSX_DEPLOYMENT_TARGET": MACOS},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        said = result.stderr.strip().splitlines() or ["nothing"]
        raise Mistake(f"a package could not be had; {command[0]} says: {said[-1]}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the bundles asked for, and the file with their hashes; print their sizes."""
    parser = argparse.ArgumentParser(prog="lab.py bundle", description=__doc__)
    parser.add_argument("platforms", nargs="*", metavar="SYSTEM", help=", ".join(PLATFORMS))
    parser.add_argument("--python", nargs="+", default=PYTHONS, choices=PYTHONS, metavar="3.X")
    parser.add_argument("--into", type=Path, default=ROOT / "bundles", metavar="FOLDER")
    options = parser.parse_args(arguments)
    unknown = set(options.platforms) - set(PLATFORMS)
    if unknown:
        parser.error(f"no system {', '.join(sorted(unknown))}; there are {', '.join(PLATFORMS)}")
    for name in options.platforms or PLATFORMS:
        print(f"{name} ...", flush=True)
        made = bundle(name, options.python, options.into)
        print(f"{made.stat().st_size / 1e6:6.0f} MB  {made}", flush=True)
    archives = sorted(options.into.glob(f"{APPLICATION}-*"))
    lines = [
        f"{hashlib.file_digest(path.open('rb'), 'sha256').hexdigest()}  {path.name}\n"
        for path in archives
    ]
    (options.into / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    try:
        main()
    except Mistake as mistake:
        sys.exit(f"lab.py bundle: {mistake}")
