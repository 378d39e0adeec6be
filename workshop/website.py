"""`python3 lab.py website`: the lessons, exercises and pages as a website, from their stored outputs.

Sphinx and its theme are in an environment of their own, which uv keeps in its cache: nobody else needs them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "website"


def sphinx(builder: str, configuration: Path, source: Path, into: Path) -> int:
    """Run Sphinx and return its exit status; a warning is an error, for it is a broken link or picture."""
    requirements = FOLDER / "requirements.lock"
    command = ["uv", "run", "--no-project", "--with-requirements", str(requirements)]
    build = ["sphinx-build", f"--builder={builder}", "--quiet", "--fail-on-warning", "--keep-going"]
    folders = [f"--conf-dir={configuration}", str(source), str(into)]
    return subprocess.call([sys.executable, "-m", *command, *build, *folders])


def build(into: Path) -> int:
    """Build the website and return the exit status."""
    return sphinx("html", FOLDER, ROOT, into)


def command(
    name: str,
    description: str | None,
    build: Callable[[Path], int],
    folder: Path,
    first: str,
    arguments: Sequence[str] | None,
) -> int:
    """What `lab.py NAME` does: build into `folder`, or where --into says, and tell which page is the first."""
    parser = argparse.ArgumentParser(prog=f"lab.py {name}", description=description)
    parser.add_argument("--into", type=Path, default=folder, metavar="FOLDER")
    into = parser.parse_args(arguments).into
    status = build(into)
    if status == 0:
        print(f"The {name} can be opened: {into / first}")
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Build it, and say where it is."""
    return command("website", __doc__, build, FOLDER / "built", "README.html", arguments)


if __name__ == "__main__":
    sys.exit(main())
