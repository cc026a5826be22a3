"""One check of one case, and what became of it once the known defects are counted. No torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from harness.records.base_model import FrozenModel
from harness.records.check import CheckResult, Outcome


class CheckStatus(StrEnum):
    """What a result means: a known defect is a failure that was expected, and is shown as one."""

    PASS = "pass"  # noqa: S105
    KNOWN_DEFECT = "known defect"
    FAIL = "fail"
    UNSUPPORTED = "unsupported"
    SKIPPED = "skipped"


class Execution(StrEnum):
    """How the run of a check ended."""

    COMPLETED = "completed"
    UNSUPPORTED = "unsupported"
    """The implementation does not offer the case: it raised harness.Unsupported."""
    RAISED = "raised"
    """The implementation or the check raised another exception; `result.detail` names it."""


class CheckOutcome(FrozenModel):
    """One check of one case."""

    implementation: str
    kind: Literal["method", "operation", "base"]
    target: str
    dtype: str
    case: str
    """Config and shape in words."""
    result: CheckResult
    defect: str = ""
    """Id of the known defect that explains the failure."""
    execution: Execution = Field(default=Execution.COMPLETED, exclude=True)
    """Not part of JSON documents, where `standing` says it."""

    @property
    def check(self) -> str:
        """The check's name."""
        return self.result.id.check

    @property
    def standing(self) -> CheckStatus:
        """What the result means."""
        if self.result.outcome is Outcome.FAIL:
            return CheckStatus.KNOWN_DEFECT if self.defect else CheckStatus.FAIL
        if self.result.outcome is Outcome.PASS:
            return CheckStatus.PASS
        return CheckStatus.UNSUPPORTED if self.execution is Execution.UNSUPPORTED else CheckStatus.SKIPPED

    @property
    def share(self) -> float | None:
        """The error as a share of what was allowed; None where nothing was measured or nothing allowed."""
        if self.result.error is None or not self.result.allowed:
            return None
        return self.result.error / self.result.allowed
