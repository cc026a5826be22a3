"""Spread of accuracies over seeds, moderated by all recipes of a group: three seeds alone give a poor estimate.

The variances of the recipes are treated as samples of one distribution, whose mean and width are estimated from them.
Each variance shrinks towards this mean, more strongly with fewer seeds (the moderated t of Smyth 2004,
doi:10.2202/1544-6115.1027). Such shrinkage is too optimistic for the best of several recipes, so a variance above the
moderated one is not shrunk, and the degrees of freedom of the other recipes count half. With every spread that the
tests simulate, equal recipes are then called unequal in less than 5 % of cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from harness.records.record import Accuracy

FEWEST, FEWEST_SEEDS = 5, 3
"""Fewest recipes, and fewest seeds of each, for an estimate of the distribution of variances."""
_COUNTS = 0.5
"""Weight of the degrees of freedom of the other recipes. It is below 1 because the distribution is only estimated, and
because the best recipe was selected."""


@dataclass(frozen=True)
class Prior:
    """Distribution of variances: a scaled inverse chi-squared."""

    variance: float
    df: float
    """Degrees of freedom; infinite if the variances do not differ significantly."""
    most: float
    """Degrees of freedom of all seeds together: the maximum for a moderated variance."""

    def moderated(self, own: float, df: float) -> tuple[float, float]:
        """Return the moderated variance of a recipe, and its degrees of freedom. own, df: both from its own seeds."""
        if math.isinf(self.df):
            return max(own, self.variance), self.most
        shrunk = (self.df * self.variance + df * own) / (self.df + df)
        return max(own, shrunk), min(df + _COUNTS * self.df, self.most)


def prior(recipes: Sequence[Sequence[Accuracy]]) -> Prior | None:
    """Return the prior of recipes with the same number of seeds; None if there are too few recipes or seeds."""
    seeds = {len(runs) for runs in recipes}
    if len(recipes) < FEWEST or len(seeds) > 1 or min(seeds) < FEWEST_SEEDS:
        return None
    (n,) = seeds
    df = n - 1
    # Rounding to whole items limits the precision of equal accuracies.
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


def _least(runs: Sequence[Accuracy]) -> float:
    """Return the variance that rounding to whole items gives an accuracy."""
    return 1 / (12 * max(1, len(runs[0].items)) ** 2)


def _trigamma_inverse(value: float) -> float:
    """Return x with trigamma(x) = value > 0, by Newton's method on 1 / trigamma, which is convex (Smyth 2004, appendix)."""
    from scipy.special import polygamma

    x = 0.5 + 1 / value
    for _ in range(50):
        at = float(polygamma(1, x))
        step = at * (1 - at / value) / float(polygamma(2, x))
        x += step
        if abs(step) <= 1e-10 * x:
            break
    return x
