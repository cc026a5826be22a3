"""Reruns of Cells, for the page and the terminal: which are bitwise equal, how the others differ, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.analysis.comparison.reproducibility import Rerun
from harness.analysis.verdict_kind import VerdictKind
from harness.errors import plural
from harness.records.store import Run
from harness.report.tones import badge

_NO_CAUSE = "no known cause: same machine, software, code, threads, model and data"


def section(runs: Sequence[Run], found: Sequence[Rerun]) -> dict[str, Any]:
    """Return the section on the reruns `found` in `runs`: which Cells are bitwise equal, and why the others differ."""
    expected = {cell.cell_id for run in runs for cell in run.manifest.cells}
    word, sentence = _whole(found)
    lacking = len(expected - {r.cell_id for r in found})
    if found and lacking and len(runs) > 1:
        sentence += f" {lacking} other{'s have' if lacking > 1 else ' has'} no second ok Record to compare."
    rows = [_row(r) for r in found]
    differences = {"; ".join(row["why"]) for row in rows} - {""}
    common = differences.pop() if len(differences) == 1 else ""
    return badge(word) | {"sentence": sentence, "rows": rows, "common": common}


def lines(runs: Sequence[Run], found: Sequence[Rerun]) -> list[str]:
    """Return the comparisons of the reruns `found` in `runs` as lines for the terminal."""
    shown = section(runs, found)
    text = ["", f"{shown['icon']} reproducibility: {shown['sentence']}"]
    for row in shown["rows"]:
        text.append(f"  {row['icon']} {row['name']}: losses {row['losses']}; answers {row['items']}")
        text += [f"      {why}" for why in row["why"]]
    return text


def _whole(found: Sequence[Rerun]) -> tuple[VerdictKind, str]:
    cells = plural(len(found), "repeated Cell")
    unexplained = sum(r.unexplained for r in found)
    explained = sum(not r.equal for r in found) - unexplained
    if not found:
        reason = "Nothing was compared: no Cell has two ok Records, and a copy of a Record is not a rerun."
        return VerdictKind.NOT_RUN, reason
    if unexplained:
        more = f" and {explained} with a known cause" if explained else ""
        differ = "differs" if unexplained == 1 else "differ"
        return VerdictKind.FAIL, f"Of {cells}, {unexplained} {differ} without a known cause{more}."
    if explained:
        differ = f"{explained} differ{'s' * (explained == 1)} with a known cause"
        return VerdictKind.INCONCLUSIVE, f"Of {cells}, {differ}: this is neither a failure nor a proof."
    return VerdictKind.PASS, f"{cells} gave the same losses and answers to the last bit."


def _row(r: Rerun) -> dict[str, Any]:
    word = VerdictKind.PASS if r.equal else VerdictKind.FAIL if r.unexplained else VerdictKind.INCONCLUSIVE
    same = {True: "equal to the last bit", False: "differ", None: "none to compare"}
    first = "" if r.first_step is None else f" from step {r.first_step}"
    why = [*r.causes, *([_NO_CAUSE] if r.unexplained else []), *(f"the runs differ in the {d}" for d in r.seeded)]
    return badge(word) | {
        "name": r.label,
        "records": [
            {"id": f"{run}/{record}", "text": f"{run} {record[:6]}….{record.rpartition('.')[2]}"}
            for run, record in r.records
        ],
        "losses": same[r.same_losses] + first,
        "items": same[r.same_items],
        "why": why,
    }
