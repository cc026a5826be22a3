"""The same Cell on this machine, as a task of Ray and as an element of submitit's array: the same Record but for times."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, make_bench

from harness import store
from harness.records import Record
from harness.runner.executors.slurm import LOCAL

pytestmark = pytest.mark.skipif(
    not (find_spec("ray") and find_spec("submitit")), reason="the extras `ray` and `slurm` are not installed"
)


def _but_for_times(record: Record) -> dict[str, Any]:
    """Return all of a Record that does not say when, how fast, in how much memory and under which variables."""
    found = record.model_dump(mode="json", exclude={"run", "started", "duration_s"})
    assert found["measurements"] is not None, record.because
    found["environment"]["extra"].pop("variables")  # Ray's number of threads is one of them, and means the same
    found["phases"] = [phase["name"] for phase in found["phases"]]
    for times in ("step_seconds", "cpu_seconds"):
        found["measurements"]["training"].pop(times)
    found["measurements"]["memory"].pop("baseline_B")
    for latency in found["measurements"]["latency"]:
        latency["seconds"] = len(latency["seconds"])
    return found


def test_local_ray_and_slurm_leave_the_same_records(
    smoke: tuple[Finished, store.Run], cache: Path, tmp_path: Path
) -> None:
    benches = {}
    for name in ("ray", "slurm"):
        benches[name] = bench = make_bench(tmp_path / name, cache)
        bench.environment[LOCAL] = "local"
        # What Ray or this test's own surroundings say of threads must not decide.
        bench.environment.pop("OMP_NUM_THREADS", None)
    only = "id=lora,implementation=fused"
    begun = time.monotonic()
    running = {
        name: bench.start("run", "smoke", "--only", only, "--out", "run", "--executor", name, "--jobs", "1")
        for name, bench in benches.items()
    }
    finished = {name: benches[name].finish(process, begun) for name, process in running.items()}
    here = smoke[1].latest()
    for name, bench in benches.items():
        (record,) = bench.read().records
        assert " ok " in finished[name].err
        assert _but_for_times(record) == _but_for_times(here[record.cell_id]), name
