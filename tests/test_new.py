"""A new exercise: what `python3 lab.py new` writes works as it is, so whoever adds one begins with something green."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from environments import ROOT

CHECK = """
from answers.exercise_98 import ANSWERS
from workshop.checks.the_price import price_for_each as task

answers = ANSWERS["price_for_each"]
for answer in answers.right:
    outcome = task.check(answer)
    assert outcome.kind == "right", outcome
for answer, misconception in answers.wrong:
    outcome = task.check(answer)
    assert (outcome.kind, outcome.misconception) == ("wrong", misconception), outcome
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what an exercise needs."""
    for name in ("workshop", "ormscope", "data", "solutions", "tests/answers"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "exercises").mkdir()
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def python(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (checkout, checkout / "tests")))},
        capture_output=True,
        text=True,
    )


def test_a_new_exercise_works_as_it_is(checkout: Path) -> None:
    made = python(checkout, "-m", "workshop.new", "exercise", "98", "the_price")
    assert (made.returncode, made.stderr) == (0, "")
    *written, _then = made.stdout.splitlines()
    assert all((checkout / name).is_file() for name in written) and len(written) == 4
    refreshed = python(checkout, "-m", "workshop.notebooks", "refresh", "98")
    assert refreshed.returncode == 0, refreshed.stderr
    for folder, kind in (("solutions", "RIGHT"), ("exercises", "NOT ATTEMPTED")):
        cells = nbformat.read(checkout / folder / "98_the_price.ipynb", as_version=4).cells
        (check,) = [cell for cell in cells if "verdict" in cell.metadata.get("tags", [])]
        assert check.outputs[0].text.startswith(f"{kind}: ")
    checked = python(checkout, "-c", CHECK)
    assert checked.returncode == 0, checked.stderr


def written(checkout: Path) -> list[Path]:
    """All that is there but what Python compiles."""
    return [path for path in sorted(checkout.rglob("*")) if "__pycache__" not in str(path)]


@pytest.mark.parametrize(
    ("number", "subject", "told"),
    [
        ("8", "the_price", "lab.py: '8' is no number of an exercise; two digits are wanted, as in 08."),
        ("98", "The price", "lab.py: 'The price' is no name; small letters and _ are wanted, as in"),
        ("01", "the_price", "lab.py: solutions/01_pool_starvation.ipynb is there already; take another"),
        ("98", "pool_starvation", "lab.py: workshop/checks/pool_starvation/__init__.py is there already"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line(
    number: str, subject: str, told: str, checkout: Path
) -> None:
    before = written(checkout)
    done = python(checkout, "-m", "workshop.new", "exercise", number, subject)
    assert done.returncode == 1 and done.stderr.startswith(told) and done.stderr.count("\n") == 1
    assert written(checkout) == before
