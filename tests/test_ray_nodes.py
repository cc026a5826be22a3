"""Nodes of a Ray cluster that join late, and that are lost: by Ray's own cluster of several nodes on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray.cluster_utils", reason="the extra `ray` is not installed")

# In a process of its own: one has one Ray. GPUs that there are none of are as good as any to Ray, which only counts them.
_CLUSTER = """
import json, os, sys, threading
from pathlib import Path
import psutil, stubbed
from conftest import eventually
from ray.cluster_utils import Cluster
from harness.runner.executors.ray import Ray

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
os.environ["RAY_ADDRESS"] = cluster.address
run = stubbed.Stubbed(Path(sys.argv[1]), 5)
pid = run.folder.path / "pid"

def measure(executor):
    found.append(executor.device("cuda"))
    found.append({r.cell.seed: r for r in executor.run(run.works("cuda"), run.terms, run.nobody)})

found = []
with Ray(None, run.command({2: "hang"}), patience=60.0) as executor:
    executor._seen_s = 0.5  # one machine sees at once what another of its nodes wrote
    measuring = threading.Thread(target=measure, args=[executor])
    measuring.start()
    node = cluster.add_node(num_cpus=2, num_gpus=2)  # Ray wants this of the first thread
    eventually(pid.exists, "a worker hangs")
    eventually(lambda: len(list(run.folder.path.glob("cells/*.json"))) >= 2, "others are measured beside it")
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=2, num_gpus=2)
    measuring.join()
device, records = found
hung = int(pid.read_text())
eventually(lambda: not psutil.pid_exists(hung) or psutil.Process(hung).status() == "zombie", "its worker is gone")
cluster.shutdown()
print(json.dumps([device, {seed: [r.status.value, r.because] for seed, r in sorted(records.items())}]))
"""


def test_a_node_with_gpus_joins_late_and_is_lost_and_another_takes_over(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", _CLUSTER, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    device, found = json.loads(done.stdout.splitlines()[-1])
    assert device == "cuda"
    assert found.keys() == {"0", "1", "2", "3", "4"}
    lost = {seed: because for seed, (status, because) in found.items() if status == "lost"}
    assert "2" in lost
    assert lost["2"].startswith("Ray lost the worker or its machine: ")
    assert {status for seed, (status, _) in found.items() if seed not in lost} == {"ok"}
    assert len(lost) <= 2  # what was on the node at that moment, two GPUs
    assert found["4"][0] == "ok"  # by the node that joined when the first was lost
