"""Set the workshop up, open it, prove it. Needs Python 3.11 to 3.14 and nothing else.

python3 lab.py [JupyterLab options]     set up what is missing, and open my_notebooks at lesson 00
python3 lab.py progress                 show which tasks of the exercises are done
python3 lab.py reset NN ...             bring exercises back as they were; your versions are kept
python3 lab.py reset --lesson NN ...    the same for lessons
python3 lab.py run [NN ...]             run lessons without a browser, into the folder executed
python3 lab.py doctor                   rehearse: will everything work on this machine?
python3 lab.py service [SEED]           the service of lesson 10, which breaks under load, in a terminal
python3 lab.py room [options]           for instructors: which seats have done which task, on a page
python3 lab.py join ADDRESS NAME        share with such a room which tasks you have done
python3 lab.py bench                    measure the instruments themselves
python3 lab.py matrix [options]         test the instruments on each Python, SQLAlchemy and event loop
python3 lab.py test [pytest options]    run everything that CI runs; with --quick, what a learner needs
python3 lab.py refresh [NN ...]         for maintainers: run notebooks in place, store their outputs
python3 lab.py new exercise NN name     for maintainers: write the files of a new exercise
python3 lab.py bundle [SYSTEM ...]      pack the kit with its packages, for a room without network
python3 lab.py website                  build the website from what the notebooks have stored
python3 lab.py slides                   build slides of each lesson, with speaker's notes
python3 lab.py hub [JupyterHub options] a JupyterHub with a seat for each learner, on one machine
python3 lab.py rehearse --seats 30      try such a room here: what it takes, and whether it holds
python3 lab.py remove                   take away what the kit keeps outside of this folder

The first start makes the environment .venv in this folder from requirements.lock, with uv where
it is on PATH, else with the locked uv, fetched by pip. Where a company inspects TLS, they go on
with the system's certificates. Where the folder wheels stands beside this file, as in what bundle
makes, packages come from there and no network is asked.
"""
# Python 3.6 must be able to parse this file: an old Python shall say that it is old, in one line.

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

OLDEST, NEWEST = (3, 11), (3, 14)
ROOT = Path(__file__).resolve().parent
LOCK = ROOT / "requirements.lock"
WHEELS = ROOT / "wheels"  # in a bundle: all the packages
VENV = ROOT / ".venv"
OLD_VENV = ROOT / ".venv.old"  # what a new one replaces, for a moment
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
INSTALLED = VENV / "installed.stamp"  # written last: an environment without it is never trusted
SERVER_CHECKED = VENV / "server-checked.stamp"
APPLICATION = "sqlalchemy-under-load"  # what the workshop calls its folders elsewhere
DISK_NEEDED = 1.2e9  # bytes: 0.7 GB of packages, their download cache, the lessons' databases
COMMANDS = {
    # Side by side, as tests/conftest.py groups them; whoever asks for another number gets it.
    "test": ["pytest", "--numprocesses=3", "--dist=loadfile"],
    "run": ["workshop.notebooks", "run"],
    "refresh": ["workshop.notebooks", "refresh"],
    "doctor": ["workshop.doctor"],
    "service": ["workshop.drill.outside"],
    "room": ["workshop.room"],
    "join": ["workshop.join"],
    "bench": ["workshop.bench"],
    "matrix": ["workshop.matrix"],
    "progress": ["workshop.progress"],
    "reset": ["workshop.copies"],
    "new": ["workshop.new"],
    "bundle": ["workshop.bundle"],
    "website": ["workshop.website"],
    "slides": ["workshop.slides"],
    "hub": ["workshop.hub"],
    "rehearse": ["workshop.rehearse"],
}
# What uv or pip say of a certificate that none of those they trust has signed, as where a company
# inspects TLS, and what makes them trust all that this machine trusts. uv calls its switch so since
# 0.11, and had another name for it before; pip from 24.2 on does it by itself.
UNTRUSTED = r"invalid peer certificate|CERTIFICATE_VERIFY_FAILED|truststore. must be installed"
SYSTEM_CERTIFICATES = {
    "UV_SYSTEM_CERTS": "true",
    "UV_NATIVE_TLS": "true",
    "PIP_USE_FEATURE": "truststore",
}
# What uv or pip say when they fail, and what the user is told.
FAILURES = {
    UNTRUSTED: (
        "the certificate of the package index is not trusted here; let SSL_CERT_FILE and PIP_CERT"
        " name the file with your network's certificates and start again"
    ),
    r"No space left|os error (28|112)\b": "the disk is full",
    r"Failed to (fetch|read)|error sending request|timed out|disabled|No matching distribution": (
        "packages are out of reach; connect to the network and start again"
    ),
    r"Hash mismatch|HASHES|have a hash|Invalid hash|parse requirement|no version of|not found": (
        "requirements.lock does not match the packages; try git checkout requirements.lock"
    ),
}
# The same where packages come from the folder wheels.
FAILURES_OF_WHEELS = {
    r"no version of|No matching distribution|Hash mismatch|HASHES|disabled": (
        "the folder wheels has no package for this system and Python {}.{};"
        " take the bundle of your system, or a Python that it is for".format(*sys.version_info)
    ),
}


class Trouble(Exception):
    """What went wrong and what to do about it, in one line."""


def main(arguments):
    """Carry out one command line; return the exit status."""
    command, options = None, arguments
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if arguments and not arguments[0].startswith("-"):
        command, *options = arguments
        if command not in COMMANDS and command != "remove":
            raise Trouble(f"no command {command!r}; there are {', '.join(COMMANDS)}, remove")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends children, too
    home = os.path.expanduser("~")
    if not os.access(home, os.W_OK):  # as for a user of a container whom it does not know
        raise Trouble(
            f"cannot write to your home folder {home}; name another: HOME=folder python3 lab.py"
        )
    if command == "remove":
        return remove()
    if not is_installed():
        with only_one():
            install()
    lock_environment()
    if command:
        return hand_over(["-m", *COMMANDS[command], *options])
    return check_server() or hand_over(["-m", "workshop.jupyter", *options])


def fingerprint():
    """What the environment is made of: another lock or folder, or another Python in it, wants a new one.

    The Python that runs this file need not be that one, and in a seat of a hub .venv is a link to the kit's.
    """
    question = "import sys; print(sys.version, sys.base_prefix, sep='\\n')"
    ask = [str(PYTHON), "-I", "-S", "-X", "utf8", "-c", question]
    try:
        python = subprocess.check_output(ask, stderr=subprocess.DEVNULL, encoding="utf-8").strip()
    except (OSError, subprocess.CalledProcessError) as error:  # removed, or of another machine
        python = str(error)
    sources = [LOCK.read_bytes().hex(), python, str(VENV.resolve().parent)]
    return hashlib.sha256("\n".join(sources).encode()).hexdigest()


def is_installed():
    return INSTALLED.exists() and INSTALLED.read_text() == fingerprint()


def lock_environment(alone=False):
    """Keep the environment from being replaced as long as this process lives, or ask for it `alone`.

    Raises Trouble where it is asked for alone and a lab runs from it.
    """
    stamp = lock(INSTALLED, alone, "a lab is running from .venv; close it and start again")
    if stamp is not None:
        os.set_inheritable(stamp, True)  # what this process becomes keeps it


@contextlib.contextmanager
def only_one():
    """Let no other start set up .venv meanwhile; raises Trouble where one does already."""
    taken = None
    if LOCK.exists():
        taken = lock(LOCK, True, "another start is setting up .venv; wait for it, then start again")
    try:
        yield
    finally:
        if taken is not None:
            os.close(taken)


def lock(path, alone, trouble):
    """Share a file with others, or have it alone, until what is returned is closed; Trouble where that cannot be.

    None on Windows, where a folder cannot be moved while something in it is used.
    """
    if os.name == "nt":
        return None
    import fcntl

    file = os.open(str(path), os.O_RDONLY)
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Trouble(trouble) from None
    except OSError:  # a network drive that knows no locks
        pass
    return file


def install():
    """Make .venv from requirements.lock; leave nothing behind where that fails."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        found = "{}.{}".format(*sys.version_info)
        wanted = "{}.{} to {}.{}".format(*OLDEST, *NEWEST)
        raise Trouble(f"Python {found} found; {wanted} wanted: install one, and run this with it")
    uv = shutil.which("uv")
    modules = ["venv"] if uv else ["venv", "ensurepip"]
    if not all(importlib.util.find_spec(module) for module in modules):
        raise Trouble("this Python lacks its venv module; on Debian: apt install python3-venv")
    free = shutil.disk_usage(ROOT).free
    if free < DISK_NEEDED:
        raise Trouble(f"{DISK_NEEDED / 1e9} GB of free disk wanted, {free / 1e9:.1f} GB found")
    try:
        if OLD_VENV.exists():
            shutil.rmtree(OLD_VENV)
        if VENV.exists():
            if INSTALLED.exists():
                lock_environment(alone=True)
            # First, so that half an environment is never trusted; Windows refuses it while one is used.
            VENV.rename(OLD_VENV)
            shutil.rmtree(OLD_VENV)
        VENV.mkdir()
    except OSError as error:
        raise Trouble(
            f"cannot write .venv: {error}; close what uses it, or work in a copy of this folder"
        ) from error
    try:
        source = "from the folder wheels" if WHEELS.is_dir() else "which downloads about 215 MB"
        print(f"Setting up .venv, {source}.", flush=True)
        install_packages(uv)
        add_checkout()
        INSTALLED.write_text(fingerprint())
    except BaseException:  # Ctrl-C as well; what cannot be removed here has no stamp
        shutil.rmtree(VENV, ignore_errors=True)
        raise


def install_packages(uv):
    """Install exactly what the lock says, with the given uv or else with the locked one."""
    # The base interpreter: the one in .venv, if lab.py was started with that, is gone by now.
    python = getattr(sys, "_base_executable", sys.executable)
    locked_uv = re.search(r"^uv==.*\n(\s.*\n)*", LOCK.read_text(errors="replace"), re.MULTILINE)
    if locked_uv is None:
        raise Trouble("requirements.lock lacks packages; try git checkout requirements.lock")
    environ = dict(os.environ)
    if WHEELS.is_dir():  # relative to this folder, whose name may have a space
        environ.update({"UV_OFFLINE": "1", "UV_FIND_LINKS": "wheels"})
    if uv:
        watch([python, "-m", "venv", "--without-pip", str(VENV)], environ)
        installer = [uv]
    else:
        watch([python, "-m", "venv", str(VENV)], environ)
        (VENV / "uv.txt").write_text(locked_uv.group())
        # What is set for one of the two installers holds for the other.
        for uv_name, pip_name in [
            ("UV_FIND_LINKS", "PIP_FIND_LINKS"),
            ("UV_OFFLINE", "PIP_NO_INDEX"),
        ]:
            if uv_name in environ:
                environ[pip_name] = environ[uv_name]
        if "PIP_INDEX_URL" in environ:
            environ.setdefault("UV_DEFAULT_INDEX", environ["PIP_INDEX_URL"])
        # In folders of our own, for `remove` would not empty those that other projects use.
        environ.setdefault("UV_CACHE_DIR", str(places()[0] / APPLICATION / "uv"))
        pip = [
            str(PYTHON),
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--require-hashes",
            "--no-cache-dir",
        ]
        watch([*pip, "-r", str(VENV / "uv.txt")], environ)
        installer = [str(PYTHON), "-m", "uv"]
    sync = ["pip", "sync", "--color=never", "--require-hashes", f"--python={PYTHON}", str(LOCK)]
    if environ.get("PYTHONDONTWRITEBYTECODE"):
        sync.append("--compile-bytecode")  # else each start would compile SQLAlchemy anew
    watch([*installer, *sync], environ)


def add_checkout():
    """Make the checkout's packages importable, and let each kernel load what tells a learner's mistakes."""
    site_packages = sysconfig.get_path("purelib", "venv", {"base": str(VENV)})
    # Relative, hence ASCII: .pth files are read in an encoding that may lack this folder's name.
    Path(site_packages, "workshop.pth").write_text(os.path.relpath(ROOT, site_packages) + "\n")
    # At its start, for after a restart the first cell to run may be any. (Were it listed as an
    # extension, %load_ext workshop would say in each lesson that it is loaded already.)
    load = "__import__('workshop').load_ipython_extension(get_ipython())"
    settings = VENV / "etc/ipython/ipython_kernel_config.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps({"IPKernelApp": {"exec_lines": [load]}}))


def watch(command, environ):
    """Run a command and show its progress; if it fails, say in one line why.

    Where it trusts too few certificates it is run once more, and all after it, with the system's.
    """
    lines = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            for line in process.stdout:
                lines.append(line.strip())
                if re.match(r"Download|Prepared|Installed", line.strip()):
                    print(" ", line.strip(), flush=True)
        except BaseException:
            process.kill()
            raise
    if not process.returncode:
        return
    said = "\n".join(lines)
    if re.search(UNTRUSTED, said) and not SYSTEM_CERTIFICATES.keys() <= environ.keys():
        environ.update({**SYSTEM_CERTIFICATES, **environ})
        watch(command, environ)
        return
    failures = {**FAILURES_OF_WHEELS, **FAILURES} if WHEELS.is_dir() else FAILURES
    for pattern, advice in failures.items():
        for line in lines:
            if re.search(pattern, line):
                reasons = [other for other in lines if re.match("cause:|Caused by:|hint:", other)]
                told = dict.fromkeys([line, *reasons])
                raise Trouble("{} ({})".format(advice, "; ".join(told)))
    raise Trouble(f"the set-up failed:\n{said}")


def places():
    """Where the kit keeps what it may use again: a folder of this user's, and one of all users."""
    if os.name == "nt":
        return Path(os.environ["LOCALAPPDATA"]), Path(os.environ["PUBLIC"])
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches", Path("/Library/Caches")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"), Path("/var/cache")


def remove():
    """Take away what the kit keeps outside of this folder, and say how much that was."""
    if INSTALLED.exists():
        lock_environment(alone=True)
    total = 0
    for folder in [folder for place in places() for folder in place.glob(APPLICATION + "*")]:
        if not os.access(str(folder.parent), os.W_OK):  # what root's labs keep
            print(f"   stays  {folder}: that is not yours to remove")
            continue
        files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        size = sum(path.stat().st_size for path in files)
        shutil.rmtree(folder)
        total += size
        print(f"{size / 1e6:6.0f} MB  {folder}")
    print(f"{total / 1e6:6.0f} MB removed. All else is in this folder: {ROOT}")
    if shutil.which("uv"):
        print("Packages are in the cache of your uv too, for all your projects: uv cache clean")
    return 0


def check_server():
    """See that a database answers; needed once for each environment, and always for a given URL."""
    is_given = "DATABASE_URL" in os.environ
    if not is_given and SERVER_CHECKED.exists():
        return 0
    status = subprocess.call([str(PYTHON), "-m", "workshop.doctor", "--server"], cwd=ROOT)
    if status == 0 and not is_given:
        SERVER_CHECKED.touch()
    return status


def hand_over(arguments):
    """Go on as the environment's Python with these; its signals and exit status are ours."""
    command = [str(PYTHON), *arguments]
    os.chdir(ROOT)
    sys.stdout.flush()
    if os.name != "nt":
        os.execv(command[0], command)
    with subprocess.Popen(command) as process:  # on Windows, execv would not wait for the end
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the process got it too, and decides what it means
                continue


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (Trouble, OSError) as error:
        sys.exit(f"lab.py: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
