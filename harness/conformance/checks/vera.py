"""Check of VeRA's frozen projections, which are drawn from a seed, the `projection_key`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.conformance.case import Case
from harness.conformance.checks import check
from harness.conformance.comparison.check_results import from_problems, judged, prefix_tensor, skipped
from harness.conformance.comparison.tolerance_policies import exact, worst_of
from harness.conformance.subject import Subject
from harness.methods.module_copy import copied
from harness.records.record import CheckResult


@check()
def check_projections(subject: Subject, case: Case) -> CheckResult:
    """VeRA's A and B equal the reference's, to the last bit.

    A and B are drawn only from the key and are shared by all layers, so that a checkpoint needs only the key. Another
    key gives other projections  (VeRA, section 3.1). Their sizes are those of the largest target. The check also attaches
    to each layer alone, because one has more inputs than outputs and the other fewer.
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
    found = [exact(mine, _projections(subject.fresh_reference(subject.dtype).state()))]
    for path in subject.bases:
        model: Any = copied(subject.original.model)
        if not hasattr(model, "targets"):
            break
        model.targets = (path,)
        alone = case.attach_again(model=model)
        assert alone is not None  # noqa: S101  # it was attached before
        wanted = _projections(alone.fresh_reference(subject.dtype).state())
        found.append(prefix_tensor("as the only target,", exact(_projections(alone.state()), wanted)))
    return judged(subject, case, "projections", worst_of(found, "exact"))


def _projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in state.items() if name.rpartition(".")[2] in ("A", "B")}
