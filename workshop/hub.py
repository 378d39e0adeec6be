"""`python3 lab.py hub`: a JupyterHub with a seat for each learner, on one machine (see hub/README.md).

Options are JupyterHub's. It comes with the kit's environment; Node.js, for its proxy, with a wheel that uv keeps in its
cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from workshop.mistake import Mistake

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "hub"
STATE = FOLDER / "state"
_PROXY = FOLDER / "node_modules" / "configurable-http-proxy"
_NOBODY = 65534
_PRIVATE = ("/tmp", "/var/tmp")  # under systemd, each seat has its own
_MOST_SHOWN = 300


def prepare() -> dict[str, str]:
    """Install the proxy, and return what the hub's configuration wants to find in the environment.

    Raises Mistake where this machine cannot have seats.
    """
    if sys.platform != "linux":
        raise Mistake("the seats are users of Linux; take a machine that runs it")
    if os.geteuid() != 0:
        raise Mistake("only root can make a user for each seat: sudo python3 lab.py hub")
    is_private = any(ROOT.is_relative_to(folder) for folder in _PRIVATE)
    ask = [sys.executable, "-c", f"open({str(FOLDER / 'seat.py')!r})"]
    try:
        subprocess.run(ask, cwd="/", user=_NOBODY, extra_groups=[], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        is_private = True
    if is_private:
        raise Mistake(
            f"a seat could not read {ROOT}, or not run {os.path.realpath(sys.executable)}: put the kit where all can"
            " read it, as in /opt, and start it with a Python that all can run, as /usr/bin/python3"
        )
    if not _PROXY.is_dir():
        _node("npm", "ci", "--no-audit", "--no-fund")
    return {"HUB_NODE": _node("node", "--print", "process.execPath").strip()}


def _node(*command: str) -> str:
    """What a command prints that comes with Node.js."""
    requirements = str(FOLDER / "requirements.lock")
    uv = [sys.executable, "-m", "uv", "run", "--quiet", "--no-project"]
    done = subprocess.run(
        [*uv, "--with-requirements", requirements, *command],
        cwd=FOLDER,
        env=os.environ | {"NODE_USE_SYSTEM_CA": "1"},  # where a company inspects TLS
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise Mistake(f"{command[0]} cannot be had, or failed: {said[-_MOST_SHOWN:]}")
    return done.stdout


def command(*options: str) -> list[str]:
    """The command that is the hub."""
    configuration = f"--config={FOLDER / 'jupyterhub_config.py'}"
    return [sys.executable, "-m", "jupyterhub", configuration, "--log-level=WARN", *options]


def main(options: Sequence[str]) -> None:
    """Be the hub."""
    environ = os.environ | prepare()
    print(f"The seats and their passwords: {STATE / 'passwords.txt'}", flush=True)
    os.chdir(FOLDER)
    os.execve(sys.executable, command(*options), environ)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Mistake as mistake:
        sys.exit(f"lab.py hub: {mistake}")
