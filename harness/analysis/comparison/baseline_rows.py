"""Rows of a comparison with a baseline, one per compared quantity. The kind of a row determines how it is judged."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from harness.analysis.verdict_kind import Verdict, VerdictKind
from harness.records.record import Record

PROCESS_PEAK_B = 16 * 2**20
"""Largest growth of a process's peak memory above its imports, in bytes, that does not fail the gate. The peak is VmHWM
or a sampled value.

The limit rests on results/published/2026-11-25-tune-small-cpu. There, three Cells of each of nine methods differ only
in the learning rate. Their peak memory above the imports varies between processes, with a standard deviation of 1.7
MiB. The upper 95 % bound of this deviation is 2.4 MiB (18 degrees of freedom). Even with a deviation of 2.4 MiB, the
second of two processes exceeds the first by 16 MiB in only one of a million pairs."""
PROCESS_SHARE = 0.05
"""Largest growth of a process's peak memory that does not fail the gate, as a share of the peak in the baseline. The
larger of PROCESS_PEAK_B and this share counts. The overhead of an allocator grows with the requested memory: two runs
of SmolLM2 had peaks of 1.4 GiB that differed by 2.7 %, although the tensors of their steps had equal sizes."""
COUNTED_PEAK_B = 64 * 2**10
"""Largest growth of the counted peak, in bytes, that does not fail the gate. The counted peak is the number of bytes of
all tensors that exist at the same time in a step on a CPU. The limit has room for some scalars or a short vector. It
was chosen, not measured. Each of thirty Cells of a small Llama had the same counted peak in two processes. These Cells
cover six methods, 4-bit base weights, four providers, 32 and 16 bits, 8-bit and paged optimizers, checkpointing, and
torch.compile."""
ACCURACY = 0.02
"""Largest drop of an accuracy that does not fail the gate: two percentage points."""
LOOSER = 10.0
"""Largest ratio of the error that a check allows in the run to the error that it allowed in the baseline. Above it, the
row on the checks is inconclusive. The allowed error follows the noise that each run measures, and this noise differs
between machines."""
LOSS_SHARE, LOSS = 0.1, 0.05
"""Largest rise of a training loss that does not fail the gate: LOSS_SHARE times the loss of the baseline, plus LOSS
nats. Both numbers were chosen, not measured. Both runs see the same batches in the same order, so their losses differ
only by rounding errors. These errors may grow during training."""
ONE_SEED = "one seed: valid for this checkpoint, not for the method"
TIMES = "not judged here: `peft-harness gate --pairs` judges times"


class RowKind(StrEnum):
    """Kind of a `ComparisonRow`. `MEANING` says what the rows of each kind compare, and when they fail."""

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


MEANING: dict[RowKind, str] = {
    RowKind.PARITY: (
        "the checks of a Cell. Fails if the Cell departs from its Method or if a check fails, whatever the baseline shows; "
        "inconclusive if a check that passed before was not tried, or now allows an error more than ten times as large"
    ),
    RowKind.OUTCOME: (
        "the status of a Cell. Fails if the Cell was ok and is not ok now: oom, timeout, error, lost or skipped"
    ),
    RowKind.MISSING: (
        "a Cell or a number that only the baseline has. Fails if the run does not plan the Cell, if its Record was changed "
        "after the run, or if the number was measured before; not-run if the run did not reach the Cell, or if its Record "
        "cannot be read"
    ),
    RowKind.NEW: "a Cell or a number that only the run has: shown, not judged",
    RowKind.PARAMETERS: "counts of scalars. Fails at any difference, since the Cell is the same",
    RowKind.MEMORY: (
        "bytes of tensors, and peaks of training. Counted bytes fail if they grow by one byte. A peak fails on a GPU if the "
        "allocated memory grows by one byte; on a CPU if the tensors in one step grow by more than 64 KiB, or if the "
        "memory of the process (VmHWM) above its imports grows by more than 16 MiB and by more than 5 %, since equal "
        "programs may differ by less. --memory-bytes replaces these three limits"
    ),
    RowKind.CHECKPOINT: "sizes of saved files. Fails if a size grows by one byte",
    RowKind.ACCURACY: (
        "accuracies, paired on the same items and, with several seeds, on the same seeds. Passes if the 95 % interval of "
        "the difference lies above minus the margin (--accuracy-points); otherwise fails if the drop is significant at 5 % "
        "over all comparisons of the gate (Holm); otherwise inconclusive. With one seed the verdict is valid for this "
        "checkpoint, not for the method"
    ),
    RowKind.LOSS: (
        "the mean training loss over the last quarter of the steps. Fails if it rises by more than 10 % plus 0.05: the "
        "batches are the same, so only rounding may differ"
    ),
    RowKind.ASSETS: "models, data sets and tasks. Inconclusive if one of them is not the same",
    RowKind.ENVIRONMENT: (
        "machine, driver, libraries, threads, variables and device. Inconclusive if one of them differs, since it may "
        "explain other differences; another code version or commit is only shown"
    ),
    RowKind.SPEED: (
        "times that can be judged: `gate --pairs` compares interleaved runs, and pytest --harness-gate compares a run with "
        "the spread of saved runs. Fails if a time is longer by more than a margin; inconclusive if this is neither proven "
        "nor excluded. Each reason gives the smallest detectable slow-down"
    ),
    RowKind.TIME: (
        "medians of single processes from two sessions: shown, never judged. `peft-harness gate --pairs` judges times"
    ),
}

Value = int | float | str | None
Unit = Literal["B", "1", "s", "1/s", "J", "share", "nats", ""]


@dataclass(frozen=True)
class ComparisonRow:
    """Comparison of one quantity between a baseline and a run."""

    kind: RowKind
    """Kind of the row, e.g. memory or accuracy. It determines how the row is judged."""
    word: VerdictKind
    """Verdict on this quantity."""
    name: str
    """Name of the compared Cell or recipe. A row about several Cells has their number instead, e.g. `3 Cells`."""
    cells: tuple[str, ...]
    """cell_ids of the compared Cells."""
    what: str
    """Name of the compared quantity."""
    reason: str = ""
    """Reason for the verdict; may be empty."""
    base: Value = None
    """Value in the baseline; None if missing."""
    new: Value = None
    """Value in the run; None if missing."""
    unit: Unit = ""
    """Unit of the values; empty for texts and for counts of checks."""
    interval: tuple[float, float] | None = None
    """Confidence interval of new - base. In a row of the kind SPEED, it is the interval of new / base - 1."""
    records: tuple[str, ...] = ()
    """Ids of the compared Records. In each pair, the Record of the baseline comes first."""

    @property
    def judged(self) -> bool:
        """True if the row affects the verdict of the whole comparison."""
        return self.kind not in (RowKind.TIME, RowKind.NEW)

    @property
    def same(self) -> bool:
        """True if both values are known and equal, and the row passes."""
        return self.word is VerdictKind.PASS and self.base == self.new and self.base is not None

    @property
    def valued(self) -> bool:
        """True if `base` or `new` has a value."""
        return self.base is not None or self.new is not None

    @property
    def delta(self) -> float | None:
        """`new` minus `base`. None if one of them is not a number."""
        if isinstance(self.base, int | float) and isinstance(self.new, int | float):
            return self.new - self.base
        return None


@dataclass(frozen=True)
class RecordPair:
    """Two Records of one Cell. `base` is from the baseline or the old code, `new` is from the run under test."""

    name: str
    """Name of the Cell."""
    base: Record
    new: Record

    def row(
        self, kind: RowKind, word: VerdictKind, what: str, reason: str,
        base: Value = None, new: Value = None, unit: Unit = "",
    ) -> ComparisonRow:  # fmt: skip
        """Return a row about this Cell, with the ids of both Records."""
        ids = (self.base.id, self.new.id)
        return ComparisonRow(kind, word, self.name, (self.base.cell_id,), what, reason, base, new, unit, records=ids)


@dataclass(frozen=True)
class Margins:
    """Largest differences from the baseline that do not fail the regression gate."""

    memory_B: int | None = None
    """Allowed growth of a training peak, in bytes. If None, the allowed growth depends on how the peak was measured.
    Memory that torch allocated on a GPU may not grow at all. Tensors counted on a CPU may grow by COUNTED_PEAK_B. The
    memory of a process may grow by PROCESS_PEAK_B or by PROCESS_SHARE of the peak, whichever is larger."""
    accuracy: float = ACCURACY
    """Allowed drop of an accuracy; 0.02 is two percentage points."""

    def growth_limit(self, default: int) -> int:
        """Return the allowed growth of a peak in bytes: `memory_B`, or `default` if `memory_B` is None."""
        return default if self.memory_B is None else self.memory_B


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """Result of a regression gate, from which all its output formats are made."""

    verdict: Verdict
    """Verdict of the gate."""
    rows: tuple[ComparisonRow, ...]
    """One row per compared quantity."""
    compared: int
    """Number of Cells or benchmarks that have results both in the baseline and in the run."""
    unreadable: tuple[str, ...] = ()
    """Unreadable files of the baseline and the run: one text per file, with the reason."""
    changed: tuple[str, ...] = ()
    """Files that were changed after their run."""

    def of(self, *words: VerdictKind) -> list[ComparisonRow]:
        """Return the rows that have one of these verdicts and affect the verdict of the whole comparison."""
        return [row for row in self.rows if row.judged and row.word in words]
