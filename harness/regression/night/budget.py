"""Decide how long each part (one command) of a nightly run may take, so that the most important parts are all reached.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.regression.night import part_run
from harness.regression.night.parts import Device, NightPart

LAST_S = {"cuda": 5.0 + part_run.GRACE_S + 7.0, "cpu": 5.0}
"""Seconds of the budget that are reserved for the end of the nightly run, by device. They suffice to write the footer
and the page. On a GPU, which may be lent only until a fixed time, they also suffice for a part to end after SIGTERM."""
_FACTOR = {"cuda": 4.0, "cpu": 12.0}
"""Factor by which a part may exceed its estimate before it counts as hanging, by device. The factors are large, since
the estimates are rough and a rehearsal (a nightly run on a CPU) often shares its cores."""
DEFAULT_S = {"cuda": 600.0, "cpu": 720.0}
"""Budget in seconds of a nightly run without `--budget`, by device. On a CPU, it suffices for all parts if they take
their estimated times. With a larger budget on a CPU, each part may take longer in proportion."""
AROUND_S = 5.0
"""Seconds added to the estimate of a part, for its start and for the output of results at its end."""
LEAST_S = 120.0
"""Seconds that any part may take before it counts as hanging, even if its estimate is short."""


@dataclass(frozen=True)
class Limit:
    """Time limit of a part (one command) of a nightly run."""

    seconds: float
    by: Literal["budget", "share", "estimate"]
    """Reason for the limit. `budget`: the budget ends then. `share`: the rest of the budget is kept for later parts.
    `estimate`: by then, the part has taken many times its estimate, so it seems to hang."""


def limit(part: NightPart, later: Sequence[NightPart], left_s: float, device: Device, budget_s: float) -> Limit:
    """Return the time limit of a part that starts now.

    later: the parts that follow. The limit leaves enough time for those with `is_reserved`. But if the budget allows
    it, the limit is at least the estimate of `part`. A part that takes many times its estimate is ended in any case.
    left_s: seconds of the budget that are left. budget_s: the whole budget in seconds.
    """
    reserved_s = sum(one.estimate_s + AROUND_S for one in later if one.is_reserved)
    share_s = max(part.estimate_s, left_s - reserved_s - (AROUND_S if reserved_s else 0.0))
    slower = max(1.0, budget_s / DEFAULT_S[device]) if device == "cpu" else 1.0
    hang_s = slower * max(LEAST_S, _FACTOR[device] * part.estimate_s)
    least = min(left_s, share_s, hang_s)
    return Limit(least, "estimate" if least == hang_s else "budget" if least == left_s else "share")


def needed_s(estimates_s: Sequence[float], device: Device) -> float:
    """Return the seconds that a nightly run with these parts needs.

    This includes the overhead of each part and of the end of the nightly run.
    """
    return sum(estimate_s + AROUND_S for estimate_s in estimates_s) + LAST_S[device]


def planned(plan: Sequence[NightPart], budget_s: float, device: Device) -> list[float]:
    """Return the time limit of each part in seconds, assuming that all earlier parts take exactly their estimates.

    The limit is 0 if the part does not fit into the budget.
    """
    left_s, found = budget_s - LAST_S[device], []
    for number, part in enumerate(plan):
        fits = part.estimate_s <= left_s
        found.append(limit(part, plan[number + 1 :], left_s, device, budget_s).seconds if fits else 0.0)
        left_s -= part.estimate_s if fits else 0.0
    return found
