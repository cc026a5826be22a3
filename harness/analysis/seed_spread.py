"""How far accuracies differ from seed to seed, as all recipes of a group tell of each: two or three seeds tell little.

The variances of the recipes are taken as drawn from one distribution, whose mean and width they show themselves; each is
drawn to that mean as far as its few seeds leave it open (the moderated t of Smyth 2004, doi:10.2202/1544-6115.1027).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from harness.records import Accuracy

FEWEST = 5
"""Recipes below which nothing is known of the distribution of their variances."""


@dataclass(frozen=True)
class Prior:
    """The distribution of variances: a scaled inverse chi-squared. df: infinite where nothing shows that they differ.

    most: of all seeds together, the degrees of freedom that no moderated variance can have more of.
    """

    variance: float
    df: float
    most: float

    def moderated(self, own: float, df: float) -> tuple[float, float]:
        """Return the variance of a recipe whose seeds have the variance `own`, and its degrees of freedom."""
        if math.isinf(self.df):
            return self.variance, self.most
        return (self.df * self.variance + df * own) / (self.df + df), min(self.df + df, self.most)


def prior(recipes: Sequence[Sequence[Accuracy]]) -> Prior | None:
    """Return the prior of recipes that were trained with equally many seeds, two or more; None of too few recipes."""
    seeds = {len(runs) for runs in recipes}
    if len(recipes) < FEWEST or len(seeds) > 1 or min(seeds) < 2:
        return None
    (n,) = seeds
    df = n - 1
    # Equal accuracies of a few hundred items are equal to half an item's worth.
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
    """Return the variance of what rounding to whole items leaves open."""
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
