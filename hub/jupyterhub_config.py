"""A room of seats on one machine: each is a user of the system's, with a home that nobody else can read.

`sudo python3 lab.py hub` starts it, and hub/README.md says what it needs and what it keeps apart. How many
seats there are comes from the environment, and any option of JupyterHub's from the command line, which comes first.
"""

import hmac
import os
import secrets
import sys
from pathlib import Path

from jupyterhub.auth import LocalAuthenticator

c = get_config()  # noqa: F821  # JupyterHub's

KIT = Path(__file__).resolve().parent.parent
STATE = Path(os.environ.get("HUB_STATE", KIT / "hub" / "state"))
PREFIX = os.environ.get("HUB_PREFIX", "seat")
SEATS = [f"{PREFIX}-{number:02}" for number in range(1, int(os.environ.get("HUB_SEATS", "30")) + 1)]
INSTRUCTOR = f"{PREFIX}-instructor"
HAS_SYSTEMD = Path("/run/systemd/system").is_dir()


def passwords() -> dict[str, str]:
    """The password of each seat, in a file that only root can read; new seats get new ones."""
    path = STATE / "passwords.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    known = dict(line.split() for line in lines)
    known |= {name: secrets.token_hex(4) for name in (*SEATS, INSTRUCTOR) if name not in known}
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.writelines(f"{name} {password}\n" for name, password in known.items())
    return known


STATE.mkdir(mode=0o700, exist_ok=True)
PASSWORDS = passwords()


class Cards(LocalAuthenticator):
    """Whoever has the card of a seat may sit there."""

    async def authenticate(self, handler, data):
        """The name of the seat, or None where the password is not the seat's."""
        password = PASSWORDS.get(data["username"])
        if password and hmac.compare_digest(password.encode(), data["password"].encode()):
            return data["username"]
        return None


c.JupyterHub.authenticator_class = Cards
c.Authenticator.allowed_users = {*SEATS, INSTRUCTOR}
c.Authenticator.admin_users = {INSTRUCTOR}  # sees at /hub/admin who is there, and restarts seats
c.LocalAuthenticator.create_system_users = True
c.LocalAuthenticator.add_user_cmd = [
    *("useradd", "--create-home", "--shell", "/bin/bash"),
    *("--key", "HOME_MODE=0700"),
]

c.JupyterHub.bind_url = "http://0.0.0.0:8000"
c.JupyterHub.db_url = f"sqlite:///{STATE / 'jupyterhub.sqlite'}"
c.JupyterHub.cookie_secret_file = str(STATE / "cookie_secret")
c.JupyterHub.concurrent_spawn_limit = 0  # a room comes all at once, and nobody is to be sent away
c.ConfigurableHTTPProxy.pid_file = str(STATE / "proxy.pid")
c.ConfigurableHTTPProxy.command = [
    os.environ["HUB_NODE"],
    str(KIT / "hub/node_modules/configurable-http-proxy/bin/configurable-http-proxy"),
    "--log-level=warn",
]

# Limits for each seat. Only systemd holds them; without it, one seat can take the memory of all.
c.JupyterHub.spawner_class = "systemd" if HAS_SYSTEMD else "localprocess"
c.Spawner.mem_limit = "2G"
c.Spawner.cpu_limit = 2.0
if HAS_SYSTEMD:
    c.SystemdSpawner.isolate_tmp = True
    c.SystemdSpawner.unit_extra_properties = {"TasksMax": "1000"}
c.Spawner.cmd = [sys.executable, str(KIT / "hub" / "seat.py")]
c.Spawner.environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
c.Spawner.args = [
    # A kernel without a tab ends after an hour, and a seat without kernels after two.
    "--MappingKernelManager.cull_idle_timeout=3600",
    "--ServerApp.shutdown_no_activity_timeout=7200",
]
c.Spawner.start_timeout = 300  # when all start at once, on few cores
c.Spawner.http_timeout = 300
c.Spawner.default_url = "/lab/tree/my_notebooks/00_start_here.ipynb"
