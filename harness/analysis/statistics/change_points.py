"""Find changes of level in a series with one value per night, by optimal segmentation with `ruptures`.

The values are logarithms, so that a relative change has the same size at every level. They are divided by their noise.
The segmentation minimises the sum of the squared deviations from the levels, plus a penalty for each change
(ruptures.KernelCPD with the linear kernel). Small changes are then left out. A level has at least three nights, so a
single slow night is never a change. But such a night would shift the level of the nights around it. So its value is
first replaced by the median of the five values around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

LEVEL_NIGHTS = 3
"""Fewest consecutive values (one per nightly run) that can form a level."""
FEWEST = 2 * LEVEL_NIGHTS
"""Fewest values of a series in which a change can be found."""
PENALTY = 18.0
"""Penalty for a change, in units of the squared noise. In a series of pure noise with a hundred positions for a change,
the best position reduces the sum of the squared deviations by slightly less than this penalty."""
SUSPICIOUS = 3.0
"""Smallest distance, in standard errors, at which the last night is suspiciously far above the level before it. Normal
noise reaches this distance on one night of 700."""
_SPIKE = 4.0
"""Smallest distance of an outlier from the median of its neighbours, in units of the noise."""
_TO_SIGMA = 1.4826
"""Ratio of the standard deviation to the median absolute deviation of a normal distribution."""
_OWN_NIGHTS = 10
"""Weight of the noise that all series share, when it is averaged with the noise of one series. Each night of the series
has the weight 1. The shared noise is used because a few nights give a bad estimate."""


@dataclass(frozen=True)
class LevelChange:
    """One change of level."""

    at: int
    """Index of the first value at the new level."""
    before: float
    """Median of the old level."""
    after: float
    """Median of the new level."""

    @property
    def change(self) -> float:
        """The new level minus the old level."""
        return self.after - self.before


def noise(values: Array) -> float:
    """Return the standard deviation of the values around their levels. For fewer than two values, return 0.

    The standard deviation is estimated from the median of the differences between neighbours. A change of level affects
    only one of these differences, so it hardly affects the median.
    """
    import numpy as np

    if len(values) < 2:
        return 0.0
    return float(_TO_SIGMA * _median(np.abs(np.diff(values))) / np.sqrt(2))


def steps(
    values: Array, *, least: float, shared: float = 0.0, floor: float = 1e-4, own: float | None = None
) -> tuple[LevelChange, ...]:
    """Return the changes of level of a series (1-d, finite), oldest first. With fewer than FEWEST values, return ().

    - least: smallest change to return.
    - shared: noise of similar series; 0 if unknown.
    - own: noise of this series; if None, it is estimated.
    - floor: smallest noise to assume, because even a constant series has some uncertainty.

    All four have the unit of the values.
    """
    if len(values) < FEWEST or values.max() - values.min() < least:
        return ()
    from ruptures import KernelCPD

    sigma = _pooled_noise(values, shared, floor, own)
    clipped = _without_spikes(values, sigma)
    # The kernel sums squares, so a large mean would cost digits.
    scaled = (clipped - clipped.mean()) / sigma
    ends = KernelCPD(kernel="linear", min_size=LEVEL_NIGHTS).fit(scaled.reshape(-1, 1)).predict(pen=PENALTY)
    return _large_enough(values, [0, *ends], least) if len(ends) > 1 else ()


def suspect(
    values: Array, *, since: int, least: float, shared: float = 0.0, floor: float = 1e-4, own: float | None = None
) -> LevelChange | None:
    """Return a suspected change to a higher level in the last two values. If there is none, return None.

    `steps` cannot find this change, because a level needs three nights. The old level is the median of the values from
    the index `since` on, without the last two; it needs FEWEST values. A change is suspected if the last value exceeds
    the old level by at least `least`, and by at least SUSPICIOUS standard errors. The new level is assumed to begin at
    the second last value. `steps` describes the other parameters.
    """
    import numpy as np

    young = LEVEL_NIGHTS - 1
    level = values[since:-young]
    if len(level) < FEWEST:
        return None
    sigma, before, after = _pooled_noise(values, shared, floor, own), _median(level), float(values[-1])
    uncertain = sigma * float(np.sqrt(1 + np.pi / 2 / len(level)))  # the variance of a median is pi / 2 / n
    if after - before < max(least, SUSPICIOUS * uncertain):
        return None
    return LevelChange(len(values) - young, before, after)


def _pooled_noise(values: Array, shared: float, floor: float, own: float | None) -> float:
    """Return the noise of a series, averaged with the noise that all series share. The result is at least `floor`."""
    sigma = noise(values) if own is None else own
    if shared:
        nights = len(values) - 1
        sigma = float(((nights * sigma**2 + _OWN_NIGHTS * shared**2) / (nights + _OWN_NIGHTS)) ** 0.5)
    return max(sigma, floor)


def _large_enough(values: Array, edges: Sequence[int], least: float) -> tuple[LevelChange, ...]:
    """Merge neighbouring levels, the closest first, until all changes are large and well supported.

    Return the remaining changes. A large change is at least `least`; a well supported change satisfies `_supported`.
    Medians alone do not suffice: if two nights of three are slow, the median is slow, even if the third is fast.
    """
    bounds = [int(edge) for edge in edges]
    while True:
        levels = [_median(values[a:b]) for a, b in pairwise(bounds)]
        found = [LevelChange(at, a, b) for at, a, b in zip(bounds[1:], levels, levels[1:], strict=False)]
        if not found:
            return ()
        sides = ((values[a:b], values[b:c]) for a, b, c in zip(bounds, bounds[1:], bounds[2:], strict=False))
        sizes = [abs(step.change) if _supported(step, *of) else 0.0 for step, of in zip(found, sides, strict=True)]
        weakest = min(range(len(found)), key=sizes.__getitem__)
        if sizes[weakest] >= least:
            return tuple(found)
        del bounds[weakest + 1]


def _supported(step: LevelChange, left: Array, right: Array) -> bool:
    """Return whether enough values support a change.

    On each side of the change, LEVEL_NIGHTS values or more must lie nearer to their own level than to the other level.
    """
    sign, middle = (1 if step.change > 0 else -1), (step.before + step.after) / 2
    nearer = ((sign * (left - middle) < 0).sum(), (sign * (right - middle) > 0).sum())
    return bool(min(nearer) >= LEVEL_NIGHTS)


def _without_spikes(values: Array, sigma: float) -> Array:
    """Return the values with each far outlier replaced by the median of the five values around it (Hampel filter)."""
    import numpy as np

    # Both ends are padded with NaN, which sorts last, so the median there is that of four or three values.
    padded = np.concatenate([[np.nan] * 2, values, [np.nan] * 2])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 5)
    ordered = np.sort(windows, axis=1)
    around = ordered[:, 2].copy()
    around[[0, -1]] = ordered[[0, -1], 1]
    around[[1, -2]] = (ordered[[1, -2], 1] + ordered[[1, -2], 2]) / 2
    far = np.abs(values - around) > _SPIKE * sigma
    return np.where(far, around, values)


def _median(values: Array) -> float:
    import numpy as np

    ordered, n = np.sort(values), len(values)  # np.median takes eight times as long for a series
    return float((ordered[(n - 1) // 2] + ordered[n // 2]) / 2)
