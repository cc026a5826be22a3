"""The state of a running Cell. If the Cell fails, its Record (the file with its results) still contains this state.

The parity gate compares the adapted model with a float64 reference. Only a Cell that passes its gate is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from harness.cell.job import Emit, Job, KnownGate
from harness.cell.measure.memory import PeakMeter
from harness.cell.measure.phases import PhaseClock
from harness.cell.outcomes import NonconformingError
from harness.conformance.findings.summary import describe
from harness.conformance.subject import DTYPES
from harness.methods.registry import Registry
from harness.records.imported import LossAgreement
from harness.records.record import Cell, CheckResult, Gate, Note, Outcome


@dataclass
class CellRun:
    """A running Cell: its job, its meters of time and memory, and the results so far."""

    job: Job
    registry: Registry
    clock: PhaseClock
    meter: PeakMeter
    emit: Emit
    """Function that reports progress to the runner."""
    baseline_B: int
    """Memory of the process before it loads the model, in bytes."""
    gate_key: str = ""
    """Key of the Cell's parity gate (see `harness.cell.gate_key`). Empty if the Cell never shares the result of its gate."""
    gate: Gate | None = None
    """Result of the parity gate; None until the gate has ended."""
    checks: list[CheckResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    typed_notes: list[Note] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    """Paths of the adapted layers."""
    loss_agreement: LossAgreement | None = None
    """Comparison of an imported adapter's loss with its logged losses. None before the comparison, and always None for
    a Cell without an imported adapter."""
    adapted: Mapping[str, object] = field(default_factory=dict)
    """Path of each adapted layer -> the module that the implementation put there."""

    @property
    def cell(self) -> Cell:
        """The Cell of the job."""
        return self.job.cell

    @property
    def device(self) -> torch.device:
        """The device that the Cell runs on."""
        return torch.device(self.job.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model."""
        return DTYPES[self.cell.dtype]

    @property
    def known_gate(self) -> KnownGate | None:
        """The parity gate of an earlier Cell, whose result this Cell reuses. None if this Cell runs its own gate."""
        known = self.job.known_gate
        return known if known is not None and known.key == self.gate_key else None

    def require(self, results: Sequence[CheckResult]) -> None:
        """Add results of checks to `checks`. Raises NonconformingError if one of these checks failed."""
        self.checks += results
        failed = next((result for result in results if result.outcome is Outcome.FAIL), None)
        if failed is not None:
            raise NonconformingError(f"{failed.check} failed: {describe(failed)}")
