"""Time-out, kill, Ctrl-C and resume: a run loses nothing that was measured."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.errors import Exit
from harness.records import store
from harness.records.record import Status
from support.processes import eventually, gone
from support.run_records import adds_up, losses, one_message, trained
from support.sandbox import Finished, Sandbox, make_sandbox

pytestmark = pytest.mark.e2e


def test_a_hanging_worker_is_killed_with_its_children(sandbox: Sandbox) -> None:
    finished = sandbox.command(
        "run", sandbox.suite("{implementation: hangs}"), "--out", "run", "--timeout", "8"
    )  # fmt: skip
    pids = sandbox.hanging()
    eventually(lambda: all(map(gone, pids)), "the worker and its child are gone")
    (record,) = sandbox.read().records
    assert (record.status, record.measurements) == (Status.TIMEOUT, None)
    assert record.because == "not done after 8 s, in phase start-up"
    assert finished.code == Exit.INFRASTRUCTURE
    assert sandbox.read().footer is not None


@dataclass(frozen=True)
class Stage:
    """What a run looked like after something had happened to it."""

    finished: Finished
    run: store.Run
    page: str


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Stage]:
    """One run of two Cells, of which the second hangs: ended in every way, resumed each time, in the end let finish."""
    sandbox = make_sandbox(tmp_path_factory.mktemp("story"), cache)
    suite = sandbox.suite("{implementation: reference}", "{implementation: hangs}")
    stages: dict[str, Stage] = {}

    def stage(
        name: str,
        process: subprocess.Popen[str],
        blow: signal.Signals | None,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        pids = sandbox.hanging() if blow else []
        if meanwhile:
            meanwhile()
        if blow:
            for pid in pids[:1] if blow is signal.SIGTERM else []:
                os.kill(pid, blow)  # a batch system tells every process of a job, in any order
            process.send_signal(blow)
        finished = sandbox.finish(process)
        eventually(lambda: all(map(gone, pids)), "the worker and its child are gone")
        page = sandbox.run_folder / "report.html"
        stages[name] = Stage(finished, sandbox.read(), page.read_text(encoding="utf-8") if page.exists() else "")
        page.unlink(missing_ok=True)

    stage("interrupted", sandbox.start("run", suite, "--out", "run"), signal.SIGINT)
    stage("killed", sandbox.start("run", suite, "--resume", "run"), signal.SIGKILL)
    stage("reported", sandbox.start("report", "run"), None)
    first = sandbox.start("run", suite, "--resume", "run")
    stage(
        "terminated",
        first,
        signal.SIGTERM,
        lambda: stage("second", sandbox.start("run", suite, "--resume", "run"), None),
    )
    (sandbox.run_folder / "footer.json").write_bytes(b"")
    stage("torn", sandbox.start("report", "run"), None)
    (sandbox.folder / "behave").touch()
    stage("resumed", sandbox.start("run", suite, "--resume", "run"), None)
    return stages


def test_ctrl_c_ends_cleanly_with_a_report_of_what_there_is(story: dict[str, Stage]) -> None:
    stage = story["interrupted"]
    first, second = stage.run.manifest.cells
    assert stage.finished.code == Exit.INFRASTRUCTURE
    assert "interrupted: finished Cells are saved" in stage.finished.err
    assert "Traceback" not in stage.finished.err
    assert [(r.cell_id, r.status) for r in stage.run.records] == [(first.cell_id, Status.OK)]
    assert stage.run.footer is not None
    assert (stage.run.footer.how, stage.run.footer.missing) == ("interrupted", [second.cell_id])
    assert stage.run.footer.seconds_in_cells > stage.run.records[0].duration_s
    assert first.cell_id in stage.page
    assert "the run is interrupted" in stage.finished.out


@pytest.mark.nightly  # it waits for the smoke run
def test_a_rerun_gives_the_same_losses_to_the_last_bit(
    smoke: tuple[Finished, store.Run], story: dict[str, Stage]
) -> None:
    (again,) = story["interrupted"].run.records
    earlier = smoke[1].latest()[again.cell_id]
    assert earlier.run != again.run
    assert losses(again) == losses(earlier)
    for what in ("gradient_norms", "data_order_sha256", "initial_state_sha256"):
        assert getattr(trained(again), what) == getattr(trained(earlier), what)


def test_a_killed_runner_loses_nothing_that_was_finished(story: dict[str, Stage]) -> None:
    stage = story["killed"]
    assert stage.finished.code == -signal.SIGKILL
    assert stage.run.records == story["interrupted"].run.records
    assert (stage.run.footer, stage.run.broken) == (None, {})


def test_a_run_without_footer_is_reported_as_incomplete(story: dict[str, Stage]) -> None:
    stage = story["reported"]
    assert stage.finished.code == Exit.INFRASTRUCTURE
    assert "the run is incomplete" in stage.finished.out
    assert "incomplete" in stage.page


def test_resume_measures_only_what_is_missing(story: dict[str, Stage]) -> None:
    stage = story["resumed"]
    first, second = stage.run.manifest.cells
    assert stage.finished.code == Exit.PASS, stage.finished.err
    assert "has an ok Record" in stage.finished.err
    # Three attempts were cut off and left their logs; their numbers are used up.
    assert [(r.cell_id, r.attempt, r.status) for r in stage.run.latest().values()] == [
        (first.cell_id, 1, Status.OK),
        (second.cell_id, 4, Status.OK),
    ]
    assert len(stage.run.records) == 2
    assert stage.run.footer is not None
    assert (stage.run.footer.how, stage.run.footer.missing, stage.run.footer.counts) == ("finished", [], {"ok": 2})
    assert all(r.id.split(".")[0] in stage.page for r in stage.run.records)


def test_the_times_of_a_resumed_run_are_its_own(story: dict[str, Stage]) -> None:
    stage = story["resumed"]
    kept, made = stage.run.latest().values()
    footer = stage.run.footer
    assert footer is not None
    assert footer.kept == 1
    assert made.duration_s <= footer.seconds_in_cells < made.duration_s + kept.duration_s
    assert sys.platform != "linux" or footer.seconds_outside["imports"] > 0
    assert adds_up(footer)
    assert (
        f"this resumed part took {footer.seconds_total:.1f} s; the Cells of the whole run took "
        f"{kept.duration_s + made.duration_s:.1f} s, 1 of them were measured earlier"
    ) in stage.finished.err
    first = story["interrupted"]
    assert first.run.footer is not None
    assert first.run.footer.kept == 0
    assert "resumed part" not in first.finished.err


def test_sigterm_ends_a_run_as_ctrl_c_does(story: dict[str, Stage]) -> None:
    stage = story["terminated"]
    first, second = stage.run.manifest.cells
    assert stage.finished.code == Exit.INFRASTRUCTURE
    assert "interrupted by SIGTERM: finished Cells are saved" in stage.finished.err
    assert "Traceback" not in stage.finished.err
    assert [(r.cell_id, r.status) for r in stage.run.records] == [(first.cell_id, Status.OK)]
    assert stage.run.footer is not None
    assert (stage.run.footer.how, stage.run.footer.missing) == ("interrupted", [second.cell_id])
    assert first.cell_id in stage.page
    assert "the run is interrupted" in stage.finished.out


def test_a_second_runner_is_sent_away(story: dict[str, Stage]) -> None:
    stage = story["second"]
    assert stage.finished.code == Exit.USAGE
    message = one_message(stage.finished.err)
    assert re.search(r"run: another peft-harness is writing to this run: process \d+ on ", message)
    assert "hint: " in message
    assert stage.finished.out == ""
    assert stage.run.records == story["killed"].run.records


def test_a_run_with_a_torn_footer_is_reported_and_resumed(story: dict[str, Stage]) -> None:
    torn = story["torn"]
    assert torn.finished.code == Exit.INFRASTRUCTURE
    assert "the run is incomplete" in torn.finished.out
    assert "unreadable: footer.json: not a complete Footer" in torn.finished.out
    assert torn.run.manifest.cells[0].cell_id in torn.page
    assert "is incomplete: its footer.json cannot be read" in story["resumed"].finished.err
