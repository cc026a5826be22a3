"""Test items that only one of two recipes answers correctly. Each recipe is compared with the most accurate recipe.

A recipe is a set of Cells that differ only in the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.analysis.ranking import Group, RankingEntry
from harness.errors import first_names

SHOWN = 12
"""Largest number of test items whose ids a row lists."""


def rows(group: Group, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return a row for each recipe that compares it with the most accurate recipe of the group.

    The row has the items that only one of the two recipes answers correctly. If a recipe has several seeds, its first
    seed is compared. A recipe that was scored on other items has no row. names: names of the entries, by their id().
    """
    highest, *others = group.entries
    right = _answers(highest)
    found = []
    for entry in others:
        mine = _answers(entry)
        if mine.keys() != right.keys():
            continue
        lost = [item for item in right if right[item] and not mine[item]]
        gained = [item for item in right if mine[item] and not right[item]]
        found.append(
            {
                "name": names[id(entry)],
                "lost": len(lost),
                "lost_ids": first_names(lost, SHOWN),
                "gained": len(gained),
                "gained_ids": first_names(gained, SHOWN),
            }
        )
    return found


def _answers(entry: RankingEntry) -> dict[str, bool]:
    accuracy = entry.record.accuracy
    return {item.id: bool(item.correct) for item in accuracy.items} if accuracy else {}
