"""Pairs of process runs: each Cell by the old and by the new side in turn, in an order that is fixed before the first."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.analysis.measured import step_seconds
from harness.analysis.pair_order import log_ratios, order
from harness.analysis.paired import Design, Verdict, decide
from harness.gate import arms
from harness.gate.arms import Arm, Pair
from harness.records import Record, Status


@dataclass
class Measured:
    """What the two sides of one Cell gave so far.

    first, fresh: pairs of Records (old, new) of either stage.
    """

    pair: Pair
    first: list[tuple[Record, Record]] = field(default_factory=list)
    fresh: list[tuple[Record, Record]] = field(default_factory=list)

    @property
    def records(self) -> list[tuple[Record, Record]]:
        """The pairs of both stages."""
        return [*self.first, *self.fresh]

    @property
    def whole(self) -> list[tuple[Record, Record]]:
        """The pairs of which both sides are ok."""
        return [pair for pair in self.records if all(record.status is Status.OK for record in pair)]

    @property
    def broken(self) -> str:
        """Say which process run did not end well, if one did not: then there is nothing to time."""
        for pair in self.records:
            for side, record in zip(("old", "new"), pair, strict=True):
                if record.status is not Status.OK:
                    return f"the {side} side is {record.status.value}: {record.because}"
        return ""

    def verdict(self, design: Design) -> Verdict | None:
        """Judge the times; None where there are none to judge."""
        if self.broken or len(self.first) < design.first or step_seconds(self.first[0][0]) is None:
            return None
        return decide(_ratios(self.first), _ratios(self.fresh), design)


@dataclass(frozen=True)
class Bench:
    """Where and how pairs are run. folder: gets a run folder for each process run. options: of `peft-harness run`.

    say: talk, a line for each pair.
    """

    sides: tuple[Arm, Arm]
    suite: Path
    folder: Path
    design: Design
    seed: int
    options: Sequence[str] = ()
    say: Callable[[str], None] = print

    def measure(self, pairs: Sequence[Pair], label: str = "") -> list[Measured]:
        """Run the first pairs of all Cells; then, for those that they do not settle, fresh ones as planned.

        label: tells the folders of several measurements apart. A Cell of which a side does not end well gets no further
        pairs: it is a finding already, or cannot be timed.
        """
        found = [Measured(pair) for pair in pairs]
        for one in found:
            one.first += self._run(one.pair, self.design.first, f"{label}first")
        while waiting := [(one, more) for one in found if (more := self._more(one))]:
            for one, more in waiting:
                one.fresh += self._run(one.pair, more, f"{label}fresh-{len(one.fresh)}")
        return found

    def canary(self, pair: Pair) -> list[float] | None:
        """Run the first pairs of the old side against itself and return their log ratios; None if they cannot be timed."""
        twin = Bench(
            (self.sides[0], self.sides[0]), self.suite, self.folder, self.design, self.seed, self.options, self.say
        )
        alone = Pair(f"canary {pair.name}", pair.old, pair.old)
        one = Measured(alone, twin._run(alone, self.design.first, "canary"))
        return None if one.verdict(self.design) is None else _ratios(one.first)

    def _more(self, one: Measured) -> int:
        verdict = one.verdict(self.design)
        return verdict.more if verdict else 0

    def _run(self, pair: Pair, count: int, stage: str) -> list[tuple[Record, Record]]:
        drawn = random.Random(f"{self.seed} {pair.old.cell_id} {pair.new.cell_id} {stage}")  # noqa: S311
        turns = order(count, drawn.getrandbits(32))
        found: list[tuple[Record, Record]] = []
        for turn in range(count):
            records = {side: self._side(pair, side, stage, turn) for side in turns[2 * turn : 2 * turn + 2]}
            found.append((records["A"], records["B"]))
            self.say(f"{pair.name}, {stage} pair {turn + 1} of {count}: {_said(found[-1])}")
            if any(record.status is not Status.OK for record in records.values()):
                break
        return found

    def _side(self, pair: Pair, side: str, stage: str, turn: int) -> Record:
        arm, cell = (self.sides[0], pair.old) if side == "A" else (self.sides[1], pair.new)
        name = f"{pair.old.cell_id}-{stage}-{turn:02}-{'old' if side == 'A' else 'new'}"
        return arms.run(arm, self.suite, cell, self.folder / name, self.options)


def _ratios(pairs: Sequence[tuple[Record, Record]]) -> list[float]:
    seconds = [step_seconds(record) or 0.0 for pair in pairs for record in pair]
    return log_ratios("AB" * len(pairs), seconds)


def _said(pair: tuple[Record, Record]) -> str:
    old, new = (step_seconds(record) for record in pair)
    if old is None or new is None:
        return ", ".join(record.status.value for record in pair)
    return f"{1e3 * old:.1f} ms, {1e3 * new:.1f} ms"
