"""Functions that make a `CheckResult`, and functions that name the layer or the form of a judgement or an exception."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from harness.conformance.case import Case
from harness.conformance.comparison.tolerance_policies import Judgement
from harness.records.check import CheckId
from harness.records.record import CheckResult, Outcome


class Named(Protocol):
    """Subject of a check: an implementation of a Method or of an Operation, in one dtype."""

    @property
    def method(self) -> str:
        """The Method's or the Operation's name."""

    @property
    def dtype(self) -> str:
        """The dtype's name."""


def judged(subject: Named, case: Case, name: str, judgement: Judgement, detail: str = "") -> CheckResult:
    """Return the result of the check `name` for a judgement.

    If the reference is too inaccurate to decide, the result is a skip with the reason `judgement.worst`.
    """
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


def from_problems(
    subject: Named, case: Case, name: str, problems: Sequence[str], detail_of_pass: str = ""
) -> CheckResult:
    """Return the result of the check `name`: a pass if `problems` is empty, otherwise a failure.

    problems: descriptions of what is wrong. The failure shows the first five. detail_of_pass: the `detail` of a pass.
    """
    return CheckResult(
        check=identifier(subject, case, name),
        outcome=Outcome.FAIL if problems else Outcome.PASS,
        error=float(len(problems)),
        allowed=0.0,
        policy="exact",
        detail="; ".join(problems[:5]) or detail_of_pass,
    )


def skipped(subject: Named, case: Case, name: str, because: str) -> CheckResult:
    """Return a skip as the result of the check `name`. because: the reason."""
    return CheckResult(check=identifier(subject, case, name), outcome=Outcome.SKIPPED, detail=because)


def identifier(subject: Named, case: Case, name: str) -> str:
    """Return the check id `method/check/dtype/state`."""
    return str(CheckId(subject.method, name, subject.dtype, case.state))


def prefix_tensor(path: str, judgement: Judgement) -> Judgement:
    """Return the judgement with `path` in front of its tensor's name.

    path: name of a layer or of a call.
    """
    return replace(judgement, tensor=f"{path}: {judgement.tensor}")


@contextmanager
def named_if_raised(path: str, form: str) -> Iterator[None]:
    """Add the names of the layer and the form to an exception that is raised inside this context."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the form `{path} {form}`")
        raise
