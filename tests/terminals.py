"""A real terminal, by tmux: a command runs in it, keys are typed, the screen is read."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from leftovers import await_that

needs_tmux = pytest.mark.skipif(
    shutil.which("tmux") is None and os.environ.get("CI") != "true", reason="tmux is not installed"
)


@dataclass
class Terminal:
    """What runs on one screen; `socket` is that of its own tmux."""

    socket: Path
    surroundings: Mapping[str, str]

    def tmux(self, *arguments: str) -> str:
        """A command of tmux, and what it says."""
        return subprocess.run(
            ["tmux", "-S", str(self.socket), "-f", "/dev/null", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=self.surroundings,
        ).stdout

    def types(self, key: str) -> None:
        """Press a key."""
        self.tmux("send-keys", "-t", "view", key)

    def screen(self) -> str:
        """What can be read now."""
        return self.tmux("capture-pane", "-p", "-t", "view")

    def shows(self, *wanted: str) -> None:
        """Wait until all that is wanted can be read."""
        assert await_that(lambda: all(line in self.screen() for line in wanted), 30), self.screen()


@contextmanager
def terminal(
    command: str, socket: Path, folder: Path, surroundings: Mapping[str, str] = os.environ
) -> Iterator[Terminal]:
    """A shell's command in a folder, with these environment variables, to the end of the block."""
    # A terminal's size is what it says itself, not what these say of another one.
    kept = {name: surroundings[name] for name in surroundings if name not in ("COLUMNS", "LINES")}
    made = Terminal(socket, kept)
    made.tmux("new-session", "-d", "-x", "150", "-y", "40", "-s", "view", "-c", str(folder), "cat")
    try:
        made.tmux("respawn-pane", "-k", "-t", "view", command)
        yield made
    finally:
        made.tmux("kill-server")
