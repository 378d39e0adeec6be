"""What GitHub is told to do is what it understands, and what is said of the matrix holds; it cannot run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from environments import run_uv

from workshop.matrix import PYTHONS

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
CHECKED = [
    *(("vendor.github-workflows", path) for path in sorted(GITHUB.glob("workflows/*.yml"))),
    *(("vendor.github-issue-forms", path) for path in sorted(GITHUB.glob("ISSUE_TEMPLATE/*.yml"))),
    ("vendor.citation-file-format", ROOT / "CITATION.cff"),
]


@pytest.mark.parametrize("schema, path", CHECKED, ids=lambda value: getattr(value, "name", ""))
def test_it_has_its_schema(schema: str, path: Path, tmp_path: Path) -> None:
    run_uv(
        *("tool", "run", "--quiet", "check-jsonschema", "--builtin-schema", schema, str(path)),
        cwd=tmp_path,
    )


def jobs(name: str) -> dict[str, Any]:
    described: dict[str, Any] = yaml.safe_load((GITHUB / "workflows" / name).read_text())
    return dict(described["jobs"])


def test_each_system_runs_each_python() -> None:
    matrix = jobs("tests.yml")["quick"]["strategy"]["matrix"]
    assert matrix["python"] == PYTHONS
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}


def test_the_whole_suite_is_that_of_this_repository() -> None:
    """On the Debian that .ci/run expects, within the time that it is given everywhere."""
    whole = jobs("tests.yml")["whole"]
    assert whole["container"].startswith("debian:")
    assert whole["steps"][-1] == {"run": ".ci/run"}
    assert whole["timeout-minutes"] == 90
