"""The parity gate of a Cell: nothing is measured before the Cell's own layers have passed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from harness.conformance import checks, suite
from harness.conformance.case import Case
from harness.conformance.subject import Subject, load, warm
from harness.records import CheckResult, Outcome

FIRST = ("layers", "parameters")
AT_THE_START = ("base", "identity", "codes")
WHEN_WARM = ("forward", "gradient", "model")


def gate(
    subject: Subject,
    seed: int,
    run_model: Callable[[], Tensor],
    base_output: Tensor,
    *,
    start: Mapping[str, Tensor] | None = None,
    forward: Callable[[nn.Module], Tensor] | None = None,
) -> list[CheckResult]:
    """Check a freshly attached subject at its start and at `warm`, then put it back to its start.

    run_model: runs the whole model on fixed inputs; base_output: what that gave before attaching; start: the state to
    begin from (None: the subject's own); forward: runs a given model on those inputs, differentiably. Which checks apply
    stands in the Method's parity suite. If the layers or their tensors are not the reference's, nothing further can be
    asked, and only that is returned.
    """
    plan = suite.load(subject.method)
    factors = plan.factors()
    case = Case("init", seed=seed, inputs=run_model, base_output=base_output, forward=forward, factors=factors)

    def tried(names: tuple[str, ...], at: Case) -> list[CheckResult]:
        return [checks.every()[name](subject, at) for name in names if name in (*plan.checks, "codes")]

    results = tried(FIRST, case)
    if any(result.outcome is Outcome.FAIL for result in results):
        return results
    if start is not None:
        load(subject.adapted, dict(start))
    began = {name: t.detach().clone() for name, t in subject.added().items()}
    results += tried(AT_THE_START if subject.packed else AT_THE_START[:-1], case)
    warm(subject.added(), case.generator(salt=1))
    results += tried(WHEN_WARM, replace(case, state="warm" if began else "init"))
    load(subject.adapted, began)
    return results


def after_training(subject: Subject, seed: int) -> list[CheckResult]:
    """Check what may only be tried once training is over, because some libraries merge into the base weight itself."""
    factors = suite.load(subject.method).factors()
    with torch.random.fork_rng():
        return [checks.every()["merge"](subject, Case("trained", seed=seed, factors=factors))]
