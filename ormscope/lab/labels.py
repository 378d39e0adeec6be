"""The labels of curves: to the right of their ends, none upon another."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib import rcParams
from matplotlib.axes import Axes

_LINE = 1.25  # times the size of the letters


class Label(NamedTuple):
    """A text that belongs to a height of the vertical axis."""

    value: float
    text: str
    color: str


def label_ends(axes: Axes, labels: list[Label]) -> None:
    """Write each label to the right of the axes, as near to its value as the others let it, within the axes.

    The axes have their final place and limits. Of equal values the first stands below.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    points = axes.get_position().height * figure.get_figheight() * 72
    bottom, top = axes.get_ylim()
    size = rcParams["font.size"]
    line = _LINE * size / points * (top - bottom)
    ordered = sorted(labels, key=lambda label: label.value)
    heights = [line * (1 + label.text.count("\n")) for label in ordered]
    wanted = [label.value for label in ordered]
    for label, height in zip(ordered, _apart(wanted, heights, bottom, top), strict=True):
        axes.annotate(
            label.text,
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=label.color,
            weight="bold",
            linespacing=1.05,
        )


def _apart(wanted: list[float], heights: list[float], bottom: float, top: float) -> list[float]:
    """Middles, in this order, that lie nearest to those wanted so that no two texts overlap: least squares.

    (Pool adjacent violators: texts that push one another become a block, which stands at the mean of what they want.)
    """
    offsets = [sum(heights[:at]) + height / 2 for at, height in enumerate(heights)]
    blocks: list[list[float]] = []
    for want, offset in zip(wanted, offsets, strict=True):
        blocks.append([want - offset])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    starts = [_mean(block) for block in blocks for _ in block]
    highest = max(bottom, top - sum(heights))
    return [
        min(max(start, bottom), highest) + offset
        for start, offset in zip(starts, offsets, strict=True)
    ]


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)
