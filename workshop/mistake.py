"""The one kind of error that is shown to people as a single line."""

from __future__ import annotations


class Mistake(Exception):
    """A person's mistake or a machine's lack, told in one clear line.

    The message says what happened, what was expected and what to do. It never holds a password.
    """

    def _render_traceback_(self) -> list[str]:
        """Lines that IPython shows in place of a traceback: our code is not where the cure is."""
        return [str(self)]
