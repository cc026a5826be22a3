"""The end of a run in the terminal: one aligned table, then the verdicts. Plain text, as wide as it needs."""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis import divergence, failed_checks
from harness.analysis.run_facts import RunFacts
from harness.methods.experts import UNREACHED
from harness.report import recipes, sections, tables
from harness.report.formatting import Figure
from harness.report.tones import icon

# Places in the comparison table's rows; "Against the best" is left to the page, it would make the lines too wide.
_COLUMNS = {"status": 0, "trainable": 1, "accuracy": 2, "peak MiB": 4, "tok/s": 5, "step ms": 6}


def summary(f: RunFacts) -> list[str]:
    """Return the lines of a run's table and verdicts."""
    lines: list[str] = []
    table = tables.comparison(f)
    for group in table["groups"]:
        rows = [[row["name"], *(_text(row["figures"][i]) for i in _COLUMNS.values())] for row in group["rows"]]
        lines += [*aligned([[group["title"], *_COLUMNS], *rows]), ""]
    if means := recipes.lines(f):
        lines += [*aligned(means), ""]
    for j in f.verdict.judgements:
        lines.append(f"{icon(j.verdict.word)} {j.verdict.word.value}: {j.comparison.says}")
        lines.append(f"    {j.verdict.reason}")
    lines += [f"! {note}" for note in tables.short_notes(f)]
    for note in sections.notes(f):
        if UNREACHED in note["text"]:  # of the others it is enough that they are on the page
            names = (f.titles[source["id"].partition(".")[0]] for source in note["sources"])
            lines.append(f"! {note['text']}: {', '.join(names)}")
    p = f.verdict.parity
    lines.append(f"parity: {p.passed} checks passed, {p.failed} failed, {p.skipped} skipped")
    lines += [
        f"failed: {f.titles[r.cell_id]}: {sections.told(c)}" for r in f.latest.values() for c in failed_checks.failed(r)
    ]
    lines += [f"diverged: {f.titles[r.cell_id]}: {why}" for r in f.latest.values() if (why := divergence.diverging(r))]
    if f.verdict.how != "finished":
        lines.append(f"incomplete: this run {f.unfinished()}")
    lines += [f"changed: {name} {what}, and does not count" for name, what in f.run.changed.items()]
    lines += [f"missing: {f.titles[i]} ({i})" for i in f.verdict.missing]
    lines += [f"unreadable: {name}: {why}" for name, why in f.run.broken.items()]
    v = f.verdict.verdict
    lines.append(f"{icon(v.word)} {v.word.value}: {v.reason}")
    return lines


def _text(figure: Figure) -> str:
    return " ".join(filter(None, [figure["text"], figure["small"], "!" if figure["flag"] else ""]))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: names and statuses to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
