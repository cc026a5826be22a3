"""First screen of a report: for each group of recipes, three cards with answers, and a table of the recipes.

A recipe is a set of Cells that differ only in the seed. The recipes of a group have the same model, task and training
budget.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from harness.analysis import choice, contention, metrics
from harness.analysis.choice import MARGIN, Choice
from harness.analysis.ranking import Budget, Group, RankingEntry
from harness.analysis.run_facts import RunFacts
from harness.console import json_text
from harness.errors import plural
from harness.methods.adapter_config import peft_equivalent
from harness.records.record import Cell, Record, Status
from harness.report import formatting, item_differences, links, recipes, sections
from harness.report.recipes import Names

_LISTED = 6
"""Number of Cells without a score that the first screen lists."""
NO_BREAK = "\u00a0"


def answers(f: RunFacts) -> list[dict[str, Any]]:
    """Return the cards and the table of every group with at least two recipes. Without such a group, use all groups."""
    several = [group for group in f.groups if len(group.entries) > 1] or f.groups
    titles = Counter(_title(group) for group in several)
    found = []
    for number, group in enumerate(several):
        chosen = choice.choose(group)
        if chosen is not None:
            names = links.entry_names(f, group.entries)
            title, budget, key = _title(group), group.budget, f"{f.prefix}answer-{number}"
            if titles[title] > 1:
                title += f" · {budget.dtype}, {budget.steps} steps"
            found.append(
                {
                    "id": key,
                    "title": title,
                    "cards": _cards(f, group, names, chosen),
                    "table": recipes.table(f, f"{key}-table", title, group, names, chosen),
                    "unscored": _unscored(f, group),
                    "items": item_differences.rows(group, names),
                    "highest": names[id(chosen.highest)],
                    "recommended": names[id(chosen.pick)],
                    "command": sections.rerun_command(f, chosen.pick.record.cell_id),
                    "adapter": _adapter(chosen.pick.record.cell),
                }
            )
    return found


def _cards(f: RunFacts, group: Group, names: Names, chosen: Choice) -> list[dict[str, Any]]:
    lost = _lost(f, group)
    return [_which(names, group, chosen, lost), _cost(names, chosen), _trust(f, group, chosen, lost)]


def _unscored(f: RunFacts, group: Group) -> dict[str, Any]:
    """List the first Cells with a group's training budget but without a score, and count the rest of these Cells.

    Each listed Cell has the reason why it has no score.
    """
    cells = [c for c in f.run.manifest.cells if c.cell_id not in f.entries and Budget.of(c) == group.budget]
    found = []
    for cell in cells[:_LISTED]:
        peak = _last_peak(f.latest.get(cell.cell_id))
        at = f", last peak {formatting.mebibytes(peak)} MiB" if peak is not None else ""
        found.append({**links.row(f, cell), "why": f.why_unmeasured(cell) + at})
    return {"cells": found, "more": len(cells) - len(found), "href": f"#{f.prefix}table"}


def _last_peak(record: Record | None) -> int | None:
    """Return the last peak of a Cell that ran out of memory, in bytes. For any other Cell, return None."""
    return record.failure.last_peak_B if record and record.status is Status.OOM and record.failure else None


def _adapter(cell: Cell) -> dict[str, str]:
    """Return the recommended recipe as an adapter_config.json of peft, with a remark."""
    found = peft_equivalent(cell.method, cell.config, cell.base.quantization)
    return {"text": "" if found.keys is None else json_text(found.keys), "remark": found.remark}


def _title(group: Group) -> str:
    return f"{group.budget.model} · {group.budget.task}"


def _card(question: str, headline: str, *details: str, tone: str = "") -> dict[str, Any]:
    # A no-break space keeps a number and its % on one line.
    first, *others = (text.replace(" %", f"{NO_BREAK}%") for text in (headline, *details))
    return {"question": question, "headline": first, "details": others, "tone": tone}


def _lost(f: RunFacts, group: Group) -> int:
    """Return the number of Cells with a group's training budget whose results are missing or changed after the run."""
    gone = {*f.verdict.missing, *f.doubtful}
    return sum(c.cell_id in gone and Budget.of(c) == group.budget for c in f.run.manifest.cells)


def _which(names: Names, group: Group, chosen: Choice, lost: int) -> dict[str, Any]:
    """Return the first card, which names the best method.

    lost: number of Cells whose results are missing or were changed after the run. If there are any, the card names no
    winner, because the statistical tests are corrected for too few comparisons.
    """
    question, pick, highest = "Which method?", names[id(chosen.pick)], names[id(chosen.highest)]
    score = formatting.percent(chosen.highest.score.value)
    if lost:
        have = f"{plural(lost, 'Cell')} of this comparison {'has' if lost == 1 else 'have'} no result that counts"
        return _card(
            question, f"Not decided. Highest so far: {highest}, {score}.", f"{have}; their recipes may be better."
        )
    if len(group.ranked) == 1:
        return _card(question, f"Only one: {pick}, {score}.", "No other recipe has the same budget and seeds.")
    if chosen.winner:
        second = group.ranked[1]
        gap = formatting.points(second.difference)
        return _card(
            question, f"{highest}: {score}.", f"Tests tell it apart from every other recipe. Next: {names[id(second)]},"
            f" {gap}.", tone="good",
        )  # fmt: skip
    near = [f"{names[id(e)]} {formatting.percent(e.score.value)}" for e in chosen.near[:3]]
    more = f" and {len(chosen.near) - 3} more" if len(chosen.near) > 3 else ""
    margin = f"Within {100 * MARGIN:.0f} points of the highest: {', '.join(near)}{more}."
    if len(chosen.near) == 1:
        return _card(question, f"No proven winner. Highest: {highest}, {score}.", "No other recipe is as close as"
                     f" {100 * MARGIN:.0f} points.")  # fmt: skip
    gap = "also the highest"
    if chosen.pick is not chosen.highest:
        gap = f"{abs(100 * chosen.pick.difference):.1f} points below the highest"
    return _card(question, f"No proven winner. Cheapest near the top: {pick}, {gap}.", margin)


def _cost(names: Names, chosen: Choice) -> dict[str, Any]:
    pick, against = chosen.pick, chosen.against
    parts = []
    trained, total = pick.typical(metrics.TRAINABLE.read), pick.typical(_total)
    if trained is not None and total:
        parts.append(f"{_share(trained / total)} of the parameters")
    for metric, write, what in (
        (metrics.PEAK_ABOVE_IMPORTS, lambda size: f"{formatting.mebibytes(size)} MiB", ""),
        (metrics.STEP, lambda step: f"{formatting.milliseconds(step)} ms", " a step"),
    ):
        mine = pick.typical(metric.value)
        other = None if against is None else against.typical(metric.value)
        if mine is not None:
            parts.append(write(mine) + what + ("" if other is None else f" instead of {write(other)}"))
    details = [f"{names[id(pick)]} against {names[id(against)]}." if against is not None else f"{names[id(pick)]}."]
    busy = [names[id(e)] for e in (pick, against) if e is not None and recipes.busy(e)]
    if busy:
        details.append(
            f"! Other programs used the CPU while {' and '.join(busy)} trained: these times may be too high."
        )
    details += _passes(pick, names[id(pick)])
    return _card("At what cost?", ", ".join(parts) + "." if parts else "No costs were measured.", *details)


def _passes(entry: RankingEntry, name: str) -> list[str]:
    """Return sentences about the latencies of the unmerged, merged and base model; none if a latency is missing.

    name: name of the recipe.
    """
    fields = [recipes.latency(entry, variant) for variant in ("unmerged", "merged", "base")]
    if any(one["value"] is None for one in fields):
        return []
    unmerged, merged, base = (one["text"] for one in fields)
    found = [f"A pass takes {unmerged} ms with the adapter, {merged} ms merged and {base} ms without an adapter."]
    if flag := recipes.disturbed(entry):
        seeds = f" ({flag} seeds)" if len(entry.records) > 1 else ""
        found.append(f"! The passes of {name}{seeds} were disturbed: their times may be too high.")
    return found


def _total(record: Record) -> float | None:
    return record.measurements.parameters.total if record.measurements else None


def _share(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else "100 %"


def _trust(f: RunFacts, group: Group, chosen: Choice, lost: int) -> dict[str, Any]:
    parity, others = f.verdict.parity, len(group.ranked) - 1
    code = (
        "no"
        if parity.failed
        else "not checked"
        if not parity.passed
        else "partly checked"
        if parity.unchecked
        else "yes"
    )
    ranking = "no" if lost or 2 * chosen.undecided > others else "partly" if chosen.undecided else "yes"
    headline = f"Code: {code}." + (f" Ranking: {ranking}." if others or lost else "")
    tone = "bad" if code == "no" else "good" if code == "yes" and ranking == "yes" else "open"
    return _card("Can I trust it?", headline, *_reasons(f, group, chosen), tone=tone)


def _reasons(f: RunFacts, group: Group, chosen: Choice) -> list[str]:
    parity, others = f.verdict.parity, len(group.ranked) - 1
    records = [record for entry in group.ranked for record in entry.records]
    checked = f"{parity.passed:,} of {parity.passed + parity.failed:,} checks of the computation passed."
    if parity.unchecked:
        checked += f" {plural(len(parity.unchecked), 'Cell')} passed no check."
    reasons = [checked]
    if others and chosen.undecided:
        sees = (
            ""
            if group.detectable is None
            else f" usually shows only gaps above {100 * group.detectable:.2g} points, and"
        )
        seeds = f"{plural(len(group.seeds), 'seed')} and {group.budget.items:,} test items"
        reasons.append(
            f"A comparison with {seeds}{sees} cannot tell {chosen.undecided} of {plural(others, 'other recipe')} from the"
            " highest."
        )
    if group.data_differ:
        reasons.append("Some recipes were trained on other examples, or in another order.")
    if cut := max((r.accuracy.cut_items or 0 for r in records if r.accuracy), default=0):
        reasons.append(
            f"{cut:,} of {group.budget.items:,} test items were truncated to {group.budget.max_tokens} tokens."
        )
    if busy := sum(bool(contention.busy(record)) for record in records):
        trainings = f"{busy} of {len(records)} trainings were" if len(records) > 1 else "The training was"
        reasons.append(f"{trainings} timed on a busy machine; accuracies are not affected.")
    missing, changed = len(f.verdict.missing), len(f.doubtful)
    if missing or changed:
        count = missing + changed
        lost = f"{plural(count, 'planned Cell')} {'has' if count == 1 else 'have'} no result that counts"
        why = {"without a readable Record": missing, "changed after the run, or without a parity gate": changed}
        reasons.append(f"{lost}: {', '.join(f'{n} {what}' for what, n in why.items() if n)}.")
    return reasons
