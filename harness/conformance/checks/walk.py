"""Check of random walks: sequences of calls that a training program may make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison import whole_model
from harness.conformance.comparison.check_results import from_problems, judged, skipped
from harness.conformance.comparison.galore_steps import LONG_GAP
from harness.conformance.comparison.inputs import HALF
from harness.conformance.subject import Subject, attach_reference, load, warm
from harness.conformance.walk.program import Forward, Program
from harness.methods.spec import Adapted
from harness.records.record import CheckResult

if TYPE_CHECKING:
    from harness.conformance.walk.machine import Programs

LARGEST = 2_000
"""Largest number of elements of the first adapted weight. The check skips a larger model, because a walk attaches to
many copies of the model."""


@check(States.INIT, only_wide=True)
def check_walk(subject: Subject, case: Case) -> CheckResult:
    """In random walks, outputs, gradients and tensors equal those of the float64 reference that takes the same walk.

    A walk is a sequence of up to 20 actions, called rules: forward and backward, micro-batches, optimizer steps, a
    scheduler, train and eval, no_grad, inference_mode, checkpointing, hooks, deepcopy, load_state_dict, resuming from a
    file, merging and unmerging, freezing, and a second model in the process. A walk that fails in float32 or float16 is
    taken again with more references, which show how far rounding may lead. After a failure that they do not explain,
    the check reports the shortest walk that shows it. With GaLore, a walk uses one subspace only. The check `refresh`
    tries new subspaces.
    """
    if subject.dtype == "float64":
        return skipped(subject, case, "walk", "the float64 reference cannot show how much noise the rules carry on")
    base = next(iter(subject.bases.values()), None)
    if (
        case.attach_fresh is None
        or case.forward is None
        or not isinstance(base, nn.Linear)
        or base.in_features * base.out_features > LARGEST
    ):
        return skipped(subject, case, "walk", "walks are taken with small linear layers")
    if not case.walks:
        return skipped(subject, case, "walk", "a part of the sample is enough")
    if case.weights == "large":
        return skipped(subject, case, "walk", "over large weights, sums in another order may exceed the tolerance")
    gap = {"update_gap": LONG_GAP} if hasattr(subject.config, "update_gap") else {}
    again = partial(case.attach_again, **gap)
    forward, start = case.forward, again()
    if start is None:
        return skipped(subject, case, "walk", "the case cannot attach again")
    # Every Cell imports this file, and no Cell takes a walk. Hypothesis would add 5 MiB to the memory of each Cell.
    from harness.conformance.walk.machine import walk

    warm(start.added(), case.generator(salt=1))
    failure = walk(lambda draws: _programs(start, again, case, forward, draws), case.walks, case.walk_seed)
    if failure is None:
        return from_problems(subject, case, "walk", [], f"{case.walks} walks")
    return judged(subject, case, "walk", failure.judgement, "; ".join(["attach()", *failure.rules]))


def _other_numbers(config: Any) -> dict[str, float]:
    """Return the float settings of a Config, except dropout, each halved. They give a second adapter another scaling."""
    return {
        f.name: HALF * getattr(config, f.name) for f in fields(config) if f.type == "float" and "dropout" not in f.name
    }


def _programs(
    start: Subject, attach: Callable[[], Subject | None], case: Case, forward: Forward, draws: int
) -> Programs:
    """Return the programs that take a walk together: the subject, and the references.

    attach: function that attaches the subject's implementation again, with the config of `start`. draws: number of
    references that round every result at random.

    One reference is in float64, and all others are in the subject's dtype. All programs begin with the tensors and the
    state of `start`, but the tensors of one reference (`near`) are slightly moved.
    """
    from harness.conformance.walk.machine import Programs
    from harness.conformance.walk.other_rounding import OtherRounding

    def subject() -> tuple[nn.Module, Adapted]:
        again = attach()
        if again is None:
            raise ValueError("the case cannot attach again")
        return again.model, again.adapted

    def reference(dtype: str) -> tuple[nn.Module, Adapted]:
        model = whole_model.base(start, dtype)
        generator = torch.Generator().manual_seed(0)
        return model, attach_reference(start.method, model, start.config, start.bases, generator)

    def another() -> Program:
        other = case.attach_again(square=True, **_other_numbers(start.config))
        if other is None or case.forward_of is None:
            raise ValueError("the case cannot attach again")
        return Program(other.model, other.adapted, subject, case.forward_of(other.model), start.trains_plainly)

    def program(attach: Callable[[], tuple[nn.Module, Adapted]]) -> Program:
        model, adapted = attach()
        load(adapted, start.adapted.tensors(), start.state())
        return Program(model, adapted, attach, forward, start.trains_plainly)

    narrow = partial(reference, start.dtype)
    wide, own, near = program(partial(reference, "float64")), program(narrow), program(narrow)
    drawn = tuple(replace(program(narrow), rounding=OtherRounding(seed)) for seed in range(draws))
    programs = Programs(program(subject), wide, own, near, start.dtype, case.factor("walk"), another, drawn)
    programs.align()
    return programs
