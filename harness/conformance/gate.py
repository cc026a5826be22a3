"""The parity gate of a Cell: nothing is measured before the Cell's own layers have passed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from harness.conformance import checks
from harness.conformance.subject import Subject, load, warm
from harness.records import CheckResult


def gate(subject: Subject, seed: int, run_model: Callable[[], Tensor], base_output: Tensor) -> list[CheckResult]:
    """Check a freshly attached subject at its start and at `warm`, then put it back to its start.

    run_model: runs the whole model on fixed inputs; base_output: what that gave before attaching.
    """
    start = {name: t.detach().clone() for name, t in subject.added().items()}
    case = checks.Case("init", seed=seed, inputs=run_model, base_output=base_output)
    results = [check(subject, case) for check in (checks.check_layers, checks.check_parameters, checks.check_identity)]
    if subject.packed:
        results.append(checks.check_codes(subject, case))
    warm(subject.added(), case.generator(salt=1))
    warmed = replace(case, state="warm")
    results += [check(subject, warmed) for check in (checks.check_forward, checks.check_gradient)]
    load(subject.adapted, start)
    return results


def after_training(subject: Subject, seed: int) -> list[CheckResult]:
    """Check what may only be tried once training is over, because some libraries merge into the base weight itself."""
    with torch.random.fork_rng():
        return [checks.check_merge(subject, checks.Case("trained", seed=seed))]
