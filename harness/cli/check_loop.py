"""Run `check --loop`: compare a training loop with the harness's own, and find the settings that change training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from harness.assets.environments import homes
from harness.assets.environments.folder import MadeEnvironment
from harness.assets.environments.packages import IndexOptions
from harness.cell.loop_checks.protocol import LoopEvent
from harness.cli import check_run as command
from harness.cli import environments
from harness.conformance.findings import loop_settings
from harness.conformance.findings.outcomes import CheckOutcome, Execution
from harness.conformance.findings.report import CheckReport
from harness.console import print_note
from harness.errors import Exit
from harness.process.signals import handle_termination
from harness.process.worker_pool import WorkerPool
from harness.records.environment import describe

_WORKER = "harness.cell.loop_checks.worker"


def check(
    loop: str,
    environment: str,
    index: IndexOptions,
    patience: float,
    as_json: bool,
    junit: Path | None,
    html: Path | None,
) -> Exit:
    """Check a training loop, print the report, write the requested files, and return the exit code.

    environment: name or requirement of the environment in which to check; empty for this Python. If this Python lacks
    the loop's library, the check uses the environment that suites/environments.yaml or a user's file declares for the
    loop, if this environment exists.
    """
    command.refuse_unfit_files(junit, html)
    loop_settings.load(loop)  # reports mistakes before anything runs
    with handle_termination():
        if environment:
            (made,) = environments.ensure_all([environment], index)
            report = judge(loop, patience, made)
        else:
            report = judge(loop, patience)
            home = homes.of({loop}).get(loop) if report.skipped else None
            if isinstance(home, MadeEnvironment):
                report = judge(loop, patience, homes.at(home.folder))
            elif home:
                way = f"; `peft-harness env create {home}` makes an environment that has it"
                report = replace(report, skipped={name: why + way for name, why in report.skipped.items()})
    return command.publish(report, as_json, junit, html)


def judge(loop: str, patience: float, environment: MadeEnvironment | None = None) -> CheckReport:
    """Check a training loop and try its settings in a worker process, and return the report."""
    tried, settings, skipped = list[CheckOutcome](), list[loop_settings.SettingFound](), dict[str, str]()
    pool = WorkerPool(environment.python if environment is not None else None)
    software, begun, interrupted = describe().software, "start-up", False
    try:
        for event in _events(pool, loop, patience):
            if event.missing:
                skipped[f"loop {loop}"] = event.missing
            elif event.environment:
                software = event.environment.software
            elif event.begin:
                begun = event.begin
                print_note(f"{loop}: {begun} ...")
            elif event.outcome:
                tried.append(event.outcome)
            elif event.setting:
                settings.append(event.setting)
                tried.append(event.setting.outcome(loop))
            elif event.died:
                tried.append(_crash(loop, begun, event.died))
    except KeyboardInterrupt:
        pool.stop()
        interrupted = True
    return CheckReport(
        tried, skipped, software=software, interrupted=interrupted, untried=list(skipped), settings=settings
    )


def _events(pool: WorkerPool, loop: str, patience: float) -> Iterator[LoopEvent]:
    for event in pool.events(_WORKER, {"loop": loop}, patience):
        yield LoopEvent.model_validate_json(json.dumps(event))  # as JSON: lists become tuples, and texts become enums


def _crash(loop: str, case: str, died: str) -> CheckOutcome:
    return CheckOutcome.of_whole_target(
        loop, "method", "loop", check="alive", case=case, detail=died, execution=Execution.RAISED
    )
