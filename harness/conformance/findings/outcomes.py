"""Outcome of one check in one case, with the known defects taken into account. Imports no torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field

from harness.methods.registry import TargetKind
from harness.records.base_model import FrozenModel
from harness.records.check import CheckId, CheckResult, Outcome


class CheckStatus(StrEnum):
    """Status of an outcome. `KNOWN_DEFECT` is a failure that a known defect explains."""

    PASS = "pass"  # noqa: S105
    KNOWN_DEFECT = "known defect"
    FAIL = "fail"
    UNSUPPORTED = "unsupported"
    SKIPPED = "skipped"


class Execution(StrEnum):
    """Ways in which the run of a check can end."""

    COMPLETED = "completed"
    UNSUPPORTED = "unsupported"
    """The implementation raised harness.Unsupported, because it does not offer the case."""
    RAISED = "raised"
    """The implementation or the check raised another exception; `result.detail` names it."""


class DeviceLostError(RuntimeError):
    """The GPU accepts no more work from this process, for example after an access to an illegal address."""


def in_environment(name: str, environment: str) -> str:
    """Return `name (environment)`, or only `name` if `environment` is empty."""
    return f"{name} ({environment})" if environment else name


class CheckOutcome(FrozenModel):
    """Outcome of one check in one case."""

    implementation: str
    kind: TargetKind
    target: str
    dtype: str
    case: str
    """The case in words: config and shape."""
    settings: dict[str, Any] = Field(default={})
    """Every setting and size of the case, also those with default values: name -> number, word or list. Empty for a
    loader."""
    result: CheckResult
    defect: str = ""
    """Id of the known defect that explains the failure. Empty if no known defect explains it."""
    execution: Execution = Execution.COMPLETED
    environment: str = ""
    """Label of the environment in which the check ran, e.g. `peft 0.19.1`. Empty for the Python that runs the harness."""
    traceback: str = ""
    """Traceback of the exception if the check ended by one. Otherwise empty."""

    @classmethod
    def of_whole_target(
        cls,
        implementation: str,
        kind: TargetKind,
        target: str,
        *,
        check: str,
        case: str,
        detail: str,
        execution: Execution = Execution.COMPLETED,
    ) -> CheckOutcome:
        """Return a failure of the implementation as a whole. It has no dtype and no state; both are written as `-`."""
        result = CheckResult(check=str(CheckId(target, check, "-", "-")), outcome=Outcome.FAIL, detail=detail)
        return cls(
            implementation=implementation, kind=kind, target=target, dtype="-", case=case, result=result, execution=execution
        )  # fmt: skip

    @property
    def provider(self) -> str:
        """Name of the implementation, with its environment, e.g. `hf-peft (peft 0.19.1)`."""
        return in_environment(self.implementation, self.environment)

    @property
    def check(self) -> str:
        """The check's name."""
        return self.result.id.check

    @property
    def status(self) -> CheckStatus:
        """The status: `pass`, `fail`, `known defect`, `unsupported` or `skipped`."""
        if self.result.outcome is Outcome.FAIL:
            return CheckStatus.KNOWN_DEFECT if self.defect else CheckStatus.FAIL
        if self.result.outcome is Outcome.PASS:
            return CheckStatus.PASS
        return CheckStatus.UNSUPPORTED if self.execution is Execution.UNSUPPORTED else CheckStatus.SKIPPED

    @property
    def share(self) -> float | None:
        """The error divided by the allowed error. None if no error was measured or allowed."""
        return self.result.share
