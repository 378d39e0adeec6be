"""Every file is formatted and linted, and the packages' types hold."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "check",
    [
        "ruff check",
        "ruff format --check --diff",
        "mypy",
        "mypy --platform=darwin",
        "mypy --platform=win32",
    ],
)
def test_code_style(check: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *check.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
