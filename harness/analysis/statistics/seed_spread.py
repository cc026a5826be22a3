"""Spread of accuracies over seeds, moderated by all recipes of a group: three seeds alone estimate it badly.

The variances of the recipes are taken as drawn from one distribution, whose mean and width they show themselves, and each is
drawn to that mean as far as its few seeds leave it open (the moderated t of Smyth 2004, doi:10.2202/1544-6115.1027). Of the
best of several recipes that alone is too bold: a recipe whose seeds lay apart keeps its own variance, and of what the others
know half counts. So a false order of equal recipes stays below 5 % in simulations, whatever the spreads (tests).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from harness.records.record import Accuracy

FEWEST, FEWEST_SEEDS = 5, 3
"""Recipes, and seeds of each, below which too little is known of the distribution of their variances."""
_COUNTS = 0.5
"""Of the others' degrees of freedom, as the distribution is only estimated, and the best recipe was picked."""


@dataclass(frozen=True)
class Prior:
    """Distribution of variances: a scaled inverse chi-squared."""

    variance: float
    df: float
    """Degrees of freedom; infinite where nothing shows that the variances differ."""
    most: float
    """Degrees of freedom of all seeds together: the maximum of a moderated variance."""

    def moderated(self, own: float, df: float) -> tuple[float, float]:
        """Return the variance of a recipe whose seeds have the variance `own`, and its degrees of freedom."""
        if math.isinf(self.df):
            return max(own, self.variance), self.most
        drawn = (self.df * self.variance + df * own) / (self.df + df)
        return max(own, drawn), min(df + _COUNTS * self.df, self.most)


def prior(recipes: Sequence[Sequence[Accuracy]]) -> Prior | None:
    """Return the prior of recipes that were trained with equally many seeds; None of too few, of either."""
    seeds = {len(runs) for runs in recipes}
    if len(recipes) < FEWEST or len(seeds) > 1 or min(seeds) < FEWEST_SEEDS:
        return None
    (n,) = seeds
    df = n - 1
    # Equal accuracies are known to half an item either way.
    logs = [math.log(max(variance([run.value for run in runs]), _least(runs))) for runs in recipes]
    from scipy.special import digamma, polygamma

    centre = float(digamma(df / 2)) - math.log(df / 2)
    beyond = variance(logs) - float(polygamma(1, df / 2))
    most = float(len(recipes) * df)
    if beyond <= 0:
        pooled = fmean(variance([run.value for run in runs]) for runs in recipes)
        return Prior(max(pooled, min(_least(runs) for runs in recipes)), math.inf, most)
    its = 2 * _trigamma_inverse(beyond)
    return Prior(math.exp(fmean(logs) - centre + float(digamma(its / 2)) - math.log(its / 2)), its, most)


def _least(runs: Sequence[Accuracy]) -> float:
    """Return the variance of rounding to whole items."""
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
