"""Checks of a loader of adapter files."""

from __future__ import annotations

from harness.conformance.adapter_files.subject import FIRST, LoaderSubject, by_prompt
from harness.conformance.case import Case
from harness.conformance.checks import check
from harness.conformance.comparison.check_results import judged
from harness.conformance.comparison.tolerance_policies import carried_noise
from harness.records.record import CheckResult


@check()
def check_logits(subject: LoaderSubject, case: Case) -> CheckResult:
    """With the adapter loaded, the model gives the logits that the adapter file defines.

    The expected logits are stored beside the adapter in suites/adapters. They were computed in float64 from the weights
    that the file and the base define together (reference/adapter_file.py). The allowed error is a multiple of the error
    that the reference has in the dtype of the base.
    """
    have = by_prompt(subject.loaded().logits(subject.adapter.prompts, FIRST))
    factor = case.factor("logits")
    verdict = carried_noise(have, subject.truth(), subject.rounded(), subject.dtype, factor)
    return judged(subject, case, "logits", verdict)
