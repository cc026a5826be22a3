"""Check that attaching keeps a model in eval mode."""

from __future__ import annotations

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison.check_results import from_problems, skipped
from harness.conformance.subject import Subject
from harness.records.record import CheckResult


@check(States.INIT, in_minor_examples=True)
def check_eval_mode(subject: Subject, case: Case) -> CheckResult:
    """After attaching to a model in eval mode, every module of the new layers is in eval mode too.

    Otherwise a layer with dropout would drop features in an evaluation, until somebody calls `eval` again.
    """
    if not any(getattr(subject.config, name, 0) for name in ("dropout", "rank_dropout")):
        return skipped(subject, case, "eval_mode", "the config has no dropout")
    fresh = case.attach_again()
    if fresh is None or fresh.model.training:
        return skipped(subject, case, "eval_mode", "the model is in training mode, or the case cannot attach again")
    layers = fresh.adapted.layers.items()
    odd = [f"{path} is in training mode" for path, layer in layers if any(one.training for one in layer.modules())]
    return from_problems(subject, case, "eval_mode", odd)
