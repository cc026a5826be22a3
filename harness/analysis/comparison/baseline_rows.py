"""Findings of a comparison with a baseline: their kinds, and a row for each compared quantity."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from harness.analysis.verdict_kind import Verdict, VerdictKind

PROCESS_PEAK_B = 16 * 2**20
"""Growth of a process's memory (VmHWM, or sampled) that is no finding.

Measured in results/published/2026-11-25-tune-small-cpu, where three Cells each of nine methods differ in the learning rate
alone: the training peak above the imports has a standard deviation of 1.7 MiB from process to process, at most 2.4 MiB (95 %
bound, 18 degrees of freedom). Then the second of two processes takes 16 MiB more than the first once in a million."""
PROCESS_SHARE = 0.05
"""The same limit as a share of a large peak. Two runs of SmolLM2, with equal tensors in a step to the byte,
differed by 2.7 % of 1.4 GiB. An allocator's waste grows with the requested memory."""
COUNTED_PEAK_B = 64 * 2**10
"""Growth of tensors at one time in a step, counted on a CPU, that is no finding: some scalars or a short vector. It is
chosen, not measured: thirty Cells of a small Llama (six methods, packed bases, four providers, 32 and 16 bits, 8-bit and
paged optimizers, checkpointing, torch.compile) took the same to the byte in each of two processes."""
ACCURACY = 0.02
"""Largest drop of an accuracy that still counts as no worse."""
LOOSER = 10.0
"""Largest growth of a check's allowance without a finding: allowances follow the noise that each run
measures, which differs between machines."""
LOSS_SHARE, LOSS = 0.1, 0.05
"""Growth of a training loss that is no finding: a share of it plus nats. Chosen, not measured: the same Cell
sees the same batches in the same order, so that only rounding differs, which may grow as it trains."""
ONE_SEED = "one seed: this checkpoint, not the method"
TIMES = "not judged here: `peft-harness gate --pairs` judges times"


class FindingKind(StrEnum):
    """Kinds of rows. `MEANING` gives the rule of each."""

    PARITY = "parity"
    OUTCOME = "outcome"
    MISSING = "missing"
    NEW = "new"
    PARAMETERS = "parameters"
    MEMORY = "memory"
    CHECKPOINT = "checkpoint"
    ACCURACY = "accuracy"
    LOSS = "loss"
    ASSETS = "assets"
    ENVIRONMENT = "environment"
    SPEED = "speed"
    TIME = "time"


MEANING: dict[FindingKind, str] = {
    FindingKind.PARITY: (
        "fails for a Cell that no longer computes its Method, or for a check that passed and now fails; inconclusive for a "
        "check that passed and was not tried, or that allows more than ten times as much"
    ),
    FindingKind.OUTCOME: "fails for a Cell that was ok and now ends otherwise: oom, timeout, error, lost or skipped",
    FindingKind.MISSING: (
        "a Cell, or one of its numbers, that the baseline has and the run has not. Fails where the run does not plan the "
        "Cell, its Record was changed after the run, or the number was measured before; not-run where the run did not reach "
        "the Cell, or its Record cannot be read"
    ),
    FindingKind.NEW: "a Cell or a number that the run has and the baseline has not: shown, not judged",
    FindingKind.PARAMETERS: "counts of scalars: fails at any difference, since the Cell is the same",
    FindingKind.MEMORY: (
        "bytes of tensors, counted one by one: fails at one more. The peak of training: on a GPU as allocated, fails at one "
        "byte more; on a CPU as counted in one step, at more than 64 KiB; of a process (VmHWM) above its imports, at more "
        "than 16 MiB and a twentieth, which equal programs may differ in; or all three at more than --memory-bytes"
    ),
    FindingKind.CHECKPOINT: "sizes of saved files: fails at one byte more",
    FindingKind.ACCURACY: (
        "paired on the same items, and with several seeds also on the seeds. Passes where the 95 % interval of the "
        "difference lies above minus the margin (--accuracy-points), fails where it does not and the drop is significant at "
        "5 % over all comparisons of the gate together (Holm), else inconclusive. One seed speaks for this checkpoint, not "
        "for the method"
    ),
    FindingKind.LOSS: (
        "the training loss, mean over the last quarter of the steps: fails where it is higher by more than a tenth and "
        "0.05. The batches are the same, so that only rounding may differ"
    ),
    FindingKind.ASSETS: "inconclusive where a model, a data set or a task is not the same",
    FindingKind.ENVIRONMENT: (
        "inconclusive where machine, driver, libraries, threads, variables or device differ, so that a difference need not "
        "come from the code; another code version or commit is only shown"
    ),
    FindingKind.SPEED: (
        "times that may be judged: of `gate --pairs`, with interleaved sides; of pytest's --harness-gate, by the spread of "
        "saved process runs. Fails where slower, beyond a margin; inconclusive where neither that nor the opposite is "
        "shown. Each reason gives the smallest detectable slow-down"
    ),
    FindingKind.TIME: (
        "medians of one process each, from two sessions: shown, never judged. `peft-harness gate --pairs` judges times"
    ),
}

Value = int | float | str | None
Unit = Literal["B", "1", "s", "1/s", "J", "share", "nats", ""]


@dataclass(frozen=True)
class ComparisonRow:
    """Comparison of one quantity."""

    kind: FindingKind
    """Kind of the finding."""
    word: VerdictKind
    """Verdict."""
    name: str
    """The Cell, the recipe, or the number of Cells."""
    cells: tuple[str, ...]
    """cell_ids."""
    what: str
    """Quantity."""
    reason: str = ""
    """Reason of the verdict; empty if there is nothing to explain."""
    base: Value = None
    """Value in the baseline; None where missing."""
    new: Value = None
    """Value in the run; None where missing."""
    unit: Unit = ""
    """Unit of the values; empty for words and counts of checks."""
    interval: tuple[float, float] | None = None
    """Interval of new - base; of a speed, of new / base - 1."""
    records: tuple[str, ...] = ()
    """Ids of the Records, the baseline's first."""

    @property
    def judged(self) -> bool:
        """True if the row counts for the verdict."""
        return self.kind not in (FindingKind.TIME, FindingKind.NEW)

    @property
    def same(self) -> bool:
        """True if both values are equal and the row passes."""
        return self.word is VerdictKind.PASS and self.base == self.new and self.base is not None

    @property
    def valued(self) -> bool:
        """True if either side has a value."""
        return self.base is not None or self.new is not None

    @property
    def delta(self) -> float | None:
        """New minus base, of numbers."""
        if isinstance(self.base, int | float) and isinstance(self.new, int | float):
            return self.new - self.base
        return None


@dataclass(frozen=True)
class Margins:
    """Differences that are no finding."""

    memory_B: int | None = None
    """Growth of training peaks. None: exact as allocated, COUNTED_PEAK_B as counted on a CPU, the larger of
    PROCESS_PEAK_B and PROCESS_SHARE of a process."""
    accuracy: float = ACCURACY
    """Drop of an accuracy."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All findings of one gate: the input of every output format."""

    verdict: Verdict
    """Verdict of the gate."""
    rows: tuple[ComparisonRow, ...]
    """All comparisons."""
    compared: int
    """Number of Cells or benchmarks on both sides."""
    unreadable: tuple[str, ...] = ()
    """Unreadable files of both sides, with the reason."""
    changed: tuple[str, ...] = ()
    """Files that are not as their run left them."""

    def of(self, *words: VerdictKind) -> list[ComparisonRow]:
        """Return the judged rows with one of these words."""
        return [row for row in self.rows if row.judged and row.word in words]
