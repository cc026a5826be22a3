"""Anchor of a nightly run: the factor by which the whole machine was slower or faster than usual.

A series holds one value per night. The anchor is the median, over all series, of (value on this night) / (usual value).
All times of a night are divided by its anchor. So a slow night of the whole machine does not look like a change of a
Cell. But the division also hides a slow-down of every Cell. So the history also watches the anchor itself, and the
sentinels: times that no code under test can change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.analysis.statistics.change_points import Array

FEWEST_SERIES = 5
"""Fewest series from which an anchor is computed. With a single series, each value would be divided by itself."""
FEWEST_SENTINELS = 3


def anchor(logs: Array, fewest: int = FEWEST_SERIES) -> Array:
    """Return the logarithm of the anchor of each night, shape (nights,).

    logs: logarithms of times, shape (series, nights), NaN if missing. A night with fewer series than `fewest` has the
    anchor NaN. A series is used only if it has values on at least half of the nights. Otherwise its usual value would
    come from other nights than the usual values of the other series.
    """
    import numpy as np

    nights = logs.shape[1]
    there = np.isfinite(logs)
    panel = logs[there.sum(axis=1) * 2 >= nights]
    if not len(panel):
        return np.full(nights, np.nan)
    deviations = panel - _median(panel, 1)[:, None]
    counted = np.isfinite(deviations).sum(axis=0)
    found = np.where(counted >= fewest, _median(deviations, 0), np.nan)
    usual = found[np.isfinite(found)]
    return found - (np.median(usual) if len(usual) else 0.0)


def _median(values: Array, axis: int) -> Array:
    """Return the median along `axis`, leaving out NaN values. If all values are NaN, the median is NaN."""
    import numpy as np

    ordered = np.sort(values, axis=axis)  # NaN comes last
    count = np.isfinite(values).sum(axis=axis)
    low, high = (np.maximum(k, 0) for k in ((count - 1) // 2, count // 2))
    low, high = (np.take_along_axis(ordered, np.expand_dims(k, axis), axis).squeeze(axis) for k in (low, high))
    return np.where(count > 0, (low + high) / 2, np.nan)
