"""Alerts of a run: what a reader must know before the results, such as missing Cells and changed files."""

from __future__ import annotations

from typing import Any

from harness.analysis import divergence, failed_checks
from harness.analysis.comparison import reproducibility
from harness.analysis.run_facts import RunFacts
from harness.errors import plural
from harness.records.record import Status
from harness.report import sections

_LISTED = 4
"""Largest number of Cells or files that one alert names."""


def of_run(f: RunFacts) -> list[dict[str, Any]]:
    """Return the alerts of a run, e.g. that it is unfinished, that Cells are missing, or that a file has changed."""
    latest = f.latest.values()
    missing, broken = len(f.verdict.missing), len(f.run.broken)
    usual = reproducibility.usual_environment(f.run)
    found = {
        f"This run {f.unfinished()}. Its results so far are shown below.": (
            [sections.resume_sentence(f)] if f.run.how != "finished" else []
        ),
        "Changed after the run, and not counted (move a Record out of cells/, and --resume measures its Cell again):": [
            f"{name} {what}" for name, what in f.run.changed.items()
        ],
        "Without a parity gate, and not counted (--resume measures these Cells again):": [
            f"{name} {what}" for name, what in f.run.ungated.items()
        ],
        "Measured, although a check failed; speeds of what failed are not shown:": [
            f"{f.titles[r.cell_id]}: {sections.check_sentence(c)}"
            for r in latest
            if r.status is Status.OK
            for c in failed_checks.failed(r)
        ],
        "Measured, although training diverged (a lower `lr`, a longer `warmup` or a wider dtype may help):": [
            f"{f.titles[r.cell_id]}: {why}" for r in latest if (why := divergence.diverging(r))
        ],
        "Imported adapters whose loss is not that of their log:": [
            f"{f.titles[r.cell_id]}: {r.imported.loss_contradiction}"
            for r in latest
            if r.imported and r.imported.loss_contradiction
        ],
        f"{plural(missing, 'expected Cell')} {'has' if missing == 1 else 'have'} no Record:": [
            f"{f.titles[i]} ({i})" for i in f.verdict.missing
        ],
        f"{plural(broken, 'file')} could not be read, and {'is' if broken == 1 else 'are'} not counted:": [
            f"{name}: {why}" for name, why in f.run.broken.items()
        ],
        "These Records are from another environment than most; do not compare their times and memory with the others:": [
            f"{plural(n, 'Cell')}: {differences or 'only the id differs'}"
            for differences, records in reproducibility.records_from_other_environments(f.run).items()
            if (n := sum(r.environment.id != usual.id for r in records))
        ],
    }
    return [{"text": text, "items": items} for text, items in found.items() if items]


def lines(f: RunFacts) -> list[str]:
    """Return the alerts of a run as lines of text. Each names the first Cells or files that it is about."""
    found = []
    for alert in of_run(f):
        named, more = alert["items"][:_LISTED], len(alert["items"]) - _LISTED
        found.append(f"{alert['text']} {'; '.join([*named, f'{more} more'] if more > 0 else named)}")
    return found
