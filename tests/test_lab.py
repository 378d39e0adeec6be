"""lab.py as its users meet it: run in copies of the checkout, each with its own environment."""

from __future__ import annotations

import ast
import functools
import hashlib
import http.server
import json
import os
import re
import runpy
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import platformdirs
import psutil
import pytest
from jupyter_client.blocking import BlockingKernelClient
from nbclient import NotebookClient

from workshop import postgres
from workshop.checks.lent import slowness
from workshop.keeper import free_port
from workshop.kernels import SETTINGS

ROOT = Path(__file__).parents[1]
# Runs lab.py after a line of Python that makes the machine look different.
RUN_LAB = "import os, runpy, shutil, sys; {}; runpy.run_path('lab.py', run_name='__main__')"


# Where no bytecode may be written, a set-up compiles all packages: half a minute that few tests need.
_OF_THIS_RUN = ("DATABASE_URL", "PYTHONDONTWRITEBYTECODE")


class Lab:
    """A copy of the checkout, in a folder with a space and an umlaut."""

    def __init__(self, parent: Path) -> None:
        self.folder = parent / "Übung eins"
        ignored = shutil.ignore_patterns(".venv", ".git", ".*_cache", "__pycache__", "executed")
        shutil.copytree(ROOT, self.folder, ignore=ignored)
        self.venv = self.folder / ".venv"
        self.lock = self.folder / "requirements.lock"
        self.environ = {
            # Where no uv is on PATH, a start keeps what it fetches here.
            "UV_CACHE_DIR": str(platformdirs.user_cache_path(postgres.APPLICATION, False) / "uv"),
            **{name: value for name, value in os.environ.items() if name not in _OF_THIS_RUN},
            "LAB_UNDER_TEST": str(parent),  # by which each of its processes is found
            "JUPYTER_CONFIG_DIR": str(parent / "jupyter"),
            # With uv: it takes a third of the time, and few tests are about a set-up without.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }

    def start(
        self, *arguments: str, pretend: str = "", prefix: tuple[str, ...] = (), **environ: str
    ) -> subprocess.Popen[str]:
        script = ["-c", RUN_LAB.format(pretend)] if pretend else ["lab.py"]
        return subprocess.Popen(
            [*prefix, sys.executable, *script, *arguments],
            cwd=self.folder,
            env=self.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self, *arguments: str, pretend: str = "", prefix: tuple[str, ...] = (), **environ: str
    ) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        process = self.start(*arguments, pretend=pretend, prefix=prefix, **environ)
        try:
            output, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        return process.returncode, output, errors

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("LAB_UNDER_TEST") == self.environ["LAB_UNDER_TEST"]:
                    found.append(process)
            except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
                continue  # not one of ours, or gone
        return found

    def assert_nothing_runs(self) -> None:
        deadline = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []

    def remove(self) -> None:
        """Stop what a failed test left running, and free the disk that the environment takes."""
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.folder)

    def assert_nothing_left(self) -> None:
        self.assert_nothing_runs()
        assert not self.venv.exists()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A fresh copy."""
    lab = Lab(tmp_path)
    yield lab
    lab.remove()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A copy that is set up."""
    lab = Lab(tmp_path_factory.mktemp("installed"))
    status, _, errors = lab.run("test", "--version")
    assert (status, errors) == (0, "")
    yield lab
    lab.remove()


def one_line(result: tuple[int, str, str]) -> str:
    """The one line of a failure, which is no traceback."""
    status, output, errors = result
    assert status == 1, output + errors
    assert "Traceback" not in output + errors
    (line,) = errors.splitlines()
    return line


def listens(process: subprocess.Popen[str], port: int) -> None:
    """Wait until JupyterLab answers."""
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    pytest.fail("".join(process.communicate()))


def path(has_uv: bool) -> str:
    """A PATH on which there is uv, the locked one, or none."""
    with_uv = [str(Path(sys.executable).parent)] if has_uv else []
    return os.pathsep.join([*with_uv, os.defpath])


def other_pythons(pattern: str = "3.*") -> Iterator[Path]:
    """Those of this machine that pyenv has installed."""
    yield from Path.home().glob(f".pyenv/versions/{pattern}/bin/python")


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 8, 10), (3, 10, 0), (3, 15, 0), (4, 0, 0)])
def test_other_pythons_are_told_in_one_line(version: tuple[int, ...], lab: Lab) -> None:
    line = one_line(lab.run(pretend=f"sys.version_info = {(*version, 'final', 0)}"))
    assert f"Python {version[0]}.{version[1]} found; 3.11 to 3.14 wanted" in line
    lab.assert_nothing_left()


def test_python_36_can_read_lab(lab: Lab) -> None:
    ast.parse((ROOT / "lab.py").read_text(), feature_version=(3, 6))
    for python in other_pythons("3.[6-9].*"):
        result = subprocess.run([python, lab.folder / "lab.py"], capture_output=True, text=True)
        assert result.stderr.startswith("lab.py: Python 3.")
        assert result.returncode == 1


def test_the_supported_pythons_are_those_of_pyproject() -> None:
    bounds = re.search(r'requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text())
    assert bounds and bounds[1] == ">=3.11,<3.15"
    assert "OLDEST, NEWEST = (3, 11), (3, 14)" in (ROOT / "lab.py").read_text()


def test_unknown_command(lab: Lab) -> None:
    assert "no command 'tset'; there are test, run," in one_line(lab.run("tset"))
    lab.assert_nothing_left()


def test_help(lab: Lab) -> None:
    status, output, _ = lab.run("--help")
    assert status == 0
    assert "python3 lab.py test" in output
    lab.assert_nothing_left()


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_python_without_venv(missing: str, lab: Lab) -> None:
    pretend = f"sys.modules[{missing!r}] = None; os.environ['PATH'] = ''"
    assert "apt install python3-venv" in one_line(lab.run(pretend=pretend))
    lab.assert_nothing_left()


def test_too_little_disk(lab: Lab) -> None:
    pretend = "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(0, 0, 3 * 10**8)"
    line = one_line(lab.run(pretend=pretend))
    assert "1.2 GB of free disk wanted, 0.3 GB found" in line
    lab.assert_nothing_left()


@pytest.mark.skipif(os.name == "nt", reason="a Windows folder has no read-only bit")
def test_read_only_checkout(lab: Lab) -> None:
    # root may write everywhere, unless it gives up that right.
    prefix = ("setpriv", "--bounding-set", "-dac_override") if os.geteuid() == 0 else ()
    lab.folder.chmod(0o555)
    line = one_line(lab.run(prefix=prefix))
    lab.folder.chmod(0o755)
    assert "cannot write .venv" in line
    assert "copy of this folder" in line
    lab.assert_nothing_left()


def test_lock_that_does_not_match(lab: Lab) -> None:
    text = lab.lock.read_text()
    start = text.index("cloudpickle==")
    end = text.index("    # via", start)
    wrong = re.sub(r"(sha256:\w{56})\w{8}", r"\g<1>00000000", text[start:end])
    lab.lock.write_text(text[:start] + wrong + text[end:])
    line = one_line(lab.run())
    assert "requirements.lock does not match the packages" in line
    assert "Hash mismatch for `cloudpickle==" in line
    lab.assert_nothing_left()


@pytest.mark.parametrize("kept", [0, 5_000, 100_000])
def test_lock_that_is_cut_short(kept: int, lab: Lab) -> None:
    lab.lock.write_text(lab.lock.read_text()[:kept])
    assert "git checkout requirements.lock" in one_line(lab.run())
    lab.assert_nothing_left()


def test_lock_that_is_missing(lab: Lab) -> None:
    lab.lock.unlink()
    assert "requirements.lock" in one_line(lab.run())
    lab.assert_nothing_left()


@pytest.mark.parametrize("has_uv", [True, False])
def test_no_network(has_uv: bool, lab: Lab) -> None:
    index = f"http://127.0.0.1:{free_port()}/simple"
    environ = {"UV_DEFAULT_INDEX": index, "PIP_INDEX_URL": index}
    environ |= {"UV_HTTP_RETRIES": "0", "PIP_RETRIES": "0", "PATH": path(has_uv)}
    line = one_line(lab.run(**environ, UV_CACHE_DIR=str(lab.folder.parent / "cache")))
    assert "connect to the network and start again" in line
    lab.assert_nothing_left()


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inspected]:
    """A package index behind a proxy that inspects TLS, as companies have them."""
    folder = tmp_path_factory.mktemp("inspected")
    wheel = stand_in_wheel(folder)
    new = "openssl req -x509 -newkey rsa:2048 -nodes"
    for command in (
        f"{new} -subj /CN=company -keyout company.key -out company.pem",
        f"{new} -subj /CN=proxy -addext subjectAltName=IP:127.0.0.1 -keyout proxy.key"
        " -addext basicConstraints=critical,CA:FALSE -CA company.pem -CAkey company.key -out proxy.pem",
    ):
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    page = folder / "simple/uv/index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="/{wheel.name}">{wheel.name}</a>')
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "proxy.pem", folder / "proxy.key")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        index = f"https://127.0.0.1:{server.server_port}/simple"
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        yield Inspected(index, folder / "company.pem", f"uv==1.0 \\\n    --hash=sha256:{digest}\n")
        server.shutdown()


@dataclass
class Inspected:
    """Its address, the certificate that alone vouches for it, and the lock for its one package."""

    index: str
    certificate: Path
    lock: str

    def start(self, lab: Lab, has_uv: bool, is_known: bool) -> tuple[int, str, str]:
        """Set up from it, on a machine that knows the certificate or not."""
        lab.lock.write_text(self.lock)
        told = ("SSL_CERT_FILE", "SSL_CERT_DIR", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
        for name in told:
            lab.environ.pop(name, None)
        prefix = with_certificate(self.certificate) if is_known else ()
        return lab.run(
            *("test", "--version"),
            prefix=prefix,
            PATH=path(has_uv),
            UV_DEFAULT_INDEX=self.index,
            UV_CACHE_DIR=str(lab.folder.parent / "cache"),
            PIP_INDEX_URL=self.index,
            PIP_CONFIG_FILE=os.devnull,
            PIP_RETRIES="0",
        )


def stand_in_wheel(folder: Path) -> Path:
    """A wheel that can be installed in place of all others: its uv does nothing, its pytest tells."""
    path = folder / "uv-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("uv.py", "")
        wheel.writestr("pytest.py", "print('installed from the company')")
        wheel.writestr("uv-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: uv\nVersion: 1.0")
        wheel.writestr("uv-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        wheel.writestr("uv-1.0.dist-info/RECORD", "")
    return path


def with_mount(mount: str, *arguments: str) -> tuple[str, ...]:
    """A command's prefix, by which it sees another file system; skips where that is not allowed."""
    script = f'mount {mount} && shift {len(arguments)} && exec "$@"'
    prefix = ("unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *arguments)
    if subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine does not let us change what its programs see")
    return prefix


def with_certificate(certificate: Path) -> tuple[str, ...]:
    """A command's prefix, by which it sees a system that trusts one more certificate."""
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    if not bundle.exists():
        pytest.skip("the certificates of this system are elsewhere")
    both = certificate.with_name("bundle.pem")
    both.write_bytes(bundle.read_bytes() + certificate.read_bytes())
    return with_mount(f'--bind "$1" {bundle}', str(both))


@pytest.mark.parametrize("has_uv", [True, False])
def test_network_that_inspects_tls(has_uv: bool, inspected: Inspected, lab: Lab) -> None:
    """What the system trusts is trusted, as a browser does."""
    status, output, errors = inspected.start(lab, has_uv, is_known=True)
    if "truststore' must be installed" in errors:  # an old pip has only certificates of its own
        assert "let SSL_CERT_FILE and PIP_CERT name the file" in one_line((status, output, errors))
    else:
        assert (status, errors) == (0, "")
        assert "installed from the company" in output


@pytest.mark.parametrize("has_uv", [True, False])
def test_certificate_that_nobody_knows(has_uv: bool, inspected: Inspected, lab: Lab) -> None:
    line = one_line(inspected.start(lab, has_uv, is_known=False))
    assert "let SSL_CERT_FILE and PIP_CERT name the file" in line
    if has_uv:
        assert "cause: invalid peer certificate: UnknownIssuer" in line
    lab.assert_nothing_left()


@pytest.fixture
def silent_index() -> Iterator[str]:
    """A package index that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/simple"


def start_and_hang(lab: Lab, index: str) -> subprocess.Popen[str]:
    process = lab.start(UV_DEFAULT_INDEX=index, UV_CACHE_DIR=str(lab.folder.parent / "cache"))
    while not any(is_sync(child) for child in psutil.Process(process.pid).children()):
        assert process.poll() is None
        time.sleep(0.05)
    return process


def is_sync(process: psutil.Process) -> bool:
    """Whether it is the installer at work, and not a child that has just ended."""
    try:
        return "sync" in process.cmdline()
    except psutil.NoSuchProcess:  # a zombie is one, too
        return False


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_group", [True, False], ids=["from the terminal", "to lab.py alone"])
def test_interrupted_set_up_leaves_nothing(
    number: signal.Signals, to_group: bool, lab: Lab, silent_index: str
) -> None:
    process = start_and_hang(lab, silent_index)
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + number, "")
    lab.assert_nothing_left()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and locks")
def test_two_set_ups_at_once(lab: Lab, silent_index: str) -> None:
    """The second one leaves the folder of the first alone."""
    process = start_and_hang(lab, silent_index)
    made = lab.venv.stat().st_ino
    assert "another start is setting up .venv" in one_line(lab.run("progress"))
    assert process.poll() is None and lab.venv.stat().st_ino == made
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    lab.assert_nothing_left()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_set_up_is_not_trusted(lab: Lab, silent_index: str) -> None:
    process = start_and_hang(lab, silent_index)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert lab.venv.exists()
    (lab.venv / "half-made").touch()
    status, output, errors = lab.run("test", "--version")
    assert (status, errors) == (0, "")
    assert "Setting up" in output
    assert not (lab.venv / "half-made").exists()


def test_another_lock_asks_for_another_environment(lab: Lab) -> None:
    assert "Setting up" in lab.run("test", "--version")[1]
    assert "Setting up" not in lab.run("test", "--version")[1]
    lab.lock.write_text(lab.lock.read_text() + "# another\n")
    assert "Setting up" in lab.run("test", "--version")[1]


def test_an_environment_serves_whatever_python_calls(installed: Lab) -> None:
    another = "sys.version, sys.version_info, sys.base_prefix = '3.6.15', (3, 6, 15), '/elsewhere'"
    status, output, errors = installed.run("test", "--version", pretend=another)
    assert (status, errors) == (0, "")
    assert "Setting up" not in output
    for python in other_pythons():
        command = [python, "lab.py", "test", "--version"]
        output = subprocess.check_output(
            command, cwd=installed.folder, env=installed.environ, text=True
        )
        assert "pytest 9" in output
        assert "Setting up" not in output


@pytest.mark.skipif(os.name == "nt", reason="its Python is a link only elsewhere")
def test_an_environment_whose_python_was_upgraded_is_not_trusted(installed: Lab) -> None:
    python = installed.venv / "bin/python"
    target = python.readlink()
    python.unlink()
    python.write_text("#!/bin/sh\necho 3.99.0\n")
    python.chmod(0o755)
    try:
        line = one_line(installed.run(pretend="sys.version_info = (3, 15, 0, 'final', 0)"))
    finally:
        python.unlink()
        python.symlink_to(target)
    assert "3.11 to 3.14 wanted" in line  # for a new one


@pytest.mark.skipif(os.name == "nt", reason="there the system itself refuses it")
def test_the_environment_of_a_running_lab_is_not_replaced(installed: Lab) -> None:
    port, lock = free_port(), installed.lock.read_text()
    jupyterlab = installed.start("--no-browser", f"--ServerApp.port={port}")
    try:
        listens(jupyterlab, port)
        installed.lock.write_text(lock + "# another\n")
        assert "a lab is running from .venv" in one_line(installed.run("progress"))
    finally:
        installed.lock.write_text(lock)
        jupyterlab.terminate()
        jupyterlab.communicate(timeout=15)
    status, output, errors = installed.run("test", "--version")
    assert (status, errors) == (0, "")
    assert "Setting up" not in output


def test_without_uv(lab: Lab) -> None:
    """And what may not be compiled later is compiled at once."""
    status, output, errors = lab.run("test", "--version", PATH="", PYTHONDONTWRITEBYTECODE="1")
    assert (status, errors) == (0, "")
    assert "pytest 9" in output
    (sqlalchemy,) = lab.venv.rglob("site-packages/sqlalchemy")
    compiled = {path.name.partition(".")[0] for path in (sqlalchemy / "__pycache__").iterdir()}
    assert {path.stem for path in sqlalchemy.glob("*.py")} <= compiled


def test_test_passes_options_and_exit_status_on(installed: Lab) -> None:
    assert "pytest 9" in installed.run("test", "--version")[1]
    assert installed.run("test", "--no-such-option")[0] == pytest.ExitCode.USAGE_ERROR


def test_packages_of_the_checkout_are_importable_from_anywhere(installed: Lab) -> None:
    python = installed.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "import ormscope, workshop; print(ormscope.__file__, workshop.__file__, sep='\\n')"
    result = subprocess.run([python, "-c", code], cwd="/", capture_output=True, encoding="utf-8")
    assert result.stdout.splitlines() == [
        str(installed.folder / package / "__init__.py") for package in ["ormscope", "workshop"]
    ]


def test_each_kernel_tells_of_the_cells_to_run_first(installed: Lab) -> None:
    """Also a restarted one, whose first cell to run is any; and that the extension is loaded twice is not said."""
    python = installed.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = textwrap.dedent(
        """
        import nbformat
        from nbclient import NotebookClient

        cells = map(nbformat.v4.new_code_cell, ["starved = observe(1)", "%load_ext workshop"])
        notebook = nbformat.v4.new_notebook(cells=list(cells))
        NotebookClient(notebook, kernel_name="python3", allow_errors=True).execute()
        failed, loaded = notebook.cells
        print(*failed.outputs[0].traceback, loaded.outputs, failed.execution_count)
        """
    )
    result = subprocess.run([python, "-c", code], capture_output=True, encoding="utf-8")
    told = "name 'observe' is not defined. Run the cells above first"
    assert result.stdout.startswith(told), result.stdout + result.stderr
    assert result.stdout.endswith(" [] 1\n")


@pytest.mark.parametrize(
    "url",
    [
        "no url at all",
        "postgresql+asyncpg://nobody@127.0.0.1:1/none",
        "postgresql+psycopg2://nobody@127.0.0.1/none",
        "sqlite+aiosqlite:///shop.sqlite",
    ],
    ids=["malformed", "refuses", "another driver", "SQLite"],
)
def test_database_url_mistakes(url: str, installed: Lab) -> None:
    line = one_line(installed.run("--no-browser", DATABASE_URL=url))
    assert "DATABASE_URL" in line
    installed.assert_nothing_runs()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such users")
def test_home_that_cannot_be_written(lab: Lab) -> None:
    """As a container's user has whom it does not know."""
    assert "HOME=folder python3 lab.py" in one_line(lab.run(HOME="/no/such/folder"))
    lab.assert_nothing_left()


@pytest.mark.skipif(sys.platform != "linux", reason="is about Linux's folders")
def test_remove_takes_away_what_is_outside(lab: Lab) -> None:
    """The templates, the programs that root's server needs, and the packages; nothing of others."""
    top = lab.folder.parent
    of_user, of_all, foreign = top / "cache", top / "everybody's", top / "cache/uv"
    for folder in (of_user / "sqlalchemy-under-load", of_all / "sqlalchemy-under-load", foreign):
        (folder / "some").mkdir(parents=True)
        (folder / "some/file").write_bytes(bytes(2_500_000))
    prefix = with_mount('--bind "$1" /var/cache', str(of_all))
    environ = {"XDG_CACHE_HOME": str(of_user), "PATH": path(has_uv=False)}
    status, output, errors = lab.run("remove", prefix=prefix, **environ)
    assert (status, errors) == (0, "")
    mine, everybodys, total = output.splitlines()
    assert mine.split() == ["2", "MB", str(of_user / "sqlalchemy-under-load")]
    assert everybodys.split() == ["2", "MB", "/var/cache/sqlalchemy-under-load"]
    assert total.strip() == f"5 MB removed. All else is in this folder: {lab.folder}"
    assert list(of_user.iterdir()) == [foreign]
    assert list(of_all.iterdir()) == []
    assert not lab.venv.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="is about Linux's folders")
def test_remove_leaves_what_belongs_to_root(lab: Lab) -> None:
    of_all = lab.folder.parent / "everybody's"
    (of_all / "sqlalchemy-under-load").mkdir(parents=True)
    of_all.chmod(0o555)
    mount = with_mount('--bind "$1" /var/cache', str(of_all))
    prefix = (*mount, "setpriv", "--bounding-set", "-dac_override")
    status, output, errors = lab.run("remove", prefix=prefix, XDG_CACHE_HOME=str(of_all))
    assert (status, errors) == (0, "")
    assert "stays  /var/cache/sqlalchemy-under-load: that is not yours to remove" in output
    assert (of_all / "sqlalchemy-under-load").exists()


@pytest.mark.skipif(os.name == "nt", reason="copies there go with their server")
def test_remove_looks_where_the_workshop_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workshop asks platformdirs for its folders; lab.py has nothing but the standard library."""
    for cache in ("", str(tmp_path)):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        places = runpy.run_path(str(ROOT / "lab.py"))["places"]()
        name = postgres.APPLICATION
        assert platformdirs.user_cache_path(name, appauthor=False).is_relative_to(places[0] / name)
        assert platformdirs.site_cache_path(name, appauthor=False) == places[1] / name


def test_terminal_is_quiet(installed: Lab, tmp_path: Path) -> None:
    """A kernel adds nothing to what the terminal says at the start; it talks encrypted."""
    port = free_port()
    process = installed.start(
        *("--no-browser", f"--ServerApp.port={port}", "--IdentityProvider.token=token"),
        JUPYTER_RUNTIME_DIR=str(tmp_path),
    )
    listens(process, port)
    url = f"http://127.0.0.1:{port}/api/kernels?token=token"
    with urllib.request.urlopen(url, data=b'{"name": "python3"}', timeout=60) as answer:
        kernel = json.load(answer)["id"]
    client = BlockingKernelClient(connection_file=str(tmp_path / f"kernel-{kernel}.json"))
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    client.stop_channels()
    assert "curve_publickey" in client.get_connection_info()
    process.terminate()
    output, errors = process.communicate(timeout=15)
    assert output == "JupyterLab starts. Ctrl-C here ends it, and all that it runs.\n"
    (line,) = errors.splitlines()
    assert "received signal 15" in line
    installed.assert_nothing_runs()


def test_kernels_without_a_browser_are_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('done')")])
    NotebookClient(notebook, config=SETTINGS).execute()
    assert notebook.cells[0].outputs[0].text == "done\n"
    assert capfd.readouterr() == ("", "")


def start_jupyterlab(lab: Lab) -> float:
    """Seconds from the command to a JupyterLab that answers; it is stopped again."""
    port = free_port()
    started = time.monotonic()
    process = lab.start("--no-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0")
    listens(process, port)
    seconds = time.monotonic() - started
    process.terminate()
    _, errors = process.communicate(timeout=15)
    assert "/lab/tree/my_notebooks/00_start_here.ipynb?token=" in errors
    lab.assert_nothing_runs()
    return seconds


def test_second_start_takes_under_five_seconds(lab: Lab) -> None:
    start_jupyterlab(lab)
    assert lab.venv.exists()
    # A busy machine may slow one start down, hardly three.
    assert any(start_jupyterlab(lab) < 5 * slowness() for _ in range(3))
