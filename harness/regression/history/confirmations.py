"""Confirmed slow-downs stand until they are reset, even if later nights do not show them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.regression.history import decisions
from harness.regression.history.changes import Change
from harness.regression.history.decisions import EVERY, NEAR
from harness.regression.history.night_files import History, Night


def confirmed_regressions(history: History, found: Sequence[Change]) -> Iterator[Change]:
    """Yield the slow-downs stored by `history settle` that are not in `found`.

    Either their level is only one or two nights old, or later nights were not as slow.
    """
    index = {night.night: i for i, night in enumerate(history.nights)}
    for line in history.confirmations:
        seen = line.get("seen")
        if line.get("verdict") != "regressed" or seen is None or line["night"] not in index:
            continue
        if decisions.last_reset(history.resets, line["cell"], line["metric"]) > seen["old_night"]:
            continue
        at = index[line["night"]]
        shown = any(decisions.applies(line, c.cell, c.metric) and abs(c.nights[1] - at) <= NEAR for c in found)
        before = index.get(seen["old_night"])
        if shown or before is None:
            continue
        if all(_ran(history.nights[i], line["cell"], seen["place"]) for i in (before, at)):
            yield Change(
                line["cell"], line["metric"], seen["place"], (before, at), seen["before"], seen["after"],
                worse=True, young=True, note="it stands until `peft-harness history reset`",
            )  # fmt: skip


def _ran(night: Night, cell: str, place: str) -> bool:
    return any(cell in (EVERY, row["cell"]) and row["on"] == place for row in night.rows)
