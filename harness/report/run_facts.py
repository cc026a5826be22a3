"""One run, judged and named: what every section of the report looks things up in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.analysis import ranking, verdict
from harness.analysis.ranking import Group, RankingEntry
from harness.analysis.verdict import RunVerdict
from harness.analysis.verdict_kind import VerdictKind
from harness.records import naming
from harness.records.record import Cell, Record, Status
from harness.records.store import Run

MISSING, CHANGED = "missing", "changed"
FOOTER = "footer.json"

TONES: dict[str, str] = {
    VerdictKind.PASS: "good",
    VerdictKind.FAIL: "bad",
    VerdictKind.INCONCLUSIVE: "open",
    VerdictKind.NOT_RUN: "open",
    Status.OK: "good",
    Status.NONCONFORMING: "bad",
    Status.SKIPPED: "quiet",
    CHANGED: "bad",
}
ICONS = {"good": "✓", "bad": "✗", "open": "?", "quiet": "–"}


def tone(word: str) -> str:
    """Return how a verdict or status is coloured; whatever is not known to be well or ill is open."""
    return TONES.get(word, "open")


def icon(word: str) -> str:
    """Return the sign beside a word, so that colour is never alone in saying it."""
    return ICONS[tone(word)]


@dataclass(frozen=True)
class RunFacts:
    """A run with its verdict, its rankings, and for each of its Cells two names and an anchor.

    names: within their model and task; titles: everywhere else; recipes: by recipe_id, what the seeds of one recipe are
    called together, within their model and task.
    """

    run: Run
    latest: dict[str, Record]
    verdict: RunVerdict
    groups: tuple[Group, ...]
    names: dict[str, str]
    titles: dict[str, str]
    recipes: dict[str, str]
    entries: dict[str, RankingEntry]
    prefix: str

    def anchor(self, cell_id: str) -> str:
        """Return the id of a Cell's row in the comparison table."""
        return f"{self.prefix}cell-{cell_id}"

    def status(self, cell: Cell) -> str:
        """Return a Cell's status, `missing`, or `changed` where its Record is not as the run left it."""
        record = self.latest.get(cell.cell_id)
        return record.status.value if record else CHANGED if cell.cell_id in self.run.doubtful() else MISSING

    def why_unmeasured(self, cell: Cell) -> str:
        """Say why a Cell has no measurements."""
        record = self.latest.get(cell.cell_id)
        if record is None:
            return self.run.doubtful().get(cell.cell_id, "there is no Record of this Cell")
        return f"{record.status.value}: {record.because}"

    def unfinished(self) -> str:
        """Say how a run that is not whole ended."""
        if self.run.footer is not None:
            return f"was {self.run.footer.how}"
        if FOOTER in self.run.broken:
            return "has a footer that cannot be read, so it counts as cut off"
        return "has no footer: it was cut off, or is still going on"

    def row(self, cell: Cell) -> dict[str, str]:
        """Return what identifies a Cell's row in any table."""
        record = self.latest.get(cell.cell_id)
        return {
            "name": self.names[cell.cell_id],
            "record": record.id if record else cell.cell_id,
            "href": f"#{self.anchor(cell.cell_id)}",
            "title": self.titles[cell.cell_id],
        }

    def called(self, entry: RankingEntry) -> str:
        """Return what an entry of a ranking is called within its model and task."""
        first = entry.record
        return self.names[first.cell_id] if len(entry.records) == 1 else self.recipes[first.cell.recipe_id]

    def sources(self, record_ids: Sequence[str]) -> list[dict[str, str]]:
        """Return links to the rows of Records."""
        return [{"id": i, "href": f"#{self.anchor(i.split('.')[0])}"} for i in record_ids]


def gather(run: Run, prefix: str = "") -> RunFacts:
    """Judge a run and name its Cells; `prefix` keeps the anchors of several runs on one page apart."""
    found = ranking.groups(run)
    return RunFacts(
        run=run,
        latest=run.latest(),
        verdict=verdict.judge(run),
        groups=found,
        names=naming.in_group(run.manifest.cells),
        titles=naming.full(run.manifest.cells),
        recipes=naming.recipes(run.manifest.cells, inside=True),
        entries={r.cell_id: e for g in found for e in g.entries for r in e.records},
        prefix=prefix,
    )
