"""`gate --pairs OLD NEW`: run the pairs, judge them, print the table and write the JSON document."""

from __future__ import annotations

import contextlib
import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.analysis.comparison.pair_verdict import CellComparison, JudgedPairs, judge
from harness.analysis.statistics.pair_design import Design
from harness.analysis.tracked_metrics import STEP
from harness.cell.measure import cores
from harness.console import print_json, print_lines, print_note
from harness.errors import Exit, HarnessError, StoreError, UsageError, plural
from harness.process.signals import handle_termination
from harness.records import environment, naming, store
from harness.records.files import write_atomic
from harness.regression.pairs import canary_file, table
from harness.regression.pairs import sides as pair_sides
from harness.regression.pairs.gate_result import gate_result
from harness.regression.pairs.request import PairsRequest
from harness.regression.pairs.schedule import PairsRunner
from harness.suites import loader
from harness.suites.expand import Plan, select

DOCUMENT, SCHEMA = "pairs.json", 1


@dataclass(frozen=True)
class PairsResult:
    """The pairs of runs that were measured, and the verdict on them."""

    request: PairsRequest
    runner: PairsRunner
    """Runner of the pairs, which holds their Records."""
    cores: list[int]
    """Indices of the CPU cores that both sides use. If the list is empty, the sides may use any core."""
    canary: list[float] | None
    """Log ratio of each pair of this gate's canary, which compares the old side with itself. None without a canary."""
    interrupted: str
    """Cause of an interruption of the pairs, e.g. `ended by Ctrl-C`. Empty without an interruption."""
    judged: JudgedPairs

    @property
    def exit(self) -> Exit:
        """The exit code.

        Without an interruption, it is the exit code of `judged`. After an interruption, it is FAIL if the measured
        pairs have a finding, otherwise INFRASTRUCTURE.
        """
        code = self.judged.exit
        return Exit.INFRASTRUCTURE if self.interrupted and code is not Exit.FAIL else code

    def document(self) -> dict[str, Any]:
        """Return the JSON document of `gate --pairs OLD NEW --json`."""
        request, judged = self.request, self.judged
        old, new = (side.label for side in self.runner.sides)
        cells = []
        for one, cell in zip(self.runner.found, judged.cells, strict=True):
            times = {metric: self._time(cell, metric) for metric in cell.timed}
            cells.append({
                "name": cell.name, "old": one.pair.old.cell_id, "new": one.pair.new.cell_id, "because": cell.because,
                **times.pop(STEP, self._time(cell, STEP)), "latencies": times,
                "pairs": [[before.run, after.run] for before, after in one.records],
            })  # fmt: skip
        return {
            "schema": SCHEMA, "old": {"asked": request.old, "is": old}, "new": {"asked": request.new, "is": new},
            "suite": request.suite, "only": request.only, "seed": self.runner.seed,
            "design": asdict(self.runner.design), "cells": cells,
            "findings": [asdict(row) for row in judged.rows if not row.same],
            "residue": list(judged.differences), "canary": self.canary, "canaries": judged.canaries.sentence,
            "closed": judged.canaries.closed,
            "verdict": {"word": judged.verdict.word.value, "reason": judged.verdict.reason},
            "cores": self.cores, "cut": self.interrupted, "exit": int(self.exit),
        }  # fmt: skip

    def _time(self, cell: CellComparison, metric: str) -> dict[str, Any]:
        timed = cell.timed.get(metric)
        return {
            "old_s": cell.seconds(0, metric), "new_s": cell.seconds(1, metric),
            "verdict": asdict(timed) if timed else None, "adjusted_p": self.judged.adjusted.get(cell.title(metric)),
        }  # fmt: skip


def gate(request: PairsRequest, as_json: bool, design: Design | None = None) -> PairsResult:
    """Compare two revisions or implementations by pairs of runs, print a table or JSON, and return the result.

    Raises UsageError if the sides or Cells cannot be compared. Raises HarnessError if a revision cannot be checked out.
    """
    request.outputs.refuse()
    result = _measure(request, design or Design())
    document = result.document()
    data = json.dumps(document, indent=1, allow_nan=False)
    old, new = (side.label for side in result.runner.sides)
    rows = gate_result(result.judged, result.interrupted)
    # Print and write independently: either may fail, by a full disk or a closed stdout.
    with contextlib.ExitStack() as afterwards:
        afterwards.callback(request.outputs.write, rows, f"{new} against {old}")
        afterwards.callback(write_atomic, result.runner.folder / DOCUMENT, data.encode())
        if as_json:
            print_json(document)
        else:
            print_lines(table.lines(result.judged))
    return result


def _measure(request: PairsRequest, design: Design) -> PairsResult:
    """Run the pairs, judge them and return the result. After an interruption, judge the pairs that were measured."""
    path = loader.find(request.suite)
    plan = _trained(loader.load(path).plan, request.only, request.suite)
    wanted = _cores(request)
    if wanted is not None and wanted > (available := cores.available_cores()):
        what = f"{wanted} cores requested, but this process may use only {available}"
        raise UsageError(what, where="--cores", hint=f"give at most {available}")
    if request.canary:
        canary_file.refuse_unwritable(request.canaries)
    folder = _folder(request)
    seed = secrets.randbits(32) if request.seed is None else request.seed
    runner: PairsRunner | None = None
    held: list[int] = []
    canary: list[float] | None = None
    no_canary, interrupted = "switched off", ""
    try:
        with (
            handle_termination(),
            cores.limit_cores(wanted) as held,
            pair_sides.opened(request.old, request.new, plan, request.repo) as (old, new),
        ):
            sides = old.with_variables(request.old_variables), new.with_variables(request.new_variables)
            matched = pair_sides.pairs(plan, naming.full(plan.cells), sides)
            device = ("--device", request.device)
            runner = PairsRunner(
                sides, path, folder, design, seed, device, print_note, only=request.metric, fresh=request.fresh
            )
            where = f"on core {', '.join(map(str, held))}" if held else "on any core"
            fresh = f"up to {design.fresh[-1]} new ones where these do not decide" if request.fresh else "no new ones"
            print_note(
                f"{sides[0].label} against {sides[1].label}: {plural(len(matched), 'Cell')}, {design.first} pairs each, "
                f"{fresh}; {where}; seed {seed}, into {folder}"
            )
            runner.measure(matched)
            if request.canary:
                canary, no_canary = _canary(request, runner)
    except (HarnessError, KeyboardInterrupt) as error:
        if runner is None:
            with contextlib.suppress(OSError):
                folder.rmdir()  # nothing was run, so the folder is empty
        if runner is None or isinstance(error, HarnessError):
            raise
        interrupted = f"ended by {str(error) or 'Ctrl-C'}"
        print_note(f"{interrupted}; the pairs measured so far are judged")
    place = next((one.first[0][0].environment.id for one in runner.found if one.first), "")
    canaries, broken = canary_file.read(request.canaries, place, design.trim)
    for line in broken:
        print_note(f"unreadable: {line}")
    if no_canary:
        print_note(f"no canary of this gate: {no_canary}")
    cells = [
        CellComparison(
            one.pair.name,
            one.records,
            one.verdicts(design, request.metric, runs_fresh=request.fresh),
            one.broken or interrupted,
        )
        for one in runner.found
    ]
    judged = judge(cells, canaries, strict=request.strict, runs_fresh=request.fresh)
    return PairsResult(request, runner, held, canary, interrupted, judged)


def _canary(request: PairsRequest, runner: PairsRunner) -> tuple[list[float] | None, str]:
    """Compare the old side with itself on one Cell. Store the log ratios of the pairs, and return (log ratios, "").

    If this fails, return (None, reason).
    """
    watched = runner.found[runner.seed % len(runner.found)]
    if watched.broken:
        return None, watched.broken
    canary, reason = runner.canary(watched.pair)
    if canary:
        try:
            canary_file.add(request.canaries, watched.first[0][0].environment.id, watched.pair.old.cell_id, canary)
        except StoreError as error:  # the pairs are measured: they must be judged
            return None, str(error)
    return canary, reason


def _trained(plan: Plan, only: str | None, suite: str = "") -> Plan:
    """Return a plan with the Cells whose training step can be timed. Leave out Cells that only try a learning rate.

    only: an expression that selects Cells; None for all. suite: name of the suite, for the error message.
    """
    tries = {cell_id for tuning in plan.tuning for cell_id in tuning.sweep}
    cells = tuple(cell for cell in plan.cells if cell.training.steps and cell.cell_id not in tries)
    if not cells:
        what = "no Cell of this suite trains, and pairs compare the time of a training step"
        raise UsageError(what, where=f"--suite {suite}", hint="name a suite with `steps` above 0, such as sentinels")
    trained = Plan(cells, {c.cell_id: plan.ids[c.cell_id] for c in cells}, ())
    return select(trained, only) if only is not None else trained


def _cores(request: PairsRequest) -> int | None:
    """Return the number of cores to use. The default is one on a CPU, and None (no limit) on a GPU.

    A process on a GPU needs all its threads. Threads on a CPU wait for each other, and for other work on their cores:
    with two threads, the times of equal processes spread at least twice as widely as with one.
    """
    if request.cores is None and (request.device == "cuda" or (request.device == "auto" and environment.gpus())):
        return None
    return request.cores or 1


def _folder(request: PairsRequest) -> Path:
    folder = request.out or store.RUNS / f"{store.now().replace(':', '').replace('-', '')}-pairs-{secrets.token_hex(3)}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("is not empty", where=f"--out {folder}", hint="name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
