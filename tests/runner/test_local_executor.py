"""Several Cells at a time on one machine: their share of it, a GPU each, and what the runner itself takes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import selectors
import threading
import time
from pathlib import Path

import psutil
import pytest

from harness.analysis import run_verdict
from harness.errors import Exit, HarnessError
from harness.records import environment, store
from harness.records.manifest import Footer
from harness.records.record import Provider, Status
from harness.runner import attempt, gpus
from harness.runner.executors.local import Local
from harness.runner.progress import Progress
from harness.runner.run import _reopen
from support import recorded_run, stub_attempts
from support.processes import eventually
from support.sandbox import Sandbox

CARDS = [gpus.GpuDevice(0, "GPU-aa", 4), gpus.GpuDevice(1, "GPU-bb", 4)]
BUSY = gpus.GpuDevice(0, "GPU-aa", 30_000, ("process 7 (python, 29996 MiB)",))


@pytest.mark.nightly
def test_cells_at_a_time_share_the_cores_and_say_so(sandbox: Sandbox) -> None:
    finished = sandbox.command(
        "run", sandbox.suite("{implementation: missing, seed: [0, 1]}"), "--out", "run", "--jobs", "2"
    )
    run = sandbox.read()
    assert len(run.records) == 2, finished.err
    for record in run.records:
        assert record.environment.threads == max(1, environment.threads() // 2)
        assert record.notes == ["up to 2 Cells ran at once: the times are those of a shared machine"]
    lines = [line.split("/")[0] for line in finished.err.splitlines() if " skipped " in line]
    assert sorted(lines) == ["1", "2"]


@pytest.mark.slow
def test_as_many_cells_are_at_work_as_were_asked_for(tmp_path: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path, 8)
    share = str(max(1, environment.threads() // 3))
    at_work = []
    for ended, record in enumerate(Local(3, run.command()).run(run.works(), run.terms, run.nobody)):
        at_work.append(sum(what == "begin" for _, what in run.nobody.heard) - ended)
        assert record.notes[0] == share
    # Two that end together are told one after the other, before their places are taken again.
    assert (at_work[0], max(at_work), at_work[-1]) == (3, 3, 1)


@pytest.mark.slow
def test_one_that_hangs_and_one_that_dies_hold_nobody_up(tmp_path: Path) -> None:
    run, before = stub_attempts.Stubbed(tmp_path, 5, timeout=10.0), psutil.Process().children(recursive=True)
    records = run.run(Local(2, run.command({0: "hang", 2: "die"})))
    assert {seed: r.status for seed, r in records.items()} == {
        0: Status.TIMEOUT, 1: Status.OK, 2: Status.LOST, 3: Status.OK, 4: Status.OK,
    }  # fmt: skip
    assert list(records)[-1] == 0  # the others had ended long before
    assert records[0].because == "not done after 10 s, in phase pretending"
    assert records[2].because == "the worker was killed by SIGKILL in phase pretending"
    assert psutil.Process().children(recursive=True) == before


def test_a_record_that_is_seen_late_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stub_attempts.Stubbed(tmp_path, 1)
    (work,) = run.works()
    late = recorded_run.record("reference", run.cells[0], "stubbed")

    def seen_now(_: Path) -> str:
        run.folder.write_record(late)
        return ""

    monkeypatch.setattr(attempt, "_tail", seen_now)
    ending = attempt.Ending(Status.LOST, "lost", "no Record is seen")
    assert attempt.record_of(work, run.terms, ending, store.now(), time.monotonic()) == late


def test_a_cell_whose_newest_attempt_failed_is_measured_again(tmp_path: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path, 2)
    works = {work.cell.cell_id: (work.model, work.data, work.task) for work in run.works()}

    def done() -> set[str]:
        path, progress = run.folder.path, Progress(run.cells)
        return _reopen(path, run.here, {}, works, "cpu", progress, is_remote=False)[2]

    first = run.run(Local(1, run.command()))[0]
    assert done() == works.keys()
    run.folder.write_record(recorded_run.failed(first, Status.OOM, attempt=2))
    assert done() == works.keys() - {first.cell_id}
    # So is one whose plug-in is another one by now, or gone.
    installed = importlib.metadata.version("numpy")
    for attempt_, (name, version, counts) in enumerate(
        [("numpy", installed, True), ("numpy", "0.0", False), ("gone-since", "1.0", False)], start=3
    ):
        by = Provider(distribution=name, version=version)
        run.folder.write_record(first.model_copy(update={"attempt": attempt_, "provider": by}))
        assert (first.cell_id in done()) is counts


def test_what_ends_a_run_ends_all_that_is_at_work(tmp_path: Path) -> None:
    run, before = stub_attempts.Stubbed(tmp_path, 4), psutil.Process().children(recursive=True)
    with contextlib.closing(
        Local(2, run.command({1: "hang", 2: "hang"})).run(run.works(), run.terms, run.nobody)
    ) as records:
        assert next(records).cell.seed == 0
        eventually((run.folder.path / "pid").exists, "a worker hangs")
    assert psutil.Process().children(recursive=True) == before


# --- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_cell_has_a_gpu_for_itself(tmp_path: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path, 6)
    records = run.run(Local(2, run.command(), list_gpus=lambda: CARDS), device="cuda")
    assert {r.notes[1] for r in records.values()} == {"GPU-aa", "GPU-bb"}
    lone = stub_attempts.Stubbed(tmp_path / "lone", 2)
    records = lone.run(Local(1, lone.command(), list_gpus=lambda: [BUSY, CARDS[1]]), device="cuda")
    assert {r.notes[1] for r in records.values()} == {"GPU-bb"}  # the one that nobody uses


@pytest.mark.slow
def test_a_gpu_that_others_use_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.runner.executors.local._PROBE_S", 0.01)
    run = stub_attempts.Stubbed(tmp_path, 1)
    looks = iter([BUSY, BUSY, CARDS[0]])
    records = run.run(Local(1, run.command(), list_gpus=lambda: [next(looks)]), device="cuda")
    assert records[0].status is Status.OK
    assert (0, {"event": "phase", "name": "waiting for a GPU"}) in run.nobody.heard


def test_a_gpu_that_our_own_cells_use_is_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.runner.executors.local._PROBE_S", 0.01)
    run = stub_attempts.Stubbed(tmp_path, 3)
    records = run.run(Local(2, run.command(), list_gpus=lambda: [BUSY, CARDS[1]], patience=0.001), device="cuda")
    assert {r.status for r in records.values()} == {Status.OK}
    assert {r.notes[1] for r in records.values()} == {"GPU-bb"}


def test_a_driver_that_does_not_answer_at_once_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.runner.executors.local._PROBE_S", 0.01)
    run, answers = stub_attempts.Stubbed(tmp_path, 3), iter([True, False, True])

    def list_gpus() -> list[gpus.GpuDevice]:
        if not next(answers, False):
            raise HarnessError("nvidia-smi does not answer: timed out")
        return CARDS

    records = run.run(Local(2, run.command(), list_gpus=list_gpus, patience=0.001), device="cuda")
    assert [records[seed].status for seed in range(3)] == [Status.OK, Status.OK, Status.SKIPPED]
    assert records[2].because == "nvidia-smi does not answer: timed out; it was waited for 0.001 s"


@pytest.mark.slow
def test_a_driver_that_takes_its_time_holds_no_cell_up(tmp_path: Path) -> None:
    run, looks, ended, waited = (
        stub_attempts.Stubbed(tmp_path, 2, timeout=10.0),
        itertools.count(),
        threading.Event(),
        [],
    )

    def list_gpus() -> list[gpus.GpuDevice]:
        if next(looks):
            waited.append(ended.wait(30))
        return CARDS

    records = Local(2, run.command({0: "hang"}), list_gpus=list_gpus).run(run.works("cuda"), run.terms, run.nobody)
    with contextlib.closing(records):
        assert next(records).status is Status.TIMEOUT
        assert (0, {"event": "phase", "name": "pretending"}) in run.nobody.heard
        ended.set()
        assert next(records).status is Status.OK
    assert waited == [True]


def test_a_gpu_that_stays_busy_is_said_and_is_no_success(tmp_path: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path, 1)
    record = run.run(Local(1, run.command(), list_gpus=lambda: [BUSY], patience=0.0), device="cuda")[0]
    assert record.status is Status.SKIPPED
    assert record.because == "GPU 0 (GPU-aa) is in use by process 7 (python, 29996 MiB); it was waited for 0 s"
    run.folder.close(store.read_run(run.folder.path), Footer(
        run="stubbed", ended=store.now(), how="finished", counts={"skipped": 1}, missing=[], seconds_total=1.0,
        seconds_in_cells=1.0, seconds_outside={},
    ))  # fmt: skip
    assert run_verdict.judge(store.read_run(run.folder.path)).exit is Exit.INFRASTRUCTURE


def test_more_cells_at_a_time_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpus", lambda: ("a", "b"))
    assert Local(2, list_gpus=lambda: CARDS).device("auto") == "cuda"
    with pytest.raises(HarnessError, match="3 Cells at a time need a GPU each, and there are 2") as caught:
        Local(3, list_gpus=lambda: CARDS).device("auto")
    assert "--jobs 2" in caught.value.hint
    assert Local(3, list_gpus=lambda: CARDS).device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("visible", "seen"), [(None, [0, 1, 2]), ("", []), ("2,0", [2, 0]), ("GPU-b", [1]), ("MIG-1", [])]
)
def test_what_nvidia_smi_says(
    visible: str | None, seen: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        "*compute-apps*) echo 'GPU-aa, 41, 2048, /usr/bin/python3'; echo 'GPU-aa, 42, [N/A], /opt/a,b';;\n"
        "*) echo '0, GPU-aa, 2100'; echo '1, GPU-bb, 700'; echo '2, GPU-cc, 3';;\nesac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = gpus.list_gpus()
    assert [card.index for card in found] == seen
    says = {card.index: card.busy for card in found}
    expected = {
        0: "GPU 0 (GPU-aa) is in use by process 41 (python3, 2048 MiB), process 42 (a,b, [N/A] MiB)",
        1: "GPU 1 (GPU-bb) has 700 MiB in use, by no process that can be seen",
        2: "",
    }
    assert says == {index: expected[index] for index in seen}
    tool.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(HarnessError, match="nvidia-smi does not answer"):
        gpus.list_gpus()


# --- the runner itself -----------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_a_hundred_cells_cost_the_runner_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Cell costs one worker, a few wake-ups of the runner, and no memory that stays."""
    run = stub_attempts.Stubbed(tmp_path, 100)
    executor, here, resident, wakes = Local(2, run.command()), psutil.Process(), [], []
    select = selectors.DefaultSelector.select
    monkeypatch.setattr(selectors.DefaultSelector, "select", lambda *a: wakes.append(1) or select(*a))
    for _ in executor.run(run.works(), run.terms, run.nobody):
        resident.append(here.memory_info().rss)
    assert len(resident) == 100
    assert len(wakes) < 5 * 100  # for its events and for its end; a busy wait would take many more
    assert resident[-1] - resident[40] < 4 * 2**20  # what was allocated for 60 Records is given back


def test_progress_of_several_cells(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [recorded_run.cells(seed)["reference"] for seed in range(12)]
    progress = Progress(cells)
    for cell in cells[:11]:
        progress.begin(cell)
    progress.event(cells[1], {"event": "step", "step": 3, "of": 60, "loss": 0.5})
    progress.end(recorded_run.record("reference", cells[0]))
    lines = progress._lines(time.monotonic())
    assert len(lines) == 9
    assert lines[0].startswith("2/12  ")
    assert "seed=1  train, step 3 of 60, loss 0.5000" in lines[0]
    assert lines[-1].startswith("and 2 more running, about ")
    progress.event(cells[2], {"event": "phase", "name": "with Slurm", "queued": True})
    assert progress._lines(time.monotonic())[-1] == "and 2 more running"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("1/12  ok ")


def test_attempts_are_numbered_on(tmp_path: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path, 2)
    first, second = (run.run(Local(2, run.command())) for _ in range(2))
    assert [{r.attempt for r in records.values()} for records in (first, second)] == [{1}, {2}]
    assert sorted(r.attempt for r in store.read_run(run.folder.path).records) == [1, 1, 2, 2]
