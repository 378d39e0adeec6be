"""The same storm on several pools, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ormscope.lab.picture import CHECKED_OUT, WAITING, Picture, look, new_figure


class Seen(NamedTuple):
    """How a storm went: at so many seconds, so many customers had a connection and so many waited for one.

    `served` are the customers who came to a good end. Whoever has a connection and waits for another is in both.
    """

    moments: Sequence[tuple[float, int, int]]
    served: int


def side_by_side(storms: Mapping[str, Seen], customers: int) -> Picture:
    """Who has a connection and who waits, over time, in a panel for each pool; all on the same axes."""
    with look():
        figure = new_figure(12, 4.4)
        panels = figure.subplots(1, len(storms), sharex=True, sharey=True)
        for axes, (name, seen) in zip(panels, storms.items(), strict=True):
            seconds, hold, wait = zip(*seen.moments, strict=True)
            axes.step(seconds, wait, where="post", color=WAITING)
            axes.step(seconds, hold, where="post", color=CHECKED_OUT)
            axes.set_title(name.replace(", ", "\n"), size=13)
            axes.text(
                *(0.5, 0.55, f"{seen.served} of {customers}\nserved"),
                transform=axes.transAxes,
                ha="center",
                va="center",
                weight="bold",
            )
        for text, color, height in (("wait", WAITING, 0.93), ("have one", CHECKED_OUT, 0.2)):
            panels[0].text(
                *(0.5, height, text),
                transform=panels[0].transAxes,
                ha="center",
                va="center",
                color=color,
                weight="bold",
            )
        panels[0].set_ylabel("customers")
        panels[0].set_ylim(0, 1.12 * customers)
        figure.supxlabel("seconds by the clock of the event loop", size=14)
    return Picture(
        figure,
        " | ".join(storms),
        "\n".join(_told(name, seen, customers) for name, seen in storms.items()),
    )


def _told(name: str, seen: Seen, customers: int) -> str:
    most = max(wait for _, _, wait in seen.moments)
    end, hold, wait = seen.moments[-1]
    last = max((second for second, _, wait in seen.moments if wait), default=0.0)
    how_long = (
        f"{wait} still wait after {end:.0f} s, and {hold} have a connection"
        if wait
        else f"nobody waits any more after {last:.0f} s"
    )
    return (
        f"{name}: at most {most} wait at once; {how_long}; {seen.served} of {customers} are served."
    )
