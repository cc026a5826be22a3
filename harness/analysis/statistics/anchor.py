"""Anchor of a night: the factor by which the whole machine was slower or faster than usual.

The anchor is the median of value / usual value over all series. Every time of a night is divided by the anchor of the
night, so a slow night of the whole machine is no change of any Cell. But this also hides a slow-down of every Cell. So
the history also watches the anchor itself, and sentinels: times that no code under test can change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.analysis.statistics.change_points import Array

FEWEST_SERIES = 5
"""Fewest series for an anchor; a single series would be divided by itself."""
FEWEST_SENTINELS = 3


def anchor(logs: Array, fewest: int = FEWEST_SERIES) -> Array:
    """Return the log of each night's anchor, shape (nights,). logs: log times, shape (series, nights), NaN if missing.

    The anchor is NaN on nights with fewer series than `fewest`. A series takes part only if it has values in at least
    half of the nights: the usual value of a younger series would come from other nights.
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
    """Return the median along `axis` without NaN; where all values are NaN, it is NaN, without a warning."""
    import numpy as np

    ordered = np.sort(values, axis=axis)  # NaN comes last
    count = np.isfinite(values).sum(axis=axis)
    low, high = (np.maximum(k, 0) for k in ((count - 1) // 2, count // 2))
    low, high = (np.take_along_axis(ordered, np.expand_dims(k, axis), axis).squeeze(axis) for k in (low, high))
    return np.where(count > 0, (low + high) / 2, np.nan)
