"""Check of VeRA's frozen projections, which are drawn from a seed, the `projection_key`."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.checks import check
from harness.conformance.comparison.check_results import from_problems, judged, skipped
from harness.conformance.comparison.tolerance_policies import exact
from harness.conformance.subject import Subject
from harness.records.record import CheckResult


@check()
def check_projections(subject: Subject, case: Case) -> CheckResult:
    """VeRA's A and B equal the reference's, to the last bit.

    A and B are drawn only from the key and are shared by all layers, so that a checkpoint needs only the key. Another
    key gives other projections  (VeRA, section 3.1).
    """
    again = case.attach_again()
    other = None if again is None else case.attach_again(projection_key=subject.config.projection_key + 1)
    if again is None or other is None:
        return skipped(subject, case, "projections", "the case cannot attach again")
    mine, repeated, other_key = (_projections(s.state()) for s in (subject, again, other))
    if not mine:
        return skipped(subject, case, "projections", "the implementation does not show its projections in state()")
    same = sorted(name for name, tensor in mine.items() if name in other_key and torch.equal(tensor, other_key[name]))
    if same:
        return from_problems(subject, case, "projections", [f"{name} is the same for another key" for name in same])
    verdict = exact(repeated, mine)
    if not verdict.passed:
        return judged(subject, case, "projections", verdict, "attached twice with one key")
    reference = subject.fresh_reference(subject.dtype)
    return judged(subject, case, "projections", exact(mine, _projections(reference.state())))


def _projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in state.items() if name.rpartition(".")[2] in ("A", "B")}
