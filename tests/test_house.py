"""The house: which room may look into which. Arrows go down: workshop, ormscope.lab, ormscope, SQLAlchemy."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What `ormscope` publishes beside the names of the package itself: each module has a page or a paragraph of its README.
PUBLISHED = {"census", "lab", "metrics", "places", "stacks", "tracebacks", "verdict", "waitgraph"}
OF_LAB = {"cloudpickle", "IPython", "matplotlib", "memory_profiler", "numpy", "PIL", "psutil"}


def imports(code: str, package: str) -> Iterator[str]:
    """The modules that a text imports, anywhere in it, with all their names."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *base.split(".")]).rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def texts(folder: str) -> Iterator[tuple[str, str]]:
    """The Python code of a folder, file by file; that of a notebook without its magics."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), path.read_text()
    for path in sorted((ROOT / folder).glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        lines = "".join(
            "".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code"
        ).splitlines()
        plain = [line for line in lines if not line.lstrip().startswith(("%", "!"))]
        code = "\n".join(plain)
        if not any(line.startswith("%%") for line in lines):
            yield path.relative_to(ROOT).as_posix(), code


def arrows(folder: str) -> list[tuple[str, str]]:
    """Each file of a folder with each module that it imports."""
    return [
        (name, target)
        for name, code in texts(folder)
        for target in imports(code, name.removesuffix(".py").replace("/", ".").rpartition(".")[0])
    ]


def test_what_watches_does_not_look_up() -> None:
    found = [
        (name, target)
        for name, target in arrows("ormscope")
        if not name.startswith("ormscope/lab/") and f"{target}.".startswith("ormscope.lab.")
    ]
    assert found == []


def test_the_instruments_know_nothing_of_the_workshop() -> None:
    found = [arrow for arrow in arrows("ormscope") if arrow[1].partition(".")[0] == "workshop"]
    assert found == []


@pytest.mark.parametrize("folder", ["workshop", "notebooks", "exercises", "solutions"])
def test_the_workshop_uses_what_is_published(folder: str) -> None:
    watching = {path.stem for path in (ROOT / "ormscope").glob("*.py")} - {"__init__"}
    found = [
        (name, target)
        for name, target in arrows(folder)
        if target.startswith("ormscope.") and target.split(".")[1] in watching - PUBLISHED
    ]
    assert found == []


def test_the_arrows_are_seen() -> None:
    """Else the tests above would pass on whatever stands there."""
    code = "from ormscope.lab import observe\nfrom .proof import declare\nimport workshop.shop"
    assert set(imports(code, "ormscope")) >= {"ormscope.lab", "ormscope.proof", "workshop.shop"}
    for folder in ("ormscope", "workshop", "notebooks", "exercises", "solutions"):
        assert any(target.startswith("ormscope") for _, target in arrows(folder)), folder


@pytest.mark.parametrize("folder", ["ormscope", "workshop"])
def test_no_module_stands_in_a_circle(folder: str) -> None:
    """Imports for type checkers only, which name a class that is handed down, do not count."""
    modules = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): code
        for name, code in texts(folder)
    }
    graph = {
        name: {target for target in imports(_running(code), name) if target in modules} - {name}
        for name, code in modules.items()
    }
    for package in ("ormscope", "ormscope.lab"):
        graph.pop(package, None)  # they publish what stands in them
    while free := {name for name, targets in graph.items() if not targets & set(graph)}:
        graph = {name: targets for name, targets in graph.items() if name not in free}
    assert graph == {}


def _running(code: str) -> str:
    """A module without its imports for type checkers."""

    class Without(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST:
            if ast.unparse(node.test) == "TYPE_CHECKING":
                return ast.Pass()
            return self.generic_visit(node)

    return ast.unparse(Without().visit(ast.parse(code)))


@pytest.mark.parametrize(
    "statement", ["from ormscope import *", "import ormscope.metrics", "import ormscope.otel"]
)
def test_an_import_brings_in_nothing_of_the_lab(statement: str) -> None:
    script = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert "sqlalchemy" in loaded
    assert not loaded & OF_LAB
    allowed = {"ormscope", "sqlalchemy", "greenlet", "typing_extensions"}
    allowed |= {"prometheus_client", "opentelemetry"} if "import ormscope." in statement else set()
    foreign = {
        name
        for name in loaded - set(sys.stdlib_module_names) - allowed
        if not name.startswith("_") and name not in ("cython_runtime", "sitecustomize")
    }
    assert foreign == set()


def test_who_merely_has_it_installed_pays_nothing() -> None:
    """pytest loads the plugin of every package that is installed."""
    script = "import sys, ormscope, ormscope.pytest_plugin; print('sqlalchemy' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"
