"""Search for failing cases: Hypothesis draws random cases and shrinks each failure to a smallest case that still fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.errors import FlakyFailure, Unsatisfiable

from harness.conformance.case_selection import CaseSelection
from harness.conformance.drawing import named_case, sample
from harness.conformance.execution.acceptance import is_accepted
from harness.conformance.findings import defects
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.conformance.parity_suite import AnyCase, LoaderSuite, ParitySuite


def cases(plan: ParitySuite, dtypes: Sequence[str], number: int, first_seed: int) -> list[AnyCase]:
    """Return `number` random cases, or all cases if the suite has fewer. first_seed: seed of the random numbers."""
    drawn: list[AnyCase] = []

    @seed(first_seed)
    @settings(
        max_examples=number,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(sample.random(plan, dtypes))
    def take(case: AnyCase) -> None:
        drawn.append(case)

    with suppress(Unsatisfiable):
        take()
    return drawn


def search(
    plan: ParitySuite,
    wanted: CaseSelection,
    dtypes: Sequence[str],
    run_case: Callable[[AnyCase], Iterable[CheckOutcome]],
    report: Callable[[CheckOutcome], object],
) -> None:
    """Try `wanted.drawn` random cases, and shrink each failure to the smallest case that still fails.

    Call `report` with the outcomes of each case until a check fails. After that, `report` gets the outcomes of only two
    cases per failing check: the first case in which it fails and, at the end of the search, the smallest one. A case
    counts for the first check that it fails. `wanted.seed` decides the random cases. A failure that a known defect explains
    is not shrunk, and the search goes on.

    If `wanted` selects cases by a text, the others do not run. They are still drawn, so a seed gives the same cases. If the
    text is the full name and dtype of a case, e.g. of a smallest one, only this case is tried, whether it is drawn or not.
    """
    smallest: dict[str, list[CheckOutcome]] = {}
    reported: set[tuple[str, str]] = set()

    def report_all(outcomes: Iterable[CheckOutcome]) -> None:
        for outcome in outcomes:
            report(outcome)

    @seed(wanted.seed)
    @settings(
        max_examples=wanted.drawn,
        database=None,  # otherwise the failures of earlier searches would decide what a seed tries
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        deadline=None,
        report_multiple_bugs=True,
        verbosity=Verbosity.quiet,
        print_blob=False,
    )
    @given(sample.random(plan, dtypes))
    def try_case(case: AnyCase) -> None:
        if not wanted.includes(f"{case} {case.dtype}"):
            return
        tried, _ = defects.explained(run_case(case), defects.known())
        failed = [one for one in tried if one.status is CheckStatus.FAIL]
        if failed:
            if failed[0].check not in smallest:
                report_all(tried)  # now, because a later case may crash the process
                reported.add((tried[0].case, tried[0].dtype))
            smallest[failed[0].check] = tried
            raise _failure_of(failed[0].check)(str(case))
        if not smallest:  # after a failure, cases may be steps of the shrinking
            report_all(tried)

    if (named := _named(plan, wanted, dtypes)) is not None:
        report_all(defects.explained(run_case(named), defects.known())[0])
        return
    try:
        try_case()
    except (AssertionError, FlakyFailure, BaseExceptionGroup):
        if not smallest:
            raise
    except Unsatisfiable:
        return
    for outcomes in smallest.values():
        if (outcomes[0].case, outcomes[0].dtype) not in reported:
            report_all(outcomes)


def _named(plan: ParitySuite, wanted: CaseSelection, dtypes: Sequence[str]) -> AnyCase | None:
    """Return the case whose full name and dtype `wanted` asks for.

    Return None if it is no full name, if a case of the fixed sample has this name, or if the reference refuses the case.
    """
    if not wanted.case or isinstance(plan, LoaderSuite):
        return None
    if wanted.case in (f"{one} {one.dtype}" for one in sample.fixed(plan, wanted, dtypes)):
        return None
    try:
        case = named_case.read(plan, wanted.case)
        accepted = case is not None and case.dtype in dtypes and is_accepted(plan, case)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # values of any type
        return None
    return case if accepted else None


@cache
def _failure_of(check: str) -> type[AssertionError]:
    """Return the exception type for failures of one check.

    Each check needs its own type, because Hypothesis regards all failures of one type as the same failure.
    """
    return type(f"{check}Failed", (AssertionError,), {})
