"""Workers are forks of a server that has imported the libraries, or new processes: the Records are the same."""

from __future__ import annotations

import dataclasses
import os
import sys

import psutil
import pytest

from harness.errors import Exit
from harness.records.record import Status
from support.processes import eventually, gone
from support.run_records import losses
from support.sandbox import Sandbox

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every worker is a new process"),
]


@pytest.mark.nightly
def test_a_fork_and_a_new_process_leave_the_same_losses_and_counted_bytes(sandbox: Sandbox) -> None:
    suite = sandbox.suite("{implementation: reference}")
    cold = dataclasses.replace(sandbox, environment={**sandbox.environment, "PEFT_HARNESS_COLD_START": "1"})
    records = []
    for way, out in ((sandbox, "run"), (cold, "cold")):
        done = way.command("run", suite, "--out", out)
        assert done.code == Exit.PASS, done.err
        (sandbox.folder / out).rename(sandbox.run_folder)
        records += sandbox.read().records
        sandbox.run_folder.rename(sandbox.folder / f"{out}-read")
    forked, new = records
    assert [forked.start, new.start] == ["fork", "process"]
    assert losses(forked) == losses(new)
    assert forked.measurements is not None
    assert new.measurements is not None
    assert forked.measurements.accuracy == new.measurements.accuracy
    assert forked.measurements.memory.counted_peak_B == new.measurements.memory.counted_peak_B
    assert forked.environment.id == new.environment.id
    assert [phase.name for phase in forked.phases] == [phase.name for phase in new.phases]


@pytest.mark.nightly
def test_a_killed_server_loses_one_cell_and_the_run_goes_on(sandbox: Sandbox) -> None:
    suite = sandbox.suite("{implementation: hangs}", "{implementation: reference}")
    process = sandbox.start("run", suite, "--out", "run")
    worker, child = sandbox.hanging()
    server = psutil.Process(worker).parent()
    assert server is not None
    assert server.pid != process.pid
    server.kill()
    finished = sandbox.finish(process)
    eventually(lambda: gone(worker) and gone(child), "the worker and its child are gone")
    assert finished.code == Exit.INFRASTRUCTURE
    lost, fine = sorted(sandbox.read().records, key=lambda record: record.started)
    assert (lost.status, lost.because) == (Status.LOST, "the worker was killed by SIGKILL in phase start-up")
    assert (fine.status, fine.start) == (Status.OK, "fork")


def test_no_server_outlives_its_run(sandbox: Sandbox) -> None:
    def servers() -> list[int]:
        ours = str(os.getpid())
        return [
            one.pid
            for one in psutil.process_iter(["cmdline", "environ"])
            if "harness.runner.worker_server" in (one.info["cmdline"] or [])
            and (one.info["environ"] or {}).get("TEST_OF") == ours
        ]

    sandbox.environment["TEST_OF"] = str(os.getpid())
    suite = sandbox.suite("{implementation: hangs}")
    process = sandbox.start("run", suite, "--out", "run")
    sandbox.hanging()
    assert servers()
    process.kill()
    process.communicate()
    eventually(lambda: not servers(), "the server is gone")
