"""What several test files need: a place of their own on the disk, and one running database."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from environments import ROOT, run_uv

from workshop.database import Server, start_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# As root, and with nothing that would use a network.
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# What it tests came with Python 3.14; it is not a test of what an older one has.
collect_ignore = [] if hasattr(asyncio, "capture_call_graph") else ["test_call_graph.py"]

# A shell starts what it sends to the background with Ctrl-C ignored, and children inherit that: then no
# test of an interrupt could ever end. With a handler of our own they start with the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "the event loop of the tests in this process; what they start is on asyncio's"
    parser.addoption("--loop", choices=["asyncio", "uvloop"], default="asyncio", help=help)
    help = (
        "only what a learner needs: that the first lessons and the checks work here; under a minute"
    )
    parser.addoption("--quick", action="store_true", help=help)


def pytest_configure(config: pytest.Config) -> None:
    """Run each `asyncio.run` on the loop that is asked for: the loop's policy is the one way that 3.11 has, too."""
    if config.getoption("--loop") == "uvloop":
        import uvloop

        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # from 3.14 on
            asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


@pytest.fixture(autouse=True)
def _skip_on_uvloop(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("asyncios_loop")
    if marker and request.config.getoption("--loop") == "uvloop":
        pytest.skip(marker.args[0])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a quick run does not ask for."""
    if config.getoption("--quick"):
        chosen = [item for item in items if _is_quick(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def _is_quick(item: pytest.Item) -> bool:
    is_first = item.path.parent.name == "notebooks" and item.path.name.startswith(("00_", "01_"))
    return is_first or item.get_closest_marker("quick") is not None


# Tests that share nothing, in modules that would take long in one process.
_EACH_BY_ITSELF = ("tests/test_exercises.py::",)

# Tests that measure time, or count what is left on the machine: these run last, one by one, beside nothing.
_ALONE = (
    "tests/test_busy_storms.py",
    "tests/test_cost.py",
    "tests/test_exercises.py::test_checks_leave_nothing_running",
    "tests/test_kinds.py::test_the_advice_for_barging_cures",
    "tests/test_lab.py::test_interrupt",
    "tests/test_notebooks.py::test_a_cell_that_hangs",
    "tests/test_notebooks.py::test_interrupt",
    "tests/test_random_systems.py",
    "tests/test_uvicorn.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What runs in one process: the cells of a notebook, which share a kernel, and most modules, for their fixtures.

    (xdist's own groups cannot tell: they are written into names that pytest 9.2 does not let be changed.)
    """
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(_ALONE):
                return ""
            return nodeid if nodeid.startswith(_EACH_BY_ITSELF) else nodeid.partition("::")[0]

        def _assign_work_unit(self, node: Any) -> None:
            if "" in self.workqueue:
                self.workqueue.move_to_end("")
            super()._assign_work_unit(node)

        def _reschedule(self, node: Any) -> None:
            if list(self.workqueue) != [""]:
                super()._reschedule(node)
                return
            others = [other for other in self.nodes if other is not node]
            if not others:
                super()._reschedule(node)
            elif self._pending_of(self.assigned_work[node]) <= 2 and not all(
                other.shutting_down for other in others
            ):
                node.shutdown()

        def remove_node(self, node: Any) -> Any:
            crashed = super().remove_node(node)
            for other in self.nodes:
                self._reschedule(other)
            return crashed

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture
def sandbox() -> Iterator[Path]:
    """A folder with `tmp` and `cache` in it, whose name has whatever names should not have.

    Not pytest's tmp_path: a server that root starts runs as another user, who cannot enter that.
    """
    top = Path(tempfile.mkdtemp(prefix="workshop-test-"))
    top.chmod(0o755)
    unkind = "it's a näme" if os.name == "nt" else 'it\'s a "näme" with $HOME `and` \\ more'
    folder = top / unkind
    for part in ("tmp", "cache"):
        (folder / part).mkdir(parents=True)
    yield folder
    shutil.rmtree(top)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One private database for all tests that change nothing in it."""
    running = start_server()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of ormscope, built from the source distribution as an index would have it."""
    folder = tmp_path_factory.mktemp("dist")
    run_uv("build", str(ROOT / "ormscope"), "--out-dir", str(folder), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(params=["postgresql", "sqlite"])
def url(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> str:
    """A real PostgreSQL, then a SQLite file: the same pool class, another driver."""
    if request.param == "postgresql":
        return server.url
    return f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        reason = "no Chromium on PATH (Debian: apt install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason + "; in CI this must not be skipped")
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright  # not where the instruments are tested alone

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()
