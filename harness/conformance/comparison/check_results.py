"""Results of checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from harness.conformance.case import Case
from harness.conformance.comparison.tolerance_policies import Judgement
from harness.records.check import CheckId
from harness.records.record import CheckResult, Outcome


class Named(Protocol):
    """A subject: an implementation of a Method or of an Operation, in one dtype."""

    @property
    def method(self) -> str:
        """The Method's or the Operation's name."""

    @property
    def dtype(self) -> str:
        """The dtype's name."""


def judged(subject: Named, case: Case, name: str, judgement: Judgement, detail: str = "") -> CheckResult:
    """Return a judgement as the result of the check `name`. If `decided` is False, the result is a skip with a reason."""
    if not judgement.decided:
        return skipped(subject, case, name, judgement.worst)
    return CheckResult(
        check=identifier(subject, case, name),
        outcome=Outcome.PASS if judgement.passed else Outcome.FAIL,
        error=judgement.error,
        allowed=judgement.allowed,
        tensor=judgement.tensor,
        worst=judgement.worst,
        policy=judgement.policy,
        nonfinite=judgement.nonfinite,
        detail=detail,
    )


def listed(subject: Named, case: Case, name: str, odd: Sequence[str], otherwise: str = "") -> CheckResult:
    """Return a pass if `odd` is empty, else a failure that names the first five items. otherwise: the detail of a pass."""
    return CheckResult(
        check=identifier(subject, case, name),
        outcome=Outcome.FAIL if odd else Outcome.PASS,
        error=float(len(odd)),
        allowed=0.0,
        policy="exact",
        detail="; ".join(odd[:5]) or otherwise,
    )


def skipped(subject: Named, case: Case, name: str, because: str) -> CheckResult:
    """Return a skip of the check `name`. because: its reason."""
    return CheckResult(check=identifier(subject, case, name), outcome=Outcome.SKIPPED, detail=because)


def identifier(subject: Named, case: Case, name: str) -> str:
    """Return `method/check/dtype/state`."""
    return str(CheckId(subject.method, name, subject.dtype, case.state))


def prefix_tensor(path: str, judgement: Judgement) -> Judgement:
    """Return the judgement with `path`, the name of a layer or a call, in front of its tensor's name."""
    return replace(judgement, tensor=f"{path}: {judgement.tensor}")
