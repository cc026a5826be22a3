"""Changes of level in a series: an optimal segmentation by `ruptures`, and the changes that are large enough.

Least squares with a penalty for each change (the linear kernel of ruptures.KernelCPD) on values that are divided by their
own noise. A level has three nights at least, so a lone slow night is never a change; it is clipped beforehand, or it
would still shift a neighbouring level. All on logarithms, where a relative change is the same at every level.
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
"""The fewest nights of a level."""
FEWEST = 2 * LEVEL_NIGHTS
"""The fewest nights of a series in which a change can be seen."""
PENALTY = 18.0
"""Penalty for a change, in squared noise: slightly above the chance gain at the best of a hundred places."""
SUSPICIOUS = 3.0
"""Standard errors above its level at which the last night is suspicious: one night in 700 under normal noise."""
_SPIKE = 4.0
"""Distance from the nights around it, in units of noise, at which a night is an outlier."""
_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
_OWN_NIGHTS = 10
"""Weight of the noise shared by all series, in nights of a single series: six nights alone estimate noise badly."""


@dataclass(frozen=True)
class LevelChange:
    """One change of level."""

    at: int
    """Index of the first value of the new level."""
    before: float
    """Median of the old level."""
    after: float
    """Median of the new level."""

    @property
    def change(self) -> float:
        """The difference of the levels."""
        return self.after - self.before


def noise(values: Array) -> float:
    """Return the standard deviation of the values around their levels, from the differences of neighbours.

    A change of level is one difference among many, which the median ignores. 0 for fewer than two values.
    """
    import numpy as np

    if len(values) < 2:
        return 0.0
    return float(_TO_SIGMA * _median(np.abs(np.diff(values))) / np.sqrt(2))


def steps(
    values: Array, *, least: float, shared: float = 0.0, floor: float = 1e-4, own: float | None = None
) -> tuple[LevelChange, ...]:
    """Return the changes of level of a series (1-d, finite), oldest first; none of fewer than FEWEST values.

    least: smaller changes are left out. shared: the noise of similar series, if known. floor: the smallest assumed noise,
    in the unit of the values: a constant series is not infinitely exact. own: the series' noise, if known.
    """
    if len(values) < FEWEST or values.max() - values.min() < least:
        return ()
    from ruptures import KernelCPD

    sigma = _believed(values, shared, floor, own)
    calm = _without_spikes(values, sigma)
    # Around its mean: the kernel sums squares, and a large common part would cost digits.
    scaled = (calm - calm.mean()) / sigma
    ends = KernelCPD(kernel="linear", min_size=LEVEL_NIGHTS).fit(scaled.reshape(-1, 1)).predict(pen=PENALTY)
    return _worth_telling(values, [0, *ends], least) if len(ends) > 1 else ()


def suspect(
    values: Array, *, since: int, least: float, shared: float = 0.0, floor: float = 1e-4, own: float | None = None
) -> LevelChange | None:
    """Return a suspected change to a higher level that began on the last value or the one before; None without suspicion.

    `steps` cannot find it, since two nights are no level. The last value lies above the level since `since` by `least`, and
    by SUSPICIOUS times the joint uncertainty of value and level. Only a trial can confirm the change. Other arguments: see
    `steps`. `at` is the index of the value before the last.
    """
    import numpy as np

    young = LEVEL_NIGHTS - 1
    level = values[since:-young]
    if len(level) < FEWEST:
        return None
    sigma, before, after = _believed(values, shared, floor, own), _median(level), float(values[-1])
    uncertain = sigma * float(np.sqrt(1 + np.pi / 2 / len(level)))  # the median of so many normal values
    if after - before < max(least, SUSPICIOUS * uncertain):
        return None
    return LevelChange(len(values) - young, before, after)


def _believed(values: Array, shared: float, floor: float, own: float | None) -> float:
    """Return the noise of a series, from its own nights and the noise shared by all series."""
    sigma = noise(values) if own is None else own
    if shared:
        nights = len(values) - 1
        sigma = float(((nights * sigma**2 + _OWN_NIGHTS * shared**2) / (nights + _OWN_NIGHTS)) ** 0.5)
    return max(sigma, floor)


def _worth_telling(values: Array, edges: Sequence[int], least: float) -> tuple[LevelChange, ...]:
    """Merge neighbouring levels, the closest first, until all differ by `least` or more and enough nights support each.

    A median does not show support: with two slow nights of three it is slow, whatever the third is.
    """
    bounds = [int(edge) for edge in edges]
    while True:
        levels = [_median(values[a:b]) for a, b in pairwise(bounds)]
        found = [LevelChange(at, a, b) for at, a, b in zip(bounds[1:], levels, levels[1:], strict=False)]
        if not found:
            return ()
        sides = ((values[a:b], values[b:c]) for a, b, c in zip(bounds, bounds[1:], bounds[2:], strict=False))
        sizes = [abs(step.change) if _borne(step, *of) else 0.0 for step, of in zip(found, sides, strict=True)]
        weakest = min(range(len(found)), key=sizes.__getitem__)
        if sizes[weakest] >= least:
            return tuple(found)
        del bounds[weakest + 1]


def _borne(step: LevelChange, left: Array, right: Array) -> bool:
    """Return whether, on each side, at least LEVEL_NIGHTS values lie nearer to their own level than to the other."""
    way, middle = (1 if step.change > 0 else -1), (step.before + step.after) / 2
    nearer = ((way * (left - middle) < 0).sum(), (way * (right - middle) > 0).sum())
    return bool(min(nearer) >= LEVEL_NIGHTS)


def _without_spikes(values: Array, sigma: float) -> Array:
    """Replace every value that lies far from the median of the five around it by that median (Hampel)."""
    import numpy as np

    # Beyond either end there are no values: NaN sorts last, and the middle is that of four or three values.
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
