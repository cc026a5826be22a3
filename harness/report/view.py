"""Content of the report page, as one plain dict: templates look up and loop, they never compute."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from harness.analysis import divergence, failed_checks, measurements
from harness.analysis.comparison import reproducibility
from harness.analysis.comparison.reproducibility import Rerun
from harness.analysis.ranking import Budget, Group, RankingEntry
from harness.analysis.run_facts import RunFacts
from harness.analysis.statistics.over_seeds import MODERATED
from harness.analysis.verdict import QuestionVerdict
from harness.errors import plural
from harness.records import store
from harness.records.record import Record, Status
from harness.report import costs, formatting, latencies, links, recipes, reruns, sections, tables
from harness.report.svg import charts
from harness.report.tones import icon, tone


def build(analysed: Sequence[RunFacts], again: Sequence[Rerun] | None = None) -> dict[str, Any]:
    """Return the view of one or several runs. again: their reruns; None if none are possible."""
    return {
        "title": " and ".join(dict.fromkeys(f.run.manifest.title or f.run.manifest.suite for f in analysed)),
        "generated": store.now(),
        "runs": [_run(f) for f in analysed],
        "reproducibility": None if again is None else reruns.section([f.run for f in analysed], again),
        "data": [{"run": f.run.manifest.run, "suite": f.run.manifest.suite, "cells": tables.raw(f)} for f in analysed],
    }


def _run(f: RunFacts) -> dict[str, Any]:
    m, footer = f.run.manifest, f.run.footer
    same_losses = [s for j in f.verdict.judgements if (s := sections.losses(f, j))]
    groups = [_group(f, g) for g in f.groups if len(g.entries) > 1]
    curves, time = sections.curves(f), sections.time(f)
    drawings = [d for g in groups for d in g["charts"]] + curves + [s["chart"] for s in same_losses] + [time["chart"]]
    for number, drawing in enumerate(d for d in drawings if d):
        drawing["id"] = f"{f.prefix}chart-{number}"
    return {
        "id": m.run,
        "prefix": f.prefix,
        "suite": m.suite,
        "title": m.title or m.suite,
        "about": m.about,
        "started": m.started,
        "ended": footer.ended if footer else "",
        "duration": sections.duration(f),
        "verdict": _verdict(f),
        "alerts": _alerts(f),
        "counts": [
            {"status": s, "count": n, "tone": tone(s), "icon": icon(s)}
            for s, n in sorted(f.verdict.counts.items(), key=lambda pair: pair[0] != Status.OK)
        ],
        "questions": [_question(f, j) for j in f.verdict.judgements],
        "parity_summary": _parity_summary(f),
        "groups": groups,
        "alone": [_alone(f, g) for g in f.groups if len(g.entries) == 1],
        "over_seeds": recipes.over_seeds(f),
        "tuning": recipes.searched(f),
        "comparison": tables.comparison(f),
        "latency": tables.latency(f),
        "mixed": latencies.several(f),
        "memory": tables.memory(f),
        "costs": costs.costs(f),
        "gpus": costs.gpus(f),
        "curves": curves,
        "same_losses": same_losses,
        "parity": sections.checks(f),
        "time": time,
        "environment": sections.environment(f),
        "failures": sections.failures(f),
        "notes": sections.notes(f),
        "rerun": sections.rerun(f),
    }


def _verdict(f: RunFacts) -> dict[str, Any]:
    v = f.verdict.verdict
    return {
        "word": v.word.value,
        "icon": icon(v.word),
        "tone": tone(v.word),
        "reason": formatting.sentence(v.reason),
        "exit": f"exit code {f.verdict.exit.value} ({f.verdict.exit.name.lower().replace('_', ' ')})",
    }


def _alerts(f: RunFacts) -> list[dict[str, Any]]:
    """Return the alerts: unfinished run, missing Cells, changed or torn files, Records from other environments."""
    found: list[dict[str, Any]] = []
    if f.run.how != "finished":
        hint = f"peft-harness run SUITE --resume {f.run.manifest.run} measures the rest"
        found.append({"text": f"This run {f.unfinished()}. What it holds is shown below.", "items": [hint]})
    if f.run.changed:
        text = "Not as the run left it, and not counted (move a Record out of cells/, and --resume measures its Cell again):"
        found.append({"text": text, "items": [f"{name} {what}" for name, what in f.run.changed.items()]})
    red = [(r, c) for r in f.latest.values() if r.status is Status.OK for c in failed_checks.failed(r)]
    if red:
        text = "Measured, although a check failed; speeds of what failed are not shown:"
        found.append({"text": text, "items": [f"{f.titles[r.cell_id]}: {sections.check_sentence(c)}" for r, c in red]})
    rising = [(r, why) for r in f.latest.values() if (why := divergence.diverging(r))]
    if rising:
        text = "Measured, although training diverged (a lower `lr`, a longer `warmup` or a wider dtype may help):"
        found.append({"text": text, "items": [f"{f.titles[r.cell_id]}: {why}" for r, why in rising]})
    if f.verdict.missing:
        n = len(f.verdict.missing)
        text = f"{n} expected Cell{'s have' if n > 1 else ' has'} no Record:"
        found.append({"text": text, "items": [f"{f.titles[i]} ({i})" for i in f.verdict.missing]})
    if f.run.broken:
        n = len(f.run.broken)
        text = f"{plural(n, 'file')} could not be read, and {'are' if n > 1 else 'is'} not counted:"
        found.append({"text": text, "items": [f"{name}: {why}" for name, why in f.run.broken.items()]})
    usual = reproducibility.usual_environment(f.run)
    elsewhere = [
        f"{plural(n, 'Cell')}: {differences or 'only the id differs'}"
        for differences, records in reproducibility.strangers(f.run).items()
        if (n := sum(r.environment.id != usual.id for r in records))
    ]
    if elsewhere:
        text = "Records from another environment than most have, so their times and memory do not compare with those:"
        found.append({"text": text, "items": elsewhere})
    return found


def _question(f: RunFacts, j: QuestionVerdict) -> dict[str, Any]:
    return {
        "says": j.comparison.says,
        "word": j.verdict.word.value,
        "icon": icon(j.verdict.word),
        "tone": tone(j.verdict.word),
        "reason": formatting.sentence(j.verdict.reason),
        "sources": links.sources(f, j.verdict.records),
    }


def _parity_summary(f: RunFacts) -> dict[str, Any]:
    p = f.verdict.parity
    text = f"{p.passed} checks passed, {p.failed} failed, {p.skipped} skipped."
    if p.unchecked:
        several = len(p.unchecked) > 1
        text += f" {len(p.unchecked)} measured Cell{'s carry' if several else ' carries'} no passed check."
    return {"text": text, "unchecked": links.sources(f, p.unchecked)}


def _group(f: RunFacts, g: Group) -> dict[str, Any]:
    levels = [charts.Level(f.entry_name(e), e.score.value, e.score.low, e.score.high) for e in g.untrained]
    drawings = []
    if g.ranked:
        drawings = [d for d in (_memory_chart(f, g, levels), _size_chart(f, g, levels)) if d]
    return {
        "title": f"{g.budget.model} · {g.budget.task}",
        "budget": _budget(g),
        "sentences": _sentences(f, g),
        "charts": drawings,
        "undrawn": _undrawn(f, g) if drawings else [],
    }


def _alone(f: RunFacts, g: Group) -> dict[str, Any]:
    """Return the view of an entry that is alone in its budget."""
    (entry,) = g.entries
    title = f"{entry.record.cell.model} {f.entry_name(entry)}"
    return {
        **links.row(f, entry.record.cell), "title": title, "accuracy": formatting.accuracy(entry.score), "budget": _budget(g)
    }  # fmt: skip


def _budget(g: Group) -> str:
    b = g.budget
    training = f"{b.steps} steps × {b.batch} examples" if b.steps else "no training"
    items = f"{b.items:,} test items" + (f" after the first {b.skip:,}" if b.skip else "")
    cut = max((n for e in g.entries for r in e.records if (n := _cut(r))), default=0)
    items += f" ({cut:,} of them cut)" if cut else ""
    seeds = f", seeds {', '.join(map(str, g.seeds))}" if len(g.seeds) > 1 else ""
    tries = f", {g.tries} learning rates tried for each" if g.tries else ""
    return f"{training}, at most {b.max_tokens} tokens, {items}, {b.dtype}{seeds}{tries}"


def _cut(record: Record) -> int | None:
    """Return the number of test items that were too long for the budget; None if not counted."""
    accuracy = record.measurements.accuracy if record.measurements else None
    return accuracy.cut_items if accuracy else None


def _sentences(f: RunFacts, g: Group) -> list[str]:
    """Return the ranking as sentences: the best, those tied with it, the limits of the comparison."""

    def listed(entries: Sequence[RankingEntry]) -> str:
        return ", ".join(f"{f.entry_name(e)} ({_gap(e)})" for e in entries)

    sentences = []
    best = g.entries[0]
    if g.is_ranking:
        tied = [e for e in g.ranked if e.standing == "tied"]
        below = [e for e in g.ranked if e.standing == "below"]
        sentences.append(
            f"Highest accuracy: {f.entry_name(best)}, {formatting.accuracy(best.score)}. "
            + (f"Tied with it: {listed(tied)}. " if tied else "Nothing is tied with it. ")
            + (f"Below it: {listed(below)}." if below else "Nothing is below it for certain.")
        )
    elif g.ranked:
        sentences.append(f"One trained Cell: {f.entry_name(best)}, {formatting.accuracy(best.score)}.")
    if len(g.optimizers) > 1:
        differ = f"The optimizers differ ({', '.join(g.optimizers)})"
        sentences.append(f"{differ}: where two Cells do, their difference in accuracy may be the optimizer's.")
    if g.untrained and g.ranked:
        sentences.append(f"For orientation, without training: {listed(g.untrained)}.")
    if g.data_differ:
        sentences.append("Not on the same data: of one seed, some were trained on other examples or in another order.")
    return [*sentences, *_scope(g)]


def _moderated(g: Group) -> str:
    shared = any(entry.score.means == MODERATED for entry in g.ranked)
    return f", moderated by that of all {len(g.ranked)} recipes" if shared else ""


def _scope(g: Group) -> list[str]:
    """Return sentences on the scope of a group's tests and their smallest detectable difference."""
    finds = (
        f"Smallest difference that one comparison here finds with 80 % power: {100 * (g.detectable or 0):.1f} points"
    )
    if len(g.ranked[0].records if g.ranked else ()) > 1:
        about = (
            f"Each is the mean of {len(g.seeds)} training runs (seeds {', '.join(map(str, g.seeds))}). Intervals, ties and"
            f" p values (t test of paired items plus the spread over seeds{_moderated(g)}, Holm-adjusted) speak of new seeds"
            " and new test items, on the same training data."
        )
        return (
            [about] if g.detectable is None else [about, f"{finds} ({g.budget.items:,} items, {len(g.seeds)} seeds)."]
        )
    about = (
        f"One training run per Cell (seed {', '.join(map(str, g.seeds))}): intervals, ties and p values (exact McNemar,"
        " Holm-adjusted) speak of these checkpoints on a new sample of test items, not of another seed."
    )
    if g.detectable is None:
        return [about]
    observed = {
        "tied": "the best and the most different of those tied with it do",
        "all": "the best and the most different other do",
    }.get(g.basis, "independent answers would")
    share = f"if two Cells disagree on {formatting.percent(g.disagreement)} of the items, as {observed}"
    return [about, f"{finds} ({g.budget.items:,} items; {share})."]


def _gap(e: RankingEntry) -> str:
    return formatting.points(e.difference) + (f", {formatting.probability(e.p)}" if e.p is not None else "")


def _points(f: RunFacts, entries: Sequence[tuple[RankingEntry, float]], cost: str) -> list[charts.Point]:
    return [
        charts.Point(
            label=f.entry_name(e),
            cost=value,
            value=e.score.value,
            low=e.score.low,
            high=e.score.high,
            tied=e.standing in ("best", "tied"),
            tip=f"{f.entry_name(e)}: {formatting.accuracy(e.score)}, {cost.format(value)}; {_records(e)}",
            href=f"#{links.anchor(f, e.record.cell_id)}",
        )
        for e, value in entries
    ]


def _records(e: RankingEntry) -> str:
    several = len(e.records) > 1
    return f"Record{'s' * several} {', '.join(r.id for r in e.records)}"


def _peak(e: RankingEntry) -> float | None:
    """Return the peak of training above the imports, in MiB; of several seeds the median."""
    peaks = [(r, measurements.training_peak(r)) for r in e.records]
    above = [measurements.above_imports(r, peak) / formatting.MIB for r, peak in peaks if peak is not None]
    return median(above) if above else None


def _memory_chart(f: RunFacts, g: Group, levels: Sequence[charts.Level]) -> dict[str, Any] | None:
    with_peak = [(e, peak) for e in g.ranked if (peak := _peak(e)) is not None]
    if not with_peak:
        return None
    points = _points(f, with_peak, "{:,.0f} MiB")
    title, axis = "Accuracy against peak training memory", "peak training memory above that of the imports, MiB"
    return charts.cost(title, axis, points, levels, _out_of_memory(f, g), log=False)


def _out_of_memory(f: RunFacts, g: Group) -> list[charts.Stopped]:
    return [
        charts.Stopped(
            f"{f.names[r.cell_id]}: out of memory",
            measurements.above_imports(r, r.failure.last_peak_B) / formatting.MIB,
        )
        for r in f.latest.values()
        if Budget.of(r.cell) == g.budget and r.status is Status.OOM and r.failure and r.failure.last_peak_B is not None
    ]


def _size_chart(f: RunFacts, g: Group, levels: Sequence[charts.Level]) -> dict[str, Any] | None:
    with_size = [(e, float(n)) for e in g.ranked if (n := _trainable(e.record)) > 0]
    if not with_size:
        return None
    points = _points(f, with_size, "{:,.0f} trainable parameters")
    axis = "trainable parameters (logarithmic)"
    return charts.cost("Accuracy against trainable parameters", axis, points, levels, log=True)


def _trainable(record: Record) -> int:
    return record.measurements.parameters.trainable if record.measurements else 0


def _undrawn(f: RunFacts, g: Group) -> list[dict[str, str]]:
    """List the Cells of this budget that have no point, with the reason."""
    found = []
    for cell in f.run.manifest.cells:
        if Budget.of(cell) != g.budget or cell.cell_id in f.entries:
            continue
        record = f.latest.get(cell.cell_id)
        out_of_memory = record is not None and record.status is Status.OOM
        peak = record.failure.last_peak_B if record and record.failure and out_of_memory else None
        at = f", last peak {formatting.mebibytes(peak)} MiB" if peak is not None else ""
        found.append({**links.row(f, cell), "why": f.why_unmeasured(cell) + at})
    no_peak = [e for e in g.ranked if _peak(e) is None]
    return found + [{**links.row(f, e.record.cell), "why": "no memory peak was recorded"} for e in no_peak]
