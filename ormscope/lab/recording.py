"""Recording: what `observe` saw of one run, and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ormscope.lab.run import Run

if TYPE_CHECKING:
    from ormscope.lab.picture import Picture


class Recording(Run):
    """A run, as `observe` returns it: it can be drawn as well."""

    # matplotlib is imported only by who draws: the observed process does not, and starts sooner without it.

    def plot(self, *others: Recording, titles: Sequence[str] | None = None) -> Picture:
        """The curves as a picture, side by side with those of other recordings on the same axes."""
        from ormscope.lab.run_picture import draw

        return draw(self, *others, titles=titles)

    def plot_waits(self) -> Picture:
        """The wait-for graph of the first deadlock as a picture; raises ValueError where there was none."""
        from ormscope.lab.waits_picture import draw_waits

        return draw_waits(self)
