"""What a seat of the hub starts: JupyterLab on a copy of the kit that is its own, in its home."""

import os
import shutil
import sys
from pathlib import Path

KIT = Path(__file__).resolve().parent.parent
COPY = Path.home() / "sqlalchemy-under-load"
# What a seat works with; the environment is the kit's, for all.
PARTS = ["README.md", "data", "exercises", "lab.py", "notebooks", "ormscope", "requirements.lock"]
PARTS += ["solutions", "workshop"]


def copy_kit() -> None:
    """Copy the kit in one stroke, so that half a copy is never taken for one."""
    new = COPY.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for part in PARTS:
        if (KIT / part).is_dir():
            shutil.copytree(KIT / part, new / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(KIT / part, new / part)
    (new / ".venv").symlink_to(KIT / ".venv")
    new.rename(COPY)


def main() -> None:
    """Be JupyterLab on the copy."""
    if not COPY.exists():
        copy_kit()
    os.chdir(COPY)
    # Before the kit's own folder, to which its environment leads.
    os.environ["PYTHONPATH"] = str(COPY)
    os.execv(sys.executable, [sys.executable, "-m", "workshop.jupyter", *sys.argv[1:]])


if __name__ == "__main__":
    main()
