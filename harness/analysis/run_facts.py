"""Facts derived from one loaded run. Each fact is computed once, on first use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from harness.analysis import ranking, run_verdict
from harness.analysis.ranking import Group, RankingEntry
from harness.analysis.run_verdict import RunVerdict
from harness.records import naming
from harness.records.record import Cell, Record
from harness.records.store import Run

MISSING, CHANGED, UNGATED = "missing", "changed", "ungated"
_FOOTER = "footer.json"


@dataclass(frozen=True)
class RunFacts:
    """A run with its verdict, its rankings and the names of its Cells.

    The terminal summary, the HTML page, the exit code and the comparison with a baseline are all made from this object.
    """

    run: Run
    """The loaded run."""
    prefix: str = ""
    """Prefix of all HTML anchors of the run. If several runs share a page, different prefixes keep their anchors apart."""

    @cached_property
    def latest(self) -> dict[str, Record]:
        """The newest Record of each Cell, by cell_id. The Cells in `doubtful` are left out."""
        return self.run.latest()

    @cached_property
    def doubtful(self) -> dict[str, str]:
        """cell_id -> reason, for each Cell whose newest Record must not be used.

        These are the Cells with the `status` `changed` or `ungated`.
        """
        return self.run.doubtful()

    @cached_property
    def verdict(self) -> RunVerdict:
        """The verdict on the run and on each comparison that its suite declares."""
        return run_verdict.judge(self.run)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The rankings of the recipes, one per group of comparable recipes."""
        return ranking.groups(self.run)

    @cached_property
    def entries(self) -> dict[str, RankingEntry]:
        """The ranking entry of each ranked Cell, by cell_id."""
        return {r.cell_id: e for g in self.groups for e in g.entries for r in e.records}

    @cached_property
    def group_of(self) -> dict[str, Group]:
        """Map the cell_id of each ranked Cell to its ranking group."""
        return {r.cell_id: g for g in self.groups for e in g.entries for r in e.records}

    @cached_property
    def names(self) -> dict[str, str]:
        """Short names of the Cells, by cell_id. A name is unique within a model and task."""
        return naming.in_group(self.run.manifest.cells)

    @cached_property
    def titles(self) -> dict[str, str]:
        """Full names of the Cells, by cell_id. A name is unique within the run."""
        return naming.full(self.run.manifest.cells)

    @cached_property
    def recipes(self) -> dict[str, str]:
        """Names of the recipes, by recipe_id. A recipe is a set of Cells that differ only in the seed.

        A name is unique within a model and task.
        """
        return naming.recipes(self.run.manifest.cells, inside=True)

    def status(self, cell: Cell) -> str:
        """Return the status of a Cell.

        - `missing`: the Cell has no Record.
        - `changed`: the newest Record was changed, removed or added after the run.
        - `ungated`: the newest Record reuses the parity gate (the checks before training) of a Record that is missing
          or was changed.
        - For any other Cell, return the status of the newest Record.
        """
        if record := self.latest.get(cell.cell_id):
            return record.status.value
        if cell.cell_id not in self.doubtful:
            return MISSING
        return UNGATED if cell.cell_id in self.run.ungated_cells() else CHANGED

    def why_unmeasured(self, cell: Cell) -> str:
        """Return the reason why a Cell has no measurements."""
        record = self.latest.get(cell.cell_id)
        if record is None:
            return self.doubtful.get(cell.cell_id, "there is no Record of this Cell")
        return f"{record.status.value}: {record.because}"

    def unfinished(self) -> str:
        """Return how an unfinished run ended, as a clause without its subject, e.g. `was interrupted`."""
        if self.run.footer is not None:
            return f"was {self.run.how}"
        if _FOOTER in self.run.broken:
            return "has a footer that cannot be read, so it counts as cut off"
        return "has no footer: it was cut off, or is still running"

    def entry_name(self, entry: RankingEntry) -> str:
        """Return the name of a ranking entry. The name is unique within a model and task."""
        first = entry.record
        return self.names[first.cell_id] if len(entry.records) == 1 else self.recipes[first.cell.recipe_id]


def analyse(run: Run) -> RunFacts:
    """Return the facts about one run."""
    return RunFacts(run)


def analyse_all(runs: Sequence[Run]) -> list[RunFacts]:
    """Return the facts about several runs that share a page. Each run has its own prefix of HTML anchors."""
    return [RunFacts(run, f"run{i}-" if i else "") for i, run in enumerate(runs)]
