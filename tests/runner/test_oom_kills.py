"""Which killed worker the kernel killed for want of memory, and what is said where nobody can know."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.records.record import Status
from harness.runner import attempt
from harness.runner.executors.local import Local
from harness.runner.oom_kills import KernelKills
from support import stub_attempts

SUMMARY = "6,1,5,-;oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),task_memcg=/a,task=python,pid=41,uid=0\n"
KILLED = "3,2,6,-;Memory cgroup out of memory: Killed process 42 (python) total-vm:9kB, anon-rss:8kB, UID:0\n"


class Kernel:
    """Files in which a kernel tells what it kills. own: the counter of the cgroup, `v1`, `v2` or none."""

    def __init__(self, folder: Path, namespace: str = "pid:[4026531836]", own: str = "v2") -> None:
        self.log, self.proc, self.cgroups = folder / "kmsg", folder / "proc", folder / "cgroup"
        (self.proc / "self" / "ns").mkdir(parents=True)
        (self.proc / "self" / "ns" / "pid").symlink_to(namespace)
        self.own = {"v2": self.cgroups / "job/memory.events", "v1": self.cgroups / "memory/job/memory.oom_control"}.get(
            own
        )
        of = {"v2": "4:cpu:/other\n0::/job\n", "v1": "4:cpu,memory:/job\n0::/other\n"}.get(own, "0::/job\n")
        (self.proc / "self" / "cgroup").write_text(of)
        if self.own:
            self.own.parent.mkdir(parents=True)
        self.log.write_text("3,0,4,-;Out of memory: Killed process 43 (python)\n")
        self.killed = 7
        self.count(own=0, machine=0)

    def count(self, own: int, machine: int) -> None:
        """Count so many more killed."""
        if self.own:
            self.own.write_text(f"oom 3\noom_kill {self.killed + own}\n")
        (self.proc / "vmstat").write_text(f"nr_free_pages 5\noom_kill {self.killed + machine}\n")

    def watch(self) -> KernelKills:
        return KernelKills(self.log, self.proc, self.cgroups)


def test_the_kernels_log_names_the_process(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    watches = {pid: kernel.watch() for pid in (41, 42, 43, 44)}
    kernel.count(own=2, machine=2)
    with kernel.log.open("a") as log:
        log.write(SUMMARY + KILLED)
    # What the log said before is of another process with the same number.
    said = {pid: watch.killed(pid, alone=True) for pid, watch in watches.items()}
    assert said == {41: True, 42: True, 43: False, 44: False}


@pytest.mark.parametrize("own", ["v1", "v2", "none"])
@pytest.mark.parametrize(
    ("namespace", "more", "alone", "said"),
    [
        ("pid:[4026532001]", (1, 1), True, {"own": True, "machine": None}),
        ("pid:[4026532001]", (1, 1), False, {"own": None, "machine": None}),
        ("pid:[4026532001]", (0, 1), True, {"own": False, "machine": None}),
        ("pid:[4026532001]", (0, 0), True, {"own": False, "machine": False}),
        ("pid:[4026531836]", (1, 1), True, {"own": False, "machine": False}),  # its log is silent of this process
    ],
)
def test_where_the_log_names_nobody_the_counters_say_no_more_than_they_know(
    own: str, namespace: str, more: tuple[int, int], alone: bool, said: dict[str, bool | None], tmp_path: Path
) -> None:
    kernel = Kernel(tmp_path, namespace, own)
    watch = kernel.watch()
    kernel.count(*more)
    with kernel.log.open("a") as log:
        log.write(KILLED)
    pid = 42 if namespace != "pid:[4026531836]" else 44
    assert watch.killed(pid, alone) is said["machine" if own == "none" else "own"]


def test_a_kernel_that_tells_nothing_killed_nothing(tmp_path: Path) -> None:
    watch = KernelKills(tmp_path / "kmsg", tmp_path, tmp_path)
    assert watch.killed(1, alone=True) is False


@pytest.mark.parametrize(
    ("by_kernel", "status", "because"),
    [
        (True, Status.OOM, "the kernel killed the worker: the host's memory ran out"),
        (False, Status.LOST, "the worker was killed by SIGKILL in phase pretending"),
        (
            None,
            Status.LOST,
            "the worker was killed by SIGKILL in phase pretending; the kernel killed a process at that time"
            " because memory ran out",
        ),
    ],
)
def test_what_is_said_of_a_killed_worker(
    by_kernel: bool | None, status: Status, because: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(attempt.KernelKills, "killed", lambda _, pid, alone: asked.append(alone) or by_kernel)
    run = stub_attempts.Stubbed(tmp_path, 3)
    records = run.run(Local(2, run.command({0: "die"})))
    assert {seed: r.status for seed, r in records.items()} == {0: status, 1: Status.OK, 2: Status.OK}
    assert records[0].because == because
    assert asked == [False]  # of the one that was killed, beside which another was at work
