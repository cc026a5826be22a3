"""Searches for learning rates that a suite declares, with the accuracy at each rate that was tried."""

from __future__ import annotations

from dataclasses import dataclass

from harness.analysis.ranking import Score, score
from harness.records.manifest import Tuning
from harness.records.record import Cell, Record
from harness.records.store import Run


@dataclass(frozen=True)
class Try:
    """One learning rate that was tried."""

    cell: Cell
    lr: float
    score: Score | None
    """Accuracy at this rate; None if the Cell was not scored."""
    because: str
    """Reason to show if `score` is None."""
    chosen: bool
    """True if the suite chose this rate."""


@dataclass(frozen=True)
class Search:
    """One search for a learning rate that the suite declares, and the rates that it tried."""

    tuning: Tuning
    """The search, as the suite declares it."""
    cells: tuple[Cell, ...]
    """Cells of the run that use the chosen learning rate."""
    tries: tuple[Try, ...]
    """Tried learning rates with their scores, lowest rate first."""

    @property
    def scored(self) -> tuple[tuple[float, Score], ...]:
        """Pairs (learning rate, score) of all tried rates with a score."""
        return tuple((t.lr, t.score) for t in self.tries if t.score)

    @property
    def band(self) -> tuple[float, float] | None:
        """The lowest and the highest accuracy over the learning rates; None if fewer than two rates were scored."""
        values = [found.value for _, found in self.scored]
        return (min(values), max(values)) if len(values) > 1 else None

    @property
    def best(self) -> tuple[float, ...]:
        """The learning rates with the highest accuracy."""
        top = max((found.value for _, found in self.scored), default=None)
        return tuple(lr for lr, found in self.scored if found.value == top)

    @property
    def better(self) -> tuple[float, ...]:
        """Learning rates with an accuracy interval that lies completely above the interval of the chosen rate.

        If there are any, the suite has probably chosen a poor rate.
        """
        chosen = [t.score for t in self.tries if t.chosen and t.score]
        return tuple(lr for lr, found in self.scored if chosen and found.low > max(c.high for c in chosen))

    @property
    def at_edge(self) -> bool:
        """True if the best rate is the lowest or the highest rate tried. Then an untried rate may be better.

        If several rates share the highest accuracy, each of them must be the lowest or the highest rate tried.
        """
        ends = {self.tries[0].lr, self.tries[-1].lr}
        return bool(self.best) and set(self.best) <= ends


def searches(run: Run) -> tuple[Search, ...]:
    """Return the searches of a run, in the order of its suite."""
    cells = {cell.cell_id: cell for cell in run.manifest.cells}
    latest = run.latest()
    found = []
    for tuning in run.manifest.tuning:
        tuned = tuple(cells[i] for i in tuning.cells if i in cells)
        tried = [cells[i] for i in tuning.sweep if i in cells]
        if tried:  # a run of the search alone has no chosen rate yet
            chosen = {cell.training.lr for cell in tuned}
            tries = sorted((_try(cell, latest.get(cell.cell_id), chosen) for cell in tried), key=lambda t: t.lr)
            found.append(Search(tuning, tuned, tuple(tries)))
    return tuple(found)


def _try(cell: Cell, record: Record | None, chosen: set[float]) -> Try:
    because = "there is no Record of it" if record is None else record.because or "it was not scored"
    found = score([record]) if record and record.accuracy else None
    return Try(cell, cell.training.lr, found, because, cell.training.lr in chosen)
