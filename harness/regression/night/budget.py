"""Decide how long a part of a night may take, so that the parts that matter most are all reached. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.regression.night import part_run
from harness.regression.night.parts import Device, Part

LAST_S = {"cuda": 5.0 + part_run.GRACE_S + 7.0, "cpu": 5.0}
"""Device -> seconds of the budget that are kept for the footer and the page. On a GPU, whose time may end sharply, they also
cover the end of a part that is cut."""
_FACTOR = {"cuda": 4.0, "cpu": 12.0}
"""Device -> largest multiple of its estimate that a part may take. The estimates are rough, and a rehearsal often
shares its cores. The limit ends a part that hangs."""
DEFAULT_S = {"cuda": 600.0, "cpu": 720.0}
"""Device -> budget of a night without `--budget`. All parts of a rehearsal fit into it on a machine like that of the
estimates. With a larger budget the machine counts as slower, and a part of a rehearsal may take more time in proportion."""
AROUND_S = 5.0
"""Seconds that are kept for the start and the end of a part, beside its estimate. A part that is cut prints its document."""
LEAST_S = 120.0
"""A part may take this long even if its estimate is short."""


@dataclass(frozen=True)
class Limit:
    """The time after which a part is ended."""

    seconds: float
    by: Literal["budget", "share", "estimate"]
    """The reason: nothing of the budget is left; the rest of it is kept for later parts; or the part takes many times its
    estimate, so that it seems to hang."""


def limit(part: Part, later: Sequence[Part], left_s: float, device: Device, budget_s: float) -> Limit:
    """Return the limit of a part that starts now.

    later: the parts after it. The limit leaves time for the estimates of those with `kept`. Even so, it is not below
    the part's own estimate, if that much time is left.
    left_s: seconds of the budget that are left.
    budget_s: the whole budget in seconds.
    """
    kept_s = sum(one.estimate_s + AROUND_S for one in later if one.kept)
    share_s = max(part.estimate_s, left_s - kept_s - (AROUND_S if kept_s else 0.0))
    slower = max(1.0, budget_s / DEFAULT_S[device]) if device == "cpu" else 1.0
    hang_s = slower * max(LEAST_S, _FACTOR[device] * part.estimate_s)
    least = min(left_s, share_s, hang_s)
    return Limit(least, "estimate" if least == hang_s else "budget" if least == left_s else "share")


def needed_s(estimates_s: Sequence[float], device: Device) -> float:
    """Return the budget in seconds that parts with these estimates need, with what is kept around and after them."""
    return sum(estimate_s + AROUND_S for estimate_s in estimates_s) + LAST_S[device]


def planned(plan: Sequence[Part], budget_s: float, device: Device) -> list[float]:
    """Return the limit of each part in seconds, if the parts before it take what they are estimated at.

    It is 0 if the part does not fit.
    """
    left_s, found = budget_s - LAST_S[device], []
    for number, part in enumerate(plan):
        fits = part.estimate_s <= left_s
        found.append(limit(part, plan[number + 1 :], left_s, device, budget_s).seconds if fits else 0.0)
        left_s -= part.estimate_s if fits else 0.0
    return found
