"""Check of an implementation's own adapters over the layers that it quantises."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from harness.conformance.case import Case
from harness.conformance.checks import AnyCheck, States, check
from harness.conformance.checks.calls import check_calls
from harness.conformance.checks.maths import check_forward, check_gradient
from harness.conformance.checks.merging import check_merge
from harness.conformance.checks.shared_input import check_shared_input
from harness.conformance.checks.structure import check_inputs
from harness.conformance.comparison.check_results import from_problems, named_if_raised, skipped
from harness.conformance.parity_suite import in_words
from harness.conformance.subject import Subject, warm
from harness.errors import Unsupported
from harness.records.record import CheckResult, Outcome

_METHODS = ("lora", "dora")
_CHECKS: Mapping[str, Iterable[AnyCheck]] = {
    "": (check_forward, check_gradient, check_merge, check_shared_input, check_calls),
    "dropout": (check_forward, check_gradient, check_inputs),
}
"""Setting that differs from the case's, or "" -> the checks that are run on each Method with this setting."""
_DROPOUT = 0.25


@check(States.WARM, depends_on_sizes=False, only_wide=True, also_in_typical_case=True)
def check_own_adapters(subject: Subject, case: Case) -> CheckResult:
    """LoRA and DoRA of the same implementation, over its packed layers, compute what the reference computes.

    The other checks of a quantised base put the reference's LoRA over it. A program may have its own code for its own
    layers, for example to decode a weight only once. The check attaches LoRA and DoRA without dropout and runs
    `forward`, `gradient`, `merge`, `shared_input` and `calls`. It attaches them again with dropout and runs `forward`,
    `gradient` and `inputs`. It leaves out a Method that the same entry point does not offer, and a Method, setting or
    check for which the implementation raises Unsupported.
    """
    if case.attach_fresh is None:
        return skipped(subject, case, "own_adapters", "the case cannot attach again")
    problems, tried, refused = list[str](), list[str](), list[str]()
    for method, setting in itertools.product(_METHODS, _CHECKS):
        changed: dict[str, Any] = {setting: _DROPOUT} if setting else {}
        what = " ".join(filter(None, [method, in_words(changed)]))
        fresh = partial(case.attach_fresh, adapter=method, **changed)
        try:
            with named_if_raised(what, "over the packed layers"):
                adapted = fresh()
        except Unsupported as error:
            refused.append(str(error))
            continue
        tried.append(what)
        warm(adapted.added(), case.generator(salt=1))
        again = replace(case, attach_fresh=fresh, is_brief=True, walks=0)
        problems += [f"{what}: {problem}" for problem in _problems(adapted, again, _CHECKS[setting])]
    if not tried:
        return skipped(
            subject, case, "own_adapters", f"no adapter can be attached: {'; '.join(dict.fromkeys(refused))}"
        )
    return from_problems(subject, case, "own_adapters", problems, ", ".join(tried))


def _problems(subject: Subject, case: Case, named: Iterable[AnyCheck]) -> Iterator[str]:
    """Run the checks `named`, and describe each failure. A check that raises Unsupported is left out."""
    for one in named:
        try:
            with named_if_raised(one.name, "over the packed layers"):
                result = one(subject, case)
        except Unsupported:
            continue
        if result.outcome is Outcome.FAIL:
            yield " ".join(filter(None, [f"`{one.name}` fails:", result.tensor, result.worst, result.detail]))
