"""Summary of a run for the terminal: aligned tables, notes, and the verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.analysis import divergence, failed_checks, metrics
from harness.analysis.grouping import group
from harness.analysis.run_facts import RunFacts
from harness.console import align_columns
from harness.errors import plural
from harness.records.notes import notes_of_kind
from harness.records.record import NoteKind, Status
from harness.report import first_screen, sections, served, tables
from harness.report.formatting import Field
from harness.report.table_model import by_key
from harness.report.tones import icon


def summary(f: RunFacts) -> list[str]:
    """Return the summary of a run as lines of text."""
    lines = _cells(f)
    answers = first_screen.answers(f)
    if means := _recipes(answers):
        lines += [*_aligned(means), ""]
    lines += _answers(answers)
    if rows := served.lines(f):
        lines += [*_aligned(rows), ""]
    lines += served.not_timed(f)
    for j in f.verdict.judgements:
        lines.append(f"{icon(j.verdict.word)} {j.verdict.word.value}: {j.comparison.says}")
        lines.append(f"    {j.verdict.reason}")
    lines += [f"! {note}" for note in tables.short_notes(f)]
    unreached = group(  # only the page shows the other notes
        (note, f.titles[record.cell_id])
        for record in f.latest.values()
        for note in notes_of_kind(record, NoteKind.UNREACHED_EXPERTS)
    )
    lines += [f"! {note}: {', '.join(names)}" for note, names in unreached.items()]
    p = f.verdict.parity
    shared = f"; {plural(p.shared, 'Cell')} with the gate of another" if p.shared else ""
    lines.append(f"parity: {p.passed} checks of the computation passed, {p.failed} failed, {p.skipped} skipped{shared}")
    lines += [
        f"failed: {f.titles[r.cell_id]}: {sections.check_sentence(c)}"
        for r in f.latest.values()
        for c in failed_checks.failed(r)
    ]
    lines += [f"diverged: {f.titles[r.cell_id]}: {why}" for r in f.latest.values() if (why := divergence.diverging(r))]
    if f.run.how != "finished":
        lines.append(f"incomplete: this run {f.unfinished()}")
    lines += [f"changed: {name} {what}, and does not count" for name, what in f.run.changed.items()]
    lines += [f"ungated: {name} {what}, and does not count" for name, what in f.run.ungated.items()]
    lines += [f"missing: {f.titles[i]} ({i})" for i in f.verdict.missing]
    lines += [f"unreadable: {name}: {why}" for name, why in f.run.broken.items()]
    v = f.verdict.verdict
    lines.append(f"{icon(v.word)} {v.word.value}: {v.reason}")
    return lines


def _cells(f: RunFacts) -> list[str]:
    """Return the table of the Cells. In a run of many Cells, only those that did not end ok have a row."""
    cells = f.run.manifest.cells
    many = len(cells) > sections.MANY
    table = tables.comparison(f, [c for c in cells if f.status(c) != Status.OK] if many else cells)
    headings = {tables.STATUS: "status"} | {m.name: m.terminal_heading for m in metrics.shown() if m.terminal_heading}
    lines: list[str] = []
    for section in table["groups"]:
        rows = [[section["title"], *headings.values()]]
        for row in section["rows"]:
            fields = by_key(table["columns"], row["fields"])
            rows.append([row["name"], *(_text(fields[key]) for key in headings)])
        lines += [*_aligned(rows), ""]
    if many:
        ok = sum(f.status(cell) == Status.OK for cell in cells)
        lines += [f"{ok} of {len(cells)} Cells are ok; the page has a row for each.", ""]
    return lines


def _recipes(answers: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the groups in which a recipe has several seeds, as rows of text: headings, then one row per recipe."""
    columns = {"seeds": "seeds", "accuracy": "accuracy", "interval": "95 % interval", "difference": "to the highest"}
    rows: list[list[str]] = []
    for answer in answers:
        found = [
            (row["name"], by_key(answer["table"]["columns"], row["fields"]))
            for group in answer["table"]["groups"]
            for row in group["rows"]
        ]
        if any(fields["seeds"]["value"] > 1 for _, fields in found):
            rows.append([f"{answer['title']}, over seeds", *columns.values()])
            rows += [[name, *(_text(fields[key]) for key in columns)] for name, fields in found]
    return rows


def _answers(answers: Sequence[dict[str, Any]]) -> list[str]:
    """Return the headlines and the warnings of the cards on the page's first screen, for every group of recipes."""
    lines: list[str] = []
    for answer in answers:
        rows = [
            [question, text.replace(first_screen.NO_BREAK, " ")]
            for card in answer["cards"]
            for question, text in [
                (card["question"], card["headline"]),
                *(("", detail) for detail in card["details"] if detail.startswith("! ")),
            ]
        ]
        lines += [answer["title"], *align_columns(rows), ""]
    return lines


def _text(field: Field) -> str:
    return " ".join(filter(None, [field["text"], field["small"], "!" if field["flag"] else ""]))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of text as lines. The first two columns are aligned to the left, and all others to the right."""
    return align_columns(rows, right=range(2, len(rows[0])), indent="")
