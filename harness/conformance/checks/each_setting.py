"""Check that an implementation follows each setting of the Method, also those that the suite's cases leave alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.checks.galore import check_refresh
from harness.conformance.checks.maths import check_forward, check_gradient
from harness.conformance.checks.merging import check_detach, check_merge
from harness.conformance.checks.saving import check_save
from harness.conformance.checks.start import check_initial
from harness.conformance.checks.trajectory import check_trajectory
from harness.conformance.comparison.check_results import from_problems, skipped
from harness.conformance.parity_suite import in_words
from harness.conformance.subject import Subject, warm
from harness.errors import Unsupported
from harness.methods.registry import format_error
from harness.records.check import CheckId
from harness.records.record import CheckResult, Outcome

_INIT = (check_initial, check_detach)
"""The checks that are run on an adapter as it was attached."""
_WARM = (check_forward, check_gradient, check_merge, check_save, check_trajectory)
"""The checks that are run on an adapter whose tensors are random."""


@check(States.WARM, depends_on_sizes=False, only_wide=True, also_in_typical_case=True)
def check_each_setting(subject: Subject, case: Case) -> CheckResult:
    """With other values of its settings, an implementation computes what the reference computes with these values.

    A program may ignore a setting and use its usual value. With another value, it may also save or detach wrongly. So
    new adapters are attached, with another value of every setting, and the checks `initial`, `detach`, `forward`,
    `gradient`, `merge`, `save` and `trajectory` are run on them, for GaLore also `refresh`. A check that fails with the
    case's own settings, or that the implementation does not support, is left out. Each adapter has as many other values
    as the Method accepts together. If an adapter fails, or is not supported, each of its values is tried alone, and the
    failing ones are named. Ranks, shares of dropout and keys keep their values: other checks vary them. Three training
    steps do not show AdaLoRA's schedule and averages: `budget` and `importance` vary these.
    """
    if not case.other_settings or case.attach_fresh is None:
        return skipped(
            subject, case, "each_setting", "the config has no setting with another value that the case accepts"
        )
    passing = {one.name for one in (*_INIT, *_WARM, check_refresh)}
    if _failure(case, {}, passing) is not None:
        passing = {name for name in passing if _failure(case, {}, {name}) is None}
    if not passing:
        return skipped(subject, case, "each_setting", "the case's own settings fail already; other checks report it")
    problems = list[str]()
    for together in case.other_settings:
        if (problem := _failure(case, together, passing)) is not None:
            single = [{name: value} for name, value in together.items()] if len(together) > 1 else []
            named = [f"with {in_words(one)}: {why}" for one in single if (why := _failure(case, one, passing))]
            problems += named or ([f"with {in_words(together)}: {problem}"] if problem else [])
    return from_problems(subject, case, "each_setting", problems)


def _failure(case: Case, settings: dict[str, Any], names: Collection[str]) -> str | None:
    """Attach a new adapter with these settings in place of the case's. Describe the first check in `names` that fails.

    Return None if none fails, and an empty string if the implementation does not support the settings or a check.
    """
    assert case.attach_fresh is not None  # noqa: S101
    changed = replace(case, attach_fresh=partial(case.attach_fresh, **settings))
    try:
        subject = case.attach_fresh(**settings)
        # GaLore's steps amplify rounding errors, so `trajectory` allows large errors, and `refresh` small ones.
        further = () if subject.adapted.optimizer(1.0, 0.0) is None else (check_refresh,)
        results = [one(subject, replace(changed, state="init")) for one in _INIT if one.name in names]
        warm(subject.added(), case.generator(salt=1))
        results += [one(subject, changed) for one in (*_WARM, *further) if one.name in names]
    except Unsupported:
        return ""
    except Exception as error:  # noqa: BLE001  # also of a check, if an ignored setting gives tensors another shape
        return f"raised {format_error(error)}"
    failed = next((one for one in results if one.outcome is Outcome.FAIL), None)
    if failed is None:
        return None
    what = " ".join(filter(None, [failed.tensor, failed.worst, failed.detail]))
    return f"`{CheckId.parse(failed.check).check}` fails: {what}"
