"""New environments with the wheel of ormscope, made by uv from its cache: as people get it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERIES = {"2.0": "sqlalchemy>=2.0,<2.1", "2.1": "sqlalchemy>=2.1,<2.2"}


def run_uv(*arguments: str, cwd: Path, **environ: str) -> None:
    """Run uv; skip where the package index is out of reach, but never in CI."""
    result = subprocess.run(
        [sys.executable, "-m", "uv", *arguments],
        cwd=cwd,
        env=os.environ | environ,
        capture_output=True,
        text=True,
    )
    is_offline = re.search("error sending request|network was disabled", result.stderr)
    if is_offline and os.environ.get("CI") != "true":
        pytest.skip("the package index is out of reach")
    assert result.returncode == 0, result.stderr


def new_environment(folder: Path, *requirements: str) -> Path:
    """The Python of a new environment in a folder, with these packages and nothing of ours."""
    run_uv("venv", "--no-project", "--python", sys.executable, str(folder / "venv"), cwd=folder)
    python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run_uv("pip", "install", "--python", str(python), *requirements, cwd=folder)
    return python


def demand_sphinx(status: int) -> None:
    """A test goes on if Sphinx ended well; it is skipped where Sphinx cannot be fetched, but not in CI."""
    if status == 0:
        return
    ask = ["uv", "run", "--no-project", "--with-requirements", "requirements.lock", "true"]
    is_offline = subprocess.call([sys.executable, "-m", *ask], cwd=ROOT / "website") != 0
    if os.environ.get("CI") != "true" and is_offline:
        pytest.skip("the package index is out of reach")
    pytest.fail("Sphinx has ended with an error; what it says stands above")
