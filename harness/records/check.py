"""The result of one check in a Record, and the identifiers of checks."""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from pydantic import model_validator

from harness.records.base_model import FrozenModel

_SEPARATOR = "/"


class CheckId(NamedTuple):
    """Identifier of a check. Each part may also be a pattern, e.g. `lora/merge/*/*`."""

    target: str
    """Name of the Method, Operation or other target that is checked."""
    check: str = ""
    """The check's name, e.g. `gradient`."""
    dtype: str = ""
    state: str = ""
    """State in which the check runs: `init`, `warm`, `trained` or `call`. `-` for a check without a state."""

    def __str__(self) -> str:
        return _SEPARATOR.join(self)

    @property
    def is_complete(self) -> bool:
        """True if all four parts are present and no part contains a separator."""
        return all(self) and _SEPARATOR not in self.state

    @classmethod
    def parse(cls, text: str) -> CheckId:
        """Split an identifier and return its parts. Missing parts are empty, because old files may lack some."""
        return cls(*text.split(_SEPARATOR, 3))


class Outcome(StrEnum):
    """Outcome of one check."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    SKIPPED = "skipped"


class CheckResult(FrozenModel):
    """Result of one check: the outcome, the measured error and the allowed error."""

    check: str
    """Identifier, `method/check/dtype/state`, e.g. `lora/gradient/float32/warm`; see `peft-harness explain CHECK`."""
    outcome: Outcome
    """Outcome: pass, fail or skipped."""
    error: float | None = None
    """Worst error, in the norm that `policy` names. None if the error was not finite or was not measured."""
    allowed: float | None = None
    """Largest error that passes, in the same norm as `error`."""
    tensor: str = ""
    """Name of the tensor with the largest ratio of error to allowed error."""
    worst: str = ""
    """Worst element of `tensor`, as text: its index, its value and the expected value."""
    policy: str = ""
    """Name of the tolerance policy."""
    nonfinite: int = 0
    """Number of elements that are NaN or infinite where the reference is finite."""
    detail: str = ""
    """Reason of a failure or skip, and other details."""

    @cached_property
    def id(self) -> CheckId:
        """The parts of `check`."""
        return CheckId.parse(self.check)

    @property
    def of_merging(self) -> bool:
        """True if the check judges merged weights."""
        return "merge" in self.id.check

    @property
    def share(self) -> float | None:
        """The error divided by the allowed error. None if the error was not measured or no error is allowed."""
        return None if self.error is None or not self.allowed else self.error / self.allowed

    @model_validator(mode="after")
    def _numbers_decide_the_outcome(self) -> CheckResult:
        beyond = self.error is not None and self.allowed is not None and self.error > self.allowed
        if self.outcome is Outcome.PASS and (beyond or self.nonfinite):
            found = (
                f"{self.nonfinite} elements not finite" if self.nonfinite else f"{self.error} of {self.allowed} allowed"
            )
            raise ValueError(f"{self.check} did not pass: {found}")
        return self
