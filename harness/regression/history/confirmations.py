"""Slow-downs that a verdict has confirmed. They count until a user resets them, even if later nights are fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.regression.history import decisions
from harness.regression.history.changes import Change
from harness.regression.history.night_files import NEAR, History


def confirmed_regressions(history: History, found: Sequence[Change]) -> Iterator[Change]:
    """Yield the slow-downs that a stored verdict confirms, unless they are among the changes `found`.

    A confirmed slow-down is not in `found` if its level is only one or two nights old, or if later nights were faster
    again.
    """
    for line in history.confirmations:
        seen = line.seen
        if line.verdict != "regressed" or seen is None or not {line.night, seen.old_night} <= history.index.keys():
            continue
        if decisions.last_reset(history.resets, line.cell, line.metric) > seen.old_night:
            continue
        if any(line.applies(c.cell, c.metric) and history.distance(c.night, line.night) <= NEAR for c in found):
            continue
        if all(any(history.night(day).rows_of(line.cell, seen.place)) for day in (seen.old_night, line.night)):
            yield Change(
                line.cell, line.metric, seen.place, seen.old_night, line.night, seen.before, seen.after, worse=True,
                recent=True, note="it stands until `peft-harness history reset`",
            )  # fmt: skip
