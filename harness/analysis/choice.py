"""Recommendation of one recipe of a ranking: the clear winner, or the cheapest recipe near the highest accuracy.

A recipe is a set of Cells that differ only in the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.analysis import metrics
from harness.analysis.ranking import Group, RankingEntry

MARGIN = 0.05
"""Largest distance from the highest accuracy at which a recipe counts as near the top: 5 percentage points. A recipe
that a test shows to be less accurate than the highest does not count, even within this distance."""
FULL = "full"
"""Name of the Method that trains all weights (full fine-tuning). The costs of the recommended recipe are shown next to
the costs of this Method."""


@dataclass(frozen=True)
class Choice:
    """Recommendation to a reader who must choose one recipe of a ranking."""

    pick: RankingEntry
    """The recommended recipe: `highest` if `winner` is true, otherwise the cheapest of `near`."""
    highest: RankingEntry
    """The recipe with the highest accuracy."""
    winner: bool
    """True if the tests show that every other recipe is less accurate than `highest`. False for a single recipe."""
    near: tuple[RankingEntry, ...]
    """The recipes near the top (see MARGIN), best first. The first one is `highest`."""
    undecided: int
    """Number of other recipes that are tied with `highest`: no test shows that they are less accurate."""
    against: RankingEntry | None
    """The recipe whose costs are shown next to the costs of `pick`: full fine-tuning if it was ranked, otherwise
    `highest`. None if that recipe is `pick` itself."""


def choose(group: Group) -> Choice | None:
    """Recommend one of the trained recipes of a group. If the group has no trained recipe, return None."""
    if not group.ranked:
        return None
    highest, *others = group.ranked
    tied = [entry for entry in others if entry.standing != "below"]
    near = [highest, *(entry for entry in tied if entry.score.value >= highest.score.value - MARGIN)]
    pick = min(near, key=_cost)
    full = next((entry for entry in group.ranked if entry.record.cell.method == FULL), highest)
    return Choice(
        pick, highest, bool(others) and not tied, tuple(near), len(tied), None if full is pick else full
    )  # fmt: skip


def _cost(entry: RankingEntry) -> tuple[float, float]:
    """Return the two costs that order recipes: training memory, then the number of trained parameters.

    An unknown cost counts as infinite.
    """
    peak, trainable = entry.typical(metrics.PEAK_ABOVE_IMPORTS.read), entry.typical(metrics.TRAINABLE.read)
    return float("inf") if peak is None else peak, float("inf") if trainable is None else trainable
