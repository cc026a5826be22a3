"""Cells as tasks of Ray: one Ray of this machine's own for all tests, with a worker that measures nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.errors import HarnessError, StoreError
from harness.records import environment
from harness.records.record import Status
from harness.runner.executors.ray import Ray
from support import stub_attempts
from support.processes import PATIENCE_S, eventually, gone
from support.repository import TESTS

pytestmark = pytest.mark.cluster

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")


class Joined(Ray):
    """An executor on a Ray that was there before and goes on afterwards."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._ray = ray
        self._visible_s = 0.5


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    heard, cores = signal.getsignal(signal.SIGTERM), max(2, environment.physical_cores())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "physical_cores", lambda: cores)  # two Cells at a time, also where there is one core
        with Ray():
            assert signal.getsignal(signal.SIGTERM) is heard  # by which a run is asked to end
            yield ray.get_runtime_context().gcs_address


def _hanging(run: stub_attempts.Stubbed) -> int:
    eventually((run.folder.path / "pid").exists, "a worker hangs")
    return int((run.folder.path / "pid").read_text())


@pytest.mark.usefixtures("address")
def test_what_ray_loses_is_lost_and_the_rest_goes_on(tmp_path: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path, 4)
    executor = Joined(2, run.command({0: "orphan", 1: "die"}))
    assert executor.device("auto") == "cpu"
    records = run.run(executor)
    assert {seed: r.status for seed, r in records.items()} == {
        0: Status.LOST, 1: Status.LOST, 2: Status.OK, 3: Status.OK,
    }  # fmt: skip
    assert records[0].because.startswith("Ray lost the worker or its machine: ")
    assert records[0].failure is not None
    assert records[0].failure.kind == "WorkerCrashedError"
    assert records[1].because == "the worker was killed by SIGKILL in phase pretending"
    pid = _hanging(run)
    eventually(lambda: gone(pid), "the worker of a task that is gone is gone too")
    started = (run.folder.path / "started").read_text().split()
    assert sorted(started) == ["0", "1", "2", "3"]  # nothing was tried again behind our back
    share = str(max(1, environment.threads() // 2))
    assert {records[seed].notes[0] for seed in (2, 3)} == {share}


@pytest.mark.usefixtures("address")
def test_ending_a_run_ends_its_tasks(tmp_path: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path, 2)
    executor = Joined(2, run.command({1: "hang"}))
    executor.device("cpu")
    with contextlib.closing(executor.run(run.works(), run.terms, run.nobody)) as records:
        assert next(records).cell.seed == 0
        pid = _hanging(run)
    eventually(lambda: gone(pid), "the worker is gone")


@pytest.mark.usefixtures("address")
def test_a_folder_that_a_node_does_not_see(tmp_path: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path, 1)
    executor = Joined(1, run.command())
    executor.device("cpu")
    works = (work.model_copy(update={"folder": str(tmp_path / "elsewhere")}) for work in run.works())
    with pytest.raises(StoreError, match="is missing on ") as caught:
        list(executor.run(works, run.terms, run.nobody))
    assert caught.value.where == str(tmp_path / "elsewhere")
    assert "PEFT_HARNESS_CACHE" in caught.value.hint


@pytest.mark.usefixtures("address")
def test_a_folder_that_one_node_of_two_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stub_attempts.Stubbed(tmp_path, 2)
    executor = Joined(1, run.command())
    executor.device("cpu")
    monkeypatch.setattr(executor, "_nodes", lambda: [{"CPU": float(executor._cpus)}] * 2)
    gone = str(tmp_path / "task.yaml")
    works = (
        work.model_copy(update={"task": work.task.model_copy(update={"file": "" if work.cell.seed else gone})})
        for work in run.works()
    )
    records = {r.cell.seed: r for r in executor.run(works, run.terms, run.nobody)}
    assert {seed: r.status for seed, r in records.items()} == {0: Status.LOST, 1: Status.OK}
    assert records[0].because.startswith(f"it never started: {gone}: is missing on {os.uname().nodename}")


def test_half_a_gpu_on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Ray()
    nodes = [{"CPU": 4.0, "GPU": 0.5}, {"CPU": 8.0, "GPU": 2.0}]
    monkeypatch.setattr(executor, "_nodes", lambda: nodes)
    assert executor.device("auto") == "cuda"
    assert executor._cpus == 4


@pytest.mark.usefixtures("address")
def test_what_a_cluster_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="needs 1 CPU and 1 GPU on one node, and the cluster has 1 nodes") as caught:
        Joined(patience=0.3).device("cuda")
    assert "waited 0.3 s for more" in caught.value.what
    assert caught.value.exit_code == 4
    assert caught.value.hint


def test_a_killed_runner_leaves_no_worker(tmp_path: Path, address: str) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from support import stub_attempts\nfrom harness.runner.executors.ray import Ray\n"
        "run = stub_attempts.Stubbed(Path(sys.argv[1]), 1)\n"
        "with Ray(1, run.command({0: 'hang'})) as executor:\n    executor.device('cpu')\n    run.run(executor)\n"
    )
    here = {
        **os.environ,
        "RAY_ADDRESS": address,
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
    }
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed")], env=here) as runner:
        pid_file = tmp_path / "killed" / "run" / "pid"
        eventually(pid_file.exists, "a worker hangs")
        pid = int(pid_file.read_text())
        runner.kill()
        assert runner.wait(PATIENCE_S) == -signal.SIGKILL
    eventually(lambda: gone(pid), "the worker of a killed runner is gone")
