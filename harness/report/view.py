"""Everything the report shows, as one plain dict: templates look up and loop, they never compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness import store
from harness.analysis import divergence, measured, parity
from harness.analysis.ranking import Budget, Entry, Group
from harness.analysis.verdict import Judgement
from harness.records import Record, Status
from harness.report import charts, costs, display, facts, latencies, repeats, sections, tables
from harness.report.facts import RunFacts, icon, tone
from harness.store import Run


def build(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the view of one or several runs."""
    gathered = [facts.gather(run, f"run{i}-" if i else "") for i, run in enumerate(runs)]
    return {
        "title": " and ".join(dict.fromkeys(run.manifest.title or run.manifest.suite for run in runs)),
        "generated": store.now(),
        "runs": [_run(f) for f in gathered],
        "reproducibility": repeats.section(runs) if repeats.asked(runs) else None,
        "data": [{"run": f.run.manifest.run, "suite": f.run.manifest.suite, "cells": tables.raw(f)} for f in gathered],
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
        "reason": display.sentence(v.reason),
        "exit": f"exit code {f.verdict.exit.value} ({f.verdict.exit.name.lower().replace('_', ' ')})",
    }


def _alerts(f: RunFacts) -> list[dict[str, Any]]:
    """Say at the top what is not whole: an unfinished run, missing Cells, changed or torn files, Records from elsewhere."""
    found: list[dict[str, Any]] = []
    if f.verdict.how != "finished":
        mend = f"peft-harness run SUITE --resume {f.run.manifest.run} measures the rest"
        found.append({"text": f"This run {f.unfinished()}. What it holds is shown below.", "items": [mend]})
    if f.run.changed:
        text = "Not as the run left it, and not counted (move a Record out of cells/, and --resume measures its Cell again):"
        found.append({"text": text, "items": [f"{name} {what}" for name, what in f.run.changed.items()]})
    red = [(r, c) for r in f.latest.values() if r.status is Status.OK for c in parity.failed(r)]
    if red:
        text = "Measured, although a check failed; speeds of what failed are not shown:"
        found.append({"text": text, "items": [f"{f.titles[r.cell_id]}: {sections.told(c)}" for r, c in red]})
    rising = [(r, why) for r in f.latest.values() if (why := divergence.diverging(r))]
    if rising:
        text = "Measured, although training diverged (a lower `lr`, a longer `warmup` or a wider dtype may mend it):"
        found.append({"text": text, "items": [f"{f.titles[r.cell_id]}: {why}" for r, why in rising]})
    if f.verdict.missing:
        n = len(f.verdict.missing)
        text = f"{n} expected Cell{'s have' if n > 1 else ' has'} no Record:"
        found.append({"text": text, "items": [f"{f.titles[i]} ({i})" for i in f.verdict.missing]})
    if f.run.broken:
        n = len(f.run.broken)
        text = f"{n} file{'s' if n > 1 else ''} could not be read, and {'are' if n > 1 else 'is'} not counted:"
        found.append({"text": text, "items": [f"{name}: {why}" for name, why in f.run.broken.items()]})
    strangers = [r for r in f.latest.values() if r.environment.id != f.run.manifest.environment.id]
    if strangers:
        text = "Records from another environment than the run's, so their times and memory do not compare:"
        found.append({"text": text, "items": [f"{f.titles[r.cell_id]} ({r.id})" for r in strangers]})
    return found


def _question(f: RunFacts, j: Judgement) -> dict[str, Any]:
    return {
        "says": j.comparison.says,
        "word": j.verdict.word.value,
        "icon": icon(j.verdict.word),
        "tone": tone(j.verdict.word),
        "reason": display.sentence(j.verdict.reason),
        "sources": f.sources(j.verdict.records),
    }


def _parity_summary(f: RunFacts) -> dict[str, Any]:
    p = f.verdict.parity
    text = f"{p.passed} checks passed, {p.failed} failed, {p.skipped} skipped."
    if p.unchecked:
        several = len(p.unchecked) > 1
        text += f" {len(p.unchecked)} measured Cell{'s carry' if several else ' carries'} no passed check."
    return {"text": text, "unchecked": f.sources(p.unchecked)}


def _group(f: RunFacts, g: Group) -> dict[str, Any]:
    levels = [
        charts.Level(f.names[e.record.cell_id], e.accuracy.value, e.accuracy.low, e.accuracy.high) for e in g.untrained
    ]
    drawings = []
    if g.ranked:
        drawings = [d for d in (_memory_chart(f, g, levels), _size_chart(f, g, levels)) if d]
    return {
        "title": f"{g.budget.model} · {g.budget.task}",
        "budget": _budget(g.budget),
        "sentences": _sentences(f, g),
        "charts": drawings,
        "undrawn": _undrawn(f, g) if drawings else [],
    }


def _alone(f: RunFacts, g: Group) -> dict[str, Any]:
    """Show a Cell that no other shares its budget with."""
    (entry,) = g.entries
    return {**f.row(entry.record.cell), "accuracy": display.accuracy(entry.accuracy), "budget": _budget(g.budget)}


def _budget(b: Budget) -> str:
    training = f"{b.steps} steps × {b.batch} examples" if b.steps else "no training"
    return f"{training}, at most {b.max_tokens} tokens, {b.items:,} test items, {b.dtype}"


def _sentences(f: RunFacts, g: Group) -> list[str]:
    """Say who is best, who is tied with it, what the comparison cannot see."""

    def listed(entries: Sequence[Entry]) -> str:
        return ", ".join(f"{f.names[e.record.cell_id]} ({_gap(e)})" for e in entries)

    sentences = []
    best = g.entries[0]
    if g.is_ranking:
        tied = [e for e in g.ranked if e.standing == "tied"]
        below = [e for e in g.ranked if e.standing == "below"]
        sentences.append(
            f"Highest accuracy: {f.names[best.record.cell_id]}, {display.accuracy(best.accuracy)}. "
            + (f"Tied with it: {listed(tied)}. " if tied else "Nothing is tied with it. ")
            + (f"Below it: {listed(below)}." if below else "Nothing is below it for certain.")
        )
    elif g.ranked:
        sentences.append(f"One trained Cell: {f.names[best.record.cell_id]}, {display.accuracy(best.accuracy)}.")
    if len(g.optimizers) > 1:
        differ = f"The optimizers differ ({', '.join(g.optimizers)})"
        sentences.append(f"{differ}: where two Cells do, their difference in accuracy may be the optimizer's.")
    if g.untrained and g.ranked:
        sentences.append(f"For orientation, without training: {listed(g.untrained)}.")
    runs = f"One training run per Cell (seed {', '.join(map(str, g.seeds))})"
    sentences.append(
        f"{runs}: intervals, ties and p values (exact McNemar, Holm-adjusted) speak of these checkpoints on"
        " a new sample of test items, not of another seed."
    )
    if g.detectable is not None:
        observed = {
            "tied": "the best and the most different of those tied with it do",
            "all": "the best and the most different other do",
            "independent": "independent answers would",
        }[g.basis]
        share = f"if two Cells disagree on {display.percent(g.disagreement)} of the items, as {observed}"
        sentences.append(
            f"Smallest difference that one comparison here finds with 80 % power: {100 * g.detectable:.1f} points"
            f" ({g.budget.items:,} items; {share})."
        )
    return sentences


def _gap(e: Entry) -> str:
    return display.points(e.difference) + (f", {display.probability(e.p)}" if e.p is not None else "")


def _points(f: RunFacts, entries: Sequence[tuple[Entry, float]], cost: str) -> list[charts.Point]:
    return [
        charts.Point(
            label=f.names[e.record.cell_id],
            cost=value,
            value=e.accuracy.value,
            low=e.accuracy.low,
            high=e.accuracy.high,
            tied=e.standing in ("best", "tied"),
            tip=f"{f.titles[e.record.cell_id]}: {display.accuracy(e.accuracy)}, {cost.format(value)}; Record {e.record.id}",
            href=f"#{f.anchor(e.record.cell_id)}",
        )
        for e, value in entries
    ]


def _memory_chart(f: RunFacts, g: Group, levels: Sequence[charts.Level]) -> dict[str, Any] | None:
    with_peak = [
        (e, measured.above_imports(e.record, peak) / display.MIB)
        for e in g.ranked
        if (peak := measured.training_peak(e.record)) is not None
    ]
    if not with_peak:
        return None
    points = _points(f, with_peak, "{:,.0f} MiB")
    title, axis = "Accuracy against peak training memory", "peak training memory above that of the imports, MiB"
    return charts.cost(title, axis, points, levels, _out_of_memory(f, g), log=False)


def _out_of_memory(f: RunFacts, g: Group) -> list[charts.Stopped]:
    return [
        charts.Stopped(
            f"{f.names[r.cell_id]}: out of memory", measured.above_imports(r, r.failure.last_peak_B) / display.MIB
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
        at = f", last peak {display.mebibytes(peak)} MiB" if peak is not None else ""
        found.append({**f.row(cell), "why": f.why_unmeasured(cell) + at})
    no_peak = [e for e in g.ranked if measured.training_peak(e.record) is None]
    return found + [{**f.row(e.record.cell), "why": "no memory peak was recorded"} for e in no_peak]
