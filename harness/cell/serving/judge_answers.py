"""Compare the answers of a server under each load with the float64 reference of the adapter files.

A load is a mix of models that requests go to, such as `one adapter` or `base and adapters`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.case import Case
from harness.conformance.comparison.check_results import Named, identifier, skipped
from harness.conformance.served.client import RequestRefusedError
from harness.conformance.served.comparison import AnswerComparison
from harness.conformance.served.report import PhaseResult, SubjectResult, SubjectVerdict
from harness.conformance.served.session import BASE, RequestPhase, Session
from harness.errors import UsageError
from harness.records.record import CheckResult, Outcome
from harness.records.served import Load

SWAP = "hot-swap"
_CHECKS: dict[str, tuple[str, RequestPhase]] = {
    "base": ("served-base", RequestPhase.ALONE),
    "one adapter": ("served-one", RequestPhase.ALONE),
    "several adapters": ("served-several", RequestPhase.ADAPTERS),
    "base and adapters": ("served-mixed", RequestPhase.MIXED),
    SWAP: ("served-swap", RequestPhase.SWAPPED),
}
"""Load -> name of its check, and the phase in which its answers are collected. SWAP, the replacement of an adapter by
another adapter, counts as a load here."""


@dataclass(frozen=True)
class Judged:
    """The results of the checks of a server, and the loads that must not be timed because their check did not pass."""

    checks: list[CheckResult]
    refused: dict[str, str]
    """Load, or SWAP -> reason why the load must not be timed. A load that may be timed has no entry."""


def judge(session: Session, base: Path, subject: Named, case: Case) -> Judged:
    """Send requests under each load, and judge the answers.

    session: a session with at least two adapters. base: folder of the base model. subject: the Method and dtype for the
    names of the checks. case: the case for these names. Raises ServerError if the server does not answer.
    """
    names = [BASE, *session.adapters]
    trained, second = names[1:3]
    session.alone(BASE)
    files = {name: AdapterFile.read(folder) for name, folder in session.adapters.items()}
    comparison = AnswerComparison(session.client.url, base, files, session.body_of)
    try:
        floor = comparison.noise_floor(session.observations, [subject.dtype])
    except UsageError as error:  # without a noise floor, no other answer can be judged
        check = CheckResult(
            check=identifier(subject, case, "served-base"), outcome=Outcome.FAIL, policy="served", detail=error.what
        )
        return Judged([check], dict.fromkeys(_CHECKS, f"no speed without parity: {check.check} failed"))
    session.alone(trained)
    session.mixed(RequestPhase.ADAPTERS)
    session.mixed(RequestPhase.MIXED)
    not_offered = ""
    try:
        session.swapped_alone(trained, second)
    except RequestRefusedError as error:
        not_offered = f"not offered: {error.what}"
    results = {name: comparison.judge(name, session.observations, floor) for name in names}
    of_load: dict[str, Sequence[str]] = {
        "base": [BASE], "one adapter": [trained], "several adapters": names[1:], "base and adapters": names,
        SWAP: [second],
    }  # fmt: skip
    assert {*get_args(Load)} < of_load.keys()  # noqa: S101  # a load without a judgement would be timed
    checks, refused = [], {}
    for load, (name, phase) in _CHECKS.items():
        if load == SWAP and not_offered:
            check = skipped(subject, case, name, not_offered)
        else:
            check = _check(subject, case, name, phase, [results[one] for one in of_load[load]])
        checks.append(check)
        if check.outcome is Outcome.FAIL:
            refused[load] = f"no speed without parity: {check.check} failed: {check.detail}"
        elif check.outcome is Outcome.SKIPPED:
            refused[load] = check.detail
    return Judged(checks, refused)


def _check(subject: Named, case: Case, name: str, phase: RequestPhase, results: Sequence[SubjectResult]) -> CheckResult:
    """Return the check result of one load. name: the check's name. phase: where the load's answers were collected."""
    found = {one: part for one in results for part in one.phases if part.phase is phase}
    if undecided := next(
        (one for one in results if one.verdict in (SubjectVerdict.CANNOT_TELL, SubjectVerdict.NOT_COMPARED)), None
    ):
        because = undecided.reason or "the adapter changes the answers too little to judge them"
        return skipped(subject, case, name, f"{undecided.name}: {because}")
    bad = [one for one, part in found.items() if part.wrong or _wrong_together(one)]
    worst = max(bad or found, key=lambda one: _share(one, found[one]))
    part, allowed = found[worst], worst.allowed.largest if worst.allowed else None
    wrong, requests = sum(one.wrong for one in found.values()), sum(one.requests for one in found.values())
    cause = worst.finding.cause if bad and worst.finding else ""
    return CheckResult(
        check=identifier(subject, case, name),
        outcome=Outcome.FAIL if bad else Outcome.PASS,
        error=part.largest if math.isfinite(part.largest) else None,
        allowed=allowed,
        tensor=f"log-probabilities of {worst.name or 'the base'}",
        worst=worst.finding.worst if bad and worst.finding else "",
        policy="served",
        detail=f"{wrong} of {requests} answers are wrong: {cause}" if bad else f"{requests} answers",
    )


def _wrong_together(result: SubjectResult) -> bool:
    """Return whether the answers of a model are wrong as a whole, although each single answer is judged right."""
    return result.verdict is SubjectVerdict.NONCONFORMING and not any(part.wrong for part in result.phases)


def _share(result: SubjectResult, part: PhaseResult) -> float:
    return part.largest / result.allowed.largest if result.allowed else 0.0


def timed(refused: Mapping[str, str]) -> bool:
    """Return whether at least one load of the server may be timed. refused: see `Judged.refused`."""
    return any(load not in refused for load in get_args(Load))
