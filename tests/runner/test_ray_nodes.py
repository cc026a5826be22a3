"""Nodes of a Ray cluster that join late, and that are lost: by Ray's own cluster of several nodes on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.repository import TESTS

pytestmark = pytest.mark.cluster

pytest.importorskip("ray.cluster_utils", reason="the extra `ray` is not installed")

# In a process of its own: one has one Ray. GPUs that there are none of are as good as any to Ray, which only counts them.
_CLUSTER = """
import json, os, sys, threading
from pathlib import Path
from support import stub_attempts
from support.processes import eventually, gone
from ray.cluster_utils import Cluster
from harness.runner.executors.ray import Ray

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
os.environ["RAY_ADDRESS"] = cluster.address
run = stub_attempts.Stubbed(Path(sys.argv[1]), 5)
started = run.folder.path / "started"
pid = run.folder.path / "pid"

def measure(executor):
    found.append(executor.device("cuda"))
    found.append({r.cell.seed: r for r in executor.run(run.works("cuda"), run.terms, run.nobody)})

found = []
with Ray(None, run.command({1: "hang", 2: "hang"}), patience=60.0) as executor:
    executor._visible_s = 0.5  # one machine sees at once what another of its nodes wrote
    measuring = threading.Thread(target=measure, args=[executor], daemon=True)
    measuring.start()
    node = cluster.add_node(num_cpus=2, num_gpus=2)  # Ray wants this of the first thread
    # One Cell is measured, and two hang on the node's two GPUs: what is left is another node's.
    eventually(lambda: started.exists() and len(started.read_text().split()) == 3, "two workers hang")
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=2, num_gpus=2)
    measuring.join(60)
device, records = found
hung = int(pid.read_text())
eventually(lambda: gone(hung), "its worker is gone")
cluster.shutdown()
print(json.dumps([device, {seed: [r.status.value, r.because] for seed, r in sorted(records.items())}]))
"""


@pytest.mark.nightly
def test_a_node_with_gpus_joins_late_and_is_lost_and_another_takes_over(tmp_path: Path) -> None:
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", _CLUSTER, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        text=True, check=False, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    device, found = json.loads(done.stdout.splitlines()[-1])
    assert device == "cuda"
    assert {seed: status for seed, (status, _) in found.items()} == {
        "0": "ok", "1": "lost", "2": "lost", "3": "ok", "4": "ok",
    }  # fmt: skip
    assert all(found[seed][1].startswith("Ray lost the worker or its machine: ") for seed in ("1", "2"))
