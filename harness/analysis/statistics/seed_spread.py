"""Spread of accuracies over seeds, estimated with the help of all recipes of a group.

Three seeds of one recipe (Cells that differ only in the seed) give a poor estimate of its variance. So the variances of
the recipes are treated as samples of one distribution, whose mean and width are estimated from them. Each variance is
moved towards this mean, more strongly with fewer seeds (the moderated t of Smyth 2004, doi:10.2202/1544-6115.1027). For
the best of several recipes, the moved variance tends to be too low. So a variance is never reduced, and the degrees of
freedom of the other recipes count half. The tests simulate several spreads: in each, equal recipes are called unequal
in less than 5 % of cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from harness.records.record import Accuracy

FEWEST, FEWEST_SEEDS = 5, 3
"""FEWEST recipes, each with FEWEST_SEEDS seeds, are needed to estimate the distribution of variances."""
_COUNTS = 0.5
"""Factor of `Prior.df` when it is added to the degrees of freedom of one recipe. It is below 1 for two reasons: the
distribution is only estimated, and the best recipe was selected."""


@dataclass(frozen=True)
class Prior:
    """Distribution of the recipes' variances over seeds: a scaled inverse chi-squared distribution."""

    variance: float
    df: float
    """Degrees of freedom. They are infinite if the variances of the recipes do not differ significantly."""
    most: float
    """Degrees of freedom of all seeds of all recipes together. No moderated variance has more."""

    def moderated(self, own: float, df: float) -> tuple[float, float]:
        """Return the moderated variance of a recipe and its degrees of freedom.

        own: the variance of the recipe's own accuracies. df: the degrees of freedom of `own`.
        """
        if math.isinf(self.df):
            return max(own, self.variance), self.most
        shrunk = (self.df * self.variance + df * own) / (self.df + df)
        return max(own, shrunk), min(df + _COUNTS * self.df, self.most)


def prior(recipes: Sequence[Sequence[Accuracy]]) -> Prior | None:
    """Estimate the distribution of the recipes' variances.

    recipes: the accuracies of each recipe, one per seed. Return None if there are too few recipes or seeds, or if the
    recipes have different numbers of seeds.
    """
    seeds = {len(runs) for runs in recipes}
    if len(recipes) < FEWEST or len(seeds) > 1 or min(seeds) < FEWEST_SEEDS:
        return None
    (n,) = seeds
    df = n - 1
    # Accuracies are rounded to whole items, so even equal accuracies have the variance of this rounding, not 0.
    logs = [math.log(max(variance([run.value for run in runs]), _least(runs))) for runs in recipes]
    from scipy.special import digamma, polygamma

    centre = float(digamma(df / 2)) - math.log(df / 2)
    beyond = variance(logs) - float(polygamma(1, df / 2))
    most = float(len(recipes) * df)
    if beyond <= 0:
        pooled = fmean(variance([run.value for run in runs]) for runs in recipes)
        return Prior(max(pooled, min(_least(runs) for runs in recipes)), math.inf, most)
    prior_df = 2 * _trigamma_inverse(beyond)
    scale = math.exp(fmean(logs) - centre + float(digamma(prior_df / 2)) - math.log(prior_df / 2))
    return Prior(scale, prior_df, most)


def variance(values: Sequence[float]) -> float:
    """Return the sample variance of two or more values. It is computed in floats, unlike `statistics.variance`."""
    centre = fmean(values)
    return math.fsum([(value - centre) ** 2 for value in values]) / (len(values) - 1)


def _least(runs: Sequence[Accuracy]) -> float:
    """Return the variance of the error that arises because accuracies are multiples of 1 / (number of items)."""
    return 1 / (12 * max(1, len(runs[0].items)) ** 2)


def _trigamma_inverse(value: float) -> float:
    """Return the x for which trigamma(x) = value, by Newton's method. `value` must be above 0.

    The method is applied to 1 / trigamma, which is convex (Smyth 2004, appendix).
    """
    from scipy.special import polygamma

    x = 0.5 + 1 / value
    for _ in range(50):
        at = float(polygamma(1, x))
        step = at * (1 - at / value) / float(polygamma(2, x))
        x += step
        if abs(step) <= 1e-10 * x:
            break
    return x
