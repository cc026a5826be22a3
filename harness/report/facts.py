"""One run, judged and named: what every section of the report looks things up in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from harness.analysis import ranking, verdict
from harness.analysis.ranking import Entry, Group
from harness.analysis.verdict import RunVerdict
from harness.analysis.words import Word
from harness.records import Cell, Record, Status
from harness.report import display
from harness.store import Run

MISSING = "missing"

TONES: dict[str, str] = {
    Word.PASS: "good",
    Word.FAIL: "bad",
    Word.INCONCLUSIVE: "open",
    Word.NOT_RUN: "open",
    Status.OK: "good",
    Status.NONCONFORMING: "bad",
    Status.SKIPPED: "quiet",
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
    """A run with its verdict, its rankings, and a short name and an anchor for each of its Cells."""

    run: Run
    latest: dict[str, Record]
    verdict: RunVerdict
    groups: tuple[Group, ...]
    names: dict[str, str]
    entries: dict[str, Entry]
    prefix: str

    def anchor(self, cell_id: str) -> str:
        """Return the id of a Cell's row in the comparison table."""
        return f"{self.prefix}cell-{cell_id}"

    def status(self, cell: Cell) -> str:
        """Return a Cell's status, or `missing`."""
        record = self.latest.get(cell.cell_id)
        return record.status.value if record else MISSING

    def why_unmeasured(self, cell: Cell) -> str:
        """Say why a Cell has no measurements."""
        record = self.latest.get(cell.cell_id)
        return f"{record.status.value}: {record.because}" if record else "there is no Record of this Cell"

    def row(self, cell: Cell) -> dict[str, str]:
        """Return what identifies a Cell's row in any table."""
        record = self.latest.get(cell.cell_id)
        return {
            "name": self.names[cell.cell_id],
            "record": record.id if record else cell.cell_id,
            "href": f"#{self.anchor(cell.cell_id)}",
            "title": cell.label,
        }

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
        names=_names(run.manifest.cells),
        entries={e.record.cell_id: e for g in found for e in g.entries},
        prefix=prefix,
    )


def _names(cells: Sequence[Cell]) -> dict[str, str]:
    """Name each Cell within its model; those that would share a name get the head of their cell_id."""
    count = Counter((c.model, c.task, display.in_group(c)) for c in cells)
    return {
        c.cell_id: display.in_group(c)
        + ("" if count[c.model, c.task, display.in_group(c)] == 1 else f" #{c.cell_id[:6]}")
        for c in cells
    }
