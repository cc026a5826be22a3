"""Run each Cell on both sides of a comparison, old and new, in pairs of processes.

The order of the sides is fixed before the first process runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from harness.analysis.comparison.pair_ratio import log_ratio, times
from harness.analysis.statistics.pair_design import Design, order
from harness.analysis.statistics.paired import PairVerdict, decide
from harness.analysis.tracked_metrics import STEP
from harness.console import print_note
from harness.errors import HarnessError
from harness.records.record import Record, Status
from harness.regression.pairs import sides as pair_sides
from harness.regression.pairs.sides import CellPair, Side


@dataclass
class Measured:
    """Records of one Cell from both sides (old and new) of a comparison."""

    pair: CellPair
    first: list[tuple[Record, Record]] = field(default_factory=list)
    """Pairs of Records (old, new) from the first stage, in which every Cell runs."""
    fresh: list[tuple[Record, Record]] = field(default_factory=list)
    """Pairs of Records (old, new) from the second stage, in which only undecided Cells run."""
    no_record: str = ""
    """Reason why a process left no Record; empty if every process left one."""

    @property
    def records(self) -> list[tuple[Record, Record]]:
        """Pairs of Records (old, new) from both stages."""
        return [*self.first, *self.fresh]

    @property
    def broken(self) -> str:
        """Reason why the Cell cannot be timed; empty if it can.

        The reason is a process that did not end ok, left no Record, or has no step times.
        """
        for pair in self.records:
            for side, record in zip(("old", "new"), pair, strict=True):
                if record.status is not Status.OK:
                    return f"the {side} side is {record.status.value}: {record.because}"
                if STEP not in times(record):
                    return f"the {side} side has no step time above 0 s"
        return self.no_record

    def verdicts(self, design: Design, only: str = "", *, runs_fresh: bool = True) -> dict[str, PairVerdict]:
        """Return metric -> verdict for each time that all Records have; {} if the Cell's first stage is incomplete.

        only: the only metric to judge; empty for all. runs_fresh: False if no second stage follows for undecided Cells.
        """
        if self.broken or len(self.first) < design.first:
            return {}
        shared = set.intersection(*(set(times(record)) for pair in self.records for record in pair))
        metrics = [metric for metric in times(self.first[0][0]) if metric in shared and only in ("", metric)]
        ratios = {m: (_ratios(self.first, m), _ratios(self.fresh, m)) for m in metrics}
        return {m: decide(*pairs, design, runs_fresh=runs_fresh) for m, pairs in ratios.items()}


@dataclass
class PairsRunner:
    """Runner of the pairs of processes of all Cells. It keeps their Records."""

    sides: tuple[Side, Side]
    """Old and new side of the comparison."""
    suite: Path
    folder: Path
    """Folder that holds the run folders, one per process."""
    design: Design
    seed: int
    options: Sequence[str] = ()
    """Further options of `peft-harness run`."""
    log: Callable[[str], None] = print_note
    """Function that prints a line of progress."""
    only: str = ""
    """Name of the only metric to judge. If empty, all metrics are judged."""
    fresh: bool = True
    """True to run a second stage with further pairs of the Cells that the first stage leaves undecided."""
    found: list[Measured] = field(default_factory=list)
    """Records that each Cell has so far. They are kept after an interruption."""

    def measure(self, pairs: Sequence[CellPair]) -> None:
        """Run the pairs of the first stage for all Cells, then the pairs of the second stage for undecided Cells.

        If a process does not end ok, its Cell gets no further pairs, because it can no longer be timed.
        """
        self.found = [Measured(pair) for pair in pairs]
        for one in self.found:
            self._run(one, one.first, self.design.first, "first")
        while self.fresh and (waiting := [(one, more) for one in self.found if (more := self._more(one))]):
            for one, more in waiting:
                self._run(one, one.fresh, more, f"fresh-{len(one.fresh)}")

    def canary(self, pair: CellPair) -> tuple[list[float] | None, str]:
        """Compare the old side with itself by pairs of processes of one Cell. Return (log ratios of their times, "").

        If this fails, return (None, reason).
        """
        twin = replace(self, sides=(self.sides[0], self.sides[0]))
        one = Measured(CellPair(f"canary {pair.name}", pair.old, pair.old))
        twin._run(one, one.first, self.design.first, "canary")
        return (_ratios(one.first), "") if not one.broken else (None, one.broken)

    def _more(self, one: Measured) -> int:
        return max((verdict.more for verdict in one.verdicts(self.design, self.only).values()), default=0)

    def _run(self, one: Measured, into: list[tuple[Record, Record]], count: int, stage: str) -> None:
        pair = one.pair
        drawn = random.Random(f"{self.seed} {pair.old.cell_id} {pair.new.cell_id} {stage}")  # noqa: S311
        turns = order(count, drawn.getrandbits(32))
        for turn in range(count):
            try:
                records = {side: self._side(pair, side, stage, turn) for side in turns[2 * turn : 2 * turn + 2]}
            except HarnessError as error:  # the other Cells may still run
                one.no_record = error.what
                self.log(f"{pair.name}: {'; '.join(map(str.strip, error.lines()))}")
                return
            into.append((records["A"], records["B"]))
            self.log(f"{pair.name}, {stage} pair {turn + 1} of {count}: {_times(into[-1])}")
            if one.broken:
                return

    def _side(self, pair: CellPair, side: str, stage: str, turn: int) -> Record:
        chosen, cell = (self.sides[0], pair.old) if side == "A" else (self.sides[1], pair.new)
        name = f"{pair.old.cell_id}-{stage}-{turn:02}-{'old' if side == 'A' else 'new'}"
        return pair_sides.run(chosen, self.suite, cell, self.folder / name, self.options)


def _ratios(pairs: Sequence[tuple[Record, Record]], metric: str = STEP) -> list[float]:
    return [log_ratio(old, new, metric) for old, new in pairs]


def _times(pair: tuple[Record, Record]) -> str:
    old, new = (times(record).get(STEP) for record in pair)
    if old is None or new is None:
        return ", ".join(record.status.value for record in pair)
    return f"{1e3 * old:.1f} ms, {1e3 * new:.1f} ms"
