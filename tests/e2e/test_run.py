"""The run around its Cells: signals, refusals, a report that fails, a folder that breaks."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.assets import fetch, table
from harness.cell.job import Job, KnownGate
from harness.cli import main
from harness.errors import Exit
from harness.process import fork_server
from harness.records import store
from harness.records.record import Record, Status
from harness.report import html
from harness.runner import attempt, worker, worker_start
from harness.runner.executors.local import Local
from harness.runner.progress import Progress
from harness.runner.shared_gates import SharedGates
from support import recorded_run
from support.run_records import one_message, source
from support.sandbox import Sandbox, make_sandbox


@pytest.fixture
def inside(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """A sandbox for runs inside this process, which is quicker than the command.

    Each worker is a new process: Cells that end before torch is imported need no fork server, which would import it.
    """
    sandbox = make_sandbox(tmp_path, cache)
    monkeypatch.setenv(fork_server.COLD_START, "1")
    for name, value in sandbox.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(sandbox.folder / "plugin")
    monkeypatch.chdir(sandbox.folder)
    return sandbox


# Cells that take a second: they end before torch is imported.
QUICK = "{implementation: [missing, leaves]}"


@pytest.mark.slow
def test_ctrl_c_between_cells(
    inside: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = SharedGates.known, []

    def known(self: SharedGates, job: Job) -> KnownGate | None:
        calls.append(job)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, job)

    monkeypatch.setattr(SharedGates, "known", known)
    code = main(["run", inside.suite(QUICK), "--out", "run"])
    run = inside.read()
    assert code == Exit.INFRASTRUCTURE
    assert run.footer is not None
    assert (run.footer.how, len(run.footer.missing), len(run.records)) == ("interrupted", 1, 1)
    assert (run.path / "report.html").is_file()
    assert "interrupted: finished Cells are saved" in capsys.readouterr().err


def test_ctrl_c_while_fetching(
    inside: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ensure(*_: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "ensure", ensure)
    assert main(["run", inside.suite(QUICK), "--out", "run"]) == Exit.INFRASTRUCTURE
    assert "interrupted" in one_message(capsys.readouterr().err)
    assert not inside.run_folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), OSError(28, "No space left on device")])
def test_a_report_that_fails_loses_no_result(
    inside: Sandbox, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def render(*_: object) -> str:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(html, "render", render)
        assert main(["run", inside.suite("{implementation: missing}"), "--out", "run"]) == Exit.INFRASTRUCTURE
    printed = capsys.readouterr()
    message = one_message(printed.err)
    assert "all Cells are measured and saved" in message
    assert str(error) in message
    assert "skipped" in printed.out  # the summary is there all the same
    run = inside.read()
    assert run.footer is not None
    assert (run.footer.how, len(run.records)) == ("finished", 1)
    hint = re.search(r"`peft-harness (report .*)`", message)
    assert hint is not None
    main(hint[1].split())
    assert (run.path / "report.html").is_file()


@pytest.mark.slow
def test_a_run_folder_that_breaks(inside: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["run", inside.suite("{implementation: [missing, vandal, leaves]}"), "--out", "run"])
    assert code == Exit.INFRASTRUCTURE
    assert "cannot write" in one_message(capsys.readouterr().err)
    run = inside.read()
    assert run.footer is not None
    assert run.footer.how == "failed"
    (finished,) = (run.path / "gone").glob("*.json")
    assert store.read_record(finished).status is Status.SKIPPED


def test_a_tool_that_only_says_that_it_is_at_work_is_quoted_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress([])
    for _ in range(3):
        progress.fetching("tiny-llama: making", 0, None)
    progress.fetching("toy-sentiment: making", 0, None)
    assert capsys.readouterr().err.splitlines() == ["tiny-llama: making", "toy-sentiment: making"]


def test_latencies_that_there_was_no_memory_for_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    (cell,) = [one for name, one in recorded_run.cells().items() if name == "fused"]
    good = recorded_run.record("fused", cell)
    assert good.measurements is not None
    lost = [one.model_copy(update={"because": "out of memory: 2.00 GiB"}) for one in good.measurements.latency]
    short = good.model_copy(update={"measurements": good.measurements.model_copy(update={"latency": lost})})
    progress = Progress([cell])
    progress.end(good)
    progress.end(short)
    before, after = capsys.readouterr().err.splitlines()
    assert after == f"{before}  no latencies: out of memory: 2.00 GiB"


def test_a_worker_that_cannot_be_started(
    inside: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tiny-llama", "toy-sentiment"):
        fetch.ensure(source(name))  # by a child process, as long as there are any

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    open_files = []
    for folder in ("first", "run"):  # what is opened once and kept is no leak; what each run leaves open is
        assert main(["run", inside.suite(QUICK), "--out", folder]) == Exit.INFRASTRUCTURE
        assert "cannot start a worker: Resource temporarily unavailable" in one_message(capsys.readouterr().err)
        open_files.append(psutil.Process().num_fds())
    assert open_files[1] <= open_files[0]
    footer = inside.read().footer
    assert footer is not None
    assert footer.how == "failed"


@pytest.mark.e2e
def test_a_bug_in_the_middle_of_a_run_says_what_is_kept(sandbox: Sandbox) -> None:
    code = (
        "import sys\nfrom harness import cli; from harness.records import store\n"
        "def write_record(*_): raise KeyError('ours')\nstore.RunFolder.write_record = write_record\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", sandbox.suite("{implementation: leaves}"), "--out", "run"],
        cwd=sandbox.folder, env=sandbox.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == Exit.INFRASTRUCTURE
    assert "Traceback" in done.stderr
    message = done.stderr[done.stderr.index("peft-harness: ") :]
    assert "internal error in peft-harness: KeyError: 'ours'" in message
    assert "finished Cells are saved in run; `peft-harness report run` shows them" in message
    footer = sandbox.read().footer
    assert footer is not None
    assert footer.how == "failed"


@pytest.mark.parametrize(("options", "code"), [([], Exit.PASS), (["--strict"], Exit.INCONCLUSIVE)])
def test_strict_does_not_pass_an_open_question(
    inside: Sandbox, options: list[str], code: Exit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: Local, works: Iterator[Job], terms: attempt.RunContext, __: object) -> Iterator[Record]:
        for work in works:
            record = recorded_run.record("reference", work.cell, work.run)
            terms.folder.write_record(record)
            yield record

    monkeypatch.setattr(Local, "run", run)
    # The float64 run, which the others are to be compared with, is left out.
    assert main(["run", "smoke", "--only", "method=lora,dtype=float32", "--out", "run", *options]) == code


@pytest.mark.slow
def test_signals_are_heard_only_while_a_run_goes_on(inside: Sandbox) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    main(["run", inside.suite("{implementation: missing}"), "--out", "run"])
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == before


@pytest.mark.parametrize("given", [None, "active", "passive"])
def test_how_threads_wait_is_left_to_the_user(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Passive threads would not hold up other jobs, but made training steps half as long again on an idle machine.
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert worker_start._worker_environment().get("OMP_WAIT_POLICY") == given


@pytest.mark.nightly
@pytest.mark.e2e
def test_a_reader_of_the_progress_that_leaves(sandbox: Sandbox) -> None:
    process = sandbox.start("run", sandbox.suite(QUICK), "--out", "run")
    assert process.stderr is not None
    process.stderr.close()
    process.stderr = None
    sandbox.finish(process)
    run = sandbox.read()
    assert run.footer is not None
    assert (run.footer.how, len(run.records), process.returncode) == ("finished", 2, Exit.INFRASTRUCTURE)


@pytest.mark.slow
def test_what_cannot_be_written_is_refused_before_anything_is_fetched(
    inside: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = inside.suite("{implementation: missing}")
    assert main(["run", suite, "--out", "run"]) == Exit.NOTHING_COMPARED
    before = sorted((p, p.stat().st_mtime_ns) for p in inside.run_folder.rglob("*"))
    capsys.readouterr()

    def ensure(*_: object) -> Path:
        raise AssertionError("fetched")

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "ensure", ensure)
        for options, says in (
            (["--out", "run"], "holds a run already"),
            (["--out", "other", "--resume", "run"], "stays in its folder"),
            (["--resume", "nowhere"], "no run 'nowhere'"),
        ):
            assert main(["run", suite, *options]) == Exit.USAGE
            assert says in one_message(capsys.readouterr().err)
        other = inside.suite(QUICK)
        assert main(["run", other, "--resume", "run"]) == Exit.USAGE
        assert "1 Cells of this suite are not in that run" in one_message(capsys.readouterr().err)
    assert main(["run", suite, "--out", f"{suite}/run"]) == Exit.USAGE  # below a file
    assert "cannot make the run folder" in one_message(capsys.readouterr().err)
    assert sorted((p, p.stat().st_mtime_ns) for p in inside.run_folder.rglob("*")) == before


def test_fetched_data_that_do_not_fit_are_refused_before_the_first_cell(
    inside: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fetch.ensure

    def spoilt(source: table.Source, *show: Any) -> Path:
        path = real(source, *show)
        if source.rows is None or not show:  # without progress: by the suite's reader, which looks at local files
            return path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        bad = inside.folder / "bad.jsonl"
        bad.write_text("".join([*lines[:3], '{"text": "so so", "label": 2}\n', *lines[3:]]), encoding="utf-8")
        return bad

    monkeypatch.setattr(fetch, "ensure", spoilt)
    assert main(["run", inside.suite(QUICK), "--out", "run"]) == Exit.USAGE
    message = one_message(capsys.readouterr().err)
    assert "bad.jsonl:4: label 2 of row" in message
    assert "hint: " in message
    assert not inside.run_folder.exists()


@pytest.mark.slow
def test_a_clock_that_is_set_back(inside: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["run", inside.suite("{implementation: missing}"), "--out", "run"])
    run = inside.read()
    data = source("toy-sentiment")
    asset = {"path": "unused", "source": data, "use": fetch.asset_use(data)}
    facts = {"name": "toy", "spec": {}, "labels": 2, "test": 1, "shuffle_seed": 0, "use": fetch.asset_use(data)}
    work = Job.model_validate(
        {"run": run.manifest.run, "folder": "run", "attempt": 2, "cell": run.manifest.cells[0], "model": asset,
         "data": asset, "task": facts, "device": "cpu", "launched": time.time() + 3600}
    )  # fmt: skip
    record = worker.attempt(work, lambda *_, **__: None)
    assert record.status is Status.SKIPPED
    assert 0 <= record.duration_s < 3600
