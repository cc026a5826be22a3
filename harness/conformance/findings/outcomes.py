"""One check of one case, and what became of it once the known defects are counted. No torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from harness.records.record import CheckResult, FrozenModel, Outcome


class CheckStatus(StrEnum):
    """What a result means: a known defect is a failure that was expected, and is shown as one."""

    PASS = "pass"  # noqa: S105
    KNOWN_DEFECT = "known defect"
    FAIL = "fail"
    UNSUPPORTED = "unsupported"
    SKIPPED = "skipped"


class CheckOutcome(FrozenModel):
    """One check of one case. case: config and shape in words; defect: the id of the known defect that explains a failure."""

    implementation: str
    kind: Literal["method", "operation", "base"]
    target: str
    dtype: str
    case: str
    result: CheckResult
    defect: str = ""

    @property
    def check(self) -> str:
        """The check's name."""
        return self.result.check.split("/")[1]

    @property
    def standing(self) -> CheckStatus:
        """What the result means."""
        if self.result.outcome is Outcome.FAIL:
            return CheckStatus.KNOWN_DEFECT if self.defect else CheckStatus.FAIL
        if self.result.outcome is Outcome.PASS:
            return CheckStatus.PASS
        return CheckStatus.UNSUPPORTED if self.result.detail.startswith("unsupported") else CheckStatus.SKIPPED

    @property
    def share(self) -> float | None:
        """The error as a share of what was allowed; None where nothing was measured or nothing allowed."""
        if self.result.error is None or not self.result.allowed:
            return None
        return self.result.error / self.result.allowed
