"""What of a step function a picture can show: its steps, and its mean where it toggles too fast for the eye."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

# A pixel of the finest picture: of what lies closer together nobody sees more than the last and the extremes.
_FINE_PARTS = 24  # of a column
_MOST_COLUMNS = 10_000
_TOGGLING = 3  # turns within a column: up and down, and up or down again
_TOGGLING_ALONE = 5  # the same where no column beside it toggles: a patch has to be worth it
_GAP = 3  # columns: to change between steps and means more often is no help to the eye


class Drawn(NamedTuple):
    """A step function as it is drawn: the steps of the line, and the band of lowest and highest values.

    `times` and `values` are a step function again: each value holds until the next time. `band_times`, `lows` and
    `highs` are one too, in pieces that NaN keeps apart; empty where the curve can be drawn as it is.
    """

    times: Numbers
    values: Numbers
    band_times: Numbers
    lows: Numbers
    highs: Numbers


def drawn(times: Numbers, values: Numbers, until: float, column: float) -> Drawn:
    """A step function, in order of time, as a picture can show it, in columns of `column` seconds.

    Each value holds until the next time, the last one until `until`. Where the curve turns three times or more in a
    column, a line of its steps would be a solid block. There, and in up to three columns between two such, the line
    is the time-weighted mean of the column from `a` to `b`,

        mean = 1 / (b - a) * sum(value * (seconds within [a, b] for which it held)),

    so that the area under the line stays what it is (connection-seconds, say), and the band reaches from the column's
    lowest value to its highest. In all other columns the line is the steps themselves, and so it is in a single
    column with fewer than five turns.
    """
    until = max(until, times[-1], 1e-9)
    column = max(column, until / _MOST_COLUMNS)
    edges = np.append(np.arange(0.0, until, column), until)
    starts = edges[:-1]
    turns = _turns(values)
    of_sample = np.clip(np.searchsorted(edges, times, "right") - 1, 0, len(starts) - 1)
    toggles = _toggling(np.bincount(of_sample[turns], minlength=len(starts)))

    fine = (times * (_FINE_PARTS / column)).astype(np.int64)
    shown = turns | np.append(fine[1:] != fine[:-1], True)
    shown[0] = True
    shown &= ~toggles[of_sample]
    at_start = np.maximum(np.searchsorted(times, starts, "right") - 1, 0)
    anew = ~toggles & np.insert(toggles[:-1], 0, False)  # the steps begin again after a mean
    means = _means(times, values, edges)
    line_times = np.concatenate([starts[toggles], starts[anew], times[shown], [until]])
    line = np.concatenate([means[toggles], values[at_start[anew]], values[shown], values[-1:]])
    order = np.argsort(line_times, kind="stable")
    return Drawn(line_times[order], line[order], *_band(times, values, edges, at_start, toggles))


def _turns(values: Numbers) -> NDArray[np.bool_]:
    """Where a value is a local extreme: the curve came to it one way and leaves it the other."""
    changed = np.flatnonzero(np.diff(values)) + 1
    up = values[changed] > values[changed - 1]
    turns = np.zeros(len(values), dtype=np.bool_)
    turns[changed[:-1][up[:-1] != up[1:]]] = True
    return turns


def _toggling(turns: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Whether a mean is drawn in each column, from how often the curve turns in it."""
    toggles = turns >= _TOGGLING
    columns = np.flatnonzero(toggles)
    for before, after in pairwise(columns):
        if after - before <= _GAP + 1:
            toggles[before:after] = True
    beside = np.append(toggles[1:], False) | np.insert(toggles[:-1], 0, False)
    return toggles & (beside | (turns >= _TOGGLING_ALONE))


def _means(times: Numbers, values: Numbers, edges: Numbers) -> Numbers:
    """The time-weighted mean between each two edges, from the area under the curve up to each."""
    ends = np.append(times, edges[-1])
    areas = np.concatenate([[0.0], np.cumsum(values * np.diff(ends))])
    means: Numbers = np.diff(np.interp(edges, ends, areas)) / np.diff(edges)
    return means


def _band(
    times: Numbers,
    values: Numbers,
    edges: Numbers,
    at_start: NDArray[np.intp],
    toggles: NDArray[np.bool_],
) -> tuple[Numbers, Numbers, Numbers]:
    """The lowest and the highest value in each column that toggles, the value that it begins with among them."""
    columns = np.flatnonzero(toggles)
    if not len(columns):
        return (np.empty(0),) * 3
    after = np.searchsorted(times, edges[1:], "left")
    ranges = np.ravel(np.column_stack([at_start, np.maximum(after, at_start + 1)])[columns])
    padded = np.append(values, values[-1])  # for a range that ends with the last value
    lows = np.minimum.reduceat(padded, ranges)[::2]
    highs = np.maximum.reduceat(padded, ranges)[::2]
    last = np.append(
        np.diff(columns) > 1, True
    )  # of those that touch one another: it ends, and a gap follows
    gaps = np.repeat(np.flatnonzero(last) + 1, 2)
    ends = np.column_stack([edges[columns[last] + 1], np.full(last.sum(), np.nan)]).ravel()
    band_times = np.insert(edges[columns], gaps, ends)
    return (
        band_times,
        np.insert(lows, gaps, np.repeat(lows[last], 2)),
        np.insert(highs, gaps, np.repeat(highs[last], 2)),
    )
