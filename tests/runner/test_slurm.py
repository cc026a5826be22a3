"""Cells as an array of Slurm: submitit's local mode, and a stand-in for Slurm's commands that starts what it is given."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from harness.cli import main
from harness.errors import Exit, HarnessError, UsageError
from harness.records import environment, store
from harness.records.record import Status
from harness.runner.attempt import Ending
from harness.runner.executors import node, slurm
from harness.runner.executors.slurm import LOCAL, Slurm
from support import recorded_run, stub_attempts
from support.processes import PATIENCE_S, eventually, gone

pytestmark = pytest.mark.cluster

pytest.importorskip("submitit", reason="the extra `slurm` is not installed")

# What Slurm's commands do, as far as submitit calls them. State of element n is in state.n; its process group in group.n.
_SBATCH = """#!{python}
import os, re, subprocess, sys
here = os.path.dirname(__file__)
text = open(sys.argv[1]).read()
open(here + "/submitted.sh", "w").write(text)
array = re.search(r"--array=0-(\\d+)", text)
for n in range(int(array[1]) + 1):
    names = dict(SLURM_JOB_ID=str(71 + n), SLURM_ARRAY_JOB_ID="71", SLURM_ARRAY_TASK_ID=str(n), SLURM_NTASKS="1",
        SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0", SLURM_PROCID="0", SLURM_LOCALID="0")
    script = f"bash {{sys.argv[1]}} && echo COMPLETED > {{here}}/state.{{n}} || echo FAILED > {{here}}/state.{{n}}"
    element = subprocess.Popen(["sh", "-c", script], env={{**os.environ, **names}}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    open(f"{{here}}/group.{{n}}", "w").write(str(element.pid))
print("Submitted batch job 71")
"""
_SRUN = """#!/bin/sh
while :; do case "$1" in --unbuffered) shift;; --output|--error) shift 2;; *) break;; esac; done
exec "$@"
"""
_SACCT = """#!/bin/sh
cd "$(dirname "$0")"
echo "JobID|State|NodeList"
for group in group.*; do n=${group#group.}; echo "71_$n|$(cat state.$n 2>/dev/null || echo RUNNING)|n$n"; done
"""
_SQUEUE = """#!/bin/sh
cd "$(dirname "$0")"
for n in 0 1; do [ -e state.$n ] || echo 71_$n; done
"""
_SCANCEL = """#!/bin/sh
cd "$(dirname "$0")"
echo "$@" >> cancelled
kill -9 -"$(cat group.${1#71_})"
(sleep 0.5; echo "CANCELLED by 1000" > state.${1#71_}) &
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH with Slurm's commands."""
    folder = tmp_path / "slurm-commands"
    folder.mkdir()
    commands = {"sbatch": _SBATCH.format(python=sys.executable), "srun": _SRUN, "sacct": _SACCT, "scancel": _SCANCEL}
    for name, text in commands.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.delenv(LOCAL, raising=False)
    monkeypatch.setattr(slurm, "_POLL_S", 0.3)
    monkeypatch.setattr(node, "VISIBLE_S", 0.5)
    return folder


@pytest.fixture
def locally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCAL, "local")


class _Ends(stub_attempts.Nobody):
    """Ends element 1 as Slurm does, at a time limit say: it notes the state and kills it, once its Cell hangs."""

    def __init__(self, run: stub_attempts.Stubbed, cluster: Path, state: str = "TIMEOUT") -> None:
        super().__init__()
        self._run, self._cluster, self._state = run, cluster, state

    def tick(self) -> None:
        noted = self._cluster / "state.1"
        if (self._run.folder.path / "pid").exists() and not noted.exists():
            noted.write_text(f"{self._state}\n")
            os.killpg(int((self._cluster / "group.1").read_text()), signal.SIGKILL)


def test_an_array_of_slurm(tmp_path: Path, cluster: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path, 3, timeout=1200)
    run.nobody = _Ends(run, cluster)
    options = ("partition=gpu", "--gres=gpu:1", "mem_per_cpu=4G")
    with Slurm(2, options, run.command({1: "hang"})) as executor:
        assert executor.device("auto") == "cuda"
        records = run.run(executor)
    ends = {0: Status.OK, 1: Status.TIMEOUT, 2: Status.OK}
    assert {seed: r.status for seed, r in records.items()} == ends, [r.because for r in records.values()]
    assert records[1].because.startswith("its Slurm job 71_1 ended (TIMEOUT) and left no Record")
    eventually(lambda: gone(int((run.folder.path / "pid").read_text())), "the worker went with its element")
    told = set(re.findall(r"^#SBATCH --(.*)", (cluster / "submitted.sh").read_text(), re.MULTILINE))
    assert {"array=0-2%2", "no-requeue", "partition=gpu", "gres=gpu:1", "mem-per-cpu=4G", "time=25"} < told
    assert not (cluster / "cancelled").exists()


class _ShowsLate(_Ends):
    """Shows the Record of the element that it ends only after Slurm has told that it ended, as NFS may."""

    def __init__(self, run: stub_attempts.Stubbed, cluster: Path) -> None:
        super().__init__(run, cluster, "COMPLETED")
        self._ticks = 0

    def tick(self) -> None:
        super().tick()
        self._ticks += (self._cluster / "state.1").exists()
        if self._ticks == 3:
            self._run.folder.write_record(recorded_run.record("reference", self._run.cells[1], "stubbed"))


def test_a_record_that_is_seen_late_is_waited_for(
    tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "VISIBLE_S", 60.0)
    run = stub_attempts.Stubbed(tmp_path, 2)
    run.nobody = _ShowsLate(run, cluster)
    with Slurm(None, (), run.command({1: "hang"})) as executor:
        executor.device("cpu")
        records = run.run(executor)
    assert {r.status for r in records.values()} == {Status.OK}


def test_an_element_that_is_preempted_has_ended(tmp_path: Path, cluster: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path, 2)
    run.nobody = _Ends(run, cluster, "PREEMPTED")
    with Slurm(None, (), run.command({1: "hang"})) as executor:
        executor.device("cpu")
        record = run.run(executor)[1]
    assert record.status is Status.LOST
    assert record.failure is not None
    assert record.failure.kind == "preempted"
    assert record.because.startswith("its Slurm job 71_1 ended (PREEMPTED)")


def test_cells_of_a_shard_that_never_started_have_not_its_ending(
    tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_MOST_ELEMENTS", 2)
    run = stub_attempts.Stubbed(tmp_path, 4)
    run.nobody = _Ends(run, cluster)
    with Slurm(None, (), run.command({1: "hang"})) as executor:
        executor.device("cpu")
        records = run.run(executor)
    assert {seed: r.status for seed, r in records.items()} == {
        0: Status.OK, 1: Status.TIMEOUT, 2: Status.OK, 3: Status.LOST,
    }  # fmt: skip
    assert records[3].because.startswith("it never started: its Slurm job 71_1 ended (TIMEOUT)")
    assert records[3].duration_s < 0.1


def test_the_queue_is_no_part_of_an_attempt(tmp_path: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path, 1)
    (work,) = run.works()
    ending = Ending(Status.TIMEOUT, "timeout", "it is late")
    taken_up = (datetime.now(UTC) - timedelta(seconds=30)).strftime("%Y-%m-%dT%H:%M:%SZ")
    run.folder.log_path(work.cell.cell_id, 1).write_text(f"begun on n1 at {taken_up}\nsome words\n")
    record = node.final_record(work, run.terms, ending, "2001-01-01T00:00:00Z", time.monotonic() - 10)
    assert record.started == taken_up
    assert 18 < record.duration_s < 25


def test_what_slurm_no_longer_knows_is_given_up(tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_UNKNOWN_S", 0.0)
    (cluster / "sacct").write_text("#!/bin/sh\necho 'JobID|State|NodeList'\n")
    (cluster / "squeue").write_text(_SQUEUE)
    (cluster / "squeue").chmod(0o755)
    run = stub_attempts.Stubbed(tmp_path, 2)
    run.nobody = _Ends(run, cluster, "nobody reads this")
    with Slurm(None, (), run.command({1: "hang"})) as executor:
        executor.device("cpu")
        record = run.run(executor)[1]
    assert record.status is Status.LOST
    assert record.because.startswith("its Slurm job 71_1 ended (GONE)")


def test_what_sbatch_refuses(tmp_path: Path, cluster: Path) -> None:
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpus' >&2\nexit 1\n")
    run = stub_attempts.Stubbed(tmp_path, 2)
    with Slurm(None, ["partition=gpus"], run.command()) as executor:
        executor.device("cpu")
        with pytest.raises(HarnessError, match="sbatch: error: invalid partition specified: gpus") as caught:
            run.run(executor)
    assert caught.value.where == "--slurm partition=gpus"
    assert caught.value.hint
    assert not [*(run.folder.path / "slurm").glob("wanted-*")]


def test_ending_a_run_cancels_its_array(tmp_path: Path, cluster: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path, 2)
    with Slurm(None, (), run.command({1: "hang"})) as executor:
        executor.device("cpu")
        with contextlib.closing(executor.run(run.works(), run.terms, run.nobody)) as records:
            assert next(records).cell.seed == 0
            eventually((run.folder.path / "pid").exists, "a worker hangs")
    assert (cluster / "state.1").read_text() == "CANCELLED by 1000\n"  # it was waited for
    assert "71_1" in (cluster / "cancelled").read_text()
    eventually(lambda: gone(int((run.folder.path / "pid").read_text())), "the worker is gone")


@pytest.mark.usefixtures("locally")
def test_elements_that_share_a_machine(tmp_path: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path, 5)
    with Slurm(2, (), run.command({3: "orphan"})) as executor:  # which kills its element, of 1 and 3
        executor.device("cpu")
        records = run.run(executor)
    assert {seed: r.status for seed, r in records.items()} == dict.fromkeys((0, 1, 2, 4), Status.OK) | {3: Status.LOST}
    assert re.match(r"its Slurm job \d+ ended \(\w+\) and left no Record", records[3].because)
    assert {r.notes[0] for seed, r in records.items() if seed != 3} == {str(max(1, environment.threads() // 2))}
    assert records[3].notes == ["up to 2 Cells ran at once: the times are those of a shared machine"]
    assert sorted(path.name for path in (run.folder.path / "slurm").glob("wanted-*")) == []


def test_a_node_with_fewer_cores_than_a_cell_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "threads", lambda: 1)
    run = stub_attempts.Stubbed(tmp_path, 1)
    works = [work.model_copy(update={"threads": 64}).model_dump_json(by_alias=True) for work in run.works()]
    node.run_jobs(works, 60.0, run.command())
    (record,) = store.read_run(run.folder.path).records
    assert record.notes[0] == "1"


def test_cells_that_are_called_back(tmp_path: Path) -> None:
    run = stub_attempts.Stubbed(tmp_path, 1)
    (wanted := tmp_path / "wanted").touch()
    works = [work.model_dump_json(by_alias=True) for work in run.works()]
    code = "import json, sys; from harness.runner.executors import node; node.run_jobs(**json.load(sys.stdin))"
    told = {"specs": works, "timeout": 600.0, "command": run.command({0: "hang"}), "permit": str(wanted)}
    element = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert element.stdin is not None
    element.stdin.write(json.dumps(told))
    element.stdin.close()
    element.stdin = None
    try:
        eventually((run.folder.path / "pid").exists, "a worker hangs")
        wanted.unlink()
        _, said = element.communicate(timeout=PATIENCE_S)
    finally:
        element.kill()  # and so what it had started; nothing to do where it has ended
    assert "RunTakenOverError" in said
    assert gone(int((run.folder.path / "pid").read_text()))


def test_where_there_is_no_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(LOCAL, raising=False)
    assert main(["run", "smoke", "--out", str(tmp_path / "run"), "--executor", "slurm"]) == Exit.INFRASTRUCTURE
    message = capsys.readouterr().err
    assert "there is no Slurm here: no `sbatch` on the PATH" in message
    assert "hint: run it on a login node" in message
    assert not (tmp_path / "run").exists()


def test_options_of_sbatch(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "smoke", "--executor", "slurm", "--slurm", "partition"]) == Exit.USAGE
    assert "--slurm partition: is not KEY=VALUE" in capsys.readouterr().err
    assert main(["run", "smoke", "--slurm", "partition=gpu"]) == Exit.USAGE
    assert "is for --executor slurm" in capsys.readouterr().err
    with Slurm(None, ["partition=x"]) as executor, pytest.raises(UsageError, match="request no GPU"):
        executor.device("cuda")
