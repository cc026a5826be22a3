"""Check that attaching keeps a model in eval mode."""

from __future__ import annotations

import torch

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.checks.merging import layer_inputs, layer_outputs
from harness.conformance.comparison.check_results import from_problems, skipped
from harness.conformance.subject import Subject, warm
from harness.records.record import CheckResult


@check(States.INIT, depends_on_sizes=False, in_minor_examples=True)
def check_eval_mode(subject: Subject, case: Case) -> CheckResult:
    """After attaching to a model in eval mode, dropout is off.

    A layer with random adapter tensors gives the same output as after a call of `eval()`. If it does not, the outputs of the
    model are random until the program calls `eval()` again.
    """
    if subject.trains_plainly:
        return skipped(subject, case, "eval_mode", "the config has no dropout")
    fresh = case.attach_again()
    if fresh is None:
        return skipped(subject, case, "eval_mode", "the case cannot attach again")
    if fresh.original.model is None or fresh.original.model.training:
        return skipped(subject, case, "eval_mode", "the model was in training mode before")
    warm(fresh.added(), case.generator(salt=1))
    xs = layer_inputs(fresh, case)
    with torch.no_grad():
        before = layer_outputs(fresh, xs)
        fresh.model.eval()
        after = layer_outputs(fresh, xs)
    drops = [path for path in xs if not torch.equal(before[path], after[path])]
    odd = [f"{path} drops features after attaching to a model in eval mode" for path in drops]
    return from_problems(subject, case, "eval_mode", odd)
