"""Sections of the report other than tables and rankings: parity, losses, time, environment, failures, rerun."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from harness.analysis import failed_checks, measurements
from harness.analysis.comparison.reproducibility import strangers, usual_environment
from harness.analysis.run_facts import RunFacts
from harness.analysis.trajectories import JudgedTrajectory
from harness.analysis.verdict import QuestionVerdict
from harness.conformance.findings.summary import describe
from harness.records.record import CheckResult, Environment, Json, Outcome, Record, Status
from harness.report import formatting, links
from harness.report.formatting import DASH, GIB
from harness.report.svg import charts
from harness.report.tones import icon, tone

Section = dict[str, Any]

_CURVES_IN_A_CHART = 10
OUTSIDE_TARGET = 0.10
"""Largest acceptable share of the run's time outside the Cells."""


def curves(facts: RunFacts) -> list[Section]:
    """Draw the training losses, one chart per model and task; several seeds are averaged."""
    titled: dict[str, dict[str, list[Record]]] = {}
    for record in facts.latest.values():
        if record.measurements and record.measurements.training and record.measurements.training.losses:
            title = f"{record.cell.model} · {record.cell.task}"
            titled.setdefault(title, {}).setdefault(record.cell.recipe_id, []).append(record)
    series = {title: [_curve(facts, records) for records in found.values()] for title, found in titled.items()}
    return [
        charts.learning(title, lines[i : i + _CURVES_IN_A_CHART])
        for title, lines in series.items()
        for i in range(0, len(lines), _CURVES_IN_A_CHART)
    ]


def _curve(facts: RunFacts, records: Sequence[Record]) -> charts.ChartSeries:
    """Return the mean loss of each step over runs that differ in the seed alone."""
    losses = [r.measurements.training.losses for r in records if r.measurements and r.measurements.training]
    if len(losses) == 1:
        return charts.ChartSeries(facts.names[records[0].cell_id], losses[0])
    name = f"{facts.recipes[records[0].cell.recipe_id]}, {len(losses)} seeds"
    return charts.ChartSeries(name, [fmean(step) for step in zip(*losses, strict=True)])


def losses(facts: RunFacts, judgement: QuestionVerdict) -> Section | None:
    """Show a `same-losses` comparison step by step; None for other comparisons."""
    subjects = judgement.trajectories
    if subjects is None:
        return None
    measured_ones = [s for s in subjects if s.errors]
    by_noise = [s for s in measured_ones if s.by == "noise"]
    drawing = None
    if measured_ones:
        bound = (by_noise or measured_ones)[0]
        allowed = charts.ChartSeries("allowed" if by_noise else "allowed growth", bound.allowed)
        lines = [charts.ChartSeries(facts.names[s.cell_id], s.errors) for s in measured_ones]
        drawing = charts.errors("Distance from the float64 losses", lines, allowed)
    return {
        "says": judgement.comparison.says,
        "word": judgement.verdict.word.value,
        "chart": drawing,
        "rows": [_subject(facts, s) for s in subjects],
    }


def _subject(facts: RunFacts, s: JudgedTrajectory) -> Section:
    return {
        "name": facts.names[s.cell_id],
        "href": f"#{links.anchor(facts, s.cell_id)}",
        "word": s.verdict.word.value,
        "icon": icon(s.verdict.word),
        "tone": tone(s.verdict.word),
        "ratio": formatting.scientific(s.ratio),
        "step": DASH if s.step is None else str(s.step),
        "error": DASH if s.step is None else formatting.scientific(s.errors[s.step]),
        "allowed": DASH if s.step is None else formatting.scientific(s.allowed[s.step]),
        "reason": s.verdict.reason,
    }


def checks(facts: RunFacts) -> list[Section]:
    """List each Cell's checks; Cells with a failed check are expanded."""
    found = []
    for record in facts.latest.values():
        count = {outcome: sum(c.outcome is outcome for c in record.checks) for outcome in Outcome}
        judged = [(r, c.check) for c in record.checks if (r := _share(c)) is not None]
        tightest = max(judged, default=None)
        summary = ", ".join(f"{n} {outcome.value}" for outcome, n in count.items() if n) or "no check was run"
        red = [c.check for c in failed_checks.failed(record)]
        if red:
            summary += f": {', '.join(red)}"
        elif tightest:
            summary += f"; nearest to its bound: {tightest[1]} at {tightest[0]:.2g} of what is allowed"
        word = "fail" if count[Outcome.FAIL] else "pass" if count[Outcome.PASS] else "not-run"
        found.append(
            {
                **links.row(facts, record.cell),
                "summary": summary,
                "word": word,
                "icon": icon(word) if record.checks else "–",
                "tone": tone(word) if record.checks else "quiet",
                "open": bool(count[Outcome.FAIL]),
                "checks": [_check(c) for c in sorted(record.checks, key=lambda c: c.outcome is not Outcome.FAIL)],
            }
        )
    return found


def _share(check: CheckResult) -> float | None:
    return check.error / check.allowed if check.error is not None and check.allowed else None


def _check(c: CheckResult) -> Section:
    share = _share(c)
    notes = [c.detail, f"{c.nonfinite} not finite" if c.nonfinite else ""]
    return {
        "check": c.check,
        "outcome": c.outcome.value,
        "icon": icon(c.outcome.value),
        "tone": "quiet" if c.outcome is Outcome.SKIPPED else tone(c.outcome.value),
        "error": formatting.scientific(c.error),
        "allowed": formatting.scientific(c.allowed),
        "share": DASH if share is None else f"{share:.2g}",
        "tensor": c.tensor or DASH,
        "worst": c.worst or DASH,
        "policy": c.policy or DASH,
        "detail": "; ".join(n for n in notes if n),
    }


def check_sentence(c: CheckResult) -> str:
    """Describe a check in one sentence, with the numbers it has."""
    return f"{c.check}: {described}" if (described := describe(c)) else c.check


def duration(facts: RunFacts) -> str:
    """Return the duration of a run as text. The footer of a resumed run covers its last invocation only."""
    footer = facts.run.footer
    inside = formatting.seconds(sum(r.duration_s for r in facts.latest.values()))
    if footer is None:
        return f"took an unknown time (no footer); its Cells so far took {inside} in total"
    if not footer.kept:
        return f"took {formatting.seconds(footer.seconds_total)}"
    return (
        f"resumed: the last invocation took {formatting.seconds(footer.seconds_total)} and kept {footer.kept} of"
        f" {len(facts.run.manifest.cells)} Cells from earlier; all Cells took {inside} together"
    )


def time(facts: RunFacts) -> Section:
    """Show the time in each Cell, and outside the Cells."""
    bars = []
    for record in facts.latest.values():
        spent = [(p.name, p.seconds) for p in record.phases if p.name != measurements.STARTUP]
        rest = measurements.unaccounted_seconds(record)
        own = [*spent, (charts.NO_PHASE, rest)] if record.phases and rest > 0 else spent
        if record.phases:
            bars.append(charts.PhaseBars(facts.titles[record.cell_id], measurements.startup_seconds(record), own))
    return {"chart": charts.phases("Phases of each Cell", bars) if bars else None, **_outside(facts)}


def _outside(facts: RunFacts) -> Section:
    footer = facts.run.footer
    if footer is None or footer.seconds_total <= 0:
        return {"sentence": "Time outside the Cells: unknown, the run has no footer.", "tone": "open", "outside": []}
    # Cells that run at once add up to more than the run, so the two times are not always complements.
    named = sum(footer.seconds_outside.values())
    outside = max(named, footer.seconds_total - footer.seconds_in_cells)
    share = outside / footer.seconds_total
    within = share < OUTSIDE_TARGET
    where = "In the last invocation, outside" if footer.kept else "Outside"
    parts = [*footer.seconds_outside.items(), *([("other", outside - named)] if outside - named > 0.05 else [])]
    return {
        "sentence": f"{where} the Cells: {formatting.seconds(outside)} of {formatting.seconds(footer.seconds_total)},"
        f" {formatting.percent(share)}; the aim is under {100 * OUTSIDE_TARGET:.0f} %.",
        "tone": "good" if within else "bad",
        "outside": [{"name": name, "text": formatting.seconds(s)} for name, s in parts],
    }


def environment(facts: RunFacts) -> Section:
    """Show the environment of most Records of the run, its assets, and the Records from other environments."""
    own = usual_environment(facts.run)
    elsewhere = [
        {"differences": differences, "cells": [links.row(facts, r.cell) for r in records]}
        for differences, records in strangers(facts.run).items()
        if differences
    ]
    assets = {a.name: a for r in facts.latest.values() for a in r.assets}
    providers = {p.distribution: p.version for r in facts.latest.values() if (p := r.provider)}
    return {
        "blocks": [
            {"title": "Machine", "rows": _pairs(_readable(own.machine) | _threads(own))},
            {"title": "Software", "rows": _pairs(own.software)},
            {"title": "Code", "rows": _pairs(_code(facts, own))},
            {"title": "Implementations from", "rows": _pairs(providers)},
            {"title": "Workers", "rows": _pairs(_workers(facts))},
        ],
        "assets": [
            {
                "name": a.name,
                "source": a.source,
                "revision": a.revision or DASH,
                "licence": a.licence or DASH,
                "sha256": a.sha256 or DASH,
            }
            for a in assets.values()
        ],
        "strangers": elsewhere,
    }


def _threads(e: Environment) -> dict[str, str]:
    return {"threads": "not recorded" if e.threads is None else str(e.threads)}


def _code(facts: RunFacts, e: Environment) -> dict[str, str]:
    m = facts.run.manifest
    dirty = {None: "", True: ", with uncommitted changes", False: ", clean"}[e.git_dirty]
    return {
        "harness": m.harness_version,
        "code version": e.code_version[:16],
        "git": (e.git_sha[:12] + dirty) if e.git_sha else "not a checkout",
        "suite": m.suite_file,
        "suite sha256": m.suite_sha256[:16],
        "environment id": e.id,
    }


def _workers(facts: RunFacts) -> dict[str, str]:
    """Return the facts that workers report about themselves; several values only if they differ."""
    values: dict[str, dict[str, None]] = {}
    for record in facts.latest.values():
        for key, value in _flat(record.environment.extra):
            values.setdefault(key, {})[value] = None
    return {key: " | ".join(found) for key, found in values.items() if any(found)}


def _flat(extra: dict[str, Json]) -> Iterator[tuple[str, str]]:
    for key, value in extra.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield key, "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _readable(machine: dict[str, str]) -> dict[str, str]:
    """Write sizes in bytes with readable units."""
    return {
        key.removesuffix("_B"): f"{int(value) / GIB:.1f} GiB" if key.endswith("_B") and value.isdecimal() else value
        for key, value in machine.items()
    }


def _pairs(mapping: dict[str, str]) -> list[Section]:
    return [{"key": key, "value": value} for key, value in mapping.items()]


def failures(facts: RunFacts) -> list[Section]:
    """List every attempt that failed or that failed a check, earlier ones included."""
    ill = [r for r in facts.run.records if r.status is not Status.OK or failed_checks.failed(r)]
    return [_failure(facts, r) for r in ill if r.cell_id in facts.titles]


def _failure(facts: RunFacts, record: Record) -> Section:
    f = record.failure
    memory = []
    if f and f.requested_B is not None:
        memory.append(f"requested {formatting.mebibytes(f.requested_B)} MiB")
    if f and f.last_peak_B is not None:
        memory.append(f"last peak {formatting.mebibytes(f.last_peak_B)} MiB")
    superseded = facts.latest[record.cell_id].id != record.id if record.cell_id in facts.latest else False
    return {
        **links.row(facts, record.cell),
        "name": facts.titles[record.cell_id],
        "record": record.id,
        "status": "ok, but a check failed" if record.status is Status.OK else record.status.value,
        "icon": icon(Status.NONCONFORMING if failed_checks.failed(record) else record.status),
        "tone": tone(Status.NONCONFORMING if failed_checks.failed(record) else record.status),
        "because": record.because or "Measured, although a check failed; speeds of what failed are not shown",
        "superseded": "a later attempt exists" if superseded else "",
        "kind": f.kind if f else "",
        "message": f.message if f else "",
        "phase": f.phase if f else "",
        "memory": ", ".join(memory),
        "traceback": f.traceback if f else "",
        "checks": [check_sentence(c) for c in failed_checks.failed(record)],
        "log": f"logs/{record.id}.txt",
    }


def rerun(facts: RunFacts) -> Section:
    """Give the commands that repeat the run, or one Cell of it."""
    m = facts.run.manifest
    # As given on the command line: a path, or the name of a suite of the harness.
    paths = [word for word in m.argv[2:] if Path(word).name == m.suite_file]
    names = [word for word in m.argv[2:] if word == m.suite_file.rpartition(".")[0]]
    suite = shlex.quote([*paths, *names, m.suite_file][0])
    return {
        "command": shlex.join(m.argv),
        "file": m.suite_file,
        "text": m.suite_text,
        "cells": [
            {**links.row(facts, cell), "command": f"peft-harness run {suite} --only {cell.cell_id}"} for cell in m.cells
        ],
    }


def notes(facts: RunFacts) -> list[Section]:
    """Collect the notes of the Records, each once."""
    found: dict[str, list[str]] = {}
    for record in facts.latest.values():
        for note in record.notes:
            found.setdefault(note, []).append(record.id)
    return [{"text": text, "sources": links.sources(facts, ids)} for text, ids in found.items()]
