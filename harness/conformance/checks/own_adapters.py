"""Check of an implementation's own adapters over the layers that it quantises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.checks.calls import check_calls
from harness.conformance.checks.maths import check_forward, check_gradient
from harness.conformance.checks.merging import check_merge
from harness.conformance.checks.shared_input import check_shared_input
from harness.conformance.checks.structure import check_inputs
from harness.conformance.comparison.check_results import from_problems, named_if_raised, skipped
from harness.conformance.parity_suite import in_words
from harness.conformance.subject import Subject, warm
from harness.errors import Unsupported
from harness.records.check import CheckId
from harness.records.record import CheckResult, Outcome

_METHODS = ("lora", "dora")
_CHECKS = {
    "": (check_forward, check_gradient, check_merge, check_shared_input, check_calls),
    "dropout": (check_forward, check_gradient, check_inputs),
}
"""Setting that differs from the case's, or "" -> the checks that are run on each Method with this setting."""
_DROPOUT = 0.25


@check(States.WARM, depends_on_sizes=False, only_wide=True, also_in_typical_case=True)
def check_own_adapters(subject: Subject, case: Case) -> CheckResult:
    """LoRA and DoRA of the same implementation, over its packed layers, compute what the reference computes.

    The other checks of a quantised base put the reference's LoRA over it. A program may have its own code for its own
    layers, for example to decode a weight only once. So the adapters are attached, with and without dropout, and the checks
    `forward`, `gradient`, `inputs`, `merge`, `shared_input` and `calls` are run on them. A Method that the implementation
    does not offer is left out.
    """
    if case.attach_fresh is None:
        return skipped(subject, case, "own_adapters", "the case cannot attach again")
    problems, tried = list[str](), list[str]()
    for method in _METHODS:
        try:
            problems += _problems(case, method)
            tried.append(method)
        except Unsupported:
            continue
    if not tried:
        return skipped(subject, case, "own_adapters", f"the implementation offers none of {', '.join(_METHODS)}")
    return from_problems(subject, case, "own_adapters", problems, ", ".join(tried))


def _problems(case: Case, method: str) -> Iterator[str]:
    """Attach `method` with each setting, and describe each check that fails. Raises Unsupported as `attach_fresh` does."""
    assert case.attach_fresh is not None  # noqa: S101
    for setting, named in _CHECKS.items():
        changed: dict[str, Any] = {setting: _DROPOUT} if setting else {}
        fresh = partial(case.attach_fresh, adapter=method, **changed)
        again = replace(case, attach_fresh=fresh, is_brief=True, walks=0)
        with named_if_raised(method, in_words(changed)):
            subject = case.attach_fresh(adapter=method, **changed)
            warm(subject.added(), case.generator(salt=1))
            failed = [result for one in named if (result := one(subject, again)).outcome is Outcome.FAIL]
        for one in failed:
            what = [f"`{CheckId.parse(one.check).check}` fails:", one.tensor, one.worst, one.detail]
            yield " ".join(filter(None, [method, in_words(changed), *what]))
