"""A suite on this machine, and two Cells at a time in Ray's tasks and submitit's elements: Records alike but for times."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from harness.errors import Exit
from harness.records import store
from harness.records.record import Record
from harness.runner.executors.slurm import LOCAL
from support.sandbox import Finished, make_sandbox

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (find_spec("ray") and find_spec("submitit")), reason="the extras `ray` and `slurm` are not installed"
    ),
]

ONLY = "method=lora,dtype=float32"
"""Two Cells of the smoke suite."""


def _but_for_times(record: Record) -> dict[str, Any]:
    """Return all of a Record that does not say when, how fast, in how much memory and under which variables."""
    found = record.model_dump(mode="json", exclude={"run", "started", "duration_s", "concurrent_cells"})
    assert found["measurements"] is not None, record.because
    found["environment"]["extra"].pop("variables")  # Ray's number of threads is one of them
    found["environment"].pop("threads")  # two Cells at a time share the cores, if torch uses more than one
    found["gate"].pop("key")  # has the number of threads in it
    found["phases"] = [phase["name"] for phase in found["phases"]]
    found["notes"] = [
        note for note in found["notes"] if "Cells ran at once" not in note
    ]  # where they shared the machine
    for times in ("step_seconds", "cpu_seconds"):
        (found["measurements"]["training"] or {}).pop(times, None)
    found["measurements"]["memory"].pop("baseline_B")
    for latency in found["measurements"]["latency"]:
        latency["seconds"] = bool(latency["seconds"])  # of slow passes there are fewer
    return found


@pytest.mark.nightly
def test_local_ray_and_slurm_leave_the_same_records(
    smoke: tuple[Finished, store.Run], cache: Path, tmp_path: Path
) -> None:
    found: dict[str, dict[str, Any]] = {}
    for name in ("ray", "slurm"):
        sandbox = make_sandbox(tmp_path / name, cache)
        sandbox.environment[LOCAL] = "local"
        finished = sandbox.command("run", "smoke", "--only", ONLY, "--out", "run", "--executor", name, "--jobs", "2")
        assert finished.code == Exit.PASS, finished.err
        found[name] = {cell: _but_for_times(record) for cell, record in sandbox.read().latest().items()}
    found["local"] = {
        cell: _but_for_times(record) for cell, record in smoke[1].latest().items() if cell in found["ray"]
    }
    assert len(found["local"]) == 2
    assert found["ray"] == found["local"]
    assert found["slurm"] == found["local"]


def test_a_cluster_resumes_what_another_machine_measured(
    smoke: tuple[Finished, store.Run], cache: Path, tmp_path: Path
) -> None:
    sandbox = make_sandbox(tmp_path, cache)
    sandbox.environment[LOCAL] = "local"
    shutil.copytree(smoke[1].path, sandbox.run_folder)
    (sandbox.run_folder / "footer.json").unlink()  # with its hashes of what is changed here
    for path in sandbox.run_folder.glob("cells/*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        record["environment"] |= {"id": "0" * 12, "machine": {"cpu": "of another node"}}
        path.write_text(json.dumps(record), encoding="utf-8")
    finished = sandbox.command("run", "smoke", "--resume", "run", "--executor", "slurm")
    assert finished.err.count("has an ok Record") == len(smoke[1].records), finished.err
    assert finished.code == Exit.PASS
