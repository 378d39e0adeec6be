"""JupyterLab as `python3 lab.py` opens it: on the learner's own copies, at lesson 00, with our settings.

In a seat of a hub it is the same, and the hub says who may come in.
"""

from __future__ import annotations

import os
import sys

from workshop import copies
from workshop.exercises import MY_NOTEBOOKS, ROOT
from workshop.kernels import ENCRYPTION

SETTINGS = ROOT / "workshop" / "jupyterlab_settings"
OPTIONS = [
    f"--ServerApp.root_dir={ROOT}",
    f"--LabApp.default_url=/lab/tree/{MY_NOTEBOOKS.name}/00_start_here.ipynb",
    f"--LabApp.app_settings_dir={SETTINGS}",
    "--LabApp.custom_css=True",
    f"--MappingKernelManager.transport_encryption={ENCRYPTION}",
    "--Application.log_level=ERROR",  # a learner can do nothing about the rest
]


def main() -> None:
    """Make the copies, then be JupyterLab, with the options of the command line."""
    try:
        copies.prepare()
    except OSError as error:
        sys.exit(f"lab.py: cannot write {MY_NOTEBOOKS.name}: {error}")
    if "JUPYTERHUB_SERVICE_PREFIX" in os.environ:
        from jupyterhub.singleuser import main as seat

        settings = f"--ServerApp.tornado_settings=static_custom_path={SETTINGS}"
        sys.argv[1:] = [*OPTIONS, settings, *sys.argv[1:]]
        seat()
        return
    print("JupyterLab starts. Ctrl-C here ends it, and all that it runs.", flush=True)
    # This package builds a grammar when it is imported, half of JupyterLab's start-up time, for a
    # check of international URLs that nothing here asks for. jsonschema does without it.
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
    from jupyterlab.labapp import LabApp

    # Where custom.css is looked for is no option.
    LabApp.serverapp_config["tornado_settings"] = {"static_custom_path": [str(SETTINGS)]}
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    root = ["--allow-root"] if is_root else []  # as in a container; JupyterLab wants to be told
    LabApp.launch_instance([*OPTIONS, *root, *sys.argv[1:]])


if __name__ == "__main__":
    main()
