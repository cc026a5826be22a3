"""The parity gate of a Cell: nothing is measured before the Cell's own layers have passed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from harness.conformance import checks
from harness.conformance.subject import Subject, load, warm
from harness.records import CheckResult, Outcome


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
    begin from (None: the subject's own); forward: runs a given model on those inputs, differentiably. If the layers or
    their tensors are not the reference's, nothing further can be asked, and only that is returned.
    """
    case = checks.Case("init", seed=seed, inputs=run_model, base_output=base_output, forward=forward)
    results = [check(subject, case) for check in (checks.check_layers, checks.check_parameters)]
    if any(result.outcome is Outcome.FAIL for result in results):
        return results
    if start is not None:
        load(subject.adapted, dict(start))
    began = {name: t.detach().clone() for name, t in subject.added().items()}
    results.append(checks.check_identity(subject, case))
    if subject.packed:
        results.append(checks.check_codes(subject, case))
    warm(subject.added(), case.generator(salt=1))
    warmed = replace(case, state="warm" if began else "init")
    results += [check(subject, warmed) for check in (checks.check_forward, checks.check_gradient, checks.check_model)]
    load(subject.adapted, began)
    return results


def after_training(subject: Subject, seed: int) -> list[CheckResult]:
    """Check what may only be tried once training is over, because some libraries merge into the base weight itself."""
    with torch.random.fork_rng():
        return [checks.check_merge(subject, checks.Case("trained", seed=seed))]
