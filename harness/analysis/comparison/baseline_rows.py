"""What a run is compared in with its baseline: kinds of findings, and a row for each thing that was compared."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from harness.analysis.verdict_kind import Verdict, VerdictKind

PROCESS_PEAK_B = 16 * 2**20
"""How much more of a process's memory (VmHWM, or sampled) is no finding.

Measured in results/published/2026-11-25-tune-small-cpu, where three Cells each of nine methods differ in the learning rate
alone: the training peak above the imports has a standard deviation of 1.7 MiB from process to process, at most 2.4 MiB (95 %
bound, 18 degrees of freedom). Then the second of two processes takes 16 MiB more than the first once in a million."""
PROCESS_SHARE = 0.05
"""And as a share of a large one: two runs of SmolLM2, whose tensors at one time in a step were the same to the byte,
differed by 2.7 % of 1.4 GiB. What an allocator wastes grows with what it is asked for."""
COUNTED_PEAK_B = 64 * 2**10
"""How much more of tensors at one time in a step, counted on a CPU, is no finding: some scalars or a short vector. It is
chosen, not measured: thirty Cells of a small Llama (six methods, packed bases, four providers, 32 and 16 bits, 8-bit and
paged optimizers, checkpointing, torch.compile) took the same to the byte in each of two processes."""
ACCURACY = 0.02
"""The drop of an accuracy that is still called no worse."""
LOOSER = 10.0
"""How many times as much a check may allow as in the baseline without a question: allowances follow the noise that each run
measures, which differs between machines."""
LOSS_SHARE, LOSS = 0.1, 0.05
"""How much higher a training loss is no finding, in parts of it and in nats together. Chosen, not measured: the same Cell
sees the same batches in the same order, so that only rounding differs, which may grow as it trains."""
ONE_SEED = "one seed: this checkpoint, not the method"
TIMES = "not judged here: `peft-harness gate --pairs` judges times"


class FindingKind(StrEnum):
    """What a row is about. Each has a meaning of its own, and a rule: see `MEANING`."""

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
    FindingKind.PARITY: "fails where a Cell that computed what its Method says now does not, or a check that passed fails; "
    "inconclusive where a check that passed was not tried, or allows more than ten times what it did",
    FindingKind.OUTCOME: "fails where a Cell that was ok now ends otherwise: oom, timeout, error, lost or skipped",
    FindingKind.MISSING: "a Cell, or a number of one, that the baseline has and the run has not. Fails where the run does not plan "
    "the Cell, its Record was changed after the run, or the number was measured before; not-run where the run did not come "
    "to it, or its Record cannot be read",
    FindingKind.NEW: "what the run has and the baseline has not: told, not judged",
    FindingKind.PARAMETERS: "counts of scalars: fails at any difference, since the Cell is the same",
    FindingKind.MEMORY: "bytes of tensors, counted one by one: fails at one more. The peak of training: on a GPU as allocated, "
    "fails at one byte more; on a CPU what tensors took at one time in a step, counted allocation by allocation, at more "
    "than 64 KiB; of a process (VmHWM) above its imports, at more than 16 MiB and a twentieth, which equal programs may "
    "differ in; or all three at more than --memory-bytes",
    FindingKind.CHECKPOINT: "sizes of what a user would save: fails at one byte more",
    FindingKind.ACCURACY: "the same items, paired, and over several seeds these too. Passes where the 95 % interval of the "
    "difference lies above minus the margin (--accuracy-points), fails where it does not and the drop is significant at 5 % "
    "over all comparisons of the gate together (Holm), else inconclusive. One seed speaks for this checkpoint, not for the "
    "method",
    FindingKind.LOSS: "the training loss, mean over the last quarter of the steps: fails where it is higher by more than a tenth "
    "and 0.05. The batches are the same, so that only rounding may differ",
    FindingKind.ASSETS: "inconclusive where a model, a data set or a task is not the same one",
    FindingKind.ENVIRONMENT: "inconclusive where machine, driver, libraries, threads, variables or device are not the same, so "
    "that a difference need not come from the code; another code version or commit is told",
    FindingKind.SPEED: "times that may be judged: of `gate --pairs`, whose sides ran in turn; of pytest's --harness-gate, by the "
    "spread of process runs that were kept. Fails where slower, beyond a margin; inconclusive where neither that nor the "
    "opposite is shown. Each reason says how small a slow-down is found",
    FindingKind.TIME: "medians of one process each, from two sessions: shown, never judged. `peft-harness gate --pairs` judges "
    "times",
}

Value = int | float | str | None
Unit = Literal["B", "1", "s", "1/s", "J", "share", "nats", ""]


@dataclass(frozen=True)
class ComparisonRow:
    """One thing that was compared.

    name: the Cell, the recipe, or how many Cells. cells: cell_ids. what: the quantity. base, new: its values, None where
    there is none; of unit `""` they are words, or counts of checks. interval: of new - base, of a speed of new / base - 1.
    records: ids, the baseline's first.
    """

    kind: FindingKind
    word: VerdictKind
    name: str
    cells: tuple[str, ...]
    what: str
    reason: str = ""
    base: Value = None
    new: Value = None
    unit: Unit = ""
    interval: tuple[float, float] | None = None
    records: tuple[str, ...] = ()

    @property
    def judged(self) -> bool:
        """Say whether the row takes part in the verdict."""
        return self.kind not in (FindingKind.TIME, FindingKind.NEW)

    @property
    def same(self) -> bool:
        """Say whether there is nothing to tell: both values are equal, and so it passes."""
        return self.word is VerdictKind.PASS and self.base == self.new and self.base is not None

    @property
    def valued(self) -> bool:
        """Say whether there is a value on either side."""
        return self.base is not None or self.new is not None

    @property
    def delta(self) -> float | None:
        """New minus base, of numbers."""
        if isinstance(self.base, int | float) and isinstance(self.new, int | float):
            return self.new - self.base
        return None


@dataclass(frozen=True)
class Margins:
    """What is no finding yet. memory_B: of training peaks; None is exact as allocated, COUNTED_PEAK_B as counted on a
    CPU, PROCESS_PEAK_B or PROCESS_SHARE of a process, whichever is more."""

    memory_B: int | None = None
    accuracy: float = ACCURACY


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that one gate found: what every output of a gate is made from.

    rows: everything that was compared. compared: how many Cells or benchmarks are there on both sides. unreadable: files of
    both sides that could not be read, with the reason; changed: files that are not as their run left them.
    """

    verdict: Verdict
    rows: tuple[ComparisonRow, ...]
    compared: int
    unreadable: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def of(self, *words: VerdictKind) -> list[ComparisonRow]:
        """Return the judged rows with one of these words."""
        return [row for row in self.rows if row.judged and row.word in words]
