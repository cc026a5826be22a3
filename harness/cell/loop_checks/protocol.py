"""Events that the worker of `check --loop` reports. Imports no torch."""

from __future__ import annotations

from harness.conformance.findings.loop_settings import SettingFound
from harness.conformance.findings.outcomes import CheckOutcome
from harness.records.base_model import FrozenModel
from harness.records.record import Environment


class LoopEvent(FrozenModel):
    """One event that the worker sends to `check --loop`. Exactly one field is set."""

    missing: str = ""
    """Reason why the loop cannot run here. It names the module that is not installed."""
    environment: Environment | None = None
    """Machine and software of the worker."""
    begin: str = ""
    """Description of the training runs that begin, e.g. `lora by reference in float32`."""
    outcome: CheckOutcome | None = None
    """Outcome of a check."""
    setting: SettingFound | None = None
    """Effect of one setting of the loop's library on training."""
    died: str = ""
    """Reason why the worker ended early."""
