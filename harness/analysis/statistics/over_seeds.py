"""Confidence intervals and tests of accuracy, over training runs that differ only in the seed.

The results also hold for other seeds and other test items of the same kind. A repeated comparison has new test items
and new training runs. So the squared standard error is a sum of two parts, one for the items and one for the seeds. A
test over items alone would mistake favourable seeds for a better method. Items are paired, since every run scores the
same items (Miller, arXiv:2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from harness.analysis.statistics.intervals import LEVEL, POWER
from harness.analysis.statistics.seed_spread import Prior, variance
from harness.records.record import Accuracy

INTERVAL = f"{100 * LEVEL:g} % for new items and new seeds (t, Satterthwaite)"
MODERATED = f"{INTERVAL[:-1]}; spread over seeds moderated by that of all recipes)"


@dataclass(frozen=True)
class Spread:
    """An estimate with its standard error and degrees of freedom."""

    value: float
    """The estimate."""
    error: float
    """Standard error of the estimate."""
    df: float
    """Degrees of freedom of the t distribution of the estimate."""

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of the estimate at the confidence level LEVEL."""
        half = _quantile(0.5 + LEVEL / 2, self.df) * self.error
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """Two-sided p value of the hypothesis that the true value is 0."""
        if not self.error:
            return 1.0 if not self.value else 0.0
        from scipy.special import stdtr  # slow to import, and not needed for runs with one seed

        return float(2 * stdtr(self.df, -abs(self.value) / self.error))

    @property
    def detectable(self) -> float:
        """The smallest true value that a two-sided test at LEVEL distinguishes from 0 with 80 % power."""
        return (_quantile(0.5 + LEVEL / 2, self.df) + NormalDist().inv_cdf(POWER)) * self.error


def mean(runs: Sequence[Accuracy], prior: Prior | None = None) -> Spread | None:
    """Return the mean accuracy of two or more runs. If they did not score the same items, return None.

    prior: the spread of accuracies over seeds, estimated from all recipes of a group; None if it is unknown.
    """
    if not same_items(runs):
        return None
    items = _means(runs)
    return _spread(fmean(items), [_mean_error(items), _of_seeds(runs, prior)])


def difference(
    left: Sequence[Accuracy], right: Sequence[Accuracy], priors: tuple[Prior | None, Prior | None] = (None, None)
) -> Spread | None:
    """Return the difference of mean accuracies, left - right. If not all runs scored the same items, return None.

    The squared error of the difference has three parts. The first is var(difference of the mean answers to an item) /
    items. The two others, one per side, are var(accuracies of the runs) / runs. priors: for each side, the spread of
    accuracies over seeds, as in `mean`. If both sides have the same prior, its degrees of freedom count only once.
    """
    if not same_items((*left, *right)):
        return None
    differences = [a - b for a, b in zip(_means(left), _means(right), strict=True)]
    of_seeds = _spread(0.0, [_of_seeds(left, priors[0]), _of_seeds(right, priors[1])])
    most = min((one.most for one in priors if one is not None), default=math.inf)
    return _spread(fmean(differences), [_mean_error(differences), (of_seeds.error**2, min(of_seeds.df, most))])


def paired(left: Sequence[Accuracy], right: Sequence[Accuracy]) -> Spread | None:
    """Return the difference of mean accuracies, left - right. left[i] and right[i] are runs with the same seed.

    If not all runs scored the same items, return None. The squared error of the difference has two parts:
    var(difference of the mean answers to an item) / items, and var(difference of the accuracies of a seed) / seeds. If
    a seed affects both sides equally, its effect cancels. So even small differences between two versions of a program
    are found, and equal versions have no error at all. Raises ValueError if the sides have unequal lengths, or fewer
    than two seeds.
    """
    if len(left) != len(right) or len(left) < 2:
        raise ValueError(f"{len(left)} and {len(right)} runs cannot be paired by two or more seeds")
    if not same_items((*left, *right)):
        return None
    differences = [a - b for a, b in zip(_means(left), _means(right), strict=True)]
    per_seed = [a.value - b.value for a, b in zip(left, right, strict=True)]
    return _spread(fmean(differences), [_mean_error(differences), _mean_error(per_seed)])


def same_items(runs: Sequence[Accuracy]) -> bool:
    """Return whether all runs scored the same items. If a run has no items, return False."""
    first = runs[0].answers.keys()
    return bool(first) and all(run.answers.keys() == first for run in runs)


def _spread(value: float, parts: Sequence[tuple[float, float]]) -> Spread:
    """Return the Spread of a value whose squared error is a sum of parts (Satterthwaite 1946).

    parts: the squared error and the degrees of freedom of each part.
    """
    total = sum(square for square, _ in parts)
    if math.isinf(total):
        return Spread(value, math.inf, 1)
    weight = sum(square * square / df for square, df in parts)
    return Spread(value, math.sqrt(total), total * total / weight if weight else math.inf)


def _mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the squared standard error of the mean of the values, and its degrees of freedom."""
    return (variance(values) / len(values), len(values) - 1) if len(values) > 1 else (math.inf, 1)


def _of_seeds(runs: Sequence[Accuracy], prior: Prior | None = None) -> tuple[float, float]:
    own, df = variance([run.value for run in runs]), float(len(runs) - 1)
    if prior is not None:
        own, df = prior.moderated(own, df)
    return own / len(runs), df


def _means(runs: Sequence[Accuracy]) -> list[float]:
    """Return the mean of the answers of all runs to each item, in the order of the items' ids."""
    answers = [run.answers for run in runs]
    ids = sorted(answers[0])
    return [sum(item) / len(item) for item in zip(*([one[i] for i in ids] for one in answers), strict=True)]


def _quantile(share: float, df: float) -> float:
    from scipy.special import stdtrit

    return NormalDist().inv_cdf(share) if math.isinf(df) else float(stdtrit(df, share))
