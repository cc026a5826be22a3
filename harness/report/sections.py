"""Sections of the report, except tables and rankings: parity, losses, time, environment, failures, rerun."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.analysis import failed_checks
from harness.analysis.comparison.reproducibility import records_from_other_environments, usual_environment
from harness.analysis.grouping import group
from harness.analysis.run_facts import RunFacts
from harness.analysis.run_verdict import QuestionVerdict
from harness.analysis.trajectories import JudgedTrajectory
from harness.analysis.verdict_kind import VerdictKind
from harness.conformance.findings.summary import describe
from harness.errors import plural
from harness.records.record import CheckResult, Environment, Failure, Json, Outcome, Record, Status
from harness.report import chart_sets, formatting, links
from harness.report.formatting import DASH, GIB, check_fields
from harness.report.tones import badge

Section = dict[str, Any]

MANY = 40
"""Largest number of Cells for which the page shows checks and commands of each Cell. For more Cells, it summarises
them."""
OUTSIDE_TARGET = 0.10
"""Largest acceptable share of a run's time in which no Cell runs."""


def losses(facts: RunFacts, judgement: QuestionVerdict) -> Section | None:
    """Return the chart and the verdicts of a `same-losses` comparison. For any other comparison, return None."""
    subjects = judgement.trajectories
    if subjects is None:
        return None
    return {
        "title": formatting.sentence(judgement.comparison.says),
        "word": judgement.verdict.word.value,
        "chart": chart_sets.errors(facts, judgement),
        "rows": [_subject(facts, s) for s in subjects],
    }


def _subject(facts: RunFacts, s: JudgedTrajectory) -> Section:
    worst = (None, None) if s.step is None else (s.errors[s.step], s.allowed[s.step])
    return badge(s.verdict.word) | {
        "name": facts.names[s.cell_id],
        "href": f"#{links.anchor(facts, s.cell_id)}",
        "ratio": formatting.scientific(s.ratio),
        "step": DASH if s.step is None else str(s.step),
        "error": formatting.scientific(worst[0]),
        "allowed": formatting.scientific(worst[1]),
        "reason": s.verdict.reason,
    }


def checks(facts: RunFacts) -> list[Section]:
    """Return the checks of each Cell. The page shows them expanded if a check of the Cell failed.

    In a run of more than MANY Cells, one line stands for all Cells whose checks passed.
    """
    found = [_checks(facts, record) for record in facts.latest.values()]
    passed = [one for one in found if one["word"] == VerdictKind.PASS]
    if len(found) <= MANY or not passed:
        return found
    return [*(one for one in found if one["word"] != VerdictKind.PASS), _all_passed(facts, len(passed))]


def _all_passed(facts: RunFacts, cells: int) -> Section:
    done = [c for r in facts.latest.values() if not failed_checks.failed(r) for c in r.checks]
    share, check = max(((c.share, c.check) for c in done if c.share is not None), default=(0.0, "none"))
    summary = f"all checks passed; largest error: {check}, {share:.2g} times what is allowed. All: peft-harness export"
    return badge(VerdictKind.PASS) | {"title": plural(cells, "Cell"), "summary": summary, "open": False, "checks": []}


def _checks(facts: RunFacts, record: Record) -> Section:
    counts = Counter(c.outcome for c in record.checks)
    summary = ", ".join(f"{counts[o]} {o.value}" for o in Outcome if counts[o]) or "no check was run"
    failed = [c.check for c in failed_checks.failed(record)]
    shares = [(c.share, c.check) for c in record.checks if c.share is not None]
    if failed:
        summary += f": {', '.join(failed)}"
    elif shares:
        share, check = max(shares)
        summary += f"; largest error: {check}, {share:.2g} times what is allowed"
    if record.gate and record.gate.record:
        summary += f"; gate of {record.gate.record}"
    word = "fail" if failed else "pass" if counts[Outcome.PASS] else "not-run"
    failed_first = sorted(record.checks, key=lambda c: c.outcome is not Outcome.FAIL)
    return {
        **links.row(facts, record.cell),
        **badge(word, "" if record.checks else "quiet"),
        "summary": summary,
        "open": bool(failed),
        "checks": [check_fields(c) | badge(c.outcome) for c in failed_first],
    }


def check_sentence(c: CheckResult) -> str:
    """Describe a check in one sentence, with the numbers that it measured."""
    return f"{c.check}: {described}" if (described := describe(c)) else c.check


def duration(facts: RunFacts) -> str:
    """Return the duration of a run as text. For a resumed run, say that it covers only the last invocation."""
    footer = facts.run.footer
    inside = formatting.seconds(sum(r.duration_s for r in facts.latest.values()))
    if footer is None:
        return f"took an unknown time (no footer); its Cells so far took {inside} in total"
    if not footer.kept:
        return f"took {formatting.seconds(footer.seconds_total)}"
    return (
        f"resumed: the last invocation took {formatting.seconds(footer.seconds_total)}, after {footer.kept} of"
        f" {len(facts.run.manifest.cells)} Cells had been measured before; all Cells took {inside} together"
    )


def time(facts: RunFacts) -> Section:
    """Return the sentence about the time in which no Cell ran, and the parts of this time."""
    footer = facts.run.footer
    if footer is None or footer.seconds_total <= 0:
        return {
            "sentence": "Time outside the Cells: unknown, since the run has no footer.",
            "tone": "open",
            "outside": [],
        }
    # Concurrent Cells may take more time together than the run, so the difference below may be too small, or negative.
    named = sum(footer.seconds_outside.values())
    outside = max(named, footer.seconds_total - footer.seconds_in_cells)
    share = outside / footer.seconds_total
    where = "In the last invocation, outside" if footer.kept else "Outside"
    parts = [*footer.seconds_outside.items(), *([("other", outside - named)] if outside - named > 0.05 else [])]
    return {
        "sentence": f"{where} the Cells: {formatting.seconds(outside)} of {formatting.seconds(footer.seconds_total)},"
        f" {formatting.percent(share)}"
        + ("." if share < OUTSIDE_TARGET else f"; the aim is under {OUTSIDE_TARGET:.0%}."),
        "tone": "quiet" if share < OUTSIDE_TARGET else "bad",
        "outside": [{"name": name, "text": formatting.seconds(s)} for name, s in parts],
    }


def environment(facts: RunFacts) -> Section:
    """Return the most frequent environment of the run, the run's assets, and the Records from other environments."""
    own = usual_environment(facts.run)
    blocks = {
        "Machine": _readable(own.machine) | {"threads": "not recorded" if own.threads is None else str(own.threads)},
        "Software": own.software,
        "Code": _code(facts, own),
        "Implementations from": {p.distribution: p.version for r in facts.latest.values() if (p := r.provider)},
        "Workers": _workers(facts),
    }
    assets = {a.name: a for r in facts.latest.values() for a in r.assets}
    return {
        "blocks": blocks,
        "assets": [{key: value or DASH for key, value in a.model_dump().items()} for a in assets.values()],
        "strangers": [
            {"differences": differences, "cells": [links.row(facts, r.cell) for r in records]}
            for differences, records in records_from_other_environments(facts.run).items()
            if differences
        ],
    }


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
    """Return the facts that workers report about themselves. If workers differ in a fact, list all its values."""
    facts_of = (pair for record in facts.latest.values() for pair in _flat(record.environment.extra))
    return {key: " | ".join(found) for key, found in group(dict.fromkeys(facts_of)).items() if any(found)}


def _flat(extra: dict[str, Json]) -> Iterator[tuple[str, str]]:
    for key, value in extra.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield key, "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _readable(machine: dict[str, str]) -> dict[str, str]:
    """Return the facts about a machine, with sizes in GiB instead of bytes."""
    return {
        key.removesuffix("_B"): f"{int(value) / GIB:.1f} GiB" if key.endswith("_B") and value.isdecimal() else value
        for key, value in machine.items()
    }


def failures(facts: RunFacts) -> list[Section]:
    """Return every attempt that did not end ok or has a failed check, even if there is a later attempt."""
    failed = [r for r in facts.run.records if r.status is not Status.OK or failed_checks.failed(r)]
    return [_failure(facts, r) for r in failed if r.cell_id in facts.titles]


def _failure(facts: RunFacts, record: Record) -> Section:
    failure = record.failure or Failure(kind="", message="")
    sizes = {"requested": failure.requested_B, "last peak": failure.last_peak_B}
    red = failed_checks.failed(record)
    latest = facts.latest.get(record.cell_id, record)
    return {
        **links.row(facts, record.cell),
        **badge(Status.NONCONFORMING if red else record.status),
        **failure.model_dump(include={"kind", "message", "phase", "traceback"}),
        "name": facts.titles[record.cell_id],
        "record": record.id,
        "word": "ok, but a check failed" if record.status is Status.OK else record.status.value,
        "because": record.because or "Measured, although a check failed; speeds of what failed are not shown",
        "superseded": "a later attempt exists" if latest.id != record.id else "",
        "memory": ", ".join(
            f"{name} {formatting.mebibytes(size)} MiB" for name, size in sizes.items() if size is not None
        ),
        "checks": [check_sentence(c) for c in red],
        "log": f"logs/{record.id}.txt",
    }


def rerun(facts: RunFacts) -> Section:
    """Return the commands that repeat the run or one of its Cells."""
    m = facts.run.manifest
    many = len(m.cells) > MANY
    return {
        "command": shlex.join(m.argv),
        "file": m.suite_file,
        "text": m.suite_text,
        "cells": [] if many else [{**links.row(facts, c), "command": rerun_command(facts, c.cell_id)} for c in m.cells],
        "pattern": rerun_command(facts, "CELL_ID") if many else "",
    }


def resume_sentence(facts: RunFacts) -> str:
    """Return a sentence with the command that completes an unfinished run: the command of the run, with `--resume`.

    The run of another command, such as `import`, cannot be resumed. For it, the sentence says to measure again in a new
    folder.
    """
    kept, where, words = list[str](), facts.run.manifest.run, iter(facts.run.manifest.argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option == "--out":  # a resumed run stays in its folder
            where = value if equals else next(words, where)
        else:
            kept.append(word)
    if kept[1:2] != ["run"]:
        return f"{shlex.join(kept)} measures it again"
    return f"{shlex.join([*kept, '--resume', where])} measures the rest"


def rerun_command(facts: RunFacts, cell_id: str) -> str:
    """Return the command that repeats one Cell of the run. For an imported adapter, it is the command of the run."""
    m = facts.run.manifest
    if cell_id in facts.latest and facts.latest[cell_id].imported:
        return shlex.join(m.argv)
    # The suite as given on the command line: a path, or the name of a suite of the harness.
    paths = [word for word in m.argv[2:] if Path(word).name == m.suite_file]
    names = [word for word in m.argv[2:] if word == m.suite_file.rpartition(".")[0]]
    return f"peft-harness run {shlex.quote([*paths, *names, m.suite_file][0])} --only {cell_id}"


def notes(facts: RunFacts) -> list[Section]:
    """Return each distinct note of the Records once, with links to its Records."""
    found = group((note, record.id) for record in facts.latest.values() for note in record.notes)
    return [{"text": text, "sources": links.sources(facts, ids)} for text, ids in found.items()]
