"""Content of the report page, as one dict of plain values. The templates show these values and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.analysis.comparison.reproducibility import Rerun
from harness.analysis.ranking import Group, RankingEntry
from harness.analysis.run_facts import RunFacts
from harness.analysis.run_verdict import QuestionVerdict
from harness.analysis.statistics.over_seeds import MODERATED
from harness.errors import plural
from harness.records.record import Status
from harness.report import (
    alerts,
    chart_sets,
    costs,
    first_screen,
    formatting,
    latencies,
    links,
    reruns,
    sections,
    served,
    side_by_side,
    table_model,
    tables,
    tuning_table,
)
from harness.report.tones import badge

_OF_CELLS = ("comparison", "latency", "mixed", "served", "memory", "costs", "gpus")
"""Keys under which the content of a run has its tables of Cells."""


_LISTED = 4
"""Largest number of recipes that a sentence about a ranking names. The table of recipes has all of them, with p values."""


def build(analysed: Sequence[RunFacts], again: Sequence[Rerun] | None = None) -> dict[str, Any]:
    """Return the content of a page about one or several runs.

    again: comparisons of Cells that ran more than once; None if the runs cannot contain such Cells.
    """
    runs = [_run(f) for f in analysed]
    return {
        "title": " and ".join(dict.fromkeys(f.run.manifest.title or f.run.manifest.suite for f in analysed)),
        "runs": runs,
        "pairs": side_by_side.section(analysed),
        "reproducibility": None if again is None else reruns.section([f.run for f in analysed], again),
        "stored": table_model.stored(run[name] for run in runs for name in _OF_CELLS if run[name]["stored"]),
        "data": [{"run": f.run.manifest.run, "suite": f.run.manifest.suite, "cells": tables.raw(f)} for f in analysed],
    }


def _run(f: RunFacts) -> dict[str, Any]:
    m, footer = f.run.manifest, f.run.footer
    same_losses = [s for j in f.verdict.judgements if (s := sections.losses(f, j))]
    groups = [_group(f, g) for g in f.groups if len(g.entries) > 1]
    rates, curves, time = chart_sets.rates(f), chart_sets.curves(f), chart_sets.time(f)
    sets = [one["chart"] for one in groups + same_losses if one["chart"]] + rates + curves + time
    for number, one in enumerate(sets):
        one["id"] = f"{f.prefix}chart-{number}"
    return {
        "id": m.run,
        "prefix": f.prefix,
        "suite": m.suite,
        "title": m.title or m.suite,
        "about": m.about,
        "started": m.started,
        "ended": footer.ended if footer else "",
        "duration": sections.duration(f),
        "answers": first_screen.answers(f),
        "verdict": _verdict(f),
        "alerts": alerts.of_run(f),
        "counts": [
            {**badge(status), "count": count}
            for status, count in sorted(f.verdict.counts.items(), key=lambda pair: pair[0] != Status.OK)
        ],
        "questions": [_question(f, j) for j in f.verdict.judgements],
        "parity_summary": _parity_summary(f),
        "groups": groups,
        "alone": [_alone(f, g) for g in f.groups if len(g.entries) == 1],
        "tuning": tuning_table.searched(f),
        "comparison": tables.comparison(f),
        "latency": latencies.latency(f),
        "mixed": latencies.several_adapters(f),
        "served": served.served(f),
        "memory": tables.memory(f),
        "costs": costs.costs(f),
        "gpus": costs.gpus(f),
        "rates": rates,
        "curves": curves,
        "same_losses": same_losses,
        "parity": sections.checks(f),
        "time": sections.time(f) | {"charts": time},
        "environment": sections.environment(f),
        "failures": sections.failures(f),
        "notes": sections.notes(f),
        "rerun": sections.rerun(f),
    }


def _verdict(f: RunFacts) -> dict[str, Any]:
    v, code = f.verdict.verdict, f.verdict.exit
    name = code.name.lower().replace("_", " ")
    return badge(v.word) | {"reason": formatting.sentence(v.reason), "exit": f"exit code {code.value} ({name})"}


def _question(f: RunFacts, j: QuestionVerdict) -> dict[str, Any]:
    reason, sources = formatting.sentence(j.verdict.reason), links.sources(f, j.verdict.records)
    return badge(j.verdict.word) | {
        "says": formatting.sentence(j.comparison.says),
        "reason": reason,
        "sources": sources,
    }


def _parity_summary(f: RunFacts) -> dict[str, Any]:
    p = f.verdict.parity
    text = f"{p.passed:,} checks of the computation passed, {p.failed:,} failed, {p.skipped:,} skipped."
    if n := len(p.unchecked):
        text += f" {plural(n, 'measured Cell')} passed no check."
    if p.shared:
        text += f" {plural(p.shared, 'Cell')} with the gate of another Cell."
    return {"text": text, "unchecked": links.sources(f, p.unchecked)}


def _group(f: RunFacts, g: Group) -> dict[str, Any]:
    return {
        "title": f"{g.budget.model} · {g.budget.task}",
        "budget": _budget(g),
        "sentences": _sentences(f, g),
        "chart": chart_sets.accuracy(f, g),
    }


def _alone(f: RunFacts, g: Group) -> dict[str, Any]:
    """Return the content about a group with a single recipe, which cannot be ranked."""
    (entry,) = g.entries
    cell, accuracy = entry.record.cell, formatting.accuracy(entry.score)
    title = f"{cell.model} {f.entry_name(entry)}"
    return {**links.row(f, cell), "title": title, "accuracy": accuracy, "budget": _budget(g)}


def _budget(g: Group) -> str:
    b = g.budget
    training = f"{b.steps} steps × {b.batch} examples" if b.steps else "no training"
    items = f"{b.items:,} test items" + (f" after the first {b.skip:,}" if b.skip else "")
    # Older Records did not count the cut items, so the number is None.
    cut = max((r.accuracy.cut_items or 0 for e in g.entries for r in e.records if r.accuracy), default=0)
    items += f" ({cut:,} of them truncated)" if cut else ""
    seeds = f", seeds {', '.join(map(str, g.seeds))}" if len(g.seeds) > 1 else ""
    tries = f", {g.tries} learning rates tried for each" if g.tries else ""
    return f"{training}, at most {b.max_tokens} tokens, {items}, {b.dtype}{seeds}{tries}"


def _sentences(f: RunFacts, g: Group) -> list[str]:
    """Return sentences about the ranking of a group: the best, the tied and the lower recipes, and the tests."""

    def listed(entries: Sequence[RankingEntry]) -> str:
        shown = ", ".join(f"{f.entry_name(e)} ({_gap(e)})" for e in entries[:_LISTED])
        more = len(entries) - _LISTED
        return f"{shown} and {more} more, which the table of recipes lists" if more > 0 else shown

    sentences = []
    best = f"{f.entry_name(g.entries[0])}, {formatting.accuracy(g.entries[0].score)}"
    if g.is_ranking:
        tied, below = ([e for e in g.ranked if e.standing == standing] for standing in ("tied", "below"))
        sentences.append(
            f"Highest accuracy: {best}. "
            + (
                f"No test tells these apart from it: {listed(tied)}. "
                if tied
                else "Tests tell every other apart from it. "
            )
            + (f"Lower: {listed(below)}." if below else "No other is significantly lower.")
        )
    elif g.ranked:
        sentences.append(f"One trained Cell: {best}.")
    if len(g.optimizers) > 1:
        differ = f"The optimizers differ ({', '.join(g.optimizers)})"
        sentences.append(f"{differ}, so a difference in accuracy between two of them may come from the optimizer.")
    imported = [e for e in g.untrained if e.record.imported]
    zero_shot = [e for e in g.untrained if not e.record.imported]
    if zero_shot and g.ranked:
        sentences.append(f"For comparison, without training: {listed(zero_shot)}.")
    if imported and g.ranked:
        sentences.append(f"For comparison, imported, of another budget: {listed(imported)}.")
    if g.data_differ:
        sentences.append(
            "The data differ: some Cells with one seed were trained on other examples or in another order."
        )
    return [*sentences, *_scope(g)]


def _scope(g: Group) -> list[str]:
    """Return sentences about a group's statistical tests: what they are valid for, and what they can detect."""
    seeds = ", ".join(map(str, g.seeds))
    if len(g.ranked[0].records if g.ranked else ()) > 1:
        moderated = any(entry.score.means == MODERATED for entry in g.ranked)
        spread = f"spread over seeds{f', moderated by that of all {len(g.ranked)} recipes' if moderated else ''}"
        scope = (
            f"Each accuracy is the mean of {len(g.seeds)} training runs (seeds {seeds}). Intervals and p values (t"
            f" test of paired items plus the {spread}, Holm-adjusted) are valid for new seeds and new test items, with the"
            " same training data."
        )
        basis = f"{g.budget.items:,} items, {len(g.seeds)} seeds"
    else:
        scope = (
            f"One training run per Cell (seed {seeds}): intervals and p values (exact McNemar, Holm-adjusted) are"
            " valid for these checkpoints on a new sample of test items, not for another seed."
        )
        observed = {
            "tied": "the best Cell and the tied Cell that differs most from it do",
            "all": "the best Cell and the Cell that differs most from it do",
        }.get(g.basis, "independent answers would")
        share = formatting.percent(g.disagreement)
        basis = f"{g.budget.items:,} items; if two Cells disagree on {share} of the items, as {observed}"
    if g.detectable is None:
        return [scope]
    smallest = f"Smallest difference that one comparison here finds with 80 % power: {100 * g.detectable:.1f} points"
    return [scope, f"{smallest} ({basis})."]


def _gap(e: RankingEntry) -> str:
    return formatting.points(e.difference) + (f", {formatting.probability(e.p)}" if e.p is not None else "")
