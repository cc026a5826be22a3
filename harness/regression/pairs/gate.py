"""`gate --pairs OLD NEW`: run the pairs, judge them, print the table and write the document."""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.analysis.comparison.pair_verdict import CellComparison, JudgedPairs, judge
from harness.analysis.statistics.pair_design import Design
from harness.analysis.tracked_metrics import STEP
from harness.cell.measure import cores
from harness.errors import Exit, HarnessError, UsageError
from harness.process.termination import handle_termination
from harness.records import environment, naming, store
from harness.records.files import write_atomic
from harness.regression.pairs import canary_file, findings, table
from harness.regression.pairs import sides as pair_sides
from harness.regression.pairs.request import PairsRequest
from harness.regression.pairs.schedule import Measured, PairsRunner
from harness.suites import loader
from harness.suites.expand import Plan, select

DOCUMENT, SCHEMA = "pairs.json", 1


def gate(request: PairsRequest, as_json: bool, design: Design | None = None) -> Exit:
    """Compare two sides by interleaved pairs, print a table or the document, and return the exit code.

    Raises UsageError for sides or Cells that cannot be compared, HarnessError if a side gives no Record at all.
    """
    design = design or Design()
    request.outputs.refuse()
    path = loader.find(request.suite)
    plan = _trained(loader.load(path).plan, request.only, request.suite)
    wanted = _cores(request)
    if wanted is not None and wanted > (there := cores.available_cores()):
        what = f"{wanted} cores requested, but this process may use only {there}"
        raise UsageError(what, where="--cores", hint=f"give at most {there}")
    folder = _folder(request)
    seed = secrets.randbits(32) if request.seed is None else request.seed
    names = naming.full(plan.cells)
    canary: list[float] | None = None
    no_canary, cut = "switched off", ""

    def log(line: str) -> None:
        print(line, file=sys.stderr)

    held: list[int] = []
    bench: PairsRunner | None = None
    try:
        with (
            handle_termination(),
            cores.limit_cores(wanted) as held,
            pair_sides.opened(request.old, request.new, plan, request.repo) as sides,
        ):
            matched = pair_sides.pairs(plan, names, sides)
            bench = PairsRunner(sides, path, folder, design, seed, ("--device", request.device), log, request.metric)
            where = f"on core {', '.join(map(str, held))}" if held else "on any core"
            log(
                f"{sides[0].label} against {sides[1].label}: {len(matched)} Cells, {design.first} pairs each, up to "
                f"{design.fresh[-1]} new ones where these do not decide; {where}; seed {seed}, into {folder}"
            )
            bench.measure(matched)
            if request.canary:
                watched = bench.found[seed % len(bench.found)]
                canary, no_canary = bench.canary(watched.pair) if not watched.broken else (None, watched.broken)
                if canary:
                    place = watched.first[0][0].environment.id
                    canary_file.add(request.canaries, place, watched.pair.old.cell_id, canary)
    except HarnessError:
        if bench is None:
            _forget(folder)
        raise
    except KeyboardInterrupt as stopped:
        if bench is None:
            _forget(folder)
            raise
        cut = f"ended by {str(stopped) or 'Ctrl-C'}"
        log(f"{cut}; the pairs measured so far are judged")
    places = [one.first[0][0].environment.id for one in bench.found if one.first]
    canaries, broken = canary_file.read(request.canaries, places[0] if places else "", design.trim)
    for line in broken:
        log(f"unreadable: {line}")
    if no_canary:
        log(f"no canary of this gate: {no_canary}")
    cells = [
        CellComparison(one.pair.name, one.records, one.verdicts(design, request.metric), one.broken or cut)
        for one in bench.found
    ]
    judged = judge(cells, canaries, strict=request.strict)
    labels = (bench.sides[0].label, bench.sides[1].label)
    # Findings stand, but interrupted pairs are no success.
    code = Exit.INFRASTRUCTURE if cut and judged.exit is not Exit.FAIL else judged.exit
    document = _document(request, labels, seed, design, bench.found, judged, canary) | {
        "cores": held, "cut": cut, "exit": int(code)
    }  # fmt: skip
    write_atomic(folder / DOCUMENT, json.dumps(document, indent=1, allow_nan=False).encode())
    rows = findings.findings(judged, cut)
    request.outputs.write(rows, f"{labels[1]} against {labels[0]}")
    print(json.dumps(document, indent=1) if as_json else "\n".join(table.lines(judged)))
    request.outputs.annotate(rows)
    return code


def _trained(plan: Plan, only: str | None, suite: str = "") -> Plan:
    """Return the plan's Cells that train; others have no step to time."""
    swept = {cell_id for tuning in plan.tuning for cell_id in tuning.sweep}
    kept = tuple(cell for cell in plan.cells if cell.training.steps and cell.cell_id not in swept)
    if not kept:
        what = "no Cell of this suite trains, and pairs compare the time of a training step"
        raise UsageError(what, where=f"--suite {suite}", hint="name a suite with `steps` above 0, such as sentinels")
    trained = Plan(kept, {c.cell_id: plan.ids[c.cell_id] for c in kept}, ())
    return select(trained, only) if only is not None else trained


def _cores(request: PairsRequest) -> int | None:
    """Return the requested cores, else one on a CPU and None on a GPU, where a process needs its threads.

    Threads on a CPU wait for each other, and for other work on their cores: the times of equal processes with two threads
    spread at least twice as widely."""
    if request.cores is None and (request.device == "cuda" or (request.device == "auto" and environment.gpus())):
        return None
    return request.cores or 1


def _folder(request: PairsRequest) -> Path:
    folder = request.out or store.RUNS / f"{store.now().replace(':', '').replace('-', '')}-pairs-{secrets.token_hex(3)}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("is not empty", where=f"--out {folder}", hint="name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _forget(folder: Path) -> None:
    """Delete a folder in which nothing was run."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _document(
    request: PairsRequest, labels: tuple[str, str], seed: int, design: Design, measured: Sequence[Measured],
    judged: JudgedPairs, canary: list[float] | None,
) -> dict[str, Any]:  # fmt: skip
    cells = []
    for one, cell in zip(measured, judged.cells, strict=True):
        times = {metric: _time(cell, metric, judged) for metric in cell.timed}
        cells.append({
            "name": cell.name, "old": one.pair.old.cell_id, "new": one.pair.new.cell_id, "because": cell.because,
            **times.pop(STEP, _time(cell, STEP, judged)), "latencies": times,
            "pairs": [[old.run, new.run] for old, new in one.records],
        })  # fmt: skip
    return {
        "schema": SCHEMA,
        "old": {"asked": request.old, "is": labels[0]}, "new": {"asked": request.new, "is": labels[1]},
        "suite": request.suite, "only": request.only, "seed": seed, "design": asdict(design), "cells": cells,
        "findings": [asdict(row) for row in judged.rows if not row.same],
        "residue": list(judged.differences), "canary": canary, "canaries": judged.canaries.sentence,
        "closed": judged.canaries.closed,
        "verdict": {"word": judged.verdict.word.value, "reason": judged.verdict.reason},
    }  # fmt: skip


def _time(cell: CellComparison, metric: str, judged: JudgedPairs) -> dict[str, Any]:
    timed = cell.timed.get(metric)
    return {
        "old_s": cell.seconds(0, metric), "new_s": cell.seconds(1, metric), "verdict": asdict(timed) if timed else None,
        "adjusted_p": judged.adjusted.get(cell.title(metric)),
    }  # fmt: skip
