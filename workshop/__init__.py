"""What the lessons stand on: the database, the shop, the checks, the doctor, and an extension for their kernels."""

from __future__ import annotations

from typing import Any


def load_ipython_extension(shell: Any) -> None:
    """What `%load_ext workshop` calls."""
    from workshop.kernel import load_ipython_extension

    load_ipython_extension(shell)
