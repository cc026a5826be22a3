"""What pairs confirmed stands until somebody resets it, whether or not the nights show it by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.regression.history import decisions
from harness.regression.history.changes import Change
from harness.regression.history.decisions import EVERY, NEAR
from harness.regression.history.night_files import History, Night


def standing(history: History, found: Sequence[Change]) -> Iterator[Change]:
    """Yield the slow-downs that `history settle` wrote down and that no change of `found` is.

    Such are one or two nights old, so that they are no level yet; or the next nights were not as slow.
    """
    index = {night.night: i for i, night in enumerate(history.nights)}
    for line in history.confirmations:
        seen = line.get("seen")
        if line.get("verdict") != "regressed" or not isinstance(seen, dict) or line["night"] not in index:
            continue
        if decisions.start(history.resets, line["cell"], line["metric"]) > seen["old_night"]:
            continue
        at = index[line["night"]]
        told = [c for c in found if decisions.concerns(line, c.cell, c.metric) and abs(c.nights[1] - at) <= NEAR]
        before = index.get(seen["old_night"])
        if (
            not told
            and before is not None
            and all(_ran(history.nights[i], line["cell"], seen["place"]) for i in (before, at))
        ):
            yield Change(
                line["cell"], line["metric"], seen["place"], (before, at), seen["before"], seen["after"],
                worse=True, young=True, note="it stands until `peft-harness history reset`",
            )  # fmt: skip


def _ran(night: Night, cell: str, place: str) -> bool:
    return any(cell in (EVERY, row["cell"]) and row["on"] == place for row in night.rows)
