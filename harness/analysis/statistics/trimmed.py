"""Trimmed t statistics and Hodges-Lehmann estimates of log ratios.

The last axis of an array holds the pairs of a Cell; the other axes hold the Cells. A pair is the log ratio of two
processes. The trimmed mean leaves out the highest and the lowest values of a Cell, `cut` values at either end. The
variance replaces each of them by the nearest remaining value (Yuen 1974). So a disturbed process costs a pair, but not
the verdict. numpy and scipy are imported at the first computation, because code that only reads verdicts needs neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Mask = NDArray[np.bool_]

STILL = 1e-9
"""Largest standard error of a log ratio that counts as no spread. The times of two real processes always differ by
more."""


def cut(n: int, share: float) -> int:
    """Return how many of n values are trimmed at either end. share: the part of the values to trim there."""
    return int(share * n)


@dataclass(frozen=True)
class Trimmed:
    """The trimmed mean of n log ratios per Cell, its standard error, and the degrees of freedom of its t statistic."""

    mean: Array
    error: Array
    df: float
    n: int

    @property
    def still(self) -> Mask:
        """True for each Cell without spread. Such a Cell has no t statistic."""
        return self.error <= STILL

    def beyond(self, margin: float) -> Array:
        """Return for each Cell the one-sided p value of the hypothesis that its true log ratio is at most `margin`.

        A Cell without spread has the p value 1.
        """
        import numpy as np
        from scipy.special import stdtr

        still = self.still
        t = (self.mean - margin) / np.where(still, 1.0, self.error)
        return np.asarray(np.where(still, 1.0, stdtr(self.df, -t)))

    @property
    def mirrored(self) -> Trimmed:
        """The same result for the negated log ratios, i.e. with the two sides A and B exchanged."""
        return Trimmed(-self.mean, self.error, self.df, self.n)

    def interval(self, level: float) -> tuple[Array, Array]:
        """Return the lower and the upper end of the two-sided confidence interval at `level`, one value per Cell."""
        from scipy.special import stdtrit

        half = float(stdtrit(self.df, 0.5 + level / 2)) * self.error
        return self.mean - half, self.mean + half

    @property
    def scale(self) -> Array:
        """Standard deviation of the log ratio of a pair, derived from the standard error of the mean.

        Under normal noise, this estimate is unbiased even for few pairs.
        """
        shrunk = math.sqrt(2 / self.df) * math.exp(math.lgamma((self.df + 1) / 2) - math.lgamma(self.df / 2))
        return self.error * math.sqrt(self.n) / shrunk


def trimmed(log_ratios: Any, share: float) -> Trimmed:
    """Return the trimmed mean of each Cell, with its standard error.

    log_ratios: shape (..., n). share: part of the n values to trim at either end.
    """
    import numpy as np

    ordered = np.sort(np.asarray(log_ratios, dtype=np.float64), axis=-1)
    n = ordered.shape[-1]
    ends = cut(n, share)
    used = n - 2 * ends
    centre = ordered[..., n // 2 : n // 2 + 1]  # so that equal values have a spread of exactly 0
    clipped = np.clip(ordered, ordered[..., ends : ends + 1], ordered[..., n - 1 - ends : n - ends]) - centre
    squares = (clipped**2).sum(axis=-1) - clipped.sum(axis=-1) ** 2 / n
    error = np.sqrt(np.maximum(squares, 0.0) / (used * (used - 1)))
    return Trimmed(ordered[..., ends : n - ends].mean(axis=-1), error, used - 1, n)


def single(mean: float, error: float, df: float, n: int) -> Trimmed:
    """Return a `Trimmed` that holds one Cell with a given mean and standard error.

    df: degrees of freedom; `math.inf` if the error is known exactly. n: number of values behind the mean.
    """
    import numpy as np

    return Trimmed(np.asarray([mean]), np.asarray([error]), df, n)


def hodges_lehmann(log_ratios: Any, level: float) -> tuple[float, tuple[float, float] | None]:
    """Return the Hodges-Lehmann estimate (the median of all pairwise means of n values) and its confidence interval.

    The interval inverts the signed-rank test, so its coverage is at least `level` for any symmetric distribution and
    any n. If n is too small, it is None.
    """
    import numpy as np

    values = np.asarray(log_ratios, dtype=np.float64)
    upper, lower = np.triu_indices(len(values))
    means = np.sort((values[upper] + values[lower]) / 2)
    rank = _signed_rank(len(values), (1 - level) / 2)
    middle = float(np.median(means))
    return middle, None if rank is None else (float(means[rank]), float(means[len(means) - 1 - rank]))


def _signed_rank(n: int, tail: float) -> int | None:
    """Return the largest k with P(T <= k) <= tail, where T is the signed-rank sum of n values.

    If there is no such k, return None.
    """
    ways = [1] + [0] * (n * (n + 1) // 2)  # ways[s]: number of subsets of the ranks with the sum s
    for rank in range(1, n + 1):
        for total in range(len(ways) - 1, rank - 1, -1):
            ways[total] += ways[total - rank]
    found, below = None, 0
    for k, count in enumerate(ways):
        below += count
        if below > tail * 2**n:
            break
        found = k
    return found
