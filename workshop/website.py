"""`python3 lab.py website`: the lessons, exercises and pages as a website, from their stored outputs.

Sphinx and its theme are in an environment of their own, which uv keeps in its cache: nobody else needs them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "website"


def build(into: Path) -> int:
    """Build the website and return the exit status; a warning is an error, for it is a broken link or picture."""
    requirements = FOLDER / "requirements.lock"
    command = ["uv", "run", "--no-project", "--with-requirements", str(requirements)]
    sphinx = ["sphinx-build", "--builder=html", "--quiet", "--fail-on-warning", "--keep-going"]
    return subprocess.call(
        [sys.executable, "-m", *command, *sphinx, f"--conf-dir={FOLDER}", str(ROOT), str(into)]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Build it, and say where it is."""
    parser = argparse.ArgumentParser(prog="lab.py website", description=__doc__)
    parser.add_argument("--into", type=Path, default=FOLDER / "built", metavar="FOLDER")
    into = parser.parse_args(arguments).into
    status = build(into)
    if status == 0:
        print(f"The website is in {into}; open {into / 'README.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
