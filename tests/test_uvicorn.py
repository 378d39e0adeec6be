"""ormscope/README.md's service: its own app and commands, uvicorn, real requests, the wheel in a new environment."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import urllib.error
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from environments import ROOT, SERIES, new_environment
from helpers import PATIENCE
from leftovers import await_that
from terminals import Terminal, needs_tmux, terminal

from workshop.database import Server
from workshop.keeper import free_port
from workshop.prometheus import ask

PAGE = (ROOT / "ormscope" / "README.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## Ten minutes in a service") : PAGE.index("## The pytest plugin")]
(APP,) = re.findall(r"^```python shop\.py\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
(START, READ, BLOCK) = (
    block.splitlines()
    for block in re.findall(r"^```sh\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
)
INSTALL, EXPORT, SERVE = START
ORDERS, REPORT, SIGNAL, CONSOLE, METRICS = READ
INVOICE, REPORT_IN_VAIN = BLOCK
CURL_TIMED_OUT = 28

# The same with `uvicorn --workers`: a port for each, as another section of the page has it.
(SERVE_METRICS,) = re.findall(r"^```python\n(def serve_metrics.*?)^```$", PAGE, re.M | re.S)
WORKERS = APP.replace('start_http_server(9100, "127.0.0.1")', "serve_metrics(9100)").replace(
    "@asynccontextmanager\n", f"registry = REGISTRY\n\n\n{SERVE_METRICS}\n\n@asynccontextmanager\n"
)

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="the commands are those of a Unix shell"),
    pytest.mark.skipif(
        shutil.which("curl") is None and os.environ.get("CI") != "true",
        reason="curl is not installed",
    ),
    needs_tmux,
]


@dataclass
class Shop:
    """The running service, and a shell beside it."""

    process: subprocess.Popen[bytes]
    folder: Path
    surroundings: dict[str, str]
    ports: dict[str, str]

    @property
    def log(self) -> str:
        """What is in uvicorn's terminal."""
        return (self.folder / "log").read_text()

    def line(self, line: str) -> str:
        """A line of the page with the process and the ports of this service."""
        text = re.sub(r"\bPID\b", str(self.process.pid), line)
        for port, own in self.ports.items():
            text = text.replace(port, own)
        return text

    def run(self, line: str, status: int = 0) -> str:
        """What a line of the page prints until the shell is done with it."""
        # No pipe: what goes on in the background would keep it open.
        path = self.folder / "printed"
        with path.open("w") as printed:
            done = subprocess.run(
                ["bash", "-c", self.line(line)],
                cwd=self.folder,
                env=self.surroundings,
                stdout=printed,
                timeout=PATIENCE,
            )
        assert done.returncode == status, line
        return path.read_text()


@pytest.fixture(scope="module", params=SERIES)
def programs(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The programs of a new environment: what the page installs, and a series of SQLAlchemy."""
    pip, install, ours, *others = shlex.split(INSTALL)
    assert (pip, install) == ("pip", "install") and ours.startswith("./ormscope[")
    wanted = f"{ours.removeprefix('./')} @ {wheel.as_uri()}"
    folder = tmp_path_factory.mktemp("environment")
    python = new_environment(folder, wanted, *others, SERIES[request.param])
    versions = (
        "from importlib import metadata, util\n"
        "print(metadata.version('sqlalchemy'), util.find_spec('ormscope').origin)"
    )
    said = subprocess.run([python, "-I", "-c", versions], capture_output=True, text=True).stdout
    assert said.startswith(f"{request.param}.") and "site-packages" in said
    return python.parent


@contextmanager
def served(programs: Path, server: Server, app: str = APP, *, workers: int = 1) -> Iterator[Shop]:
    """The page's service, as its commands start it, but on free ports."""
    assert re.fullmatch(r"export DATABASE_URL=postgresql\+asyncpg://\S+", EXPORT)
    ports = {"8000": str(free_port()), "9100": str(free_port())}
    with tempfile.TemporaryDirectory() as made:  # its name is short, as a socket's must be
        folder = Path(made)
        # Not this project's path; and bytecode is kept, whatever is said here: there are many starts.
        kept = {name: os.environ[name] for name in os.environ if not name.startswith("PYTHON")}
        surroundings = kept | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "DATABASE_URL": server.url,
            "XDG_RUNTIME_DIR": made,
            "TERM": "xterm-256color",
        }
        with (folder / "log").open("w") as log:
            (folder / "shop.py").write_text(app.replace("9100", ports["9100"]))
            process = subprocess.Popen(
                [
                    "bash",
                    "-c",
                    f"WEB_CONCURRENCY={workers} exec {SERVE.replace('8000', ports['8000'])}",
                ],
                cwd=folder,
                env=surroundings,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        shop = Shop(process, folder, surroundings, ports)
        try:
            started = "Application startup complete"
            assert await_that(lambda: shop.log.count(started) == workers, PATIENCE), shop.log
            yield shop
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_starved_service_is_read_in_four_ways(programs: Path, server: Server) -> None:
    with served(programs, server) as shop:
        assert f"[{shop.process.pid}]" in shop.log.splitlines()[0]
        shop.run(ORDERS)
        assert await_that(lambda: "DEADLOCK in shop" in shop.run(REPORT), PATIENCE)
        report = shop.run(REPORT)
        for text in ("POOL shop: 2 of 2 checked out, 6 waiting", "last SQL: select 'an order'"):
            assert text in report
        assert re.search(r"they ask +2 at shop\.py:\d+, price_of: async with", report), report

        assert "DEADLOCK" not in shop.log
        shop.run(SIGNAL)
        wanted = (f"ORMSCOPE, process {shop.process.pid}", "DEADLOCK in shop (hold-and-wait)")
        assert await_that(lambda: all(line in shop.log for line in wanted), PATIENCE), shop.log

        with looking(shop) as view:
            view.shows("shop", "deadlock", "price_of")
            view.types("r")
            view.shows("DEADLOCK in shop")
            view.types("q")
            view.types("q")
            view.shows("status: 0")

        metrics = shop.run(METRICS).splitlines()
        assert 'sqlalchemy_pool_waiting{pool="shop"} 6.0' in metrics
        assert 'sqlalchemy_pool_verdict{cause="deadlock",pool="shop"} 1.0' in metrics


def test_three_ways_lead_into_a_blocked_service(programs: Path, server: Server) -> None:
    with served(programs, server) as shop:
        assert shop.run(REPORT).startswith("POOL shop: 0 of 2 checked out, 0 waiting")
        shop.run(INVOICE)
        blocked = 'sqlalchemy_pool_verdict{cause="loop blocked",pool="shop"} 1.0'
        assert await_that(lambda: blocked in shop.run(METRICS), PATIENCE)
        assert shop.run(REPORT_IN_VAIN, CURL_TIMED_OUT) == ""

        shop.run(SIGNAL)
        wanted = (f"ORMSCOPE, process {shop.process.pid}", "LOOP BLOCKED", "time.sleep(60)")
        assert await_that(lambda: all(line in shop.log for line in wanted), PATIENCE), shop.log

        with looking(shop) as view:
            view.shows("shop", "loop blocked", "print_invoice")

        metrics = shop.run(METRICS)
        assert blocked in metrics
        (lag,) = (
            line.split()[1] for line in metrics.splitlines() if line.startswith("event_loop_lag")
        )
        assert float(lag) >= 2


@pytest.mark.parametrize("programs", ["2.1"], indirect=True)
def test_two_workers_have_a_port_each_and_end_as_they_would_without(
    programs: Path, server: Server
) -> None:
    with served(programs, server, WORKERS, workers=2) as shop:
        found = []
        for port in range(int(shop.ports["9100"]), int(shop.ports["9100"]) + 4):
            with suppress(urllib.error.URLError):
                found.append(ask(port, timeout=PATIENCE))
        assert (
            len([text for text in found if 'sqlalchemy_pool_waiting{pool="shop"} 0.0' in text]) == 2
        )
        shop.process.send_signal(signal.SIGINT)
        shop.process.wait(PATIENCE)
        assert shop.log.count("Application shutdown complete") == 2
        assert "Traceback" not in shop.log


def looking(shop: Shop) -> AbstractContextManager[Terminal]:
    """The console in a terminal."""
    command = shop.line(CONSOLE).partition("#")[0] + "; echo status: $?; cat"
    return terminal(command, shop.folder / "tmux", shop.folder, shop.surroundings)
