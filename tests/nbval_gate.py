"""What nbval lets through, judged in its own run of a notebook: the reply to each cell, and what is left at the end.

So a notebook is run once. nbval compares what a cell displays; what the kernel replied it does not read.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from leftovers import assert_nothing_is_left
from nbformat import NotebookNode
from nbval.plugin import IPyNbCell

from workshop import mariadb

WITH_MYSQL = "MySQL here: yes\n"
WITHOUT_MYSQL = "MySQL here: no, so this was not run\n"
_FOLDERS = pytest.StashKey[Path]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Start the kernel of a notebook with a temporary folder by which all that it starts can be told."""
    notebook = item.parent
    if not isinstance(item, IPyNbCell) or notebook is None or _FOLDERS in notebook.stash:
        return (yield)
    folder = Path(tempfile.mkdtemp(prefix="workshop-test-"))
    folder.chmod(0o755)  # a server that root starts runs as another user
    notebook.stash[_FOLDERS] = folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.delenv("DATABASE_URL", raising=False)
        return (yield)


def _expect_what_runs_here(cell: NotebookNode) -> None:
    """Where there is no MySQL server, a cell that needs one says so, and nothing else; in CI there is one."""
    if mariadb.programs() or os.environ.get("MYSQL_URL") or os.environ.get("CI") == "true":
        return
    for output in cell.outputs:
        if output.get("text", "").startswith(WITH_MYSQL):
            output.text = WITHOUT_MYSQL


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Hold the reply to a cell against what it must be."""
    if not isinstance(item, IPyNbCell):
        return (yield)
    kernel, statuses = item.parent.kernel, []
    _expect_what_runs_here(item.cell)

    def noted(stream: str, timeout: float | None = None) -> dict[str, Any]:
        message: dict[str, Any] = type(kernel).get_message(kernel, stream, timeout=timeout)
        if message["msg_type"] == "execute_reply":
            statuses.append(message["content"]["status"])
        return message

    kernel.get_message = noted
    try:
        yield
    finally:
        del kernel.get_message
    expected = "error" if "raises-exception" in item.cell.metadata.get("tags", []) else "ok"
    if statuses != [expected]:
        item.raise_cell_error(f"The kernel replied {statuses}, not {expected!r}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    """After the last cell of a notebook, look for what is left of it."""
    yield
    if isinstance(item, IPyNbCell) and (nextitem is None or nextitem.parent is not item.parent):
        folder = item.parent.stash[_FOLDERS]
        try:
            assert_nothing_is_left(folder)
        finally:
            shutil.rmtree(folder)
