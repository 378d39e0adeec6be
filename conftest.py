"""A notebook is judged by tests/nbval_gate.py as well, also where pytest is given that notebook alone."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Have the gate beside nbval, wherever notebooks are run."""
    if config.pluginmanager.hasplugin("nbval"):  # the matrix has no notebooks
        import nbval_gate

        config.pluginmanager.register(nbval_gate)
