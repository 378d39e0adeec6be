"""How the kernels of the kit talk: encrypted, so that on a shared machine nobody else listens.

(IPC would keep others out as well, where the system has it. But its sockets are files whose names must be
short, and nbclient gives those of each kernel the same names.)
"""

from __future__ import annotations

import zmq
from traitlets.config import Config

ENCRYPTION = "auto" if zmq.has("curve") else "disabled"
"""Jupyter's policy; "auto" encrypts where the kernel can, as ipykernel can."""

SETTINGS = Config({"KernelManager": {"transport_encryption": ENCRYPTION}})
"""The configuration of a NotebookClient. (lab.py tells JupyterLab the policy.)"""
