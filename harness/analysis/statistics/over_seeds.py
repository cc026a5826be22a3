"""Accuracy over several training runs that differ in the seed alone: intervals and tests for new seeds and new items.

A repeated comparison would have new test items and new training runs. The squared standard error adds the contributions
of both: a test over items alone would mistake favourable seeds for a better method. Items are paired, since every run
scores the same items (Miller, arXiv:2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

from harness.analysis.statistics.intervals import LEVEL, POWER
from harness.analysis.statistics.seed_spread import Prior
from harness.records.record import Accuracy

INTERVAL = f"{100 * LEVEL:g} % for new items and new seeds (t, Satterthwaite)"
MODERATED = f"{INTERVAL[:-1]}; spread over seeds moderated by that of all recipes)"


@dataclass(frozen=True)
class Spread:
    """An estimate and its standard error."""

    value: float
    """Estimate."""
    error: float
    """Standard error."""
    df: float
    """Degrees of freedom of the t distribution of the estimate."""

    @property
    def interval(self) -> tuple[float, float]:
        """The interval at LEVEL."""
        half = _quantile(0.5 + LEVEL / 2, self.df) * self.error
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """Two-sided p value for a true value of 0."""
        if not self.error:
            return 1.0 if not self.value else 0.0
        from scipy.special import stdtr  # slow to import, and not needed for runs with one seed

        return float(2 * stdtr(self.df, -abs(self.value) / self.error))

    @property
    def detectable(self) -> float:
        """The smallest true value that the test finds with 80 % power."""
        return (_quantile(0.5 + LEVEL / 2, self.df) + NormalDist().inv_cdf(POWER)) * self.error


def mean(runs: Sequence[Accuracy], prior: Prior | None = None) -> Spread | None:
    """Return the mean accuracy of two or more runs; None unless all of them scored the same items.

    prior: the spread over seeds, estimated from all recipes of a group, if known.
    """
    if not same_items(runs):
        return None
    items = _means(runs)
    return _spread(fmean(items), [_mean_error(items), _of_seeds(runs, prior)])


def difference(
    left: Sequence[Accuracy], right: Sequence[Accuracy], priors: tuple[Prior | None, Prior | None] = (None, None)
) -> Spread | None:
    """Return mean(left) - mean(right); None unless all runs scored the same items.

    The squared error of the difference is var(per-item difference of the runs' means) / items, plus var(accuracies) /
    runs of each side. priors: one per side, as in `mean`; a prior shared by both counts once.
    """
    if not same_items((*left, *right)):
        return None
    differences = [a - b for a, b in zip(_means(left), _means(right), strict=True)]
    of_seeds = _spread(0.0, [_of_seeds(left, priors[0]), _of_seeds(right, priors[1])])
    most = min((one.most for one in priors if one is not None), default=math.inf)
    return _spread(fmean(differences), [_mean_error(differences), (of_seeds.error**2, min(of_seeds.df, most))])


def paired(left: Sequence[Accuracy], right: Sequence[Accuracy]) -> Spread | None:
    """Return mean(left) - mean(right), where left[i] and right[i] have the same seed; None unless all scored the same items.

    The squared error of the difference is var(per-item difference of the means) / items + var(per-seed difference) /
    seeds. Effects of a seed on both sides cancel, so the comparison finds even small differences between two versions of
    a program, and equal versions have no error at all. Raises ValueError for sides of unequal length, or of fewer than
    two seeds.
    """
    if len(left) != len(right) or len(left) < 2:
        raise ValueError(f"{len(left)} and {len(right)} runs cannot be paired by two or more seeds")
    if not same_items((*left, *right)):
        return None
    differences = [a - b for a, b in zip(_means(left), _means(right), strict=True)]
    per_seed = [a.value - b.value for a, b in zip(left, right, strict=True)]
    return _spread(fmean(differences), [_mean_error(differences), _mean_error(per_seed)])


def same_items(runs: Sequence[Accuracy]) -> bool:
    """Return whether all runs scored the same items, and at least one item."""
    scored = {frozenset(run.answers) for run in runs}
    return len(scored) == 1 and bool(*scored)


def _spread(value: float, parts: Sequence[tuple[float, float]]) -> Spread:
    """Return a Spread from a value and its squared errors, each with its degrees of freedom (Satterthwaite 1946)."""
    total = sum(square for square, _ in parts)
    if math.isinf(total):
        return Spread(value, math.inf, 1)
    weight = sum(square * square / df for square, df in parts)
    return Spread(value, math.sqrt(total), total * total / weight if weight else math.inf)


def _mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the squared error of the mean of values, and its degrees of freedom."""
    return (variance(values) / len(values), len(values) - 1) if len(values) > 1 else (math.inf, 1)


def _of_seeds(runs: Sequence[Accuracy], prior: Prior | None = None) -> tuple[float, float]:
    own, df = variance([run.value for run in runs]), float(len(runs) - 1)
    if prior is not None:
        own, df = prior.moderated(own, df)
    return own / len(runs), df


def _means(runs: Sequence[Accuracy]) -> list[float]:
    """Return each item's mean over the runs, in the order of the items' ids."""
    answers = [run.answers for run in runs]
    return [fmean(one[i] for one in answers) for i in sorted(answers[0])]


def _quantile(share: float, df: float) -> float:
    from scipy.special import stdtrit

    return NormalDist().inv_cdf(share) if math.isinf(df) else float(stdtrit(df, share))
