"""The picture of a run while it goes on: drawn as often as leaves what is measured undisturbed."""

from __future__ import annotations

import time

from ormscope.lab.picture import FINAL_DPI
from ormscope.lab.run import Run
from ormscope.lab.run_picture import draw

_LIVE_DPI = 90
# Drawing may take this share of one core at most: what is measured runs on the same machine. Where nothing
# moves any more there is nothing to disturb.
_DRAWING_SHARE = 0.04
_DRAWING_SHARE_STANDING = 0.5
_STANDING_AFTER = 0.15  # seconds without any event
_SHORTEST_PAUSE = 0.2  # seconds


class LivePicture:
    """The picture of a run that is still going on, in a notebook."""

    def __init__(self, run: Run) -> None:
        from IPython.display import DisplayHandle

        self._run = run
        self._handle = DisplayHandle()
        self._events = 0
        self._cost = 0.0
        self._next = self._last_end = self._moved = time.monotonic()
        self._shown = False

    def draw_if_due(self) -> None:
        """Draw, unless the last drawing was so recent that one more would disturb what is measured."""
        now = time.monotonic()
        events = sum(len(pool.samples) for pool in self._run.pools)
        events += len(self._run.objects)
        if events != self._events:
            self._events, self._moved = events, now
        if now - self._moved > _STANDING_AFTER:
            self._next = min(self._next, self._last_end + self._pause(_DRAWING_SHARE_STANDING))
        if now >= self._next:
            self._show(_LIVE_DPI)
            self._last_end = time.monotonic()
            self._cost = self._last_end - now
            self._next = self._last_end + self._pause(_DRAWING_SHARE)

    def _pause(self, share: float) -> float:
        return max(_SHORTEST_PAUSE, self._cost / share)

    def draw_final(self) -> None:
        """Draw the whole run, finely."""
        self._show(FINAL_DPI)

    def _show(self, dpi: int) -> None:
        picture = draw(self._run)
        data = {"text/html": picture.html(dpi), "text/plain": repr(picture)}
        if self._shown:
            self._handle.update(data, raw=True)
        else:
            self._handle.display(data, raw=True)
            self._shown = True
