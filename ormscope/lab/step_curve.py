"""What of a step function a picture can show."""

from __future__ import annotations

from itertools import groupby

from ormscope.lab.picture import SHOWN_WIDTH


def thinned(times: list[float], values: list[int]) -> tuple[list[float], list[int]]:
    """A step function, in order of time, without the points that no eye could tell apart.

    Of each stretch of time as narrow as the finest picture can show it keeps the first, the lowest, the highest
    and the last point. Drawing a long storm would otherwise take most of its time for nothing.
    """
    if len(times) <= 4 * SHOWN_WIDTH:
        return times, values
    width = times[-1] / SHOWN_WIDTH
    kept: list[int] = []
    for _, stretch in groupby(range(len(times)), key=lambda at: times[at] // width):
        points = list(stretch)
        lowest, highest = min(points, key=values.__getitem__), max(points, key=values.__getitem__)
        kept += sorted({points[0], lowest, highest, points[-1]})
    return [times[at] for at in kept], [values[at] for at in kept]
